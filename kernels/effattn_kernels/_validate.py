"""Bad input gets a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIM_RANGE = (16, 256)


def check_attention_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    window_size: int | None,
    mode: str,
) -> None:
    """Raise ValueError unless `flash_attention` can compute exactly what was asked.

    Args:
        q, k, v: what the caller passed for ``[B, Hq, Nq, D]``, ``[B, Hkv, Nk, D]``, ``[B, Hkv, Nk, D]``.
        scale: softmax scale or None.
        window_size: keys a query may look back on (itself included) or None.
        mode: ``"interpreter"`` or ``"compiled"``; compiled kernels need tensors on a GPU.
    """
    _check_tensors(q, k, v)
    low, high = HEAD_DIM_RANGE
    if not low <= q.shape[3] <= high:
        raise ValueError(f"q: expected a head dimension from {low} to {high}, got {q.shape[3]}")
    _check_scale(scale)
    if window_size is not None and (
        isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1
    ):
        raise ValueError(f"window_size: expected an integer of at least 1 or None, got {window_size!r}")
    _check_device(q, mode)


def check_linear_attention_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    eps: float,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None,
    mode: str,
) -> None:
    """Raise ValueError unless `linear_attention_chunked` can compute exactly what was asked.

    Args:
        q, k, v: what the caller passed for ``[B, Hq, Nq, K]``, ``[B, Hkv, Nk, K]``, ``[B, Hkv, Nk, V]``.
        scale: factor on the weights or None. eps: what is added to their sum.
        initial_state: ``(S [B, Hkv, K, V], z [B, Hkv, K])``, float32, or None.
        mode: ``"interpreter"`` or ``"compiled"``.
    """
    _check_tensors(q, k, v, any_value_dim=True)
    _check_scale(scale)
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")
    if initial_state is not None:
        if not isinstance(initial_state, tuple) or len(initial_state) != 2:
            raise ValueError(
                f"initial_state: expected a pair (S, z) or None, got {type(initial_state).__name__}"
            )
        shapes = {"S": (*k.shape[:2], k.shape[3], v.shape[3]), "z": (*k.shape[:2], k.shape[3])}
        for (part, shape), x in zip(shapes.items(), initial_state):
            if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
                came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"initial_state: expected {part} in float32 of shape {shape}, got {came}")
            if x.device != q.device:
                raise ValueError(
                    f"initial_state: expected {part} on the device of q, {q.device}, got {x.device}"
                )
    _check_device(q, mode)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, any_value_dim: bool = False) -> None:
    """Types, shapes, dtypes and devices fit together; ``any_value_dim``: v may be wider or narrower than k."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [B, H, N, D], got {x.dim()} with shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected every dimension to be at least 1, got shape {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected the batch size of q, {q.shape[0]}, got {x.shape[0]}")
        if x.shape[3] != q.shape[3] and not (name == "v" and any_value_dim):
            raise ValueError(f"{name}: expected the head dimension of q, {q.shape[3]}, got {x.shape[3]}")
    if q.device.type == "meta":
        raise ValueError("q: expected a tensor that holds data, got device meta")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected the number of heads of k, {k.shape[1]}, got {v.shape[1]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected the length of k, {k.shape[2]}, got {v.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides the {q.shape[1]} heads of q, got {k.shape[1]}"
        )


def _check_scale(scale: float | None) -> None:
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale)
    ):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")


def _check_device(q: torch.Tensor, mode: str, name: str = "q") -> None:
    """Compiled kernels need a GPU, and one that knows the dtype."""
    if mode == "compiled":
        if q.device.type != "cuda":
            raise ValueError(
                f"{name}: expected a tensor on the GPU (kernels are compiled here), got device {q.device}; "
                "move it with .cuda(), or set TRITON_INTERPRET=1 before Python starts to run on the CPU"
            )
        if (
            q.dtype is torch.bfloat16
            and torch.version.hip is None
            and torch.cuda.get_device_capability(q.device) < (8, 0)
        ):
            raise ValueError(
                f"{name}: expected float16 or float32 (this GPU has no bfloat16), got torch.bfloat16"
            )
