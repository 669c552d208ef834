"""Inputs of the selective scan: checked, widened, with time first."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from effattn_lab._validate import DTYPES

Rule = Literal["euler", "zoh"]
RULES = ("euler", "zoh")


class Inputs(NamedTuple):
    """Checked, in at least float32, time first; R channels to each of the G groups that share B and C."""

    u: torch.Tensor  # [N, B, G, R]
    delta: torch.Tensor  # [N, B, G, R], bias and softplus applied
    A: torch.Tensor  # [G, R, S]
    B: torch.Tensor  # [N, B, G, S]
    C: torch.Tensor  # [N, B, G, S]
    state: torch.Tensor  # [B, G, R, S]


def prepare(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    state: torch.Tensor | None,
    rule: str,
    state_name: str = "initial_state",
) -> Inputs:
    """Check everything, then apply bias and softplus to delta."""
    check_scan_inputs(u, delta, A, B, C, D, z, delta_bias, state, state_name)
    if rule not in RULES:
        raise ValueError(f"rule: expected 'euler' or 'zoh', got {rule!r}")
    batch, channels, length = u.shape
    # Half precision is widened first: a decay of 0.999 is 1 in bfloat16.
    dtype = torch.promote_types(u.dtype, torch.float32)
    groups = B.shape[1] if B.dim() == 4 else 1
    inner = (groups, channels // groups)
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (x.reshape(batch, groups, -1, length).permute(3, 0, 1, 2).to(dtype) for x in (B, C))
    u, delta = (x.to(dtype).permute(2, 0, 1).unflatten(2, inner) for x in (u, delta))
    if state is None:
        state = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device)
    return Inputs(u, delta, A.to(dtype).unflatten(0, inner), B, C, state.to(dtype).unflatten(1, inner))


def check_scan_inputs(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    state_name: str = "initial_state",
) -> None:
    """Raise ``ValueError`` unless these fit together; shapes as in :func:`selective_scan`."""
    given = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        state_name: state,
    }
    for name, x in given.items():
        if x is None and name in ("D", "z", "delta_bias", state_name):
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        allowed = (torch.float32, torch.float64) if name == state_name else DTYPES
        if x.dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise ValueError(f"{name}: expected {names}, got {x.dtype}")
        if x.device != u.device:
            raise ValueError(f"{name}: expected the device of u ({u.device}), got {x.device}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected every dimension to be at least 1, got shape {tuple(x.shape)}")
        if name in ("delta", "B", "C", "z") and x.dtype != u.dtype:
            raise ValueError(f"{name}: expected the dtype of u ({u.dtype}), got {x.dtype}")
    if u.dim() != 3:
        raise ValueError(f"u: expected 3 dimensions [B, E, N], got shape {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A: expected shape ({channels}, S), got {tuple(A.shape)}")
    size = A.shape[1]
    if B.dim() == 4 and (channels % B.shape[1] or B.shape != (batch, B.shape[1], size, length)):
        raise ValueError(
            f"B: expected shape ({batch}, G, {size}, {length}) with G a divisor of {channels}, got {tuple(B.shape)}"
        )
    if B.dim() != 4 and B.shape != (batch, size, length):
        raise ValueError(f"B: expected shape {(batch, size, length)}, got {tuple(B.shape)}")
    wanted = {
        "delta": u.shape, "z": u.shape, "C": B.shape, "D": (channels,), "delta_bias": (channels,),
        state_name: (batch, channels, size),
    }  # fmt: skip
    for name, shape in wanted.items():
        x = given[name]
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
