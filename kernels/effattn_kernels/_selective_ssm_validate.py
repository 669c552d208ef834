"""Bad input of the selective scan gets a ValueError that names the argument, what was expected and what
came."""

from __future__ import annotations

import torch

from ._validate import DTYPES, _check_device

MAX_STATE_SIZE = 256


def check_selective_scan_inputs(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    mode: str,
) -> None:
    """Raise ValueError unless `selective_scan_chunked` can compute exactly what was asked; shapes as there."""
    given = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    for name, x in given.items():
        if x is None and name in ("D", "z", "delta_bias", "initial_state"):
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        allowed = (torch.float32,) if name == "initial_state" else DTYPES
        if x.dtype not in allowed:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise ValueError(f"{name}: expected {names}, got {x.dtype}")
        if x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
        if x.device != u.device:
            raise ValueError(f"{name}: expected the device of u, {u.device}, got {x.device}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected every dimension to be at least 1, got shape {tuple(x.shape)}")
        if name in ("delta", "B", "C", "z") and x.dtype != u.dtype:
            raise ValueError(f"{name}: expected the dtype of u, {u.dtype}, got {x.dtype}")
    if u.dim() != 3:
        raise ValueError(f"u: expected 3 dimensions [B, E, N], got {u.dim()} with shape {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A: expected shape ({channels}, S), got {tuple(A.shape)}")
    size = A.shape[1]
    if size > MAX_STATE_SIZE:
        raise ValueError(f"A: expected a state size of at most {MAX_STATE_SIZE}, got {size}")
    if B.dim() == 4:
        if channels % B.shape[1] or B.shape != (batch, B.shape[1], size, length):
            raise ValueError(
                f"B: expected shape ({batch}, G, {size}, {length}), G a divisor of {channels}, got {tuple(B.shape)}"
            )
    elif B.shape != (batch, size, length):
        raise ValueError(f"B: expected shape {(batch, size, length)}, got {tuple(B.shape)}")
    wanted = {
        "delta": u.shape, "C": B.shape, "D": (channels,), "z": u.shape, "delta_bias": (channels,),
        "initial_state": (batch, channels, size),
    }  # fmt: skip
    for name, shape in wanted.items():
        x = given[name]
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    if u.device.type == "meta":
        raise ValueError("u: expected a tensor that holds data, got device meta")
    _check_device(u, mode)
