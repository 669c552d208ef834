"""Depthwise convolution along time, with and without its future: the augmentation of linearized LLMs, and its leak.

One kernel for each *head*, shared by the head's channels. Borrowed from vision, where a "same" convolution may look
both ways: ``y_t = sum_m w_m v_{t + m - p}``, ``m = 0 .. 2p``. In a decoder the taps right of the centre read tokens
that do not exist yet. What is left without them has a weight for each *lag*: ``y_t = sum_l w_l v_{t - l}``.
Source: You et al. 2024 (arXiv:2406.07368), section on augmented linear attention, and the authors' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effattn_lab._validate import DTYPES, check_positive_int
from effattn_lab.foundations.attention import repeat_kv


def symmetric_depthwise_conv(v: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The convolution as vision has it, ``y_t = sum_m kernel_m v_{t + m - p}``: it reads ``p`` *future* values.

    Args:
        v: values ``[B, Hkv, N, Dv]``.
        kernel: ``[Hq, 2p + 1]``, an odd number of taps; tap ``p`` is the centre. Hkv divides Hq.

    Returns:
        ``[B, Hq, N, Dv]`` in the dtype of ``v``. Not for a decoder: it is here to be caught.
    """
    v, kernel, dtype = _prepare(v, kernel, "kernel")
    if kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel: expected an odd number of taps, got {kernel.shape[1]}")
    p = kernel.shape[1] // 2
    out = torch.zeros_like(v)
    for m in range(2 * p + 1):
        out = out + kernel[:, m, None, None] * _shift(v, p - m)
    return out.to(dtype)


