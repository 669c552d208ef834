"""The short causal convolution in front of the scan: a whole sequence, or one token with its cache.

Depthwise: each channel mixes its own last W inputs,
``y_t = bias + w_{W-1} x_t + w_{W-2} x_{t-1} + ... + w_0 x_{t-W+1}``. The last weight meets the newest input, as in
PyTorch's ``conv1d`` and in causal_conv1d. The cache is the last W - 1 inputs, oldest first; zeros before the first
token. Source: Gu and Dao 2023 (Mamba), section 3.4; the library causal_conv1d.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F

from effattn_lab._validate import DTYPES


@overload
def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = ..., *, activation: str | None = ...,
    initial_state: torch.Tensor | None = ..., return_state: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = ..., *, activation: str | None = ...,
    initial_state: torch.Tensor | None = ..., return_state: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution of a sequence.

    Args:
        x: ``[B, E, N]``, any floating dtype. weight: ``[E, W]``. bias: ``[E]`` or None; both in the dtype of x.
        activation: "silu" or None.
        initial_state: the W - 1 inputs before the first, ``[B, E, W - 1]``, oldest first. Default zeros.
        return_state: also return the last W - 1 inputs, to go on from. Default False.

    Returns:
        ``y [B, E, N]``, or ``(y, state [B, E, W - 1])``; in the dtype of x.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    state = _check(x, weight, bias, activation, initial_state, "initial_state")
    seen = torch.cat([state, x], dim=2)  # all the padding stands on the left: no output sees a later input
    y = F.conv1d(seen, weight[:, None], bias, groups=x.shape[1])
    y = F.silu(y) if activation == "silu" else y
    return (y, seen[:, :, x.shape[2] :].clone()) if return_state else y


def causal_conv1d_step(
    state: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: ``x [B, E, 1]`` to ``(y [B, E, 1], new state [B, E, W - 1])``; the state given is left as it
    was."""
    if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[2] != 1:
        raise ValueError(f"x: expected one token, a length of 1, got {x.shape[2]}")
    state = _check(x, weight, bias, activation, state, "state")
    seen = torch.cat([state, x], dim=2)  # [B, E, W]
    y = (seen * weight).sum(2, keepdim=True)
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation == "silu" else y, seen[:, :, 1:]


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    state: torch.Tensor | None,
    state_name: str,
) -> torch.Tensor:
    """The state to begin with."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias), (state_name, state)):
        if t is None and name in ("bias", state_name):
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x ({x.dtype}), got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected the device of x ({x.device}), got {t.device}")
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected 3 dimensions [B, E, N], each at least 1, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight: expected shape ({channels}, W), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")
    shape = (x.shape[0], channels, weight.shape[1] - 1)
    if state is None:
        return x.new_zeros(shape)
    if tuple(state.shape) != shape:
        raise ValueError(f"{state_name}: expected shape {shape}, got {tuple(state.shape)}")
    return state
