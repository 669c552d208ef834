"""The first call of every lab."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from effattn_lab import lab


def test_start_says_what_this_machine_is(capsys):
    device = lab.start(seed=3)
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert f"tensors for kernels on: {device}" in out
    assert "effattn_kernels: " in out
    first = torch.rand(1)
    lab.start(seed=3)
    assert torch.equal(first, torch.rand(1))


def test_start_refuses_old_versions(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "2.5.1+cu121" if n == "torch" else real(n))
    with pytest.raises(RuntimeError, match=r"torch 2\.5\.1\+cu121 is too old: 2\.6 or newer is needed"):
        lab.start()
