"""Wrong Triton kernels for ``linear/delta_rule/triton_forward``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

LAST = 15


@triton.jit
def faulty_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, out_ptr, seqlen, groups, scale,
    D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, C)
    dims = tl.arange(0, D)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * D
    k_ptr += (head // groups) * seqlen * D
    v_ptr += (head // groups) * seqlen * V
    beta_ptr += (head // groups) * seqlen
    out_ptr += head * seqlen * V
    s = tl.zeros([D, V], tl.float32)
    for first in range(0, seqlen, C):
        token = (first + rows)[:, None]
        q = tl.load(q_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
        k = tl.load(k_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        beta = tl.load(beta_ptr + token, mask=token < seqlen, other=0.0)
        lower = beta * tl.dot(k, tl.trans(k), input_precision="ieee")
        if FAULT != "inclusive triangle":  # the diagonal would be taken out of finished rows too
            lower = tl.where(rows[:, None] > rows[None, :], lower, 0.0)
        else:
            lower = tl.where(rows[:, None] >= rows[None, :], lower, 0.0)
        answer = tl.dot(k, s.to(k.dtype), input_precision="ieee")
        if FAULT == "state not asked":
            x = beta * v.to(tl.float32)
        elif FAULT == "beta on the value only":
            x = beta * v - answer
        elif FAULT == "no beta in R":
            x = v - answer
        else:
            x = beta * (v - answer)
        if FAULT == "one term of the series":
            x -= tl.dot(lower, x, input_precision="ieee")
        elif FAULT == "stops early":
            for j in range(0, C - 2):
                done = tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)
                column = tl.sum(tl.where(rows[None, :] == j, lower, 0.0), 1)
                x -= column[:, None] * done[None, :]
        elif FAULT != "not solved":
            for j in range(0, C - 1):
                done = tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)
                column = tl.sum(tl.where(rows[None, :] == j, lower, 0.0), 1)
                x -= column[:, None] * done[None, :]
        square = tl.dot(q, tl.trans(k), input_precision="ieee")
        square = tl.where(rows[:, None] >= rows[None, :], square, 0.0)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee")
        out += tl.dot(square.to(q.dtype), x.to(q.dtype), input_precision="ieee")
        s += tl.dot(tl.trans(k), x.to(k.dtype), input_precision="ieee")
        tl.store(
            out_ptr + token * V + values[None, :],
            (scale * out).to(out_ptr.dtype.element_ty),
            mask=token < seqlen,
        )


@triton.jit
def global_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    out_ptr,
    seqlen,
    groups,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
):
    """Right in the interpreter; the compiler does not see the ordinary global LAST."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, C)
    dims = tl.arange(0, D)
    values = tl.arange(0, V)
    q_ptr += head * seqlen * D
    k_ptr += (head // groups) * seqlen * D
    v_ptr += (head // groups) * seqlen * V
    beta_ptr += (head // groups) * seqlen
    out_ptr += head * seqlen * V
    s = tl.zeros([D, V], tl.float32)
    for first in range(0, seqlen, C):
        token = (first + rows)[:, None]
        q = tl.load(q_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
        k = tl.load(k_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
        v = tl.load(v_ptr + token * V + values[None, :], mask=token < seqlen, other=0.0)
        beta = tl.load(beta_ptr + token, mask=token < seqlen, other=0.0)
        lower = beta * tl.dot(k, tl.trans(k), input_precision="ieee")
        lower = tl.where(rows[:, None] > rows[None, :], lower, 0.0)
        x = beta * (v - tl.dot(k, s.to(k.dtype), input_precision="ieee"))
        for j in range(0, LAST):
            done = tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)
            column = tl.sum(tl.where(rows[None, :] == j, lower, 0.0), 1)
            x -= column[:, None] * done[None, :]
        square = tl.dot(q, tl.trans(k), input_precision="ieee")
        square = tl.where(rows[:, None] >= rows[None, :], square, 0.0)
        out = tl.dot(q, s.to(q.dtype), input_precision="ieee")
        out += tl.dot(square.to(q.dtype), x.to(q.dtype), input_precision="ieee")
        s += tl.dot(tl.trans(k), x.to(k.dtype), input_precision="ieee")
        tl.store(
            out_ptr + token * V + values[None, :],
            (scale * out).to(out_ptr.dtype.element_ty),
            mask=token < seqlen,
        )


def launch(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    chunk_size: int = 16,
) -> torch.Tensor:
    """Launch the kernel with one fault."""
    batch, num_heads, seqlen, dim = q.shape
    out = torch.empty(batch, num_heads, seqlen, v.shape[3], device=q.device, dtype=q.dtype)
    sizes = {"D": dim, "V": v.shape[3], "C": chunk_size}
    groups, grid = num_heads // k.shape[1], (batch * num_heads,)
    if fault == "plain global":
        global_kernel[grid](q, k, v, beta, out, seqlen, groups, scale, **sizes)
    else:
        faulty_kernel[grid](q, k, v, beta, out, seqlen, groups, scale, **sizes, FAULT=fault)
    return out
