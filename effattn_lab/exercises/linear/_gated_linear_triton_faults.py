"""Wrong Triton kernels for ``linear/gated_linear/triton_forward``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

FACTOR = 1.0


@triton.jit
def faulty_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, seqlen, groups, scale,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
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
        seen = rows[:, None] >= rows[None, :]
        if FAULT == "leaky mask":
            inside = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.exp(
                -tl.abs(up[:, None] - up[None, :])
            )
        elif FAULT == "divided by the running product":
            q_kept, k_kept = q * tl.exp(up)[:, None], k / tl.exp(up)[:, None]
            inside = tl.dot(q_kept.to(q.dtype), tl.trans(k_kept.to(q.dtype)), input_precision="ieee")
            inside = tl.where(seen, inside, 0.0)
        else:
            apart = tl.where(seen, up[:, None] - up[None, :], float("-inf"))
            if FAULT == "decay off by one":
                apart = tl.where(seen, up[:, None] - (up - g)[None, :], float("-inf"))
            inside = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.exp(apart)
        rest = total - up
        if FAULT == "keys undecayed":
            rest = 0.0 * up
        if FAULT == "keys off by one":
            rest = total - up + g
        if FAULT == "keys decayed by their own g":
            rest = g
        k_kept = (k * tl.exp(rest)[:, None]).to(v.dtype)
        written = tl.dot(tl.trans(k_kept), v, input_precision="ieee")
        kept = tl.exp(total)
        if FAULT == "state undecayed":
            kept = 1.0
        elif FAULT == "chunk boundary lost":
            kept = 0.0
        if FAULT == "written before read":
            s = kept * s + written
        read = tl.exp(up)
        if FAULT == "read undecayed":
            read = tl.exp(0.0 * up)
        if FAULT == "read off by one":
            read = tl.exp(up - g)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee") * read[:, None]
        out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        if FAULT != "scale forgotten":
            out = scale * out
        if FAULT == "scaled before the square is added":
            out = scale * tl.dot(q, s.to(q.dtype), input_precision="ieee") * read[:, None]
            out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        if FAULT != "written before read":
            s = kept * s + written
        tl.store(out_ptr + token * V + values[None, :], out.to(out_ptr.dtype.element_ty), mask=token < seqlen)


@triton.jit
def global_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, seqlen, groups, scale,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Right in the interpreter; the compiler does not see the ordinary global FACTOR."""
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
        out = FACTOR * scale * out
        k_kept = (k * tl.exp(total - up)[:, None]).to(v.dtype)
        s = tl.exp(total) * s + tl.dot(tl.trans(k_kept), v, input_precision="ieee")
        tl.store(out_ptr + token * V + values[None, :], out.to(out_ptr.dtype.element_ty), mask=token < seqlen)


def launch(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    chunk_size: int = 16,
) -> torch.Tensor:
    """Launch the kernel with one fault."""
    batch, num_heads, seqlen, channels = q.shape
    out = torch.empty(batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype)
    sizes = {"K": channels, "V": v.shape[3], "CHUNK": chunk_size}
    groups, grid = num_heads // k.shape[1], (batch * num_heads,)
    if fault == "plain global":
        global_kernel[grid](q, k, v, g, out, seqlen, groups, scale, **sizes)
    else:
        faulty_kernel[grid](q, k, v, g, out, seqlen, groups, scale, **sizes, FAULT=fault)
    return out
