"""Linear attention in readable PyTorch: quadratic reference, chunks, recurrence, one decode step, a layer.

Weights are ``w_ij = scale * phi(q_i) . phi(k_j)`` where softmax attention has ``exp(scale * q_i . k_j)``. They
factor, so ``sum_j w_ij v_j = scale * phi(q_i)^T (sum_j phi(k_j) v_j^T)``: the bracket, ``S [d_phi, Dv]``, is all
that the past leaves behind. The forms below compute one function in different orders.
Source: Katharopoulos et al. 2020; the chunkwise form after Hua et al. 2022 and Yang et al. 2024 (GLA).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple, overload

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.linear.feature_maps import FeatureMapLike, apply_feature_map, resolve_feature_map


class LinearState(NamedTuple):
    """What linear attention remembers, whatever the length: one entry for each *key-value* head, at least float32.

    ``S [B, Hkv, d_phi, Dv]`` is ``sum_j phi(k_j) v_j^T``, ``z [B, Hkv, d_phi]`` is ``sum_j phi(k_j)``.
    """

    S: torch.Tensor
    z: torch.Tensor


def init_state(
    batch: int,
    num_kv_heads: int,
    feature_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> LinearState:
    """The state before the first token: zeros."""
    return LinearState(
        torch.zeros(batch, num_kv_heads, feature_dim, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, num_kv_heads, feature_dim, dtype=dtype, device=device),
    )


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMapLike = "elu",
    causal: bool = False,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The reference, all weights laid out: ``o_i = sum_j w_ij v_j / (sum_j w_ij + eps)`` over the visible keys.

    Args:
        q: queries ``[B, Hq, seqlen_q, D]``, any floating dtype.
        k: keys ``[B, Hkv, seqlen_k, D]``; Hkv divides Hq, query head h reads key head ``h // (Hq / Hkv)``.
        v: values ``[B, Hkv, seqlen_k, Dv]``; Dv may differ from D.
        feature_map: phi, a name in :data:`effattn_lab.linear.feature_maps.FEATURE_MAPS`, a map, any callable on the
            last axis, or None: q and k are features already. Default "elu".
        causal: each query sees keys up to its own position; with ``seqlen_q != seqlen_k`` the queries are the last
            positions (the offset rule). Default False.
        scale: multiplies the weights, *after* the map. Default ``D ** -0.5``. With ``normalize`` it cancels, but
            for eps.
        normalize: divide by the sum of weights. Default True; wants non-negative weights.
        eps: added to that sum, at least 0. Default 1e-6.

    Returns:
        ``[B, Hq, seqlen_q, Dv]`` in the dtype of ``q``. Computed in float64 for float64 inputs, else in float32.
        A query that sees no key gets 0.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, scale = _prepare(q, k, v, feature_map, scale, normalize, eps)
    groups = q.shape[1] // k.shape[1]
    weights = scale * (q @ repeat_kv(k, groups).transpose(-1, -2))  # [B, Hq, seqlen_q, seqlen_k]
    hidden = ~visible(q.shape[2], k.shape[2], causal=causal, device=q.device)
    weights = weights.masked_fill(hidden, 0.0)
    return _divide(weights @ repeat_kv(v, groups), weights.sum(dim=-1), normalize, eps).to(dtype)


def chunk_step(
    state: LinearState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LinearState]:
    """Causal linear attention of one chunk, given what came before it.

    ``O = Q S + tril(Q K^T) V`` and ``S' = S + K^T V``; the denominator is the same with a column of ones for V.

    Args:
        state: what the chunk finds, ``S [B, Hkv, d_phi, Dv]`` and ``z [B, Hkv, d_phi]``.
        q: features of its queries ``[B, Hq, C, d_phi]``, the scale already in them.
        k, v: features of its keys ``[B, Hkv, C, d_phi]`` and its values ``[B, Hkv, C, Dv]``.

    Returns:
        ``(numerator [B, Hq, C, Dv], denominator [B, Hq, C], state after the chunk)``.
    """
    groups = q.shape[1] // k.shape[1]
    inside = (q @ repeat_kv(k, groups).transpose(-1, -2)).tril()  # [B, Hq, C, C]; a token sees itself
    numerator, denominator = read(state, q)
    numerator = numerator + inside @ repeat_kv(v, groups)
    return numerator, denominator + inside.sum(dim=-1), absorb(state, k, v)


def read(state: LinearState, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What query features ``[B, Hq, N, d_phi]`` find in the state: ``(Q S [B, Hq, N, Dv], Q z [B, Hq, N])``."""
    groups = q.shape[1] // state.S.shape[1]
    return q @ repeat_kv(state.S, groups), (q @ repeat_kv(state.z, groups)[..., None])[..., 0]


