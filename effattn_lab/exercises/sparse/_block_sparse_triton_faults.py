"""Wrong Triton kernels for ``sparse/block_sparse/triton_forward``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

NOTHING = float("-inf")


@triton.jit
def faulty_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, index_ptr, count_ptr, seqlen, groups, scale, width,
    D: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
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
    if FAULT == "first head's list":
        line = (head * 0 + own).to(tl.int64)
    if FAULT == "list of the KV head":
        line = head // groups * tl.num_programs(0) + own
    count = tl.load(count_ptr + line)
    if FAULT == "whole width":
        count = width
    if FAULT == "last entry dropped":
        count = tl.maximum(count - 1, 1)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, count):
        block = tl.load(index_ptr + line * width + t)
        if FAULT == "list not read":
            block = t
        col = block * BLOCK + tile
        if FAULT == "index counts tokens":
            col = block + tile
        at = col[:, None]
        k = tl.load(k_ptr + at * D + channels, mask=at < seqlen, other=0.0)
        v = tl.load(v_ptr + at * D + channels, mask=at < seqlen, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        if FAULT == "no mask in the own block":
            s = tl.where(col[None, :] < seqlen, s, float("-inf"))
        elif FAULT == "masked by place in the list":
            s = tl.where((t * BLOCK + tile)[None, :] <= row, s, float("-inf"))
        elif FAULT == "masked in the last entry alone":
            s = tl.where(
                (col[None, :] <= row) | ((t < count - 1) & (col < seqlen)[None, :]), s, float("-inf")
            )
        elif FAULT == "own token hidden":
            s = tl.where(col[None, :] < row, s, float("-inf"))
        else:
            s = tl.where(col[None, :] <= row, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        if FAULT == "no maximum":
            new = tl.zeros([BLOCK], tl.float32)
        if FAULT == "one maximum a tile":
            new = tl.maximum(top, tl.max(tl.max(s, 1), 0))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        if FAULT == "no maximum":
            old = tl.zeros([BLOCK], tl.float32) + 1.0
        total = total * old + tl.sum(p, 1)
        if FAULT == "output not rescaled":
            acc = acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    if FAULT != "no maximum" and FAULT != "one maximum a tile":
        total = tl.where(total == 0.0, 1.0, total)
    out = acc / total[:, None]
    tl.store(out_ptr + row * D + channels, out.to(out_ptr.dtype.element_ty), mask=row < seqlen)


@triton.jit
def global_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, index_ptr, count_ptr, seqlen, groups, scale, width,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Right in the interpreter; the compiler does not see the ordinary global NOTHING."""
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
        s = tl.where(col[None, :] <= row, s, NOTHING)
        new = tl.maximum(top, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    out = acc / total[:, None]
    tl.store(out_ptr + row * D + channels, out.to(out_ptr.dtype.element_ty), mask=row < seqlen)


def launch(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    index: torch.Tensor, count: torch.Tensor, block: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel with one fault."""
    batch, num_heads, seqlen, dim = q.shape
    out = torch.empty_like(q)
    grid = (triton.cdiv(seqlen, block), batch * num_heads)
    shape = (seqlen, num_heads // k.shape[1], scale, index.shape[3])
    if fault == "plain global":
        global_kernel[grid](q, k, v, out, index, count, *shape, D=dim, BLOCK=block)
    else:
        faulty_kernel[grid](q, k, v, out, index, count, *shape, D=dim, BLOCK=block, FAULT=fault)
    return out
