"""A solution of ``linear/selective_ssm/triton_scan``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def ssm_kernel(
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
    """One program: BLOCK channels of one sequence, all its tokens. Tensors are contiguous [B, N, E], [B, N,
    S], [S, E]."""
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
        h = tl.exp(delta[None, :] * A) * h + B[:, None] * (delta * u)[None, :]
        y = tl.sum(h * C[:, None], 0) + D * u
        tl.store(y_ptr + row * channels + chans, y.to(y_ptr.dtype.element_ty), mask=here)


def ssm_triton(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    block: int = 32,
) -> torch.Tensor:  # fmt: skip
    """Launch `ssm_kernel`: u, delta [B, N, E]; A [S, E], S a power of two; B, C [B, N, S]; D [E]. Gives y [B,
    N, E]."""
    u, delta, A, B, C, D = (x.contiguous() for x in (u, delta, A, B, C, D))
    batch, seqlen, channels = u.shape
    y = torch.empty_like(u)
    grid = (triton.cdiv(channels, block), batch)
    ssm_kernel[grid](u, delta, A, B, C, D, y, seqlen, channels, S=A.shape[0], BLOCK=block)
    return y
