"""Wrong Triton kernels for ``sparse/quest/triton_bounds``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

INFINITY = float("inf")


@triton.jit
def faulty_kernel(
    k_ptr, least_ptr, greatest_ptr, seqlen, pages, page,
    D: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, D)[None, :]
    k_ptr += head * seqlen * D
    least_ptr += head * pages * D
    greatest_ptr += head * pages * D
    least = tl.full([BLOCK, D], float("inf"), tl.float32)
    greatest = tl.full([BLOCK, D], float("-inf"), tl.float32)
    if FAULT == "begun at zero":
        least = tl.zeros([BLOCK, D], tl.float32)
        greatest = tl.zeros([BLOCK, D], tl.float32)
    for j in range(0, page):
        token = rows * page + j
        if FAULT == "every so many tokens":
            token = rows + j * pages
        real = token < seqlen
        k = tl.load(k_ptr + token * D + channels, mask=real, other=0.0).to(tl.float32)
        low = tl.where(real, k, float("inf"))
        high = tl.where(real, k, float("-inf"))
        if FAULT == "loaded twice":
            again = tl.load(k_ptr + token * D + channels, mask=real, other=float("-inf"))
            high = again.to(tl.float32)
        if FAULT == "padded with zeros":
            low = k
            high = k
        if FAULT == "padded with infinity":
            high = tl.where(real, k, float("inf"))
        if FAULT == "first token missed":
            low = tl.where(j > 0, low, float("inf"))
            high = tl.where(j > 0, high, float("-inf"))
        if FAULT == "last token alone":
            least = tl.where(real, k, least)
            greatest = tl.where(real, k, greatest)
        else:
            least = tl.minimum(least, low)
            greatest = tl.maximum(greatest, high)
    if FAULT == "the wrong way round":
        least, greatest = greatest, least
    at = rows * D + channels
    tl.store(least_ptr + at, least.to(least_ptr.dtype.element_ty), mask=rows < pages)
    tl.store(greatest_ptr + at, greatest.to(greatest_ptr.dtype.element_ty), mask=rows < pages)


@triton.jit
def global_kernel(
    k_ptr, least_ptr, greatest_ptr, seqlen, pages, page,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Right in the interpreter; the compiler does not see the ordinary global INFINITY."""
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
        least = tl.minimum(least, tl.where(token < seqlen, k, INFINITY))
        greatest = tl.maximum(greatest, tl.where(token < seqlen, k, -INFINITY))
    at = rows * D + channels
    tl.store(least_ptr + at, least.to(least_ptr.dtype.element_ty), mask=rows < pages)
    tl.store(greatest_ptr + at, greatest.to(greatest_ptr.dtype.element_ty), mask=rows < pages)


def launch(fault: str, k: torch.Tensor, page: int, block: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel with one fault."""
    batch, heads, seqlen, dim = k.shape
    pages = triton.cdiv(seqlen, page)
    least = torch.empty(batch, heads, pages, dim, dtype=k.dtype, device=k.device)
    greatest = torch.empty_like(least)
    grid = (triton.cdiv(pages, block), batch * heads)
    if fault == "plain global":
        global_kernel[grid](k, least, greatest, seqlen, pages, page, D=dim, BLOCK=block)
    else:
        faulty_kernel[grid](k, least, greatest, seqlen, pages, page, D=dim, BLOCK=block, FAULT=fault)
    return least, greatest
