"""Input checks shared by every mechanism: they name the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, any_value_dim: bool = False) -> None:
    """Raise ``ValueError`` unless q, k, v are floating-point ``[B, H, N, D]`` tensors that fit together.

    ``q`` is ``[B, Hq, seqlen_q, D]``; ``k`` and ``v`` are ``[B, Hkv, seqlen_k, D]`` with Hq a multiple of Hkv.
    With ``any_value_dim`` the last axis of ``v`` may differ from D.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, H, N, D], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected every dimension to be at least 1, got shape {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q ({q.device}), got {x.device}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q ({q.dtype}), got {x.dtype}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected the batch size of q ({q.shape[0]}), got {x.shape[0]}")
        if x.shape[3] != q.shape[3] and not (name == "v" and any_value_dim):
            raise ValueError(f"{name}: expected the head_dim of q ({q.shape[3]}), got {x.shape[3]}")
    if any_value_dim:
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"v: expected the batch, heads and length of k {tuple(k.shape[:3])}, got shape {tuple(v.shape)}"
            )
    elif v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected num_kv_heads to divide num_heads ({q.shape[1]}), got {k.shape[1]} key-value heads"
        )


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the softmax scale: ``head_dim ** -0.5`` for ``None``, else the finite number given."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    return float(scale)


def check_positive_int(name: str, value: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an ``int`` of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
