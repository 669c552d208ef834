"""Gated linear attention, forward: a pass that leaves a state at every chunk border, and a pass that reads.

As in `_linear_attention_fwd`, with decays: see `_gated_linear_decay`. Rows that do not exist read as zeros: no key.
Row strides are constants of the compilation: the addresses of a tile are then one register and offsets in the code.
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
    head_offset,
    load_columns,
    load_sums,
    pair_of,
    tile_of,
)
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state


@triton.jit
def _gated_linear_states_kernel(
    k_ptr, v_ptr, sums_ptr, low_ptr, states_ptr, s0_ptr, sT_ptr,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd,
    num_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """State at every border, ``S' = 2^G_C S + (2^(G_C - G) K)^T V``.

    Grid: (tiles of K * tiles of V, key heads, batch); each walks all chunks.
    """
    pid_k, pid_v = tile_of(tl.program_id(0), V, BLOCK_V)
    pair = pair_of(num_heads)
    k_ptr += head_offset(stride_kb, stride_kh, tl.program_id(1))
    v_ptr += head_offset(stride_vb, stride_vh, tl.program_id(1))
    SUMS: tl.constexpr = CHUNK * (K if PER_CHANNEL else 1)
    sums_ptr += pair * num_chunks * SUMS
    low_ptr += pair * num_chunks * SUMS
    states_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    end_row = tl.arange(0, 1) + (CHUNK - 1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    WHOLE: tl.constexpr = (K % BLOCK_K == 0) & (V % BLOCK_V == 0)

    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if INITIAL:
        s += load_state(s0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
    for c in range(0, num_chunks):
        store_state(states_ptr, s, c, offs_k, offs_v, K, V, WHOLE)
        k = load_rows(k_ptr, c * CHUNK, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
        v = load_rows(v_ptr, c * CHUNK, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
        sums, low = load_sums(sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        end, end_low = load_sums(sums_ptr, low_ptr, end_row, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        k = cast(k.to(tl.float32) * decay_between(end, end_low, sums, low, EXACT), v.dtype)
        s = s * tl.trans(decay_from_border(end, end_low, EXACT)) + dot(tl.trans(k), v)  # [BLOCK_K, BLOCK_V]
        sums_ptr += SUMS
        low_ptr += SUMS
    if FINAL:
        store_state(sT_ptr, s, pair, offs_k, offs_v, K, V, WHOLE)


@triton.jit
def _gated_linear_outputs_kernel(
    q_ptr, k_ptr, v_ptr, sums_ptr, low_ptr, states_ptr, o_ptr, scale,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd,
    num_kv_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``O = scale (A V + 2^G Q S)``, A the decayed scores. Grid: (chunks * tiles of V, heads, batch)."""
    chunk, pid_v = tile_of(tl.program_id(0), V, BLOCK_V)
    pair = pair_of(num_kv_heads * GROUPS)
    kv_head = tl.program_id(1) // GROUPS
    border = (tl.program_id(2).to(tl.int64) * num_kv_heads + kv_head) * num_chunks + chunk
    q_ptr += head_offset(stride_qb, stride_qh, tl.program_id(1))
    k_ptr += head_offset(stride_kb, stride_kh, kv_head)
    v_ptr += head_offset(stride_vb, stride_vh, kv_head)
    sums_ptr += border * (CHUNK * (K if PER_CHANNEL else 1))
    low_ptr += border * (CHUNK * (K if PER_CHANNEL else 1))
    rows = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    if (
        not PER_CHANNEL and K <= BLOCK_K
    ):  # scores first, in the inputs' dtype before the sum takes its registers
        offs_k = tl.arange(0, BLOCK_K)
        q = load_rows(q_ptr, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K, True)
        a = dot(q, load_columns(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K))
        sums, low = load_sums(sums_ptr, low_ptr, rows, rows, K, BLOCK_K, False, EXACT)
        a *= decay_between(sums, low, tl.trans(sums), tl.trans(low), EXACT)
        a = cast(tl.where(rows[:, None] >= rows[None, :], a, 0.0), q.dtype)
        s, size = for_product(load_state(states_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V), q.dtype)
        acc = dot(q, s) * (decay_from_border(sums, low, EXACT) * size)
        v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
        acc += dot(a, v)
    else:
        acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        a = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start_k in range(0, K, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            q = load_rows(q_ptr, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K, True)
            s = load_state(states_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
            s, size = for_product(s, q.dtype)
            if PER_CHANNEL:
                k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
                sums, low = load_sums(sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, True, EXACT)
                a = add_channel_scores(
                    a, q, k, sums, low, sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, LEVELS, EXACT
                )
                q = cast(q.to(tl.float32) * decay_from_border(sums, low, EXACT), q.dtype)
            else:
                a += dot(
                    q, load_columns(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)
                )
            acc += dot(q, s) * size
        if not PER_CHANNEL:
            sums, low = load_sums(sums_ptr, low_ptr, rows, rows, K, BLOCK_K, False, EXACT)
            acc *= decay_from_border(sums, low, EXACT)
            a *= decay_between(sums, low, tl.trans(sums), tl.trans(low), EXACT)
        a = cast(tl.where(rows[:, None] >= rows[None, :], a, 0.0), v_ptr.dtype.element_ty)
        v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
        acc += dot(a, v)
    store_rows(o_ptr + pair * seqlen * V, acc * scale, first, rows, seqlen, offs_v, V, V % BLOCK_V == 0)
