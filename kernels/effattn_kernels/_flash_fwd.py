"""FlashAttention, forward: one program per tile of queries, the key tiles streamed past it."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot, key_tiles, load_tile, store_tile, tile_start, visible


@triton.jit
def _absorb_key_tiles(
    acc, m_i, l_i, q,
    k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
    full, num_full, edge, num_tiles, pos_m, seqlen_k, window_size, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold ``num_tiles`` key tiles, the full ones or (MASKED) the edge ones, into the state ``(acc, m_i, l_i)``."""
    offs_d = tl.arange(0, BLOCK_D)
    tile_n = tl.arange(0, BLOCK_N)
    for t in range(0, num_tiles):
        start_n = tile_start(t, full, num_full, edge, BLOCK_N, MASKED)
        offs_n = start_n + tile_n  # [BLOCK_N]
        # The tile's base moves in int64, as a scalar; offsets inside the tile are small and stay int32.
        row = start_n.to(tl.int64)
        k_ptrs = k_ptr + row * stride_kn + (tile_n[:, None] * stride_kn + offs_d[None, :] * stride_kd)
        v_ptrs = v_ptr + row * stride_vn + (tile_n[:, None] * stride_vn + offs_d[None, :] * stride_vd)
        k = load_tile(k_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        s = dot(q, tl.trans(k)) * qk_scale  # [BLOCK_M, BLOCK_N], in units of log2
        if MASKED:
            see = visible(pos_m[:, None], offs_n[None, :], seqlen_k, window_size, CAUSAL, WINDOW)
            s = tl.where(see, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [BLOCK_M]
        if MASKED:  # noqa: SIM108
            # A row that has seen no key yet has maximum -inf, and -inf - (-inf) is NaN.
            # Any finite origin will do: its p and its alpha are 2^-inf = 0.
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            origin = m_new
        p = tl.exp2(s - origin[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - origin)  # what was summed so far, measured from the new origin
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_tile(v_ptrs, offs_n, seqlen_k, offs_d, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)  # [BLOCK_M, BLOCK_D]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _flash_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sm_scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on, stride_od,
    num_heads, groups, seqlen_q, seqlen_k, window_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, query heads, batch). No program talks to another."""
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)  # int64: batch * stride can pass 2^31 elements
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // groups
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

    full, num_full, edge, num_edge = key_tiles(
        start_m, seqlen_q, seqlen_k, window_size, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)  # fmt: skip
    acc, m_i, l_i = _absorb_key_tiles(  # most of the work: no mask at all
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        full, num_full, edge, num_full, pos_m, seqlen_k, window_size, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, False)  # fmt: skip
    acc, m_i, l_i = _absorb_key_tiles(  # the diagonal, the window's edges, the ragged end
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn, stride_kd, stride_vn, stride_vd,
        full, num_full, edge, num_edge, pos_m, seqlen_k, window_size, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True)  # fmt: skip

    empty = l_i == 0.0  # a row that saw no key: output 0, log-sum-exp -inf
    l_safe = tl.where(empty, 1.0, l_i)
    # Stored in log2 units, as the backward needs it: turned to natural logarithms and back it would be rounded
    # twice more, and an error of 1e-6 in a log-sum-exp of 20 is the largest error of the whole fp32 backward.
    lse = tl.where(empty, float("-inf"), m_i + tl.log2(l_safe))
    o_ptrs = o_ptr + tile_m[:, None] * stride_on + offs_d[None, :] * stride_od
    store_tile(o_ptrs, acc / l_safe[:, None], offs_m, seqlen_q, offs_d, HEAD_DIM)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < seqlen_q)
