"""Wrong Triton kernels for ``sparse/adamas/triton_distances``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOW = 0x55555555


@triton.jit
def faulty_kernel(
    a_ptr, b_ptr, d_ptr, seqlen, groups,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    a_ptr += head * WORDS
    b_ptr += (head // groups) * seqlen * WORDS
    total = tl.zeros([BLOCK], tl.int32)
    for w in range(0, WORDS):
        a = tl.load(a_ptr + w)
        b = tl.load(b_ptr + keys * WORDS + w, mask=keys < seqlen, other=0)
        x = a ^ b
        central = x & (x >> 1) & (a ^ (a >> 1)) & 0x55555555
        if FAULT == "{1, 2} counted 3":
            central = x & 0
        elif FAULT == "mended for {0, 3} too":
            central = x & (x >> 1) & 0x55555555
        elif FAULT == "mended for the outer pair":
            central = x & (x >> 1) & ~(a ^ (a >> 1)) & 0x55555555
        elif FAULT == "neighbours mixed":
            central = x & (x >> 1) & (a ^ (a >> 1))
        if FAULT == "low bit cleared":
            x = x ^ central
        elif FAULT == "both bits cleared":
            x = x ^ central ^ (central << 1)
        elif FAULT == "coordinates that differ":
            x = (x | (x >> 1)) & 0x55555555
        else:
            x = x ^ (central << 1)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        x = (x + (x >> 16)) & 0x3F
        if FAULT == "last word alone":
            total = x + tl.zeros([BLOCK], tl.int32)
        else:
            total += x
    tl.store(d_ptr + head * seqlen + keys, total, mask=keys < seqlen)


@triton.jit
def global_kernel(
    a_ptr, b_ptr, d_ptr, seqlen, groups,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Right in the interpreter; the compiler does not see the ordinary global LOW."""
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    a_ptr += head * WORDS
    b_ptr += (head // groups) * seqlen * WORDS
    total = tl.zeros([BLOCK], tl.int32)
    for w in range(0, WORDS):
        a = tl.load(a_ptr + w)
        b = tl.load(b_ptr + keys * WORDS + w, mask=keys < seqlen, other=0)
        x = a ^ b
        central = x & (x >> 1) & (a ^ (a >> 1)) & LOW
        x = x ^ (central << 1)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        total += (x + (x >> 16)) & 0x3F
    tl.store(d_ptr + head * seqlen + keys, total, mask=keys < seqlen)


def launch(fault: str, a: torch.Tensor, b: torch.Tensor, block: int = 128) -> torch.Tensor:
    """Launch the kernel with one fault."""
    batch, num_heads, words = a.shape
    num_kv_heads, seqlen = b.shape[1:3]
    d = torch.empty(batch, num_heads, seqlen, dtype=torch.int32, device=a.device)
    grid = (triton.cdiv(seqlen, block), batch * num_heads)
    shape = (seqlen, num_heads // num_kv_heads)
    if fault == "plain global":
        global_kernel[grid](a, b, d, *shape, WORDS=words, BLOCK=block)
    else:
        faulty_kernel[grid](a, b, d, *shape, WORDS=words, BLOCK=block, FAULT=fault)
    return d
