"""Gated linear attention, forward: a pass that leaves a state at every chunk border, and a pass that reads.

As in `_linear_attention_fwd`, with decays: see `_gated_linear_decay`. Rows that do not exist read as zeros: no key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import cast, dot
from ._gated_linear_decay import (
    add_channel_scores,
    decay_between,
    decay_from_border,
    for_product,
    load_sums,
)
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state


@triton.jit
def _gated_linear_states_kernel(
    k_ptr, v_ptr, sums_ptr, low_ptr, states_ptr, s0_ptr, sT_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """State at every border, ``S' = 2^G_C S + (2^(G_C - G) K)^T V``.

    Grid: (tiles of V, tiles of K, batch * key heads); each walks all chunks.
    """
    pid_v = tl.program_id(0)
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)  # int64: batch * stride can pass 2^31 elements
    k_ptr += pair // num_heads * stride_kb + pair % num_heads * stride_kh
    v_ptr += pair // num_heads * stride_vb + pair % num_heads * stride_vh
    sums_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    low_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    states_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    one = tl.arange(0, 1)

    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if INITIAL:
        s += load_state(s0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
    for c in range(0, num_chunks):
        store_state(states_ptr, s, c, offs_k, offs_v, K, V)
        first = c * CHUNK
        last = tl.minimum(first + CHUNK, seqlen) - 1
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)
        v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V)
        sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        end, end_low = load_sums(sums_ptr, low_ptr, last + one, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        k = cast(k.to(tl.float32) * decay_between(end, end_low, sums, low, EXACT), v.dtype)
        s = s * tl.trans(decay_from_border(end, end_low, EXACT)) + dot(tl.trans(k), v)  # [BLOCK_K, BLOCK_V]
    if FINAL:
        store_state(sT_ptr, s, pair, offs_k, offs_v, K, V)


@triton.jit
def _gated_linear_outputs_kernel(
    q_ptr, k_ptr, v_ptr, sums_ptr, low_ptr, states_ptr, o_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, groups, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``O = scale (A V + 2^G Q S)``, A the decayed scores. Grid: (chunks, tiles of V, batch * heads)."""
    chunk = tl.program_id(0)
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    kv_head = head // groups
    kv_pair = batch * (num_heads // groups) + kv_head
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    sums_ptr += kv_pair * seqlen * (K if PER_CHANNEL else 1)
    low_ptr += kv_pair * seqlen * (K if PER_CHANNEL else 1)
    states_ptr += kv_pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, seqlen) - 1
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    a = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        q = load_rows(q_ptr, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K)
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)
        s = load_state(states_ptr, chunk, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        s, size = for_product(s, q.dtype)
        if PER_CHANNEL:
            sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, offs_k, K, BLOCK_K, True, EXACT)
            a = add_channel_scores(
                a, q, k, sums, low, sums_ptr, low_ptr, first, rows, last, offs_k, K, BLOCK_K, LEVELS, EXACT
            )
            q = cast(q.to(tl.float32) * decay_from_border(sums, low, EXACT), q.dtype)
        else:
            a += dot(q, tl.trans(k))
        acc += dot(q, s) * size
    if not PER_CHANNEL:
        sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, rows, K, BLOCK_K, False, EXACT)
        acc *= decay_from_border(sums, low, EXACT)
        a *= decay_between(sums, low, tl.trans(sums), tl.trans(low), EXACT)
    a = tl.where(rows[:, None] >= rows[None, :], a, 0.0)
    v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V)
    acc += dot(cast(a, v.dtype), v)
    store_rows(o_ptr + pair * seqlen * V, acc * scale, first, rows, seqlen, offs_v, V)
