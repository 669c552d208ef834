"""ZeroS in readable PyTorch: weights of either sign in linear time, by three running sums.

The weight of key i at step t is ``r_ti cos(q_t, k_i)``: a radial part ``r`` whose sum over the keys is zero
(:mod:`effattn_lab.linear.zeros_weights`), and an angle. With logits ``s_i`` that need no query, ``r`` is a mix of
three functions of the key's step, ``r_ti = alpha_t e^(s_i) + beta_t s_i + gamma_t``, and the query's step only
chooses the mix. So three sums remember the past (:mod:`effattn_lab.linear.zeros_state`). The forms below compute one
function in different orders. Source: Lu et al. 2025 (ZeroS), section 3; the chunkwise form is ours.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.linear.zeros_state import Gates, ZeroSState, absorb, chunk_step, init_state, read
from effattn_lab.linear.zeros_weights import unit, zero_sum_weights


def zeros(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The reference, all weights laid out: ``o_t = sum_i r_ti cos(q_t, k_i) v_i`` over the visible keys.

    ``r_ti = gate_1_t delta_ti / t + gate_h_t (softmax(s)_i - 1/t - delta_ti / t)``, the softmax over the t visible
    keys, ``delta_ti = s_i - mean(s)``. It sums to zero; the product with the cosine need not.

    Args:
        q: queries ``[B, Hq, seqlen_q, D]``, any floating dtype and any length: only their direction counts.
        k: keys ``[B, Hkv, seqlen_k, D]``; Hkv divides Hq, query head h reads key head ``h // (Hq / Hkv)``.
        v: values ``[B, Hkv, seqlen_k, Dv]``; Dv may differ from D.
        logits: s, one for each key, ``[B, Hkv, seqlen_k]``, see
            :func:`effattn_lab.linear.zeros_weights.deviation_logits`. Unbounded ones give unbounded weights.
        gate_1: of the first order, one for each query, ``[B, Hq, seqlen_q]``; in the paper a sigmoid.
        gate_h: of the higher orders, the same shape.
        gate_0: of the constant ``1/t``, the same shape. Default None: it is removed, which is the paper's layer.
        causal: each query sees keys up to its own position; with ``seqlen_q != seqlen_k`` the queries are the last
            positions (the offset rule). Default False: t is ``seqlen_k`` for all.

    Returns:
        ``[B, Hq, seqlen_q, Dv]`` in the dtype of ``q``. Computed in float64 for float64 inputs, else in float32.
        A query that sees no key gets 0, and so does one that sees a single key.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, logits, gates = _prepare(q, k, v, logits, gate_1, gate_h, gate_0)
    groups = q.shape[1] // k.shape[1]
    scores = repeat_kv(logits[:, :, None], groups).expand(*q.shape[:3], -1)
    keep = visible(q.shape[2], k.shape[2], causal=causal, device=q.device)
    r = zero_sum_weights(scores, gates.first, gates.higher, gate_0=gates.zeroth, keep=keep)
    cosine = q @ repeat_kv(k, groups).transpose(-1, -2)  # [B, Hq, seqlen_q, seqlen_k]
    return ((r * cosine) @ repeat_kv(v, groups)).to(dtype)


def zeros_sm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    cosine: bool = False,
) -> torch.Tensor:
    """ZeroS-SM: the zero-sum weights of ordinary attention scores, ``s_ti = scale q_t . k_i``. Quadratic, always.

    Args:
        q, k, v, gate_1, gate_h, gate_0, causal: as in :func:`zeros`.
        scale: multiplies the scores. Default ``D ** -0.5``.
        cosine: multiply the weights by ``cos(q_t, k_i)`` as ZeroS does. The paper defines the weights for any scores
            and leaves open, as far as we could read it, whether the angle stays; default False.

    Returns and raises as :func:`zeros`.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    check_qkv(q, k, v, any_value_dim=True)
    scale = resolve_scale(scale, q.shape[3])
    wide, gates = _check_gates(q, gate_1, gate_h, gate_0)
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.to(wide), repeat_kv(k.to(wide), groups), repeat_kv(v.to(wide), groups)
    keep = visible(q.shape[2], k.shape[2], causal=causal, device=q.device)
    scores = scale * (q @ k.transpose(-1, -2))
    r = zero_sum_weights(scores, gates.first, gates.higher, gate_0=gates.zeroth, keep=keep)
    if cosine:
        r = r * (unit(q) @ unit(k).transpose(-1, -2))
    return (r @ v).to(dtype)


