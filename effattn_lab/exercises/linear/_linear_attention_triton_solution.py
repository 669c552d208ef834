"""A solution of ``linear/linear_attention/triton_forward``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen, groups, scale, F: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr
):
    """One program: one query head, all its chunks. Tensors are contiguous [B, H, N, D]."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    features = tl.arange(0, F)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * F
    k_ptr += (head // groups) * seqlen * F
    v_ptr += (head // groups) * seqlen * V
    out_ptr += head * seqlen * V
    s = tl.zeros([F, V], tl.float32)
    for first in range(0, seqlen, CHUNK):
        token = (first + rows)[:, None]
        q = tl.load(q_ptr + token * F + features[None, :], mask=token < seqlen, other=0.0)
        k = tl.load(k_ptr + token * F + features[None, :], mask=token < seqlen, other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        inside = tl.dot(q, tl.trans(k), input_precision="ieee")
        inside = tl.where(rows[:, None] >= rows[None, :], inside, 0.0)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee")
        out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        out = scale * out
        s += tl.dot(tl.trans(k), v, input_precision="ieee")
        tl.store(out_ptr + token * V + values[None, :], out.to(out_ptr.dtype.element_ty), mask=token < seqlen)


def linear_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, chunk_size: int = 16
) -> torch.Tensor:
    """Launch `linear_kernel`: q [B, Hq, N, F], k [B, Hkv, N, F], v [B, Hkv, N, V] give out [B, Hq, N, V]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernel computes addresses from the shape
    batch, num_heads, seqlen, features = q.shape
    out = torch.empty(batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype)
    linear_kernel[(batch * num_heads,)](
        q, k, v, out, seqlen, num_heads // k.shape[1], scale, F=features, V=v.shape[3], CHUNK=chunk_size
    )
    return out
