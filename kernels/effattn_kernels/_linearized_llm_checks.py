"""What linearized attention's kernels can compute, checked before any work; messages name the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from ._linearized_llm_tiles import MAX_LAGS


def check_alpha(alpha: Any, q: torch.Tensor) -> torch.Tensor:
    """``[Hq]`` float32 on the device of q."""
    if isinstance(alpha, torch.Tensor):
        if alpha.shape not in ((), (1,), (q.shape[1],)) or not alpha.is_floating_point():
            raise ValueError(
                f"alpha: expected a number or floats of shape () or ({q.shape[1]},), got {alpha.dtype} "
                f"{tuple(alpha.shape)}"
            )
        return alpha.to(q.device, torch.float32).expand(q.shape[1]).contiguous()
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number or a tensor, got {alpha!r}")
    return torch.full((q.shape[1],), float(alpha), device=q.device)


def check_weight(name: str, weight: Any, v: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        came = (
            f"{weight.dtype} {tuple(weight.shape)}"
            if isinstance(weight, torch.Tensor)
            else type(weight).__name__
        )
        raise ValueError(f"{name}: expected a floating-point tensor [H, taps], got {came}")
    if not 1 <= weight.shape[1] <= MAX_LAGS or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: expected 1 to {MAX_LAGS} taps and a head or more, got {tuple(weight.shape)}"
        )
    if weight.shape[0] % v.shape[1]:
        raise ValueError(
            f"{name}: expected a number of heads that the {v.shape[1]} of v divide, got {weight.shape[0]}"
        )
    if weight.device != v.device:
        raise ValueError(f"{name}: expected the device of v, {v.device}, got {weight.device}")


def check_state(state: Any, k: torch.Tensor, v: torch.Tensor, lags: int, group: int) -> None:
    if state is None:
        return
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], torch.Tensor):
        raise ValueError(f"initial_state: expected a LinearizedState or None, got {type(state).__name__}")
    opened = state[1].shape[2] if state[1].dim() == 4 else 0
    if opened >= group:
        raise ValueError(f"initial_state: expected an open group shorter than {group}, got {opened} tokens")
    batch, heads, _, key_dim = k.shape
    rows = {"S": (key_dim, v.shape[3]), "k": (opened, key_dim), "v": (opened, v.shape[3])}
    rows["tail"] = (max(0, lags - 1), v.shape[3])
    for (part, shape), x in zip(rows.items(), state):
        want = (batch, heads, *shape)
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != want or x.dtype != torch.float32:
            came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"initial_state: expected {part} in float32 of shape {want}, got {came}")
        if x.device != k.device:
            raise ValueError(f"initial_state: expected {part} on the device of q, {k.device}, got {x.device}")
