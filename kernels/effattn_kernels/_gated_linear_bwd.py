"""Gated linear attention, backward: the same two passes, the other way round. No atomics, the same bits every run.

``D_c`` is the gradient of the state at border c; with ``P = dO V^T`` the gradients of one chunk are::

    D_c = 2^G_C D_(c+1) + scale (2^G Q)^T dO
    dq_i = scale (2^G_i S_c dO_i    + sum_(j <= i) P_ij 2^(G_i - G_j) k_j)
    dk_j = 2^(G_C - G_j) D_(c+1) v_j + scale sum_(i >= j) P_ij 2^(G_i - G_j) q_i
    dv_j = (2^(G_C - G_j) k_j)^T D_(c+1) + scale sum_(i >= j) A_ij dO_i

Each decay lies between a query (or the chunk's end) and a key (or its beginning), so that its gradient is a sum of
what the tokens around it have already: ``dg_t = sum_(s >= t) (q_s dq_s - k_s dk_s) + <D_(c+1), S_(c+1)>``, over the
tokens of the chunk. The last term, the gradient of all that leaves the chunk, is ``2^G_C <D_(c+1), S_c>`` plus the
part of ``k dk`` that came through D.
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
    level_factors,
    load_sums,
    pair_level,
)
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state


@triton.jit
def _gated_linear_dstates_kernel(
    q_ptr, do_ptr, sums_ptr, low_ptr, dstates_ptr, dsT_ptr, ds0_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_kv_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """``D_1 .. D_M`` from the end, kept at 0 .. M - 1. Grid: (tiles of V, tiles of K, batch * key heads).

    FINAL: a gradient came back through the final state. INITIAL: the initial state's, ``D_0``, is wanted.
    """
    pid_v = tl.program_id(0)
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    q_ptr += batch * stride_qb + kv_head * GROUPS * stride_qh
    do_ptr += batch * stride_dob + kv_head * GROUPS * stride_doh
    sums_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    low_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    dstates_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    one = tl.arange(0, 1)

    d = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if FINAL:
        d += load_state(dsT_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
    for step in range(0, num_chunks):
        chunk = num_chunks - 1 - step
        store_state(dstates_ptr, d, chunk, offs_k, offs_v, K, V)
        first = chunk * CHUNK
        last = tl.minimum(first + CHUNK, seqlen) - 1
        sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        end, end_low = load_sums(sums_ptr, low_ptr, last + one, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        kept = decay_from_border(sums, low, EXACT)
        d *= tl.trans(decay_from_border(end, end_low, EXACT))
        for h in range(0, GROUPS):
            q = load_rows(
                q_ptr + h * stride_qh, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K
            )
            do = load_rows(
                do_ptr + h * stride_doh, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V
            )
            d += dot(tl.trans(cast(q.to(tl.float32) * kept, q.dtype)), do) * scale
    if INITIAL:
        store_state(ds0_ptr, d, pair, offs_k, offs_v, K, V)


@triton.jit
def _gated_linear_dqdk_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, sums_ptr, low_ptr, states_ptr, dstates_ptr, dq_ptr, dk_ptr, dg_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_kv_heads, num_pairs, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dG, which share ``dO V^T``. Grid: (chunks, tiles of K, batch * key heads).

    dG of a decay a head is a sum over channels; each tile of K leaves its part, ``[tiles, pairs, seqlen]``.
    """
    chunk = tl.program_id(0)
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    q_ptr += batch * stride_qb + kv_head * GROUPS * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    do_ptr += batch * stride_dob + kv_head * GROUPS * stride_doh
    sums_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    low_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    states_ptr += pair * num_chunks * (K * V)
    dstates_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, seqlen) - 1
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    one = tl.arange(0, 1)
    sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
    end, end_low = load_sums(sums_ptr, low_ptr, last + one, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
    kept = decay_from_border(sums, low, EXACT)
    k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)

    dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    dg = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    leaves = tl.zeros([1, BLOCK_K], tl.float32)  # <D_(c+1), S_(c+1)>
    for h in range(0, GROUPS):
        dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        p = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start_v in range(0, V, BLOCK_V):
            offs_v = start_v + tl.arange(0, BLOCK_V)
            v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V)
            do = load_rows(
                do_ptr + h * stride_doh, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V
            )
            p += dot(do, tl.trans(v))  # [queries, keys]
            s = load_state(states_ptr, chunk, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
            if h == 0:  # later queries of all the group's heads are in D already
                d = load_state(dstates_ptr, chunk, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
                leaves += tl.sum(tl.trans(s.to(tl.float32) * d.to(tl.float32)), 0)[None, :]
                d, size_d = for_product(d, v.dtype)
                dk += dot(v, tl.trans(d)) * size_d  # [CHUNK, BLOCK_K]
            s, size_s = for_product(s, v.dtype)
            dq += dot(do, tl.trans(s)) * size_s
        if h == 0:
            dk *= decay_between(end, end_low, sums, low, EXACT)
            leaves = leaves * decay_from_border(end, end_low, EXACT)
            leaves += tl.sum(k.to(tl.float32) * dk, 0)[None, :]
        q = load_rows(q_ptr + h * stride_qh, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K)
        dq *= kept
        if PER_CHANNEL:
            different = pair_level(rows)
            own = tl.sum(tl.where(different == 0, p, 0.0), 1)[:, None] * scale
            dq = dq * scale + own * k.to(tl.float32)
            dk += own * q.to(tl.float32)
            p = tl.where(rows[:, None] > rows[None, :], p, 0.0)
            p = cast(p + tl.trans(p), k.dtype)
            nothing = tl.zeros([CHUNK, CHUNK], k.dtype)
            for level in tl.range(0, LEVELS, num_stages=1):
                f, late = level_factors(
                    sums, low, sums_ptr, low_ptr, first, rows, last, offs_k, level, K, BLOCK_K, EXACT)  # fmt: skip
                x = cast(tl.where(late, q, k).to(tl.float32) * f, k.dtype)
                t = dot(tl.where((different >> level) == 1, p, nothing), x) * (f * scale)
                dq += tl.where(late, t, 0.0)
                dk += tl.where(late, 0.0, t)
        else:
            p *= decay_between(sums, low, tl.trans(sums), tl.trans(low), EXACT)
            p = cast(tl.where(rows[:, None] >= rows[None, :], p, 0.0), k.dtype)
            dq = (dq + dot(p, k)) * scale
            dk += dot(tl.trans(p), q) * scale
        store_rows(dq_ptr + (pair * GROUPS + h) * seqlen * K, dq, first, rows, seqlen, offs_k, K)
        dg += q.to(tl.float32) * dq
    store_rows(dk_ptr + pair * seqlen * K, dk, first, rows, seqlen, offs_k, K)
    dg -= k.to(tl.float32) * dk
    if PER_CHANNEL:
        dg = tl.cumsum(dg, 0, reverse=True) + leaves
        store_rows(dg_ptr + pair * seqlen * K, dg, first, rows, seqlen, offs_k, K)
    else:
        total = tl.cumsum(tl.sum(dg, 1), 0, reverse=True) + tl.sum(leaves)
        tl.store(
            dg_ptr + (pid_k * num_pairs + pair) * seqlen + first + rows, total, mask=first + rows < seqlen
        )


@triton.jit
def _gated_linear_dv_kernel(
    q_ptr, k_ptr, do_ptr, sums_ptr, low_ptr, dstates_ptr, dv_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_kv_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dV; scores are kept transposed, ``[keys, queries]``. Grid: (chunks, tiles of V, batch * key heads)."""
    chunk = tl.program_id(0)
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    q_ptr += batch * stride_qb + kv_head * GROUPS * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    do_ptr += batch * stride_dob + kv_head * GROUPS * stride_doh
    sums_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    low_ptr += pair * seqlen * (K if PER_CHANNEL else 1)
    dstates_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, seqlen) - 1
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    one = tl.arange(0, 1)

    dv = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)
        sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        end, end_low = load_sums(sums_ptr, low_ptr, last + one, last, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        d = load_state(dstates_ptr, chunk, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        d, size = for_product(d, k.dtype)
        dv += dot(cast(k.to(tl.float32) * decay_between(end, end_low, sums, low, EXACT), k.dtype), d) * size
    for h in range(0, GROUPS):
        a = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start_k in range(0, K, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)
            q = load_rows(
                q_ptr + h * stride_qh, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K
            )
            if PER_CHANNEL:
                sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, offs_k, K, BLOCK_K, True, EXACT)
                a = add_channel_scores(
                    a,
                    q,
                    k,
                    sums,
                    low,
                    sums_ptr,
                    low_ptr,
                    first,
                    rows,
                    last,
                    offs_k,
                    K,
                    BLOCK_K,
                    LEVELS,
                    EXACT,
                )
            else:
                a += dot(k, tl.trans(q))
        if not PER_CHANNEL:
            sums, low = load_sums(sums_ptr, low_ptr, first + rows, last, rows, K, CHUNK, False, EXACT)
            a *= decay_between(tl.trans(sums), tl.trans(low), sums, low, EXACT)
        do = load_rows(
            do_ptr + h * stride_doh, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V
        )
        a = tl.where(rows[None, :] >= rows[:, None], a, 0.0)
        dv += dot(cast(a, do.dtype), do) * scale
    store_rows(dv_ptr + pair * seqlen * V, dv, first, rows, seqlen, offs_v, V)
