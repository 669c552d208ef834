"""Linear attention, backward: the same two passes, the other way round. No atomics, the same bits every run.

With ``R_i = scale / (denominator_i + eps)`` and ``delta_i = dO_i . O_i`` (without the normaliser: ``R = scale``,
``delta = 0``) the gradient of a weight is ``R_i (dO_i . v_j - delta_i)``, and::

    dq_i = R_i sum_(j <= i) (dO_i . v_j - delta_i) k_j     = R_i (S dO_i - delta_i z + the same sum inside the chunk)
    dk_j = sum_(i >= j) R_i (dO_i . v_j - delta_i) q_i     = D v_j - d + inside
    dv_j = sum_(i >= j) R_i (q_i . k_j) dO_i               = D^T k_j   + inside

``D = sum R_i q_i dO_i^T`` and ``d = sum R_i delta_i q_i`` run over the queries of all *later* chunks: the gradients
of the states, found in one pass from the end. Border ``c`` of D holds the queries from chunk c on.

PLAIN (lean, and no gradient through the final state): R is the number ``scale`` everywhere, so D is summed
without it and its readers multiply once, at their end. Products then add into one accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import cast, dot
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state


@triton.jit
def row_factors(r_ptr, first, rows, seqlen, scale, NORMALIZE: tl.constexpr, PLAIN: tl.constexpr):
    """R of a chunk as ``(relative [CHUNK], at most 1, size)``, ``R = relative * size``.

    R falls like 1 / position. As such it would leave fp16's range in a long sequence; the relative part keeps in it.
    PLAIN: 1 for rows that do not exist, too: their queries and gradients are zeros.
    """
    here = (first + rows >= 0) & (first + rows < seqlen)
    if NORMALIZE:
        r = tl.load(r_ptr + first + rows, mask=here, other=0.0)
        size = tl.max(tl.abs(r), 0)
        size = tl.where(size == 0.0, 1.0, size)
        relative = r / size
    else:
        if PLAIN:  # noqa: SIM108 (the compiler knows)
            relative = tl.full(rows.shape, 1.0, tl.float32)
        else:
            relative = tl.where(here, 1.0, 0.0)
        size = scale
    return relative, size


@triton.jit
def _linear_attention_delta_kernel(
    o_ptr, do_ptr, delta_ptr, stride_dob, stride_doh, stride_don, stride_dod, num_heads, seqlen_q,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(o * do)``, fp32. Grid: (tiles of rows, 1, batch * heads)."""
    first = tl.program_id(0) * CHUNK
    pair = tl.program_id(2).to(tl.int64)
    do_ptr += pair // num_heads * stride_dob + pair % num_heads * stride_doh
    rows = tl.arange(0, CHUNK)
    delta = tl.zeros([CHUNK], tl.float32)
    for start_v in range(0, V, BLOCK_V):
        offs_v = start_v + tl.arange(0, BLOCK_V)
        o = load_rows(o_ptr + pair * seqlen_q * V, first, rows, seqlen_q, V, offs_v, 1, V, BLOCK_V)
        do = load_rows(do_ptr, first, rows, seqlen_q, stride_don, offs_v, stride_dod, V, BLOCK_V)
        delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + pair * seqlen_q + first + rows, delta, mask=first + rows < seqlen_q)