def absorb(state: LinearState, k: torch.Tensor, v: torch.Tensor) -> LinearState:
    """Write keys and values into the state, in any number: ``S + K^T V`` and ``z + sum_j k_j``."""
    return LinearState(state.S + k.transpose(-1, -2) @ v, state.z + k.sum(dim=-2))


@overload
def linear_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMapLike = ...,
    causal: bool = ...,
    scale: float | None = ...,
    normalize: bool = ...,
    eps: float = ...,
    chunk_size: int = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def linear_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMapLike = ...,
    causal: bool = ...,
    scale: float | None = ...,
    normalize: bool = ...,
    eps: float = ...,
    chunk_size: int = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[True],
) -> tuple[torch.Tensor, LinearState]: ...
def linear_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMapLike = "elu",
    causal: bool = False,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int = 64,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LinearState]:
    """:func:`linear_attention` in time linear in the length, by matrix products; differentiable.

    Causal: chunk after chunk, :func:`chunk_step`. Not causal: all keys are absorbed, then every query reads.

    Args:
        q, k, v, feature_map, causal, scale, normalize, eps: as in :func:`linear_attention`.
        chunk_size: C, at least 1. Default 64. The result does not depend on it but for rounding; time does.
        initial_state: what was seen before the first key; every query sees it. Default: nothing.
        return_state: also return the state after the last key. Default False.

    Returns:
        ``out [B, Hq, seqlen_q, Dv]`` in the dtype of ``q``, or ``(out, state)`` with the state in at least float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    check_positive_int("chunk_size", chunk_size)
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, scale = _prepare(q, k, v, feature_map, scale, normalize, eps)
    q, state = scale * q, _start(initial_state, k, v)
    if not causal:
        state = absorb(state, k, v)
        numerator, denominator = read(state, q)
    else:
        # Offset rule: keys before the first query are absorbed at once; queries before the first key read the
        # initial state. What is left has one key for each query.
        offset = k.shape[2] - q.shape[2]
        early, blind = max(0, offset), max(0, -offset)
        parts = [read(state, q[:, :, :blind])]
        state = absorb(state, k[:, :, :early], v[:, :, :early])
        chunks = (x.split(chunk_size, dim=2) for x in (q[:, :, blind:], k[:, :, early:], v[:, :, early:]))
        for q_c, k_c, v_c in zip(*chunks):
            num, den, state = chunk_step(state, q_c, k_c, v_c)
            parts.append((num, den))
        numerator = torch.cat([num for num, _ in parts], dim=2)
        denominator = torch.cat([den for _, den in parts], dim=2)
    out = _divide(numerator, denominator, normalize, eps).to(dtype)
    return (out, state) if return_state else out


def linear_attention_step(
    state: LinearState | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMapLike = "elu",
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, LinearState]:
    """Decode one token: write its key and value into the state, then read. Time and memory know no length.

    ``S' = S + phi(k) v^T``, ``z' = z + phi(k)``, ``o = scale S'^T phi(q) / (scale z' . phi(q) + eps)``.

    Args:
        state: what :func:`linear_attention_chunked` or the last step returned; None before the first token.
        q: the token's query ``[B, Hq, 1, D]``.
        k, v: its key ``[B, Hkv, 1, D]`` and value ``[B, Hkv, 1, Dv]``.
        feature_map, scale, normalize, eps: as in :func:`linear_attention`.

    Returns:
        ``(out [B, Hq, 1, Dv] in the dtype of q, new state)``; the state given is left as it was.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, scale = _prepare(q, k, v, feature_map, scale, normalize, eps)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != 1:
            raise ValueError(f"{name}: expected one token, a length of 1, got {x.shape[2]}")
    state = absorb(_start(state, k, v, name="state"), k, v)
    numerator, denominator = read(state, scale * q)
    return _divide(numerator, denominator, normalize, eps).to(dtype), state


