"""Attention over a block list, forward: flash's program for a tile of queries, past the listed tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot, load_tile, store_tile

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _block_sparse_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, index_ptr, count_ptr, tile_ptr, tiles_ptr, rows_ptr, sm_scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on, stride_od,
    list_b, list_h, width, num_heads, groups, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LIST_M: tl.constexpr, LIST_N: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, query heads, batch). No program talks to another.

    The list's tiles are ``LIST_M x LIST_N``; a program takes ``BLOCK_M`` of their queries and walks their keys in
    steps of ``BLOCK_N``, as much as its GPU has room for. ``list_b``, ``list_h``: lines of the list from one sequence
    or head to the next, 0 where they share.
    """
    PARTS: tl.constexpr = LIST_N // BLOCK_N
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)  # int64: batch * stride can pass 2^31 elements
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // groups
    q_ptr += batch * stride_qb + head * stride_qh + tl.cast(start_m, tl.int64) * stride_qn
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    o_ptr += batch * stride_ob + head * stride_oh + tl.cast(start_m, tl.int64) * stride_on
    lse_ptr += (batch * num_heads + head) * seqlen_q

    line = batch * list_b + head * list_h + start_m // LIST_M
    count = tl.load(count_ptr + line)
    index_ptr += line * width
    tile_ptr += line * width

    tile_m, tile_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_m = start_m + tile_m  # [BLOCK_M]
    inner_m = start_m % LIST_M + tile_m  # the same, counted inside the list's tile
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + tile_m[:, None] * stride_qn + offs_d[None, :] * stride_qd
    q = load_tile(q_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum, log2 units
    l_i = tl.zeros([BLOCK_M], tl.float32)  # running sum of 2^(s - m)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running sum of 2^(s - m) v
    qk_scale = sm_scale * LOG2E

    for t in range(0, count * PARTS):
        entry = t // PARTS
        part = t % PARTS * BLOCK_N
        which = tl.load(tile_ptr + entry)
        start_n = tl.load(index_ptr + entry) * LIST_N + part
        offs_n = start_n + tile_n  # [BLOCK_N]
        row = start_n.to(tl.int64)
        k_ptrs = k_ptr + row * stride_kn + (tile_n[:, None] * stride_kn + offs_d[None, :] * stride_kd)
        v_ptrs = v_ptr + row * stride_vn + (tile_n[:, None] * stride_vn + offs_d[None, :] * stride_vd)
        k = load_tile(k_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        s = dot(q, tl.trans(k)) * qk_scale  # [BLOCK_M, BLOCK_N], in units of log2
        if which > 0:  # most tiles are seen whole: no mask is loaded, none applied
            mask_ptr = tiles_ptr + (which - 1).to(tl.int64) * (LIST_M * LIST_N) + part
            see = tl.load(mask_ptr + inner_m[:, None] * LIST_N + tile_n[None, :])
            s = tl.where(see != 0, s, float("-inf"))
        if start_n + BLOCK_N > seqlen_k:
            s = tl.where(offs_n[None, :] < seqlen_k, s, float("-inf"))
        if PER_ROW:
            asks = tl.load(rows_ptr + (line * width + entry) * LIST_M + inner_m)
            s = tl.where(asks[:, None] != 0, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [BLOCK_M]
        # A row that has seen no key yet has maximum -inf; measured from 0 its p and its alpha are 2^-inf = 0.
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - origin[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - origin)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_tile(v_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)  # [BLOCK_M, BLOCK_D]
        m_i = m_new

    empty = l_i == 0.0  # a row that saw no key: output 0, log-sum-exp -inf
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_safe)) * LN2)
    o_ptrs = o_ptr + tile_m[:, None] * stride_on + offs_d[None, :] * stride_od
    store_tile(o_ptrs, acc / l_safe[:, None], offs_m, seqlen_q, offs_d, HEAD_DIM)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < seqlen_q)