@overload
def zeros_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = ...,
    causal: bool = ...,
    chunk_size: int = ...,
    initial_state: ZeroSState | None = ...,
    return_state: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def zeros_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = ...,
    causal: bool = ...,
    chunk_size: int = ...,
    initial_state: ZeroSState | None = ...,
    return_state: Literal[True],
) -> tuple[torch.Tensor, ZeroSState]: ...
def zeros_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
    causal: bool = False,
    chunk_size: int = 64,
    initial_state: ZeroSState | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ZeroSState]:
    """:func:`zeros` in time linear in the length, by matrix products; differentiable.

    Causal: chunk after chunk, :func:`chunk_step`. Not causal: all keys are absorbed, then every query reads.

    Args:
        q, k, v, logits, gate_1, gate_h, gate_0, causal: as in :func:`zeros`.
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
    q, k, v, s, gates = _prepare(q, k, v, logits, gate_1, gate_h, gate_0)
    state = _start(initial_state, k, v)
    if not causal:
        state = absorb(state, k, v, s)
        out = read(state, q, gates)
    else:
        # Offset rule: keys before the first query are absorbed at once; queries before the first key read the
        # initial state. What is left has one key for each query.
        offset = k.shape[2] - q.shape[2]
        early, blind = max(0, offset), max(0, -offset)
        parts = [read(state, q[:, :, :blind], gates.rows(0, blind))] if blind else []
        state = absorb(state, k[:, :, :early], v[:, :, :early], s[:, :, :early])
        for a in range(early, k.shape[2], chunk_size):
            b = min(a + chunk_size, k.shape[2])
            rows = gates.rows(a - offset, b - offset)
            part, state = chunk_step(
                state, q[:, :, a - offset : b - offset], k[:, :, a:b], v[:, :, a:b], s[:, :, a:b], rows
            )
            parts.append(part)
        out = torch.cat(parts, dim=2)
    return (out.to(dtype), state) if return_state else out.to(dtype)


def zeros_step(
    state: ZeroSState | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ZeroSState]:
    """Decode one token: write it into the three sums, then read them. Time and memory know no length.

    ``o = q (alpha F + beta G + gamma H)`` with ``alpha = gate_h / E``, ``beta = (gate_1 - gate_h) / t`` and
    ``gamma = -(beta P + gate_h) / t``.

    Args:
        state: what :func:`zeros_chunked` or the last step returned; None before the first token.
        q: the token's query ``[B, Hq, 1, D]``.
        k, v, logits: its key ``[B, Hkv, 1, D]``, value ``[B, Hkv, 1, Dv]`` and logit ``[B, Hkv, 1]``.
        gate_1, gate_h, gate_0: as in :func:`zeros`, ``[B, Hq, 1]``.

    Returns:
        ``(out [B, Hq, 1, Dv] in the dtype of q, new state)``; the state given is left as it was.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, s, gates = _prepare(q, k, v, logits, gate_1, gate_h, gate_0)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != 1:
            raise ValueError(f"{name}: expected one token, a length of 1, got {x.shape[2]}")
    state = absorb(_start(state, k, v, name="state"), k, v, s)
    return read(state, q, gates).to(dtype), state


def zeros_recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
    initial_state: ZeroSState | None = None,
) -> tuple[torch.Tensor, ZeroSState]:
    """Causal :func:`zeros`, token after token: the paper's scan.

    Arguments and errors as in :func:`zeros_chunked`, always causal. Returns ``(out, state)``.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, s, gates = _prepare(q, k, v, logits, gate_1, gate_h, gate_0)
    state = _start(initial_state, k, v)
    offset = k.shape[2] - q.shape[2]
    parts = []
    for t in range(min(0, offset), k.shape[2]):  # t < 0: queries that stand before the first key
        if t >= 0:
            state = absorb(state, k[:, :, t : t + 1], v[:, :, t : t + 1], s[:, :, t : t + 1])
        if t >= offset:
            i = t - offset
            parts.append(read(state, q[:, :, i : i + 1], gates.rows(i, i + 1)))
    return torch.cat(parts, dim=2).to(dtype), state


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    gate_0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Gates]:
    """Checked inputs in at least float32, queries and keys of length 1."""
    check_qkv(q, k, v, any_value_dim=True)
    dtype, gates = _check_gates(q, gate_1, gate_h, gate_0)
    _check_rows("logits", logits, tuple(k.shape[:3]), q.device)
    return unit(q.to(dtype)), unit(k.to(dtype)), v.to(dtype), logits.to(dtype), gates


def _check_gates(
    q: torch.Tensor, gate_1: torch.Tensor, gate_h: torch.Tensor, gate_0: torch.Tensor | None
) -> tuple[torch.dtype, Gates]:
    # Half precision is widened first: weights are differences of nearly equal numbers.
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = tuple(q.shape[:3])
    for name, x in (("gate_1", gate_1), ("gate_h", gate_h), ("gate_0", gate_0)):
        if name != "gate_0" or x is not None:
            _check_rows(name, x, shape, q.device)
    return dtype, Gates(gate_1.to(dtype), gate_h.to(dtype), None if gate_0 is None else gate_0.to(dtype))


def _check_rows(name: str, x: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or not x.is_floating_point():
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a floating-point tensor of shape {shape}, got {came}")
    if x.device != device:
        raise ValueError(f"{name}: expected the device of q ({device}), got {x.device}")


def _start(
    state: ZeroSState | None, k: torch.Tensor, v: torch.Tensor, name: str = "initial_state"
) -> ZeroSState:
    """The state to begin with, in the dtype of the keys; checked against them."""
    batch, heads, _, dim = k.shape
    if state is None:
        return init_state(batch, heads, dim, v.shape[3], dtype=k.dtype, device=k.device)
    fields = ZeroSState._fields
    if not isinstance(state, tuple) or len(state) != len(fields):
        raise ValueError(
            f"{name}: expected a ZeroSState ({', '.join(fields)}) or None, got {type(state).__name__}"
        )
    for part, x in zip(fields, state):
        shape = (batch, heads, dim, v.shape[3]) if part in ("F", "G", "H") else (batch, heads)
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected {part} of shape {shape}, got {came}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: expected {part} in float32 or float64, got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"{name}: expected {part} on the device of k ({k.device}), got {x.device}")
    return ZeroSState(*(x.to(k.dtype) for x in state))
