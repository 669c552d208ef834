"""Grouped linear attention with a masked convolution, as linearized LLMs have it: reference, groups, one step.

Time is cut into groups of G tokens. Inside its group a query attends with ``relu(q . k)^2``; on all groups *before*
its own it reads linear attention, ``alpha q S``, where S is the sum of ``k v^T`` over whole past groups; and a short
convolution on the values (:mod:`effattn_lab.linear.linearized_llm_conv`) adds the nearest tokens. q and k have length
1, and there is no softmax and no denominator anywhere. The local and the global weight are *different* functions, so
unlike a chunk size the group size is part of the model.
Source: You et al. 2024 (arXiv:2406.07368) and the authors' code; groups after Hua et al. 2022 (FLASH).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int, check_qkv
from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.linearized_llm_conv import (
    band,
    check_tail,
    check_weight,
    masked_depthwise_conv_chunked,
)

NORM_EPS = 1e-6  # the least length that a query or key is divided by: padding is zeros, and zeros stay zeros


class LinearizedState(NamedTuple):
    """What is left of the past, in at least float32; its size does not grow with the length.

    ``S [B, Hkv, D, Dv]``: sum of ``k v^T`` over the *complete* groups. ``k [B, Hkv, n, D]`` (of length 1 already) and
    ``v [B, Hkv, n, Dv]``: the open group, n < G. ``tail [B, Hkv, L - 1, Dv]``: the last values, for the convolution;
    without one the axis has length 0. ``seen``: tokens so far.
    """

    S: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tail: torch.Tensor
    seen: int


def linearized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    conv_weight: torch.Tensor | None = None,
    group_size: int = 64,
    qk_norm: bool = True,
) -> torch.Tensor:
    """The reference, all three branches in one matrix of weights; always causal.

    ``o_t = sum_j w_tj v_j`` over ``j <= t`` with ``w_tj = relu(q_t . k_j)^2`` in the group of t, ``alpha q_t . k_j``
    in an earlier one, plus ``conv_weight[t - j]`` where that lag exists. Group of t: ``t // group_size``.

    Args:
        q: queries ``[B, Hq, seqlen_q, D]``, any floating dtype.
        k: keys ``[B, Hkv, seqlen_k, D]``; Hkv divides Hq. With ``seqlen_q < seqlen_k`` the queries are the last
            positions.
        v: values ``[B, Hkv, seqlen_k, Dv]``.
        alpha: weight of the global branch: a number, or a tensor of 0 dimensions or ``[Hq]`` that may train.
            Default 1. The paper learns one a layer, from 0.
        conv_weight: ``[Hq, L]``, by lag. Default: no convolution.
        group_size: G, at least 1. Default 64.
        qk_norm: divide each query and key by its length (at least ``NORM_EPS``). Default True.

    Returns:
        ``[B, Hq, seqlen_q, Dv]`` in the dtype of ``q``. Computed in float64 for float64 inputs, else in float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, alpha, conv_weight = _prepare(q, k, v, alpha, conv_weight, group_size, qk_norm)
    repeat = q.shape[1] // k.shape[1]
    key = torch.arange(k.shape[2], device=q.device)
    query = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    scores = q @ repeat_kv(k, repeat).transpose(-1, -2)  # [B, Hq, seqlen_q, seqlen_k]
    local = (query // group_size == key // group_size) & (key <= query)
    past = key // group_size < query // group_size
    weights = torch.where(local, scores.relu().square(), 0.0) + alpha * torch.where(past, scores, 0.0)
    if conv_weight is not None:
        lag = query - key
        reached = (lag >= 0) & (lag < conv_weight.shape[1])
        weights = weights + torch.where(reached, conv_weight[:, lag.clamp(0, conv_weight.shape[1] - 1)], 0.0)
    return (weights @ repeat_kv(v, repeat)).to(dtype)


@overload
def linearized_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float | torch.Tensor = ...,
    conv_weight: torch.Tensor | None = ...,
    group_size: int = ...,
    qk_norm: bool = ...,
    initial_state: LinearizedState | None = ...,
    return_state: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def linearized_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float | torch.Tensor = ...,
    conv_weight: torch.Tensor | None = ...,
    group_size: int = ...,
    qk_norm: bool = ...,
    initial_state: LinearizedState | None = ...,
    return_state: Literal[True],
) -> tuple[torch.Tensor, LinearizedState]: ...
def linearized_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    conv_weight: torch.Tensor | None = None,
    group_size: int = 64,
    qk_norm: bool = True,
    initial_state: LinearizedState | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LinearizedState]:
    """:func:`linearized_attention` group by group, all groups at once: time linear in the length; differentiable.

    ``O_g = tril(relu(Q_g K_g^T)^2) V_g + alpha Q_g S_g``, ``S_g`` the sum of ``K^T V`` over the groups *before* g (an
    exclusive prefix sum: with the group's own keys in it they would count twice), plus the convolution.

    Args:
        q, k, v, alpha, conv_weight, group_size, qk_norm: as in :func:`linearized_attention`.
        initial_state: what was seen before the first key, with the same group_size; group borders fall where they
            would have without the cut. Default: nothing.
        return_state: also return the state after the last key. Default False.

    Returns:
        ``out [B, Hq, seqlen_q, Dv]`` in the dtype of ``q``, or ``(out, state)``.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, alpha, conv_weight = _prepare(q, k, v, alpha, conv_weight, group_size, qk_norm)
    state = _start(initial_state, k, v, conv_weight, group_size)
    repeat, seqlen_q, seen = q.shape[1] // k.shape[1], q.shape[2], state.seen + k.shape[2]
    conv: torch.Tensor | float = 0.0
    tail = state.tail
    if conv_weight is not None:
        mixed, tail = masked_depthwise_conv_chunked(
            v, conv_weight, chunk_size=group_size, initial_tail=tail, return_tail=True
        )
        conv = mixed[:, :, -seqlen_q:]
    # The open group comes first again: its keys are seen by the group's later queries.
    k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
    q = F.pad(q, (0, 0, k.shape[2] - seqlen_q, 0))  # queries that nobody asked about
    k_g, v_g = _cut(k, group_size), _cut(v, group_size)  # [B, Hkv, groups, G, D]
    q_g = _cut(q, group_size)
    sums = (k_g.transpose(-1, -2) @ v_g).cumsum(dim=2)  # state after each group, this call's part
    before = state.S[:, :, None] + F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    scores = (q_g @ repeat_kv(k_g, repeat).transpose(-1, -2)).relu().square().tril()
    out = scores @ repeat_kv(v_g, repeat) + alpha[:, None] * (q_g @ repeat_kv(before, repeat))
    out = (out.flatten(2, 3)[:, :, : k.shape[2]][:, :, -seqlen_q:] + conv).to(dtype)
    if not return_state:
        return out
    whole = k.shape[2] // group_size  # complete groups
    total = state.S if whole == 0 else state.S + sums[:, :, whole - 1]
    k, v = k[:, :, whole * group_size :], v[:, :, whole * group_size :]
    return out, LinearizedState(total, k, v, tail, seen)


def linearized_attention_step(
    state: LinearizedState | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    conv_weight: torch.Tensor | None = None,
    group_size: int = 64,
    qk_norm: bool = True,
) -> tuple[torch.Tensor, LinearizedState]:
    """Decode one token: at most G keys and values, one matrix and L - 1 values are read, whatever the length.

    ``o = relu(q K_open^T)^2 V_open + alpha q S + sum_l w_l v_{t-l}``, the token itself in the open group; a group
    that is full after it is folded into S and cleared.

    Args:
        state: what :func:`linearized_attention_chunked` or the last step returned; None before the first token.
        q: the token's query ``[B, Hq, 1, D]``.
        k, v: its key ``[B, Hkv, 1, D]`` and value ``[B, Hkv, 1, Dv]``.
        alpha, conv_weight, group_size, qk_norm: as in :func:`linearized_attention`.

    Returns:
        ``(out [B, Hq, 1, Dv] in the dtype of q, new state)``; the state given is left as it was.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, alpha, conv_weight = _prepare(q, k, v, alpha, conv_weight, group_size, qk_norm)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != 1:
            raise ValueError(f"{name}: expected one token, a length of 1, got {x.shape[2]}")
    state = _start(state, k, v, conv_weight, group_size, name="state")
    repeat = q.shape[1] // k.shape[1]
    keys, values = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
    weights = (q @ repeat_kv(keys, repeat).transpose(-1, -2)).relu().square()
    out = weights @ repeat_kv(values, repeat) + alpha * (q @ repeat_kv(state.S, repeat))
    tail = state.tail
    if conv_weight is not None:
        window = torch.cat([tail, v], dim=2)  # [B, Hkv, L, Dv]
        out = out + band(conv_weight, 1) @ repeat_kv(window, repeat)
        tail = window[:, :, 1:]
    return out.to(dtype), fold(LinearizedState(state.S, keys, values, tail, state.seen + 1), group_size)