@triton.jit
def _store_border(
    dstates_ptr, dweight_ptr, dz_ptr, d, z, weight, border, pid_k, pid_v, offs_k, offs_v,
    K: tl.constexpr, V: tl.constexpr, TRACK_Z: tl.constexpr, SCALED: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """D in the dtype of the inputs (SCALED: as a mean, see the forward) and d in fp32."""
    if SCALED:
        weight = tl.where(weight == 0.0, 1.0, weight)
        store_state(dstates_ptr, d / weight, border, offs_k, offs_v, K, V, LEAN)
        tl.store(dweight_ptr + border, weight, mask=(pid_v == 0) & (pid_k == 0))
    else:
        store_state(dstates_ptr, d, border, offs_k, offs_v, K, V, LEAN)
    if TRACK_Z:
        tl.store(dz_ptr + border * K + offs_k, z, mask=(offs_k < K) & (pid_v == 0))


@triton.jit
def _linear_attention_dstates_kernel(
    q_ptr, do_ptr, r_ptr, delta_ptr, dstates_ptr, dweight_ptr, dz_ptr, scale,
    dsT_ptr, dzT_ptr, dsT_size_ptr, ds0_ptr, dz0_ptr,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_kv_heads, seqlen_q, num_chunks, num_borders,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, TRACK_Z: tl.constexpr,
    SCALED: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PLAIN: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """D and d at every border, from the end. Grid: (tiles of V, tiles of K, batch * key heads).

    FINAL: the state after the last key was returned, and a gradient came back through it. INITIAL: the gradient of
    the state before the first key is wanted. Not causal: border 0 only, with all queries in it.
    """
    pid_v = tl.program_id(0)
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    q_ptr += batch * stride_qb + kv_head * GROUPS * stride_qh
    do_ptr += batch * stride_dob + kv_head * GROUPS * stride_doh
    r_ptr += pair * GROUPS * seqlen_q
    delta_ptr += pair * GROUPS * seqlen_q
    dstates_ptr += pair * num_borders * (K * V)
    dz_ptr += pair * num_borders * K
    dweight_ptr += pair * num_borders
    rows = tl.arange(0, CHUNK)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    keep_z = (offs_k < K) & (pid_v == 0)

    d = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    weight = 0.0
    if FINAL:
        d += load_state(dsT_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        z -= tl.load(dzT_ptr + pair * K + offs_k, mask=offs_k < K, other=0.0)
        weight += tl.load(dsT_size_ptr + pair)
    for step in range(0, num_chunks):
        chunk = num_chunks - 1 - step
        if CAUSAL:
            _store_border(
                dstates_ptr, dweight_ptr, dz_ptr, d, z, weight, chunk + 1, pid_k, pid_v, offs_k, offs_v,
                K, V, TRACK_Z, SCALED, LEAN)  # fmt: skip
        first = chunk * CHUNK
        for g in range(0, GROUPS):
            relative, size = row_factors(r_ptr + g * seqlen_q, first, rows, seqlen_q, scale, NORMALIZE, PLAIN)
            q_head = q_ptr + g * stride_qh
            q = load_rows(q_head, first, rows, seqlen_q, stride_qn, offs_k, stride_qd, K, BLOCK_K, LEAN)
            do_head = do_ptr + g * stride_doh
            do = load_rows(do_head, first, rows, seqlen_q, stride_don, offs_v, stride_dod, V, BLOCK_V, LEAN)
            if NORMALIZE:
                delta = tl.load(
                    delta_ptr + g * seqlen_q + first + rows, mask=first + rows < seqlen_q, other=0.0
                )
                z += tl.sum(q.to(tl.float32) * (relative * delta)[:, None], 0) * size
                do = cast(do.to(tl.float32) * relative[:, None], do.dtype)
            if PLAIN:
                d += dot(tl.trans(q), do)
                weight += CHUNK
            else:
                d += dot(tl.trans(q), do) * size
                if SCALED:
                    weight += tl.sum(tl.abs(relative), 0) * tl.abs(size)
    _store_border(
        dstates_ptr, dweight_ptr, dz_ptr, d, z, weight, 0, pid_k, pid_v, offs_k, offs_v, K, V, TRACK_Z, SCALED,
        LEAN,
    )  # fmt: skip
    if INITIAL:
        if PLAIN:
            d *= scale
        store_state(ds0_ptr, d, pair, offs_k, offs_v, K, V)
        tl.store(dz0_ptr + pair * K + offs_k, -z, mask=keep_z)


@triton.jit
def _linear_attention_dqdk_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, r_ptr, delta_ptr,
    states_ptr, weight_ptr, z_ptr, dstates_ptr, dweight_ptr, dz_ptr, dq_ptr, dk_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_kv_heads, seqlen_q, seqlen_k, offset, num_early, num_borders, num_dborders,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, TRACK_Z: tl.constexpr,
    SCALED: tl.constexpr, LEAN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """dQ and dK, which share ``dO V^T``. Grid: (early and other chunks, tiles of K, batch * key heads)."""
    chunk = tl.program_id(0) - num_early
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    q_ptr += batch * stride_qb + kv_head * GROUPS * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    do_ptr += batch * stride_dob + kv_head * GROUPS * stride_doh
    # An early chunk has keys and no queries: it takes D of all queries, and its rows of Q read as zeros.
    border = tl.maximum(chunk, 0) if CAUSAL else 0
    dborder = tl.maximum(chunk + 1, 0) if CAUSAL else 0
    states_ptr += pair * num_borders * (K * V)
    dstates_ptr += pair * num_dborders * (K * V)
    rows = tl.arange(0, CHUNK)
    first_q, first_k = chunk * CHUNK, offset + chunk * CHUNK
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)

    dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for g in range(0, GROUPS):
        head = pair * GROUPS + g
        dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        p = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start_v in range(0, V, BLOCK_V):
            offs_v = start_v + tl.arange(0, BLOCK_V)
            v = load_rows(v_ptr, first_k, rows, seqlen_k, stride_vn, offs_v, stride_vd, V, BLOCK_V, LEAN)
            do_head = do_ptr + g * stride_doh
            do = load_rows(do_head, first_q, rows, seqlen_q, stride_don, offs_v, stride_dod, V, BLOCK_V, LEAN)
            if CAUSAL:
                p += dot(do, tl.trans(v))  # [queries, keys]
            s = load_state(states_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
            dq += dot(do, tl.trans(s))
            if g == 0:  # later queries of all the group's heads are in D already
                d = load_state(dstates_ptr, dborder, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
                dk += dot(v, tl.trans(d))  # [CHUNK, BLOCK_K]
        if SCALED:
            dq *= tl.load(weight_ptr + pair * num_borders + border)
            if g == 0:
                dk *= tl.load(dweight_ptr + pair * num_dborders + dborder)
        if TRACK_Z:  # noqa: SIM102 (this one the compiler knows, that one only the GPU)
            if g == 0:
                dz_ptrs = dz_ptr + (pair * num_dborders + dborder) * K + offs_k
                dk -= tl.load(dz_ptrs, mask=offs_k < K, other=0.0)[None, :]
        relative, size = row_factors(
            r_ptr + head * seqlen_q, first_q, rows, seqlen_q, scale, NORMALIZE, PLAIN
        )
        if NORMALIZE:
            here = (first_q + rows >= 0) & (first_q + rows < seqlen_q)
            delta = tl.load(delta_ptr + head * seqlen_q + first_q + rows, mask=here, other=0.0)
            z = tl.load(z_ptr + (pair * num_borders + border) * K + offs_k, mask=offs_k < K, other=0.0)
            dq -= delta[:, None] * z[None, :]
            p -= delta[:, None]
        if CAUSAL:
            p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
            k = load_rows(k_ptr, first_k, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K, LEAN)
            dq += dot(cast(p, k.dtype), k)
            q_head = q_ptr + g * stride_qh
            q = load_rows(q_head, first_q, rows, seqlen_q, stride_qn, offs_k, stride_qd, K, BLOCK_K, LEAN)
            if PLAIN:
                dk += dot(tl.trans(cast(p, q.dtype)), q)
            else:
                dk += dot(tl.trans(cast(p * relative[:, None], q.dtype)), q) * size
        if PLAIN:
            dq *= scale
        else:
            dq *= (relative * size)[:, None]
        store_rows(dq_ptr + head * seqlen_q * K, dq, first_q, rows, seqlen_q, offs_k, K, LEAN)
    if PLAIN:
        dk *= scale
    store_rows(dk_ptr + pair * seqlen_k * K, dk, first_k, rows, seqlen_k, offs_k, K, LEAN)


@triton.jit
def _linear_attention_dv_kernel(
    q_ptr, k_ptr, do_ptr, r_ptr, dstates_ptr, dweight_ptr, dv_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_kv_heads, seqlen_q, seqlen_k, offset, num_early, num_dborders,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    LEAN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """dV. Scores are kept transposed, ``[keys, queries]``, as their product with dO wants them."""
    chunk = tl.program_id(0) - num_early
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    q_ptr += batch * stride_qb + kv_head * GROUPS * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    do_ptr += batch * stride_dob + kv_head * GROUPS * stride_doh
    dborder = tl.maximum(chunk + 1, 0) if CAUSAL else 0
    dstates_ptr += pair * num_dborders * (K * V)
    rows = tl.arange(0, CHUNK)
    first_q, first_k = chunk * CHUNK, offset + chunk * CHUNK
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    dv = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, first_k, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K, LEAN)
        d = load_state(dstates_ptr, dborder, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        dv += dot(k, d)
    if SCALED:
        dv *= tl.load(dweight_ptr + pair * num_dborders + dborder)
    if CAUSAL:
        for g in range(0, GROUPS):
            a = tl.zeros([CHUNK, CHUNK], tl.float32)
            for start_k in range(0, K, BLOCK_K):
                offs_k = start_k + tl.arange(0, BLOCK_K)
                k = load_rows(k_ptr, first_k, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K, LEAN)
                q_head = q_ptr + g * stride_qh
                q = load_rows(q_head, first_q, rows, seqlen_q, stride_qn, offs_k, stride_qd, K, BLOCK_K, LEAN)
                a += dot(k, tl.trans(q))
            r_base = r_ptr + (pair * GROUPS + g) * seqlen_q
            relative, size = row_factors(r_base, first_q, rows, seqlen_q, scale, NORMALIZE, PLAIN)
            do_head = do_ptr + g * stride_doh
            do = load_rows(do_head, first_q, rows, seqlen_q, stride_don, offs_v, stride_dod, V, BLOCK_V, LEAN)
            a = tl.where(rows[None, :] >= rows[:, None], a * relative[None, :], 0.0)
            if PLAIN:
                dv += dot(cast(a, do.dtype), do)
            else:
                dv += dot(cast(a, do.dtype), do) * size
    if PLAIN:
        dv *= scale
    store_rows(dv_ptr + pair * seqlen_k * V, dv, first_k, rows, seqlen_k, offs_v, V, LEAN)
