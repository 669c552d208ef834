"""A solution of ``linear/zeros/triton_states``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def zeros_kernel(
    k_ptr, v_ptr, s_ptr, f_ptr, g_ptr, h_ptr, e_ptr, p_ptr, m_ptr, seqlen,
    D: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one head, all its chunks. Tensors are contiguous [B, H, N, D]; keys have length 1."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    dims = tl.arange(0, D)
    values = tl.arange(0, V)
    k_ptr += head * seqlen * D
    v_ptr += head * seqlen * V
    s_ptr += head * seqlen
    f = tl.zeros([D, V], tl.float32)
    g = tl.zeros([D, V], tl.float32)
    h = tl.zeros([D, V], tl.float32)
    e, p = 0.0, 0.0
    m = tl.load(s_ptr)
    for first in range(0, seqlen, CHUNK):
        here = first + rows < seqlen
        token = (first + rows)[:, None]
        k = tl.load(k_ptr + token * D + dims[None, :], mask=here[:, None], other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=here[:, None], other=0.0)
        s = tl.load(s_ptr + first + rows, mask=here, other=float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        w = tl.exp(s - top)  # 0 past the end
        s = tl.where(here, s - top, 0.0)
        f = tl.exp(m - top) * f + tl.dot(tl.trans((k * w[:, None]).to(v.dtype)), v, input_precision="ieee")
        g += (m - top) * h + tl.dot(tl.trans((k * s[:, None]).to(v.dtype)), v, input_precision="ieee")
        h += tl.dot(tl.trans(k), v, input_precision="ieee")
        e = tl.exp(m - top) * e + tl.sum(w, 0)
        p += (m - top) * first + tl.sum(s, 0)
        m = top
    place = head * D * V + dims[:, None] * V + values[None, :]
    tl.store(f_ptr + place, f)
    tl.store(g_ptr + place, g)
    tl.store(h_ptr + place, h)
    tl.store(e_ptr + head, e)
    tl.store(p_ptr + head, p)
    tl.store(m_ptr + head, m)


def zeros_triton(k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, chunk_size: int = 16):
    """k [B, H, N, D], v [B, H, N, V], s [B, H, N] give F, G, H [B, H, D, V] and E, P, m [B, H]."""
    k, v, s = k.contiguous(), v.contiguous(), s.contiguous()  # the kernel computes addresses from the shape
    batch, heads, seqlen, dim = k.shape
    f, g, h = (torch.empty(batch, heads, dim, v.shape[3], device=k.device) for _ in range(3))
    e, p, m = (torch.empty(batch, heads, device=k.device) for _ in range(3))
    zeros_kernel[(batch * heads,)](k, v, s, f, g, h, e, p, m, seqlen, D=dim, V=v.shape[3], CHUNK=chunk_size)
    return f, g, h, e, p, m
