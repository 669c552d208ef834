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
    head_offset,
    level_factors,
    load_columns,
    load_state_columns,
    load_sums,
    pair_level,
    pair_of,
    tile_of,
)
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state


@triton.jit
def _gated_linear_dstates_kernel(
    q_ptr, do_ptr, sums_ptr, low_ptr, dstates_ptr, dsT_ptr, ds0_ptr, scale,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd,
    stride_dob, stride_doh, stride_don: tl.constexpr, stride_dod,
    num_kv_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """``D_1 .. D_M`` from the end, kept at 0 .. M - 1. Grid: (tiles of K * tiles of V, key heads, batch).

    FINAL: a gradient came back through the final state. INITIAL: the initial state's, ``D_0``, is wanted.
    """
    pid_k, pid_v = tile_of(tl.program_id(0), V, BLOCK_V)
    pair = pair_of(num_kv_heads)
    q_ptr += head_offset(stride_qb, stride_qh, tl.program_id(1) * GROUPS)
    do_ptr += head_offset(stride_dob, stride_doh, tl.program_id(1) * GROUPS)
    SUMS: tl.constexpr = CHUNK * (K if PER_CHANNEL else 1)
    sums_ptr += pair * num_chunks * SUMS
    low_ptr += pair * num_chunks * SUMS
    dstates_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    end_row = tl.arange(0, 1) + (CHUNK - 1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    WHOLE: tl.constexpr = (K % BLOCK_K == 0) & (V % BLOCK_V == 0)
    HALF: tl.constexpr = q_ptr.dtype.element_ty == tl.float16

    d = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if FINAL:
        d += load_state(dsT_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
    for step in range(0, num_chunks):
        chunk = num_chunks - 1 - step
        store_state(dstates_ptr, d, chunk, offs_k, offs_v, K, V, WHOLE)
        here, low_here = sums_ptr + chunk * SUMS, low_ptr + chunk * SUMS
        sums, low = load_sums(here, low_here, rows, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        end, end_low = load_sums(here, low_here, end_row, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
        kept = decay_from_border(sums, low, EXACT)
        if not HALF:
            kept *= scale
        d *= tl.trans(decay_from_border(end, end_low, EXACT))
        for h in range(0, GROUPS):
            q_head, do_head = q_ptr + h * stride_qh, do_ptr + h * stride_doh
            first = chunk * CHUNK
            q = load_rows(q_head, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K, True)
            do = load_rows(do_head, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V, True)
            q = tl.trans(cast(q.to(tl.float32) * kept, q.dtype))
            if HALF:  # a small scale would push the product out of fp16's range
                d += dot(q, do) * scale
            else:
                d += dot(q, do)
    if INITIAL:
        store_state(ds0_ptr, d, pair, offs_k, offs_v, K, V, WHOLE)


@triton.jit
def _gated_linear_dqdk_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, sums_ptr, low_ptr, states_ptr, dstates_ptr, dq_ptr, dk_ptr, dg_ptr, scale,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd,
    stride_dob, stride_doh, stride_don: tl.constexpr, stride_dod,
    num_kv_heads, num_pairs, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dG, which share ``dO V^T``. Grid: (chunks * tiles of K, key heads, batch).

    dG of a decay a head is a sum over channels; each tile of K leaves its part, ``[tiles, pairs, seqlen]``.
    """
    chunk, pid_k = tile_of(tl.program_id(0), K, BLOCK_K)
    pair = pair_of(num_kv_heads)
    q_ptr += head_offset(stride_qb, stride_qh, tl.program_id(1) * GROUPS)
    k_ptr += head_offset(stride_kb, stride_kh, tl.program_id(1))
    v_ptr += head_offset(stride_vb, stride_vh, tl.program_id(1))
    do_ptr += head_offset(stride_dob, stride_doh, tl.program_id(1) * GROUPS)
    border = pair * num_chunks + chunk
    sums_ptr += border * (CHUNK * (K if PER_CHANNEL else 1))
    low_ptr += border * (CHUNK * (K if PER_CHANNEL else 1))
    rows = tl.arange(0, CHUNK)
    end_row = tl.arange(0, 1) + (CHUNK - 1)
    first = chunk * CHUNK
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    sums, low = load_sums(sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
    end, end_low = load_sums(sums_ptr, low_ptr, end_row, offs_k, K, BLOCK_K, PER_CHANNEL, EXACT)
    kept = decay_from_border(sums, low, EXACT)
    HALF: tl.constexpr = q_ptr.dtype.element_ty == tl.float16
    if not HALF:
        kept *= scale
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    dq_ptr += pair * GROUPS * seqlen * K
    dk_ptr += pair * seqlen * K
    dg_ptr += (pid_k * num_pairs + pair) * seqlen if not PER_CHANNEL else pair * seqlen * K

    # One gradient after the other, where one tile holds all values: fewer registers at a time.
    if not PER_CHANNEL and V <= BLOCK_V and GROUPS == 1 and not HALF:
        offs_v = tl.arange(0, BLOCK_V)
        v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
        do = load_rows(do_ptr, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V, True)
        p = dot(do, tl.trans(v))
        p *= decay_between(sums, low, tl.trans(sums), tl.trans(low), EXACT) * scale
        p = cast(tl.where(rows[:, None] >= rows[None, :], p, 0.0), v.dtype)
        s = load_state_columns(states_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        dq = dot(do, s) * kept
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
        dq += dot(p, k)
        store_rows(dq_ptr, dq, first, rows, seqlen, offs_k, K, WHOLE)
        q = load_rows(q_ptr, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K, True)
        dg = tl.sum(q.to(tl.float32) * dq, 1)
        d = load_state_columns(dstates_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        leaves = tl.sum(s.to(tl.float32) * d.to(tl.float32)) * tl.sum(decay_from_border(end, end_low, EXACT))
        dk = dot(v, d) * decay_between(end, end_low, sums, low, EXACT)
        leaves += tl.sum(k.to(tl.float32) * dk)
        dk += dot(tl.trans(p), q)
        store_rows(dk_ptr, dk, first, rows, seqlen, offs_k, K, WHOLE)
        dg -= tl.sum(k.to(tl.float32) * dk, 1)
        tl.store(dg_ptr + first + rows, tl.cumsum(dg, 0, reverse=True) + leaves, mask=first + rows < seqlen)
    else:
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
        dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        dg = tl.zeros([CHUNK, BLOCK_K], tl.float32) if PER_CHANNEL else tl.zeros([CHUNK], tl.float32)
        leaves = tl.zeros([BLOCK_K], tl.float32) if PER_CHANNEL else 0.0  # <D_(c+1), S_(c+1)>
        for h in range(0, GROUPS):
            dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            p = tl.zeros([CHUNK, CHUNK], tl.float32)
            for start_v in range(0, V, BLOCK_V):
                offs_v = start_v + tl.arange(0, BLOCK_V)
                do_head = do_ptr + h * stride_doh
                v = load_rows(v_ptr, first, rows, seqlen, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
                do = load_rows(do_head, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V, True)
                p += dot(do, tl.trans(v))  # [queries, keys]
                s = load_state_columns(states_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
                if h == 0:  # later queries of all the group's heads are in D already
                    d = load_state_columns(dstates_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
                    if PER_CHANNEL:
                        leaves += tl.sum(s.to(tl.float32) * d.to(tl.float32), 0)
                    else:
                        leaves += tl.sum(s.to(tl.float32) * d.to(tl.float32))
                    d, size_d = for_product(d, v.dtype)
                    dk += dot(v, d) * size_d  # [CHUNK, BLOCK_K]
                s, size_s = for_product(s, v.dtype)
                dq += dot(do, s) * size_s
            if h == 0:
                dk *= decay_between(end, end_low, sums, low, EXACT)
            q_head = q_ptr + h * stride_qh
            q = load_rows(q_head, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K, True)
            dq *= kept
            if PER_CHANNEL:
                if h == 0:
                    leaves = leaves * tl.sum(decay_from_border(end, end_low, EXACT), 0)
                    leaves += tl.sum(k.to(tl.float32) * dk, 0)
                if not HALF:
                    p *= scale
                different = pair_level(rows)
                own = tl.sum(tl.where(different == 0, p, 0.0), 1)[:, None]
                if HALF:
                    own *= scale
                    dq *= scale
                dq += own * k.to(tl.float32)
                dk += own * q.to(tl.float32)
                p = tl.where(rows[:, None] > rows[None, :], p, 0.0)
                p = cast(p + tl.trans(p), k.dtype)
                nothing = tl.zeros([CHUNK, CHUNK], k.dtype)
                for level in tl.range(0, LEVELS, num_stages=1):
                    f, late = level_factors(
                        sums, low, sums_ptr, low_ptr, rows, offs_k, level, K, BLOCK_K, EXACT
                    )
                    x = cast(tl.where(late, q, k).to(tl.float32) * f, k.dtype)
                    t = dot(tl.where((different >> level) == 1, p, nothing), x) * (f * scale if HALF else f)
                    dq += tl.where(late, t, 0.0)
                    dk += tl.where(late, 0.0, t)
                dg += q.to(tl.float32) * dq
            else:
                if h == 0:
                    leaves = leaves * tl.sum(decay_from_border(end, end_low, EXACT)) + tl.sum(
                        k.to(tl.float32) * dk
                    )
                p *= decay_between(sums, low, tl.trans(sums), tl.trans(low), EXACT)
                if not HALF:
                    p *= scale
                p = cast(tl.where(rows[:, None] >= rows[None, :], p, 0.0), k.dtype)
                if HALF:
                    dq = (dq + dot(p, k)) * scale
                    dk += dot(tl.trans(p), q) * scale
                else:
                    dq += dot(p, k)
                    dk += dot(tl.trans(p), q)
                dg += tl.sum(q.to(tl.float32) * dq, 1)
            store_rows(dq_ptr + h * seqlen * K, dq, first, rows, seqlen, offs_k, K, WHOLE)
        store_rows(dk_ptr, dk, first, rows, seqlen, offs_k, K, WHOLE)
        if PER_CHANNEL:
            dg -= k.to(tl.float32) * dk
            dg = tl.cumsum(dg, 0, reverse=True) + leaves[None, :]
            store_rows(dg_ptr, dg, first, rows, seqlen, offs_k, K, WHOLE)
        else:
            dg -= tl.sum(k.to(tl.float32) * dk, 1)
            total = tl.cumsum(dg, 0, reverse=True) + leaves
            tl.store(dg_ptr + first + rows, total, mask=first + rows < seqlen)


@triton.jit
def _gated_linear_dv_kernel(
    q_ptr, k_ptr, do_ptr, sums_ptr, low_ptr, dstates_ptr, dv_ptr, scale,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd,
    stride_dob, stride_doh, stride_don: tl.constexpr, stride_dod,
    num_kv_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dV; scores are kept transposed, ``[keys, queries]``. Grid: (chunks * tiles of V, key heads, batch)."""
    chunk, pid_v = tile_of(tl.program_id(0), V, BLOCK_V)
    pair = pair_of(num_kv_heads)
    q_ptr += head_offset(stride_qb, stride_qh, tl.program_id(1) * GROUPS)
    k_ptr += head_offset(stride_kb, stride_kh, tl.program_id(1))
    do_ptr += head_offset(stride_dob, stride_doh, tl.program_id(1) * GROUPS)
    border = pair * num_chunks + chunk
    sums_ptr += border * (CHUNK * (K if PER_CHANNEL else 1))
    low_ptr += border * (CHUNK * (K if PER_CHANNEL else 1))
    rows = tl.arange(0, CHUNK)
    end_row = tl.arange(0, 1) + (CHUNK - 1)
    first = chunk * CHUNK
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    HALF: tl.constexpr = q_ptr.dtype.element_ty == tl.float16

    if not PER_CHANNEL:
        sums, low = load_sums(sums_ptr, low_ptr, rows, rows, K, BLOCK_K, False, EXACT)
        end, end_low = load_sums(sums_ptr, low_ptr, end_row, rows, K, BLOCK_K, False, EXACT)

    if not PER_CHANNEL and K <= BLOCK_K and GROUPS == 1:  # scores first, as in the forward pass
        offs_k = tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
        a = dot(k, load_columns(q_ptr, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K))
        a *= decay_between(tl.trans(sums), tl.trans(low), sums, low, EXACT)
        if not HALF:
            a *= scale
        a = cast(tl.where(rows[None, :] >= rows[:, None], a, 0.0), k.dtype)
        d, size = for_product(
            load_state(dstates_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V), k.dtype
        )
        dv = dot(k, d) * (decay_between(end, end_low, sums, low, EXACT) * size)
        do = load_rows(do_ptr, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V, True)
        if HALF:
            dv += dot(a, do) * scale
        else:
            dv += dot(a, do)
    else:
        dv = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        for start_k in range(0, K, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
            d = load_state(dstates_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
            d, size = for_product(d, k.dtype)
            if PER_CHANNEL:
                sums, low = load_sums(sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, True, EXACT)
                end, end_low = load_sums(sums_ptr, low_ptr, end_row, offs_k, K, BLOCK_K, True, EXACT)
                k = cast(k.to(tl.float32) * decay_between(end, end_low, sums, low, EXACT), k.dtype)
            dv += dot(k, d) * size
        if not PER_CHANNEL:
            dv *= decay_between(end, end_low, sums, low, EXACT)
        for h in range(0, GROUPS):
            q_head, do_head = q_ptr + h * stride_qh, do_ptr + h * stride_doh
            a = tl.zeros([CHUNK, CHUNK], tl.float32)
            for start_k in range(0, K, BLOCK_K):
                offs_k = start_k + tl.arange(0, BLOCK_K)
                k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
                if PER_CHANNEL:
                    q = load_rows(q_head, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K, True)
                    sums, low = load_sums(sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, True, EXACT)
                    a = add_channel_scores(
                        a, q, k, sums, low, sums_ptr, low_ptr, rows, offs_k, K, BLOCK_K, LEVELS, EXACT
                    )
                else:
                    q = load_columns(q_head, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K)
                    a += dot(k, q)
            if not PER_CHANNEL:
                a *= decay_between(tl.trans(sums), tl.trans(low), sums, low, EXACT)
            if not HALF:
                a *= scale
            a = cast(tl.where(rows[None, :] >= rows[:, None], a, 0.0), k_ptr.dtype.element_ty)
            do = load_rows(do_head, first, rows, seqlen, stride_don, offs_v, stride_dod, V, BLOCK_V, True)
            if HALF:
                dv += dot(a, do) * scale
            else:
                dv += dot(a, do)
    store_rows(dv_ptr + pair * seqlen * V, dv, first, rows, seqlen, offs_v, V, V % BLOCK_V == 0)
