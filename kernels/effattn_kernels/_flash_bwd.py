"""FlashAttention, backward by recomputation: three kernels, no atomics, the same bits every run.

With ``P = exp(S - L)`` rebuilt from the saved log-sum-exp ``L``, and ``dO`` given::

    D_i = sum_c dO_ic O_ic         dV = P^T dO          dP = dO V^T
    dS = P (dP - D)                dQ = scale dS K      dK = scale dS^T Q

dK and dV add up over queries, dQ adds up over keys. One kernel cannot own both sums, so either
the dQ tiles are shared (atomic adds in an order that changes from run to run) or S is rebuilt
twice: 7 matrix products instead of 5. These kernels rebuild.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot, key_tiles, load_tile, query_tiles, store_tile, tile_start, visible


@triton.jit
def _flash_bwd_preprocess_kernel(
    o_ptr, do_ptr, delta_ptr,
    stride_ob, stride_oh, stride_on, stride_od,
    stride_dob, stride_doh, stride_don, stride_dod,
    num_heads, seqlen_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(o * do)``, fp32. Grid: (tiles of queries, query heads, batch)."""
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tile_m = tl.arange(0, BLOCK_M)
    offs_m = start_m + tile_m
    offs_d = tl.arange(0, BLOCK_D)
    o_ptr += batch * stride_ob + head * stride_oh + tl.cast(start_m, tl.int64) * stride_on
    do_ptr += batch * stride_dob + head * stride_doh + tl.cast(start_m, tl.int64) * stride_don
    o_ptrs = o_ptr + tile_m[:, None] * stride_on + offs_d[None, :] * stride_od
    do_ptrs = do_ptr + tile_m[:, None] * stride_don + offs_d[None, :] * stride_dod
    o = load_tile(o_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    do = load_tile(do_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(o * do, 1)  # [BLOCK_M]
    tl.store(delta_ptr + (batch * num_heads + head) * seqlen_q + offs_m, delta, mask=offs_m < seqlen_q)


@triton.jit
def load_lse(lse_ptr, offs_m, seqlen_q):
    """Log-sum-exp, in log2 units. A row without keys, or past the end, gets +inf, so that its 2^(s - L) is 0."""
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < seqlen_q, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _absorb_query_tiles(
    dk, dv, k, v,
    q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qh, stride_qn, stride_qd, stride_doh, stride_don, stride_dod,
    full, num_full, edge, num_tiles, groups, offs_n, seqlen_q, seqlen_k, window_size, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what ``num_tiles`` query tiles of each of the group's heads contribute to this key tile's dK and dV.

    Scores are kept transposed, ``[BLOCK_N, BLOCK_M]``: then P^T and dS^T enter their products as they are.
    Heads and tiles share one flat loop. As two nested loops the same work needs so many registers that a
    64 x 64 tile spills 184 bytes a thread on an A100 (seen with the x-ray); flat, it spills none.
    """
    offs_d = tl.arange(0, BLOCK_D)
    tile_m = tl.arange(0, BLOCK_M)
    divisor = tl.maximum(num_tiles, 1)  # without tiles the loop is empty, but 0 / 0 must not be compiled
    for i in range(0, groups * num_tiles):
        g = i // divisor
        start_m = tile_start(i - g * num_tiles, full, num_full, edge, BLOCK_M, MASKED)
        offs_m = start_m + tile_m
        head = g.to(tl.int64)
        row = start_m.to(tl.int64)
        q_ptrs = (
            q_ptr
            + head * stride_qh
            + row * stride_qn
            + (tile_m[:, None] * stride_qn + offs_d[None, :] * stride_qd)
        )
        do_ptrs = do_ptr + head * stride_doh + row * stride_don + (
            tile_m[:, None] * stride_don + offs_d[None, :] * stride_dod)  # fmt: skip
        q = load_tile(q_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_M, BLOCK_D]
        lse = load_lse(lse_ptr + head * seqlen_q, offs_m, seqlen_q)  # [BLOCK_M]
        delta = tl.load(delta_ptr + head * seqlen_q + offs_m, mask=offs_m < seqlen_q, other=0.0)  # [BLOCK_M]
        p_t = tl.exp2(dot(k, tl.trans(q)) * qk_scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
        if MASKED:
            pos_m = offs_m + seqlen_k - seqlen_q
            see = visible(pos_m[None, :], offs_n[:, None], seqlen_k, window_size, CAUSAL, WINDOW)
            p_t = tl.where(see, p_t, 0.0)
        dv += dot(cast(p_t, do.dtype), do)  # [BLOCK_N, BLOCK_D]
        dp_t = dot(v, tl.trans(do))  # [BLOCK_N, BLOCK_M]
        ds_t = p_t * (dp_t - delta[None, :])
        dk += dot(cast(ds_t, q.dtype), q)  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit
def _flash_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, sm_scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_don, stride_dod,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    num_heads, groups, seqlen_q, seqlen_k, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys, **key** heads, batch). The group's query heads are summed inside the program."""
    start_n = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start64 = tl.cast(start_n, tl.int64)
    k_ptr += batch * stride_kb + kv_head * stride_kh + start64 * stride_kn
    v_ptr += batch * stride_vb + kv_head * stride_vh + start64 * stride_vn
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh + start64 * stride_dkn
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh + start64 * stride_dvn

    tile_n = tl.arange(0, BLOCK_N)
    offs_n = start_n + tile_n  # [BLOCK_N]
    offs_d = tl.arange(0, BLOCK_D)
    k_ptrs = k_ptr + tile_n[:, None] * stride_kn + offs_d[None, :] * stride_kd
    v_ptrs = v_ptr + tile_n[:, None] * stride_vn + offs_d[None, :] * stride_vd
    k = load_tile(k_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = sm_scale * LOG2E

    head = kv_head * groups  # the group's first query head
    q_ptr += batch * stride_qb + head * stride_qh
    do_ptr += batch * stride_dob + head * stride_doh
    lse_ptr += (batch * num_heads + head) * seqlen_q
    delta_ptr += (batch * num_heads + head) * seqlen_q
    full, num_full, edge, num_edge = query_tiles(
        start_n, seqlen_q, seqlen_k, window_size, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)  # fmt: skip
    dk, dv = _absorb_query_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr,
        stride_qh, stride_qn, stride_qd, stride_doh, stride_don, stride_dod,
        full, num_full, edge, num_full, groups, offs_n, seqlen_q, seqlen_k, window_size, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, WINDOW, False)  # fmt: skip
    dk, dv = _absorb_query_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr,
        stride_qh, stride_qn, stride_qd, stride_doh, stride_don, stride_dod,
        full, num_full, edge, num_edge, groups, offs_n, seqlen_q, seqlen_k, window_size, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, WINDOW, True)  # fmt: skip

    dk_ptrs = dk_ptr + tile_n[:, None] * stride_dkn + offs_d[None, :] * stride_dkd
    dv_ptrs = dv_ptr + tile_n[:, None] * stride_dvn + offs_d[None, :] * stride_dvd
    store_tile(dk_ptrs, dk * sm_scale, offs_n, seqlen_k, offs_d, HEAD_DIM)
    store_tile(dv_ptrs, dv, offs_n, seqlen_k, offs_d, HEAD_DIM)


@triton.jit
def _absorb_key_tiles_dq(
    dq, q, do, lse, delta,
    k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
    full, num_full, edge, num_tiles, pos_m, seqlen_k, window_size, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what ``num_tiles`` key tiles contribute to this query tile's dQ."""
    offs_d = tl.arange(0, BLOCK_D)
    tile_n = tl.arange(0, BLOCK_N)
    # Address arithmetic stays inside the loop: hoisted, it costs a T4 the 8 bytes a thread that then spill.
    for t in tl.range(0, num_tiles, disable_licm=True):
        start_n = tile_start(t, full, num_full, edge, BLOCK_N, MASKED)
        offs_n = start_n + tile_n
        row = start_n.to(tl.int64)
        k_ptrs = k_ptr + row * stride_kn + (tile_n[:, None] * stride_kn + offs_d[None, :] * stride_kd)
        v_ptrs = v_ptr + row * stride_vn + (tile_n[:, None] * stride_vn + offs_d[None, :] * stride_vd)
        k = load_tile(k_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        p = tl.exp2(dot(q, tl.trans(k)) * qk_scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
        if MASKED:
            see = visible(pos_m[:, None], offs_n[None, :], seqlen_k, window_size, CAUSAL, WINDOW)
            p = tl.where(see, p, 0.0)
        dp = dot(do, tl.trans(v))  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])
        dq += dot(cast(ds, k.dtype), k)  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit
def _flash_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, sm_scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_don, stride_dod,
    stride_dqb, stride_dqh, stride_dqn, stride_dqd,
    num_heads, groups, seqlen_q, seqlen_k, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, query heads, batch), like the forward."""
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // groups
    start64 = tl.cast(start_m, tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh + start64 * stride_qn
    do_ptr += batch * stride_dob + head * stride_doh + start64 * stride_don
    dq_ptr += batch * stride_dqb + head * stride_dqh + start64 * stride_dqn
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    row = (batch * num_heads + head) * seqlen_q

    tile_m = tl.arange(0, BLOCK_M)
    offs_m = start_m + tile_m  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + tile_m[:, None] * stride_qn + offs_d[None, :] * stride_qd
    do_ptrs = do_ptr + tile_m[:, None] * stride_don + offs_d[None, :] * stride_dod
    q = load_tile(q_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    do = load_tile(do_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    lse = load_lse(lse_ptr + row, offs_m, seqlen_q)  # [BLOCK_M]
    delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < seqlen_q, other=0.0)  # [BLOCK_M]
    pos_m = offs_m + seqlen_k - seqlen_q
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = sm_scale * LOG2E

    full, num_full, edge, num_edge = key_tiles(
        start_m, seqlen_q, seqlen_k, window_size, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)  # fmt: skip
    dq = _absorb_key_tiles_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        full, num_full, edge, num_full, pos_m, seqlen_k, window_size, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, False)  # fmt: skip
    dq = _absorb_key_tiles_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        full, num_full, edge, num_edge, pos_m, seqlen_k, window_size, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True)  # fmt: skip

    dq_ptrs = dq_ptr + tile_m[:, None] * stride_dqn + offs_d[None, :] * stride_dqd
    store_tile(dq_ptrs, dq * sm_scale, offs_m, seqlen_q, offs_d, HEAD_DIM)
