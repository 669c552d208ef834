"""Wrong Triton kernels for ``linear/selective_ssm/triton_scan``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

FACTOR = 1.0


@triton.jit
def faulty_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, seqlen, channels, S: tl.constexpr, BLOCK: tl.constexpr,
    FAULT: tl.constexpr,
):  # fmt: skip
    chans = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    states = tl.arange(0, S)
    here = chans < channels
    first = tl.program_id(1).to(tl.int64) * seqlen
    A = tl.load(A_ptr + states[:, None] * channels + chans[None, :], mask=here[None, :], other=0.0)
    D = tl.load(D_ptr + chans, mask=here, other=0.0)
    h = tl.zeros([S, BLOCK], tl.float32)
    for t in range(0, seqlen):
        row = first + t
        u = tl.load(u_ptr + row * channels + chans, mask=here, other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + row * channels + chans, mask=here, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + row * S + states).to(tl.float32)
        C = tl.load(C_ptr + row * S + states).to(tl.float32)
        old = h
        write = B[:, None] * (delta * u)[None, :]
        decay = tl.exp(delta[None, :] * A)
        if FAULT == "B without delta":
            write = B[:, None] * u[None, :]
        elif FAULT == "B and C swapped":
            write = C[:, None] * (delta * u)[None, :]
            C = B
        if FAULT == "A without delta":
            decay = tl.exp(A)
        elif FAULT == "base 2":
            decay = tl.exp2(delta[None, :] * A)
        if FAULT == "decayed after the write":
            h = decay * (h + write)
        elif FAULT == "past forgotten":
            h = write
        else:
            h = decay * h + write
        if FAULT == "state in half":
            h = h.to(tl.float16).to(tl.float32)
        if FAULT == "read before the write":
            y = tl.sum(old * C[:, None], 0) + D * u
        elif FAULT == "skip missing":
            y = tl.sum(h * C[:, None], 0)
        else:
            y = tl.sum(h * C[:, None], 0) + D * u
        tl.store(y_ptr + row * channels + chans, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def global_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    y_ptr,
    seqlen,
    channels,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Right in the interpreter; the compiler does not see the ordinary global FACTOR."""
    chans = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    states = tl.arange(0, S)
    here = chans < channels
    first = tl.program_id(1).to(tl.int64) * seqlen
    A = tl.load(A_ptr + states[:, None] * channels + chans[None, :], mask=here[None, :], other=0.0)
    D = tl.load(D_ptr + chans, mask=here, other=0.0)
    h = tl.zeros([S, BLOCK], tl.float32)
    for t in range(0, seqlen):
        row = first + t
        u = tl.load(u_ptr + row * channels + chans, mask=here, other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + row * channels + chans, mask=here, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + row * S + states).to(tl.float32)
        C = tl.load(C_ptr + row * S + states).to(tl.float32)
        h = tl.exp(delta[None, :] * A) * h + FACTOR * B[:, None] * (delta * u)[None, :]
        y = tl.sum(h * C[:, None], 0) + D * u
        tl.store(y_ptr + row * channels + chans, y.to(y_ptr.dtype.element_ty), mask=here)


def launch(
    fault: str, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor, block: int = 32,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel with one fault."""
    u, delta, A, B, C, D = (x.contiguous() for x in (u, delta, A, B, C, D))
    batch, seqlen, channels = u.shape
    y = torch.empty_like(u)
    grid, sizes = (triton.cdiv(channels, block), batch), {"S": A.shape[0], "BLOCK": block}
    if fault == "plain global":
        global_kernel[grid](u, delta, A, B, C, D, y, seqlen, channels, **sizes)
    else:
        faulty_kernel[grid](u, delta, A, B, C, D, y, seqlen, channels, **sizes, FAULT=fault)
    return y
