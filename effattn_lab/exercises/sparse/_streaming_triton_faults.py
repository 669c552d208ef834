"""Wrong Triton kernels for ``sparse/streaming/triton_forward``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

FACTOR = 1


@triton.jit
def faulty_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen_q, seqlen_k, groups, scale, sinks, window,
    D: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    channels = tl.arange(0, D)[None, :]
    q_ptr += head * seqlen_q * D
    k_ptr += (head // groups) * seqlen_k * D
    v_ptr += (head // groups) * seqlen_k * D
    out_ptr += head * seqlen_q * D
    row = (start + tile)[:, None]
    q = tl.load(q_ptr + row * D + channels, mask=row < seqlen_q, other=0.0)
    begin = start + seqlen_k - seqlen_q
    if FAULT == "rows from 0":
        begin = start
    pos = (begin + tile)[:, None]
    first = tl.maximum(begin - window + 1, 0) // BLOCK
    if FAULT == "window of the last query":
        first = tl.maximum(begin + BLOCK - window, 0) // BLOCK
    if FAULT == "everything read":
        first = 0
    end = tl.minimum((begin + BLOCK - 1) // BLOCK + 1, tl.cdiv(seqlen_k, BLOCK))
    if FAULT == "the future read":
        end = tl.cdiv(seqlen_k, BLOCK)
    if FAULT == "last tile dropped":
        end = tl.maximum((begin + BLOCK - 1) // BLOCK, first + 1)
    sink_tiles = tl.minimum(tl.cdiv(sinks, BLOCK), first)
    if FAULT == "tiles read twice":
        sink_tiles = tl.cdiv(sinks, BLOCK)
    if FAULT == "sinks dropped":
        sink_tiles = 0
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, sink_tiles + end - first):
        block = tl.where(t < sink_tiles, t, first + t - sink_tiles)
        col = block * BLOCK + tile
        at = col[:, None]
        k = tl.load(k_ptr + at * D + channels, mask=at < seqlen_k, other=0.0)
        v = tl.load(v_ptr + at * D + channels, mask=at < seqlen_k, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        j = col[None, :]
        if FAULT == "window one long":
            see = (j <= pos) & ((j < sinks) | (pos - j <= window))
        elif FAULT == "whole sink tiles":
            see = (j <= pos) & ((t < sink_tiles) | (j < sinks) | (pos - j < window))
        elif FAULT == "causal alone":
            see = j <= pos
        elif FAULT == "the future seen":
            see = (j < seqlen_k) & ((j < sinks) | (pos - j < window))
        else:
            see = (j <= pos) & ((j < sinks) | (pos - j < window))
        s = tl.where(see, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row * D + channels, out.to(out_ptr.dtype.element_ty), mask=row < seqlen_q)


@triton.jit
def global_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen_q, seqlen_k, groups, scale, sinks, window,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Right in the interpreter; the compiler does not see the ordinary global FACTOR."""
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    channels = tl.arange(0, D)[None, :]
    q_ptr += head * seqlen_q * D
    k_ptr += (head // groups) * seqlen_k * D
    v_ptr += (head // groups) * seqlen_k * D
    out_ptr += head * seqlen_q * D
    row = (start + tile)[:, None]
    q = tl.load(q_ptr + row * D + channels, mask=row < seqlen_q, other=0.0)
    begin = start + seqlen_k - seqlen_q
    pos = (begin + tile)[:, None]
    first = tl.maximum(begin - window + FACTOR, 0) // BLOCK
    end = tl.minimum((begin + BLOCK - 1) // BLOCK + 1, tl.cdiv(seqlen_k, BLOCK))
    sink_tiles = tl.minimum(tl.cdiv(sinks, BLOCK), first)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for t in range(0, sink_tiles + end - first):
        block = tl.where(t < sink_tiles, t, first + t - sink_tiles)
        col = block * BLOCK + tile
        at = col[:, None]
        k = tl.load(k_ptr + at * D + channels, mask=at < seqlen_k, other=0.0)
        v = tl.load(v_ptr + at * D + channels, mask=at < seqlen_k, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        j = col[None, :]
        see = (j <= pos) & ((j < sinks) | (pos - j < window))
        s = tl.where(see, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - origin[:, None])
        old = tl.exp(top - origin)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row * D + channels, out.to(out_ptr.dtype.element_ty), mask=row < seqlen_q)


def launch(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    scale: float, sinks: int, window: int, block: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel with one fault."""
    batch, num_heads, seqlen_q, dim = q.shape
    out = torch.empty_like(q)
    grid = (triton.cdiv(seqlen_q, block), batch * num_heads)
    shape = (seqlen_q, k.shape[2], num_heads // k.shape[1], scale, sinks, window)
    if fault == "plain global":
        global_kernel[grid](q, k, v, out, *shape, D=dim, BLOCK=block)
    else:
        faulty_kernel[grid](q, k, v, out, *shape, D=dim, BLOCK=block, FAULT=fault)
    return out