def linear_attention_recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMapLike = "elu",
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
) -> tuple[torch.Tensor, LinearState]:
    """Causal :func:`linear_attention`, token after token: an RNN whose hidden state is a matrix.

    Arguments and errors as in :func:`linear_attention_chunked`, always causal. Returns ``(out, state)``.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, scale = _prepare(q, k, v, feature_map, scale, normalize, eps)
    q, state = scale * q, _start(initial_state, k, v)
    offset = k.shape[2] - q.shape[2]
    parts = []
    for t in range(min(0, offset), k.shape[2]):  # t < 0: queries that stand before the first key
        if t >= 0:
            state = absorb(state, k[:, :, t : t + 1], v[:, :, t : t + 1])
        if t >= offset:
            parts.append(read(state, q[:, :, t - offset : t - offset + 1]))
    numerator = torch.cat([num for num, _ in parts], dim=2)
    denominator = torch.cat([den for _, den in parts], dim=2)
    return _divide(numerator, denominator, normalize, eps).to(dtype), state


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: FeatureMapLike,
    scale: float | None,
    normalize: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Checked inputs in at least float32, q and k mapped: ``(phi(q), phi(k), v, scale)``."""
    check_qkv(q, k, v, any_value_dim=True)
    scale = resolve_scale(scale, q.shape[3])
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")
    phi = resolve_feature_map(feature_map, normalize)
    # Half precision is widened first: sums over thousands of tokens would lose the small ones.
    dtype = torch.promote_types(q.dtype, torch.float32)
    phi_q, phi_k = apply_feature_map(phi, "q", q.to(dtype)), apply_feature_map(phi, "k", k.to(dtype))
    if phi_q.shape[3] != phi_k.shape[3]:
        raise ValueError(
            f"feature_map: expected as many features for k as for q ({phi_q.shape[3]}), got {phi_k.shape[3]}"
        )
    return phi_q, phi_k, v.to(dtype), scale


def _start(
    state: LinearState | None, k: torch.Tensor, v: torch.Tensor, name: str = "initial_state"
) -> LinearState:
    """The state to begin with, in the dtype of the mapped keys; checked against them."""
    batch, heads, _, feature_dim = k.shape
    shapes = {"S": (batch, heads, feature_dim, v.shape[3]), "z": (batch, heads, feature_dim)}
    if state is None:
        return init_state(*shapes["S"], dtype=k.dtype, device=k.device)
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"{name}: expected a LinearState (S, z) or None, got {type(state).__name__}")
    for (part, shape), x in zip(shapes.items(), state):
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected {part} of shape {shape}, got {came}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: expected {part} in float32 or float64, got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"{name}: expected {part} on the device of k ({k.device}), got {x.device}")
    return LinearState(*(x.to(k.dtype) for x in state))


def _divide(numerator: torch.Tensor, denominator: torch.Tensor, normalize: bool, eps: float) -> torch.Tensor:
    if not normalize:
        return numerator
    total = denominator + eps
    # Without eps a query that sees no key has 0 / 0; its output is 0, as everywhere in the book.
    return numerator / torch.where(total == 0, 1.0, total)[..., None]
