"""Wrong Triton kernels for ``linear/linear_attention/triton_forward``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

FACTOR = 1.0


@triton.jit
def faulty_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen, groups, heads_kv, scale,
    F: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    features = tl.arange(0, F)
    values = tl.arange(0, V)
    kv_head = head // groups
    if FAULT == "heads tiled":
        kv_head = head // (groups * heads_kv) * heads_kv + head % heads_kv
    q_ptr += head * seqlen * F
    k_ptr += kv_head * seqlen * F
    v_ptr += kv_head * seqlen * V
    out_ptr += head * seqlen * V
    s = tl.zeros([F, V], tl.float32)
    for first in range(0, seqlen, CHUNK):
        token = (first + rows)[:, None]
        q = tl.load(q_ptr + token * F + features[None, :], mask=token < seqlen, other=0.0)
        k = tl.load(k_ptr + token * F + features[None, :], mask=token < seqlen, other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        inside = tl.dot(q, tl.trans(k), input_precision="ieee")
        if FAULT == "mask too strict":
            inside = tl.where(rows[:, None] > rows[None, :], inside, 0.0)
        elif FAULT != "leaky mask":
            inside = tl.where(rows[:, None] >= rows[None, :], inside, 0.0)
        if FAULT == "written before read":
            s += tl.dot(tl.trans(k), v, input_precision="ieee")
        out = tl.dot(inside.to(v.dtype), v, input_precision="ieee")
        if FAULT != "past forgotten":
            out += tl.dot(q, s.to(q.dtype), input_precision="ieee")
        if FAULT != "scale forgotten":
            out = scale * out
        if FAULT == "chunk boundary lost":
            s = tl.dot(tl.trans(k), v, input_precision="ieee")
        elif FAULT != "written before read":
            s += tl.dot(tl.trans(k), v, input_precision="ieee")
        if FAULT == "state in half":
            s = s.to(tl.float16).to(tl.float32)
        tl.store(out_ptr + token * V + values[None, :], out.to(out_ptr.dtype.element_ty), mask=token < seqlen)


@triton.jit
def global_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen, groups, scale, F: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr
):
    """Right in the interpreter; the compiler does not see the ordinary global FACTOR."""
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
        out = FACTOR * scale * out
        s += tl.dot(tl.trans(k), v, input_precision="ieee")
        tl.store(out_ptr + token * V + values[None, :], out.to(out_ptr.dtype.element_ty), mask=token < seqlen)


def launch(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, chunk_size: int = 16
) -> torch.Tensor:
    """Launch the kernel with one fault."""
    batch, num_heads, seqlen, features = q.shape
    out = torch.empty(batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype)
    sizes = {"F": features, "V": v.shape[3], "CHUNK": chunk_size}
    groups, grid = num_heads // k.shape[1], (batch * num_heads,)
    if fault == "plain global":
        global_kernel[grid](q, k, v, out, seqlen, groups, scale, **sizes)
    else:
        faulty_kernel[grid](q, k, v, out, seqlen, groups, k.shape[1], scale, **sizes, FAULT=fault)
    return out
