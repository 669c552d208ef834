"""A solution of ``sparse/quest/triton_bounds``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def bounds_kernel(
    k_ptr, least_ptr, greatest_ptr, seqlen, pages, page,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK pages of one head. Tensors are contiguous."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, D)[None, :]
    k_ptr += head * seqlen * D
    least_ptr += head * pages * D
    greatest_ptr += head * pages * D
    least = tl.full([BLOCK, D], float("inf"), tl.float32)
    greatest = tl.full([BLOCK, D], float("-inf"), tl.float32)
    for j in range(0, page):
        token = rows * page + j
        k = tl.load(k_ptr + token * D + channels, mask=token < seqlen, other=0.0)
        k = k.to(tl.float32)
        least = tl.minimum(least, tl.where(token < seqlen, k, float("inf")))
        greatest = tl.maximum(greatest, tl.where(token < seqlen, k, float("-inf")))
    at = rows * D + channels
    tl.store(least_ptr + at, least.to(least_ptr.dtype.element_ty), mask=rows < pages)
    tl.store(greatest_ptr + at, greatest.to(greatest_ptr.dtype.element_ty), mask=rows < pages)


def bounds_triton(k: torch.Tensor, page: int, block: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `bounds_kernel`: k [B, H, N, D] gives least and greatest [B, H, pages, D]."""
    k = k.contiguous()  # the kernel computes addresses from the shape
    batch, heads, seqlen, dim = k.shape
    pages = triton.cdiv(seqlen, page)
    least = torch.empty(batch, heads, pages, dim, dtype=k.dtype, device=k.device)
    greatest = torch.empty_like(least)
    bounds_kernel[(triton.cdiv(pages, block), batch * heads)](
        k, least, greatest, seqlen, pages, page, D=dim, BLOCK=block
    )
    return least, greatest
