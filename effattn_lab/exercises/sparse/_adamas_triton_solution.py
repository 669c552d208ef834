"""A solution of ``sparse/adamas/triton_distances``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def distances_kernel(
    a_ptr, b_ptr, d_ptr, seqlen, groups,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one tile of keys, one query head. Tensors are contiguous."""
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
        x = x ^ (central << 1)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        total += (x + (x >> 16)) & 0x3F
    tl.store(d_ptr + head * seqlen + keys, total, mask=keys < seqlen)


def distances_triton(a: torch.Tensor, b: torch.Tensor, block: int = 128) -> torch.Tensor:
    """Launch `distances_kernel`: a int32 [B, Hq, W], b int32 [B, Hkv, N, W] give int32 [B, Hq, N]."""
    a, b = a.contiguous(), b.contiguous()  # the kernel computes addresses from the shape
    batch, num_heads, words = a.shape
    num_kv_heads, seqlen = b.shape[1:3]
    d = torch.empty(batch, num_heads, seqlen, dtype=torch.int32, device=a.device)
    distances_kernel[(triton.cdiv(seqlen, block), batch * num_heads)](
        a, b, d, seqlen, num_heads // num_kv_heads, WORDS=words, BLOCK=block
    )
    return d
