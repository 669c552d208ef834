"""A solution of ``linear/linearized_llm/triton_conv``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def conv_kernel(
    v_ptr,
    w_ptr,
    y_ptr,
    seqlen,
    groups,
    D: tl.constexpr,
    LAGS: tl.constexpr,
    SIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one chunk of one query head. Tensors are contiguous [B, H, N, D]; w is [Hq, LAGS] by lag."""
    first = tl.program_id(0) * CHUNK
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    pair = (tl.program_id(2) * num_heads + head).to(tl.int64)  # batch and query head
    v_ptr += pair // groups * seqlen * D
    y_ptr += pair * seqlen * D
    w_ptr += head * LAGS
    rows = tl.arange(0, CHUNK)
    side = tl.arange(0, SIDE) - SIDE  # positions before the chunk: -SIDE .. -1
    dims = tl.arange(0, D)
    token = (first + rows)[:, None]
    v = tl.load(v_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
    before = (first + side)[:, None]
    v_before = tl.load(v_ptr + before * D + dims[None, :], mask=before >= 0, other=0.0)
    lag = rows[:, None] - rows[None, :]
    band = tl.load(w_ptr + lag, mask=(lag >= 0) & (lag < LAGS), other=0.0)
    y = tl.dot(band, v, input_precision="ieee")
    lag = rows[:, None] - side[None, :]
    band = tl.load(w_ptr + lag, mask=lag < LAGS, other=0.0)
    y += tl.dot(band, v_before, input_precision="ieee")
    tl.store(y_ptr + token * D + dims[None, :], y.to(y_ptr.dtype.element_ty), mask=token < seqlen)


def conv_triton(v: torch.Tensor, weight: torch.Tensor, chunk_size: int = 16) -> torch.Tensor:
    """Launch `conv_kernel`: v [B, Hkv, N, D] and weight [Hq, L], in one dtype, give y [B, Hq, N, D]."""
    v, weight = v.contiguous(), weight.contiguous()  # the kernel computes addresses from the shape
    batch, num_kv_heads, seqlen, dim = v.shape
    num_heads, lags = weight.shape
    # A lag that has no weight must not be read: NaN lies around the weights.
    around = torch.full((weight.numel() + 256,), float("nan"), device=v.device, dtype=weight.dtype)
    around[128:-128] = weight.flatten()
    y = torch.empty(batch, num_heads, seqlen, dim, device=v.device, dtype=v.dtype)
    side = max(16, triton.next_power_of_2(lags - 1)) if lags > 1 else 16
    conv_kernel[(triton.cdiv(seqlen, chunk_size), num_heads, batch)](
        v,
        around[128:-128],
        y,
        seqlen,
        num_heads // num_kv_heads,
        D=dim,
        LAGS=lags,
        SIDE=side,
        CHUNK=chunk_size,
    )
    return y
