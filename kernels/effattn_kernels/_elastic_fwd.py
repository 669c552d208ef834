"""Full and sparse heads in one launch: each program reads its head's mode and walks that head's keys.

A full head is a window as long as the text, without sinks. So both modes are one piece of code with two numbers, and
no branch: nothing is compiled twice, and programs of a warp never part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot, key_tiles, load_tile, store_tile, tile_start


@triton.jit
def elastic_tiles(start_m, seqlen_q, seqlen_k, sinks, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`key_tiles` of a causal window, and how many tiles of sinks stand before it.

    A tile that holds sinks and a part of the window belongs to the window's edge: it is read once.
    """
    full, num_full, edge, num_edge = key_tiles(
        start_m, seqlen_q, seqlen_k, window, True, True, BLOCK_M, BLOCK_N
    )
    last = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q  # no sink is in the past of less
    num_sink = (tl.minimum(sinks, last + 1) + BLOCK_N - 1) // BLOCK_N
    return full, num_full, edge, num_edge, tl.maximum(tl.minimum(num_sink, edge // BLOCK_N), 0)


@triton.jit
def _absorb_tiles(
    acc, m_i, l_i, q,
    k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
    full, num_full, edge, num_sink, num_tiles, pos_m, seqlen_k, sinks, window, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold ``num_tiles`` key tiles, the whole ones or (MASKED) those of sinks and edges, into ``(acc, m_i, l_i)``."""
    offs_d = tl.arange(0, BLOCK_D)
    tile_n = tl.arange(0, BLOCK_N)
    for t in range(0, num_tiles):
        if MASKED:
            beyond = tile_start(t - num_sink, full, num_full, edge, BLOCK_N, True)
            start_n = tl.where(t < num_sink, t * BLOCK_N, beyond)
        else:
            start_n = tile_start(t, full, num_full, edge, BLOCK_N, False)
        offs_n = start_n + tile_n  # [BLOCK_N]
        row = start_n.to(tl.int64)
        k_ptrs = k_ptr + row * stride_kn + (tile_n[:, None] * stride_kn + offs_d[None, :] * stride_kd)
        v_ptrs = v_ptr + row * stride_vn + (tile_n[:, None] * stride_vn + offs_d[None, :] * stride_vd)
        k = load_tile(k_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        s = dot(q, tl.trans(k)) * qk_scale  # [BLOCK_M, BLOCK_N], in units of log2
        if MASKED:
            near = (offs_n[None, :] > pos_m[:, None] - window) | (offs_n[None, :] < sinks)
            see = (offs_n[None, :] < seqlen_k) & (offs_n[None, :] <= pos_m[:, None]) & near
            s = tl.where(see, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [BLOCK_M]
        if MASKED:  # noqa: SIM108
            origin = tl.where(
                m_new == float("-inf"), 0.0, m_new
            )  # a row without a key yet: any finite origin
        else:
            origin = m_new
        p = tl.exp2(s - origin[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - origin)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_tile(v_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)  # [BLOCK_M, BLOCK_D]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _elastic_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mode_ptr, o_ptr, lse_ptr, sm_scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on, stride_od,
    num_heads, groups, mode_groups, seqlen_q, seqlen_k, sinks, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (batch and query heads, tiles of queries from the last to the first).

    Heads run fastest: the query heads of a group, which read the same keys, start together. The last tiles of full
    heads take longest; they start in the first wave, and what is left at the end is short.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    kv_head = head // groups
    is_full = tl.load(mode_ptr + batch * (num_heads // mode_groups) + head // mode_groups)  # 1 or 0
    window = tl.where(is_full != 0, seqlen_k, window)
    sinks = tl.where(is_full != 0, 0, sinks)
    q_ptr += batch * stride_qb + head * stride_qh + tl.cast(start_m, tl.int64) * stride_qn
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    o_ptr += batch * stride_ob + head * stride_oh + tl.cast(start_m, tl.int64) * stride_on
    lse_ptr += (batch * num_heads + head) * seqlen_q

    tile_m = tl.arange(0, BLOCK_M)
    offs_m = start_m + tile_m  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + tile_m[:, None] * stride_qn + offs_d[None, :] * stride_qd
    q = load_tile(q_ptrs, offs_m, seqlen_q, offs_d, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    pos_m = offs_m + seqlen_k - seqlen_q

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum, log2 units
    l_i = tl.zeros([BLOCK_M], tl.float32)  # running sum of 2^(s - m)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running sum of 2^(s - m) v
    qk_scale = sm_scale * LOG2E

    full, num_full, edge, num_edge, num_sink = elastic_tiles(
        start_m, seqlen_q, seqlen_k, sinks, window, BLOCK_M, BLOCK_N)  # fmt: skip
    acc, m_i, l_i = _absorb_tiles(  # most of the work: no mask at all
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        full, num_full, edge, num_sink, num_full, pos_m, seqlen_k, sinks, window, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, False)  # fmt: skip
    acc, m_i, l_i = _absorb_tiles(  # sinks, the window's two edges, the ragged end
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        full, num_full, edge, num_sink, num_sink + num_edge, pos_m, seqlen_k, sinks, window, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, True)  # fmt: skip

    empty = l_i == 0.0  # a row that saw no key: output 0, log-sum-exp -inf
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_safe)) / LOG2E)  # natural logarithm
    o_ptrs = o_ptr + tile_m[:, None] * stride_on + offs_d[None, :] * stride_od
    store_tile(o_ptrs, acc / l_safe[:, None], offs_m, seqlen_q, offs_d, HEAD_DIM)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < seqlen_q)
