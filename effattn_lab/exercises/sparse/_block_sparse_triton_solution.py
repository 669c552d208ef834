"""A solution of ``sparse/block_sparse/triton_forward``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def block_list_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, index_ptr, count_ptr, seqlen, groups, scale, width,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one block of queries of one head. Tensors are contiguous [B, H, N, D]."""
    own = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    channels = tl.arange(0, D)[None, :]
    q_ptr += head * seqlen * D
    k_ptr += (head // groups) * seqlen * D
    v_ptr += (head // groups) * seqlen * D
    out_ptr += head * seqlen * D
    row = (own * BLOCK + tile)[:, None]
    q = tl.load(q_ptr + row * D + channels, mask=row < seqlen, other=0.0)
    line = head * tl.num_programs(0) + own
    count = tl.load(count_ptr + line)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, count):
        block = tl.load(index_ptr + line * width + t)
        col = block * BLOCK + tile
        at = col[:, None]
        k = tl.load(k_ptr + at * D + channels, mask=at < seqlen, other=0.0)
        v = tl.load(v_ptr + at * D + channels, mask=at < seqlen, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where(col[None, :] <= row, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    out = acc / total[:, None]
    tl.store(out_ptr + row * D + channels, out.to(out_ptr.dtype.element_ty), mask=row < seqlen)


def block_list_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, index: torch.Tensor, count: torch.Tensor,
    block: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Launch `block_list_kernel`: q [B, Hq, N, D], k and v [B, Hkv, N, D], index [B, Hq, m, W], count [B, Hq, m]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernel computes addresses from the shape
    index, count = index.contiguous(), count.contiguous()
    batch, num_heads, seqlen, dim = q.shape
    out = torch.empty_like(q)
    block_list_kernel[(triton.cdiv(seqlen, block), batch * num_heads)](
        q, k, v, out, index, count, seqlen, num_heads // k.shape[1], scale, index.shape[3], D=dim, BLOCK=block
    )
    return out
