"""Triton kernels of the Efficient Attention Lab.

Importing this package decides, once, how its kernels will run, and it has to be decided before
triton is first imported: triton reads ``TRITON_INTERPRET`` while it builds its own library.

======================  ========================================================================
what is found           what happens
======================  ========================================================================
``TRITON_INTERPRET``    set by you: it is kept, whatever the machine has
a CUDA or ROCm GPU      kernels are compiled for it
no GPU                  ``TRITON_INTERPRET=1`` is set; kernels run in triton's interpreter (NumPy)
no triton (macOS, …)    the import works; calling a kernel says what to do
======================  ========================================================================

`MODE` is ``"interpreter"``, ``"compiled"`` or ``"unavailable"``; `describe` says it in one line.
"""

from __future__ import annotations

import importlib.util
import os
import sys

__all__ = ["MODE", "describe", "require"]


def _gpu_name() -> str | None:
    """Name of the GPU that kernels would run on, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _choose() -> tuple[str, str, str | None]:
    """(mode, one line about it, what is wrong or None). Sets TRITON_INTERPRET where it must."""
    if importlib.util.find_spec("triton") is None:
        why = (
            "triton is not installed here (it exists for Linux only). The PyTorch versions in effattn_lab "
            "work everywhere; to run kernels use Linux, WSL2 or Colab: pip install triton."
        )
        return "unavailable", "no triton on this machine: kernels cannot run, everything else can", why
    asked = os.environ.get("TRITON_INTERPRET")
    if asked is not None:
        if asked.lower() in ("1", "true", "on", "y", "yes"):
            return "interpreter", "Triton's interpreter on the CPU (TRITON_INTERPRET was set)", None
        return "compiled", "compiled kernels (TRITON_INTERPRET was set to off)", None
    gpu = _gpu_name()
    if gpu is not None:
        return "compiled", f"compiled for {gpu}", None
    if "triton" in sys.modules:
        why = (
            "there is no GPU, and triton was imported before effattn_kernels could switch it to its "
            "interpreter. Restart Python (or the notebook's kernel) and either import effattn_kernels "
            "first or set the environment variable TRITON_INTERPRET=1."
        )
        return (
            "compiled",
            "no GPU and triton imported too early: restart and import effattn_kernels first",
            why,
        )
    os.environ["TRITON_INTERPRET"] = "1"
    return "interpreter", "no GPU: Triton's interpreter on the CPU (same numbers, not the same speed)", None


MODE, _LINE, _PROBLEM = _choose()


def describe() -> str:
    """One line: how kernels run on this machine."""
    return f"effattn_kernels: {_LINE}"


def require() -> None:
    """Raise RuntimeError, saying what to do, where kernels cannot be called."""
    if _PROBLEM is not None:
        raise RuntimeError(f"this kernel cannot run: {_PROBLEM}")