def causal_taps(kernel: torch.Tensor) -> torch.Tensor:
    """What a ``[H, 2p + 1]`` kernel keeps under the mask, by lag: ``[H, p + 1]``, entry ``l`` is tap ``p - l``.

    The released code multiplies the kernel by a mask in place before every forward; gradients and the optimizer's
    moments of the masked taps are computed all the same, and a checkpoint holds whatever they drifted to. Weights
    that do not exist cannot leak.
    """
    if not isinstance(kernel, torch.Tensor) or kernel.dim() != 2 or kernel.shape[1] % 2 == 0:
        came = tuple(kernel.shape) if isinstance(kernel, torch.Tensor) else type(kernel).__name__
        raise ValueError(f"kernel: expected shape [H, 2p + 1], an odd number of taps, got {came}")
    return kernel[:, : kernel.shape[1] // 2 + 1].flip(1)


def masked_depthwise_conv(v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The reference: ``y_t = sum_l weight_l v_{t - l}``, a sum over lags; before the first token there is nothing.

    Args:
        v: values ``[B, Hkv, N, Dv]``, any floating dtype.
        weight: one weight for each query head and lag ``[Hq, L]``, L at least 1; Hkv divides Hq, query head h reads
            value head ``h // (Hq / Hkv)``. Lag 0 is the token itself.

    Returns:
        ``[B, Hq, N, Dv]`` in the dtype of ``v``. Computed in float64 for float64 inputs, else in float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    v, weight, dtype = _prepare(v, weight, "weight")
    out = torch.zeros_like(v)
    for lag in range(weight.shape[1]):
        out = out + weight[:, lag, None, None] * _shift(v, lag)
    return out.to(dtype)


def band(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The convolution of ``rows`` consecutive tokens as a matrix: ``[H, rows, L - 1 + rows]``, ``T_{a, c}`` the
    weight of lag ``a + L - 1 - c``. Its columns are the ``L - 1`` values before the rows, then those of the rows."""
    lags = weight.shape[1]
    lag = torch.arange(rows, device=weight.device)[:, None] + lags - 1
    lag = lag - torch.arange(lags - 1 + rows, device=weight.device)
    inside = (lag >= 0) & (lag < lags)
    return torch.where(inside, weight[:, lag.clamp(0, lags - 1)], 0.0)


def masked_depthwise_conv_chunked(
    v: torch.Tensor,
    weight: torch.Tensor,
    *,
    chunk_size: int = 64,
    initial_tail: torch.Tensor | None = None,
    return_tail: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`masked_depthwise_conv` by matrix products: each chunk's outputs are a band matrix times its window.

    All channels of a head share its kernel, so a chunk of C tokens is ``T [C, L - 1 + C]`` times the chunk's values
    with the L - 1 before them, and T is the same for every chunk. More multiplications than needed (the band's zeros
    are multiplied too), but in the form that matrix units are built for.

    Args:
        v, weight: as in :func:`masked_depthwise_conv`.
        chunk_size: C, at least 1. Default 64. The result does not depend on it but for rounding.
        initial_tail: the L - 1 values before the first one ``[B, Hkv, L - 1, Dv]``. Default: zeros.
        return_tail: also return the last L - 1 values, to go on from. Default False.

    Returns:
        ``out [B, Hq, N, Dv]`` in the dtype of ``v``, or ``(out, tail)`` with the tail in at least float32.
    """
    check_positive_int("chunk_size", chunk_size)
    groups = _groups(v, weight, "weight")
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    v, weight = v.to(wide), weight.to(wide)
    batch, heads, seqlen, dim = v.shape
    lags = weight.shape[1]
    tail = check_tail(initial_tail, (batch, heads, lags - 1, dim), v)
    padded = F.pad(torch.cat([tail, v], dim=2), (0, 0, 0, -seqlen % chunk_size))
    windows = padded.unfold(2, chunk_size + lags - 1, chunk_size).transpose(
        -1, -2
    )  # [B, Hkv, chunks, window, Dv]
    windows = repeat_kv(windows, groups)
    out = (band(weight, chunk_size)[:, None] @ windows).flatten(2, 3)[:, :, :seqlen].to(dtype)
    return (out, torch.cat([tail, v], dim=2)[:, :, seqlen:]) if return_tail else out


def check_tail(tail: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The values before the first, in the dtype of ``like``; zeros for None."""
    if tail is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if not isinstance(tail, torch.Tensor) or tuple(tail.shape) != shape:
        came = tuple(tail.shape) if isinstance(tail, torch.Tensor) else type(tail).__name__
        raise ValueError(f"initial_tail: expected shape {shape}, got {came}")
    if tail.device != like.device:
        raise ValueError(f"initial_tail: expected the device of v ({like.device}), got {tail.device}")
    return tail.to(like.dtype)


def check_weight(weight: torch.Tensor, num_kv_heads: int, device: torch.device, name: str = "weight") -> int:
    """``[Hq, L]`` with Hkv dividing Hq; returns ``Hq // Hkv``."""
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in DTYPES:
        came = (
            f"{weight.dtype} {tuple(weight.shape)}"
            if isinstance(weight, torch.Tensor)
            else type(weight).__name__
        )
        raise ValueError(f"{name}: expected a floating-point tensor [H, taps], got {came}")
    if 0 in weight.shape:
        raise ValueError(f"{name}: expected at least one head and one tap, got shape {tuple(weight.shape)}")
    if weight.shape[0] % num_kv_heads:
        raise ValueError(
            f"{name}: expected a number of heads that the {num_kv_heads} heads of v divide, got {weight.shape[0]}"
        )
    if weight.device != device:
        raise ValueError(f"{name}: expected the device of v ({device}), got {weight.device}")
    return weight.shape[0] // num_kv_heads


def _groups(v: torch.Tensor, weight: torch.Tensor, name: str) -> int:
    if not isinstance(v, torch.Tensor) or v.dim() != 4 or v.dtype not in DTYPES or 0 in v.shape:
        came = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__
        raise ValueError(f"v: expected a floating-point tensor [B, H, N, D], no dimension 0, got {came}")
    return check_weight(weight, v.shape[1], v.device, name)


def _prepare(
    v: torch.Tensor, weight: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Values by query head and weights, both in at least float32, and the dtype that came."""
    groups = _groups(v, weight, name)
    wide = torch.promote_types(v.dtype, torch.float32)
    return repeat_kv(v.to(wide), groups), weight.to(wide), v.dtype


def _shift(v: torch.Tensor, lag: int) -> torch.Tensor:
    """``v_{t - lag}``, and 0 where there is none; a negative lag looks ahead."""
    lag = max(-v.shape[2], min(v.shape[2], lag))
    if lag >= 0:
        return F.pad(v, (0, 0, lag, 0))[:, :, : v.shape[2]]
    return F.pad(v[:, :, -lag:], (0, 0, 0, -lag))