def fold(state: LinearizedState, group_size: int) -> LinearizedState:
    """Move the groups that are complete from the open part into S."""
    whole = state.k.shape[2] // group_size * group_size
    if whole == 0:
        return state
    done_k, done_v = state.k[:, :, :whole], state.v[:, :, :whole]
    return LinearizedState(
        state.S + done_k.transpose(-1, -2) @ done_v,
        state.k[:, :, whole:],
        state.v[:, :, whole:],
        state.tail,
        state.seen,
    )


def init_state(
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    num_lags: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> LinearizedState:
    """The state before the first token; ``num_lags`` is the convolution's L, 0 for none."""

    def zeros(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(batch, num_kv_heads, rows, columns, dtype=dtype, device=device)

    tail = zeros(max(0, num_lags - 1), value_dim)
    return LinearizedState(zeros(head_dim, value_dim), zeros(0, head_dim), zeros(0, value_dim), tail, 0)


def unit(x: torch.Tensor) -> torch.Tensor:
    """``x / max(|x|, NORM_EPS)`` along the last axis."""
    return F.normalize(x, dim=-1, eps=NORM_EPS)


def _cut(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[B, H, N, D]`` to ``[B, H, groups, G, D]``, the last group filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % group_size)).unflatten(2, (-1, group_size))


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: float | torch.Tensor,
    conv_weight: torch.Tensor | None,
    group_size: int,
    qk_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Checked inputs in at least float32, q and k of length 1: ``(q, k, v, alpha [Hq or 1, 1, 1], conv_weight)``."""
    check_qkv(q, k, v, any_value_dim=True)
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q: expected at most as many queries as keys ({k.shape[2]}), got {q.shape[2]}")
    check_positive_int("group_size", group_size)
    wide = torch.promote_types(q.dtype, torch.float32)
    if conv_weight is not None:
        check_weight(conv_weight, k.shape[1], q.device, "conv_weight")
        if conv_weight.shape[0] != q.shape[1]:
            raise ValueError(
                f"conv_weight: expected a row for each head of q ({q.shape[1]}), got {conv_weight.shape[0]}"
            )
        conv_weight = conv_weight.to(wide)
    factor = check_alpha(alpha, q.shape[1], q.device).to(wide).reshape(-1, 1, 1)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    return (unit(q) if qk_norm else q), (unit(k) if qk_norm else k), v, factor, conv_weight


def check_alpha(alpha: float | torch.Tensor, num_heads: int, device: torch.device) -> torch.Tensor:
    """``alpha`` as a floating-point tensor of 0 dimensions or ``[Hq]``."""
    if isinstance(alpha, torch.Tensor):
        if alpha.shape not in ((), (1,), (num_heads,)) or not alpha.is_floating_point():
            raise ValueError(
                f"alpha: expected a number or floats of shape () or ({num_heads},), got {alpha.dtype} "
                f"{tuple(alpha.shape)}"
            )
        return alpha.to(device)
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number or a tensor, got {alpha!r}")
    return torch.tensor(float(alpha), dtype=torch.float64, device=device)


def _start(
    state: LinearizedState | None,
    k: torch.Tensor,
    v: torch.Tensor,
    conv_weight: torch.Tensor | None,
    group_size: int,
    name: str = "initial_state",
) -> LinearizedState:
    """The state to begin with, in the dtype of the keys; checked against them."""
    batch, heads, _, head_dim = k.shape
    lags = 0 if conv_weight is None else conv_weight.shape[1]
    if state is None:
        return init_state(batch, heads, head_dim, v.shape[3], num_lags=lags, dtype=k.dtype, device=k.device)
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], torch.Tensor):
        raise ValueError(f"{name}: expected a LinearizedState or None, got {type(state).__name__}")
    opened = state[1].shape[2] if state[1].dim() == 4 else 0
    if opened >= group_size:
        raise ValueError(f"{name}: expected an open group shorter than {group_size}, got {opened} tokens")
    shapes = {
        "S": (batch, heads, head_dim, v.shape[3]),
        "k": (batch, heads, opened, head_dim),
        "v": (batch, heads, opened, v.shape[3]),
        "tail": (batch, heads, max(0, lags - 1), v.shape[3]),
    }
    for (part, shape), x in zip(shapes.items(), state):
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected {part} of shape {shape}, got {came}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: expected {part} in float32 or float64, got {x.dtype}")
    s, open_k, open_v, tail = (check_tail(x, shape, k) for x, shape in zip(state[:4], shapes.values()))
    return LinearizedState(s, open_k, open_v, tail, int(state[4]))
