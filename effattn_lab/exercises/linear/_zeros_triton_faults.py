"""Wrong Triton kernels for ``linear/zeros/triton_states``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST = float("-inf")


@triton.jit
def faulty_kernel(
    k_ptr, v_ptr, s_ptr, f_ptr, g_ptr, h_ptr, e_ptr, p_ptr, m_ptr, seqlen,
    D: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
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
        top = tl.max(s, 0)
        if FAULT != "maximum of the chunk alone":
            top = tl.maximum(m, top)
        w = tl.exp(s - top)
        s = tl.where(here | (FAULT == "rows past the end"), s - top, 0.0)
        if FAULT == "weights in half":
            w = w.to(tl.float16).to(tl.float32)
        if FAULT == "F without the exponential":
            w = s
        new_f = tl.dot(tl.trans((k * w[:, None]).to(v.dtype)), v, input_precision="ieee")
        new_g = tl.dot(tl.trans((k * s[:, None]).to(v.dtype)), v, input_precision="ieee")
        new_h = tl.dot(tl.trans(k), v, input_precision="ieee")
        if FAULT == "F not faded":
            f += new_f
        elif FAULT == "chunk boundary lost":
            f = new_f
        else:
            f = tl.exp(m - top) * f + new_f
        if FAULT == "G not moved":
            g += new_g
        elif FAULT == "G moved after H":
            g += (m - top) * (h + new_h) + new_g
        elif FAULT == "chunk boundary lost":
            g = new_g
        else:
            g += (m - top) * h + new_g
        if FAULT == "chunk boundary lost":
            h = new_h
        else:
            h += new_h
        fade = tl.exp(m - top)
        if FAULT == "E not faded":
            fade = 1.0
        e = fade * e + tl.sum(tl.exp(tl.where(here, s, float("-inf"))), 0)
        if FAULT == "P not moved":
            p += tl.sum(s, 0)
        elif FAULT == "P moved by the chunk":
            p += (m - top) * CHUNK + tl.sum(s, 0)
        else:
            p += (m - top) * first + tl.sum(s, 0)
        if FAULT != "m not kept":
            m = top
    place = head * D * V + dims[:, None] * V + values[None, :]
    tl.store(f_ptr + place, f)
    tl.store(g_ptr + place, g)
    tl.store(h_ptr + place, h)
    tl.store(e_ptr + head, e)
    tl.store(p_ptr + head, p)
    tl.store(m_ptr + head, m)


@triton.jit
def global_kernel(
    k_ptr, v_ptr, s_ptr, f_ptr, g_ptr, h_ptr, e_ptr, p_ptr, m_ptr, seqlen,
    D: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Right in the interpreter; the compiler does not see the ordinary global LOWEST."""
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
        s = tl.load(s_ptr + first + rows, mask=here, other=LOWEST)
        top = tl.maximum(m, tl.max(s, 0))
        w = tl.exp(s - top)
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


def launch(fault: str, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, chunk_size: int = 16):
    """Launch the kernel with one fault."""
    batch, heads, seqlen, dim = k.shape
    f, g, h = (torch.empty(batch, heads, dim, v.shape[3], device=k.device) for _ in range(3))
    e, p, m = (torch.empty(batch, heads, device=k.device) for _ in range(3))
    sizes = {"D": dim, "V": v.shape[3], "CHUNK": chunk_size}
    if fault == "plain global":
        global_kernel[(batch * heads,)](k, v, s, f, g, h, e, p, m, seqlen, **sizes)
    else:
        faulty_kernel[(batch * heads,)](k, v, s, f, g, h, e, p, m, seqlen, **sizes, FAULT=fault)
    return f, g, h, e, p, m
