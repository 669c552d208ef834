"""The kernels of Quest: least and greatest key of each page, and the bound they give for a query's scores."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import cast


@triton.jit
def _quest_bounds_kernel(
    k_ptr, least_ptr, greatest_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    num_kv_heads, seqlen_k, num_pages, page_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both bounds of BLOCK pages in one pass over their keys. Grid: (blocks of pages, batch * key heads)."""
    pair = tl.program_id(1).to(tl.int64)
    k_ptr += (pair // num_kv_heads) * stride_kb + (pair % num_kv_heads) * stride_kh
    pages, offs_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = offs_d < HEAD_DIM
    least = tl.full([BLOCK, BLOCK_D], float("inf"), tl.float32)
    greatest = tl.full([BLOCK, BLOCK_D], float("-inf"), tl.float32)
    for j in range(0, page_size):
        token = pages * page_size + j
        here = (token < seqlen_k)[:, None] & inside[None, :]
        ptrs = k_ptr + token.to(tl.int64)[:, None] * stride_kn + offs_d[None, :] * stride_kd
        k = tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
        # What is not there must lose against both. NaN stays NaN, as in PyTorch: such a page has no bound.
        least = tl.minimum(least, tl.where(here, k, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        greatest = tl.maximum(greatest, tl.where(here, k, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    at = (pair * num_pages + pages)[:, None] * HEAD_DIM + offs_d[None, :]
    exist = (pages < num_pages)[:, None] & inside[None, :]
    tl.store(least_ptr + at, cast(least, least_ptr.dtype.element_ty), mask=exist)
    tl.store(greatest_ptr + at, cast(greatest, greatest_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _quest_scores_kernel(
    q_ptr, least_ptr, greatest_ptr, u_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_lb, stride_lh, stride_ln, stride_ld,
    stride_gb, stride_gh, stride_gn, stride_gd,
    num_kv_heads, num_pages,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``U_p = sum_i max(q_i M_pi, q_i m_pi)``. Grid: (blocks of pages, batch * key heads).

    A block's bounds are loaded once for the GROUP query heads that share them.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    pages, offs_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    exist, inside = pages < num_pages, offs_d < HEAD_DIM
    here = exist[:, None] & inside[None, :]
    wide = pages.to(tl.int64)[:, None]
    least_ptr += batch * stride_lb + kv_head * stride_lh
    greatest_ptr += batch * stride_gb + kv_head * stride_gh
    least = tl.load(least_ptr + wide * stride_ln + offs_d[None, :] * stride_ld, mask=here, other=0.0)
    greatest = tl.load(greatest_ptr + wide * stride_gn + offs_d[None, :] * stride_gd, mask=here, other=0.0)
    least, greatest = least.to(tl.float32), greatest.to(tl.float32)
    for g in range(0, GROUP):
        head = kv_head * GROUP + g
        q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + offs_d * stride_qd, mask=inside, other=0.0)
        q = q.to(tl.float32)[None, :]
        u = tl.sum(tl.maximum(q * greatest, q * least), 1)
        tl.store(u_ptr + (pair * GROUP + g) * num_pages + pages, u, mask=exist)
