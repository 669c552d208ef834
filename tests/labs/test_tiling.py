"""The tiling explorer shows what the algorithm does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effattn_lab.figures import flash_lab, tiling
from effattn_lab.foundations.attention import attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [(4, 4), (5, 3), (16, 2)])
def test_trace_ends_at_attention(causal, blocks):
    q, k, v = tiling.example()
    t = tiling.trace(q, k, v, causal=causal, block_q=blocks[0], block_k=blocks[1])
    last = {s.query_tile: s for s in t.steps}
    out = np.concatenate([last[i].acc / last[i].l[:, None] for i in sorted(last)])
    want = attention(q[None, None], k[None, None], v[None, None], causal=causal)[0, 0]
    np.testing.assert_allclose(out, want.numpy(), rtol=1e-5, atol=1e-5)


def test_trace_skips_tiles_above_the_diagonal():
    q, k, v = tiling.example()
    visited = [(s.query_tile, s.key_tile) for s in tiling.trace(q, k, v, causal=True).steps]
    assert visited == [(i, j) for i in range(4) for j in range(i + 1)]
    with pytest.raises(ValueError, match="q: expected 2 dimensions"):
        tiling.trace(q[None], k, v)


def test_frame_and_explorer(monkeypatch):
    t = tiling.trace(*tiling.example())
    for step in (0, len(t.steps) - 1):
        assert len(tiling.frame(t, step).axes) == 6
    with pytest.raises(ValueError, match="step: expected 0 to 9, got 10"):
        tiling.frame(t, 10)
    box = tiling.explorer()
    play, slider, causal = box.children[0].children
    assert (slider.min, slider.max) == (1, 10)
    assert slider.value == play.value == 8, "it starts where something is rescaled"
    causal.value = False
    assert slider.max == play.max == 16
    monkeypatch.setenv("EFFATTN_STATIC", "1")
    assert type(tiling.explorer()).__name__ == "Figure"


def test_moves_follow_the_record_law():
    """For random scores the maximum moves at tile t with probability 1/t."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 16, 512, 16, generator=generator) for _ in range(2))
    rate = flash_lab.move_rate(flash_lab.moves(q, k))
    tiles = np.arange(2, len(rate) + 2)
    np.testing.assert_allclose(rate[:10], 1 / tiles[:10], atol=0.04)
    assert flash_lab.error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == pytest.approx(
        0.5 / 2.5**0.5
    )
