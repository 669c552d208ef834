"""A solution of ``sparse/streaming/triton_forward``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def streaming_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen_q, seqlen_k, groups, scale, sinks, window,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. Tensors are contiguous [B, H, N, D]."""
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
    first = tl.maximum(begin - window + 1, 0) // BLOCK
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


def streaming_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: int, window: int, block: int = 16
) -> torch.Tensor:
    """Launch `streaming_kernel`: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D] give out like q."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernel computes addresses from the shape
    batch, num_heads, seqlen_q, dim = q.shape
    out = torch.empty_like(q)
    streaming_kernel[(triton.cdiv(seqlen_q, block), batch * num_heads)](
        q, k, v, out, seqlen_q, k.shape[2], num_heads // k.shape[1], scale, sinks, window, D=dim, BLOCK=block
    )
    return out
