"""Input checks of gated linear attention, beside those in `_validate`."""

from __future__ import annotations

import torch

from ._validate import DTYPES, _check_device, _check_scale, _check_tensors


def check_gated_linear_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    mode: str,
) -> None:
    """Raise ValueError unless `gated_linear_chunked` can compute exactly what was asked.

    Args:
        q, k, v, g: what the caller passed for ``[B, Hq, N, K]``, ``[B, Hkv, N, K]``, ``[B, Hkv, N, V]`` and
            ``[B, Hkv, N]`` or ``[B, Hkv, N, K]``.
        scale: factor on the outputs or None. initial_state: ``[B, Hkv, K, V]``, float32, or None.
        mode: ``"interpreter"`` or ``"compiled"``.
    """
    _check_tensors(q, k, v, any_value_dim=True)
    _check_scale(scale)
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k: expected the length of q, {q.shape[2]}, got {k.shape[2]}; "
            "what came before the first query belongs into the state"
        )
    if not isinstance(g, torch.Tensor):
        raise ValueError(f"g: expected a torch.Tensor, got {type(g).__name__}")
    if g.shape not in (k.shape[:3], k.shape):
        raise ValueError(
            f"g: expected shape {tuple(k.shape[:3])} (a decay a head) or {tuple(k.shape)} (a decay a channel), "
            f"got {tuple(g.shape)}"
        )
    if g.dtype not in DTYPES:
        raise ValueError(f"g: expected float16, bfloat16 or float32, got {g.dtype}")
    if g.device != q.device:
        raise ValueError(f"g: expected the device of q, {q.device}, got {g.device}")
    if initial_state is not None:
        shape = (*k.shape[:2], k.shape[3], v.shape[3])
        x = initial_state
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
            came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"initial_state: expected float32 of shape {shape} or None, got {came}")
        if x.device != q.device:
            raise ValueError(f"initial_state: expected the device of q, {q.device}, got {x.device}")
    _check_device(q, mode)
    if mode == "interpreter" and not bool((g <= 0).all()):
        raise ValueError(f"g: expected log decays of at most 0, got {g.max().item():.3g}")
