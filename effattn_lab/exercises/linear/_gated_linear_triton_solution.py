"""A solution of ``linear/gated_linear/triton_forward``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def gated_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, seqlen, groups, scale,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one query head, all its chunks. Tensors are contiguous; g [B, Hkv, N] is float32."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    channels = tl.arange(0, K)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * K
    k_ptr += (head // groups) * seqlen * K
    v_ptr += (head // groups) * seqlen * V
    g_ptr += (head // groups) * seqlen
    out_ptr += head * seqlen * V
    s = tl.zeros([K, V], tl.float32)
    for first in range(0, seqlen, CHUNK):
        token = (first + rows)[:, None]
        q = tl.load(q_ptr + token * K + channels[None, :], mask=token < seqlen, other=0.0)
        k = tl.load(k_ptr + token * K + channels[None, :], mask=token < seqlen, other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        g = tl.load(g_ptr + first + rows, mask=first + rows < seqlen, other=0.0)
        up = tl.cumsum(g, 0)
        total = tl.sum(g, 0)
        apart = tl.where(rows[:, None] >= rows[None, :], up[:, None] - up[None, :], float("-inf"))
        inside = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.exp(apart)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee") * tl.exp(up)[:, None]
        out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        out = scale * out
        k_kept = (k * tl.exp(total - up)[:, None]).to(v.dtype)
        s = tl.exp(total) * s + tl.dot(tl.trans(k_kept), v, input_precision="ieee")
        tl.store(out_ptr + token * V + values[None, :], out.to(out_ptr.dtype.element_ty), mask=token < seqlen)


def gated_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, chunk_size: int = 16
) -> torch.Tensor:
    """Launch `gated_kernel`: q [B, Hq, N, K], k [B, Hkv, N, K], v [B, Hkv, N, V], g [B, Hkv, N]."""
    # The kernel computes addresses from the shape.
    q, k, v, g = q.contiguous(), k.contiguous(), v.contiguous(), g.float().contiguous()
    batch, num_heads, seqlen, channels = q.shape
    out = torch.empty(batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype)
    gated_kernel[(batch * num_heads,)](
        q, k, v, g, out, seqlen, num_heads // k.shape[1], scale, K=channels, V=v.shape[3], CHUNK=chunk_size
    )
    return out
