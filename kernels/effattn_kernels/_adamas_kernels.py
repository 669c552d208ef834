"""The kernels of Adamas: codes of vectors, distances of codes, attention over a list of pages, merge of splits.

Codes: coordinate ``16 w + i`` of the transformed vector in bits ``2 i`` and ``2 i + 1`` of the 32-bit word ``w``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot


@triton.jit
def hadamard_rows(x, ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr):
    """Rows times the Hadamard matrix of entries 1 and -1: ``log2(DIM)`` times sums and differences of neighbours.

    Each step transforms the lowest bit of the column's number and moves it to the top: all steps are the same, and
    after the last each bit is back at its place. The additions are those of the PyTorch form, in its order.
    """
    for _ in tl.static_range(0, LOG_DIM):
        a, b = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, DIM])
    return x


@triton.jit
def _adamas_encode_kernel(
    x_ptr, codes_ptr, t0, t1, t2, norm,
    stride_xb, stride_xh, stride_xn, stride_xd,
    num_heads, seqlen, num_rows,
    DIM: tl.constexpr, LOG_DIM: tl.constexpr, BLOCK: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Transform, thresholds and packing in one pass. Grid: (blocks of rows of all heads and batches,)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = rows < num_rows
    pair = rows // seqlen
    start = (pair // num_heads).to(tl.int64) * stride_xb + (pair % num_heads).to(tl.int64) * stride_xh
    start += (rows % seqlen).to(tl.int64) * stride_xn
    offs_d = tl.arange(0, DIM)
    x = tl.load(x_ptr + start[:, None] + offs_d[None, :] * stride_xd, mask=here[:, None], other=0.0)
    x = x.to(tl.float32)
    if TRANSFORM:
        # Rounded to the dtype of x: what lies next to a threshold gets the code that the PyTorch form gives it.
        x = cast(hadamard_rows(x, BLOCK, DIM, LOG_DIM) * norm, x_ptr.dtype.element_ty).to(tl.float32)
    code = (x > t0).to(tl.int32) + (x > t1).to(tl.int32) + (x > t2).to(tl.int32)
    # The bits of a word are disjoint, so their sum is their union; the last code's high bit is the sign.
    word = tl.sum(tl.reshape(code << (offs_d % 16 * 2)[None, :], [BLOCK, DIM // 16, 16]), 2)
    ptrs = codes_ptr + rows.to(tl.int64)[:, None] * (DIM // 16) + tl.arange(0, DIM // 16)[None, :]
    tl.store(ptrs, word, mask=here[:, None])


@triton.jit
def _adamas_distances_kernel(
    q_ptr, k_ptr, d_ptr,
    stride_kb, stride_kh, stride_kn,
    num_kv_heads, seqlen_k,
    WORDS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``sum_i |a_i - b_i|`` of packed codes; not EXACT: low bits plus twice high ones. Grid: (blocks of keys, heads).

    A block's codes are loaded once for the GROUP query heads that share them. ``x = a ^ b`` holds sixteen 2-bit
    numbers, each ``|a_i - b_i|`` but for the pair {1, 2}, where it is 3: EXACT turns that into 1. Then the sixteen
    are added within the word: pairs to 4 bits (at most 6), to 8 bits (12, and 192 over the 16 words of 256
    dimensions), and at the end to 16.
    """
    pair = tl.program_id(1).to(tl.int64)
    k_ptr += (pair // num_kv_heads) * stride_kb + (pair % num_kv_heads) * stride_kh
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_w = tl.arange(0, WORDS)
    here = offs_n < seqlen_k
    ptrs = k_ptr + offs_n.to(tl.int64)[:, None] * stride_kn + offs_w[None, :]
    b = tl.load(ptrs, mask=here[:, None], other=0)
    for g in range(0, GROUP):
        head = pair * GROUP + g
        a = tl.load(q_ptr + head * WORDS + offs_w)[None, :]
        x = a ^ b
        if EXACT:
            central = x & (x >> 1) & (a ^ (a >> 1)) & 0x55555555
            x = x ^ (central << 1)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        total = tl.sum(x, 1)
        total = (total & 0x00FF00FF) + ((total >> 8) & 0x00FF00FF)
        total = (total + (total >> 16)) & 0xFFFF
        tl.store(d_ptr + head * seqlen_k + offs_n, total.to(tl.int16), mask=here)


@triton.jit
def _pages(index_ptr, valid_ptr, entry, num_pages, VALID: tl.constexpr):
    """Entries of a list of pages; -1, which names no token, for what is not valid or past its end."""
    named = entry < num_pages
    if VALID:
        named = tl.load(valid_ptr + entry, mask=named, other=0) != 0
    return tl.load(index_ptr + entry, mask=named, other=-1)


@triton.jit
def _adamas_decode_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, valid_ptr, o_ptr, lse_ptr, sm_scale,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_lists, num_rows, groups, seqlen_k, num_pages,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, VALID: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over SPLIT tokens of a list. Grid: (splits, batch * lists).

    ``num_rows`` query heads share a list, and the keys and values it names are loaded once for them. MERGE: there are
    several splits; each leaves its output in fp32 and the log-sum-exp (base 2) of its scores.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, which = pair // num_lists, pair % num_lists
    head = which * num_rows  # the first of the query heads that share the list
    k_ptr += batch * stride_kb + (head // groups) * stride_kh
    v_ptr += batch * stride_vb + (head // groups) * stride_vh
    index_ptr += pair * num_pages
    valid_ptr += pair * num_pages
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real = offs_m < num_rows
    inside = offs_d < HEAD_DIM
    q_ptr += batch * stride_qb + head * stride_qh
    q = tl.load(
        q_ptr + offs_m.to(tl.int64)[:, None] * stride_qh + offs_d[None, :] * stride_qd,
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, num_pages * PAGE), BLOCK_N):
        if PAGE < BLOCK_N:  # a tile has several pages
            page = _pages(
                index_ptr, valid_ptr, start // PAGE + tl.arange(0, BLOCK_N // PAGE), num_pages, VALID
            )
            token = page
            if PAGE > 1:
                token = tl.reshape(page[:, None] * PAGE + tl.arange(0, PAGE)[None, :], [BLOCK_N])
        else:
            page = _pages(index_ptr, valid_ptr, start // PAGE, num_pages, VALID)
            token = page * PAGE + start % PAGE + tl.arange(0, BLOCK_N)
        see = (token >= 0) & (token < seqlen_k)
        here = see[:, None] & inside[None, :]
        k = tl.load(k_ptr + token[:, None] * stride_kn + offs_d[None, :] * stride_kd, mask=here, other=0.0)
        s = tl.where(see[None, :], dot(q, tl.trans(k)) * (sm_scale * LOG2E), float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: -inf - -inf would be NaN
        alpha = tl.exp2(m_i - safe)
        p = tl.exp2(s - safe[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + token[:, None] * stride_vn + offs_d[None, :] * stride_vd, mask=here, other=0.0)
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)
        m_i = m_new
    some = l_i > 0
    acc = acc / tl.where(some, l_i, 1.0)[:, None]
    rows = batch * num_lists * num_rows + head + offs_m
    if MERGE:
        rows = rows * tl.num_programs(0) + split
        lse = tl.where(some, m_i + tl.log2(tl.where(some, l_i, 1.0)), float("-inf"))
        tl.store(lse_ptr + rows, lse, mask=real)
    ptrs = o_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(ptrs, cast(acc, o_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def _adamas_merge_kernel(
    part_ptr, lse_ptr, o_ptr, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sum_s w_s o_s``, ``w_s = exp(lse_s) / sum exp(lse)``: the splits' outputs, each weighed by its softmax sum.

    Grid: (batch * query heads,). Splits go in blocks, in their order: the same bits whatever the batch.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = offs_d < HEAD_DIM
    part_ptr += row * splits * HEAD_DIM
    lse_ptr += row * splits
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK):
        here = start + offs_s < splits
        lse = tl.load(lse_ptr + start + offs_s, mask=here, other=float("-inf"))
        ptrs = part_ptr + (start + offs_s)[:, None] * HEAD_DIM + offs_d[None, :]
        part = tl.load(ptrs, mask=here[:, None] & inside[None, :], other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - safe)
        w = tl.exp2(lse - safe)
        l_i = l_i * alpha + tl.sum(w, 0)
        acc = acc * alpha + tl.sum(w[:, None] * part, 0)
        m_i = m_new
    acc = acc / tl.where(l_i > 0, l_i, 1.0)
    tl.store(o_ptr + row * HEAD_DIM + offs_d, cast(acc, o_ptr.dtype.element_ty), mask=inside)
