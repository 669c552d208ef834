"""Wrong Triton kernels for ``linear/linearized_llm/triton_conv``; FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

FACTOR = 1.0


@triton.jit
def faulty_kernel(
    v_ptr, w_ptr, y_ptr, seqlen, groups,
    D: tl.constexpr, LAGS: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * CHUNK
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    pair = (tl.program_id(2) * num_heads + head).to(tl.int64)
    v_ptr += pair // groups * seqlen * D
    y_ptr += pair * seqlen * D
    if FAULT == "one kernel for all heads":
        w_ptr += 0
    else:
        w_ptr += head * LAGS
    rows = tl.arange(0, CHUNK)
    side = tl.arange(0, SIDE) - SIDE
    dims = tl.arange(0, D)
    token = (first + rows)[:, None]
    v = tl.load(v_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
    before = (first + side)[:, None]
    v_before = tl.load(v_ptr + before * D + dims[None, :], mask=before >= 0, other=0.0)
    lag = rows[:, None] - rows[None, :]
    if FAULT == "band transposed":
        lag = -lag
    if FAULT == "symmetric":
        lag = tl.abs(lag)
    see = (lag >= 0) & (lag < LAGS)
    if FAULT == "token itself dropped":
        see = (lag > 0) & (lag < LAGS)
    if FAULT == "one lag too many":
        see = (lag >= 0) & (lag <= LAGS)
    if FAULT == "later tokens read" or FAULT == "later tokens read, and no second mask":
        see = lag < LAGS
    if FAULT == "no first mask":
        see = lag >= 0
    if FAULT == "no mask":
        see = lag < 1_000
    band = tl.load(w_ptr + lag, mask=see, other=0.0)
    y = tl.dot(band, v, input_precision="ieee")
    lag = rows[:, None] - side[None, :]
    if FAULT == "before one off":
        lag = lag - 1
    see = lag < LAGS
    if FAULT == "no mask" or FAULT == "no second mask" or FAULT == "later tokens read, and no second mask":
        see = lag < 1_000
    band = tl.load(w_ptr + lag, mask=see, other=0.0)
    if FAULT != "chunk boundary lost":
        y += tl.dot(band, v_before, input_precision="ieee")
    tl.store(y_ptr + token * D + dims[None, :], y.to(y_ptr.dtype.element_ty), mask=token < seqlen)


@triton.jit
def global_kernel(
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
    """Right in the interpreter; the compiler does not see the ordinary global FACTOR."""
    first = tl.program_id(0) * CHUNK
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    pair = (tl.program_id(2) * num_heads + head).to(tl.int64)
    v_ptr += pair // groups * seqlen * D
    y_ptr += pair * seqlen * D
    w_ptr += head * LAGS
    rows = tl.arange(0, CHUNK)
    side = tl.arange(0, SIDE) - SIDE
    dims = tl.arange(0, D)
    token = (first + rows)[:, None]
    v = tl.load(v_ptr + token * D + dims[None, :], mask=token < seqlen, other=0.0)
    before = (first + side)[:, None]
    v_before = tl.load(v_ptr + before * D + dims[None, :], mask=before >= 0, other=0.0)
    lag = rows[:, None] - rows[None, :]
    band = tl.load(w_ptr + lag, mask=(lag >= 0) & (lag < LAGS), other=0.0)
    y = FACTOR * tl.dot(band, v, input_precision="ieee")
    lag = rows[:, None] - side[None, :]
    band = tl.load(w_ptr + lag, mask=lag < LAGS, other=0.0)
    y += tl.dot(band, v_before, input_precision="ieee")
    tl.store(y_ptr + token * D + dims[None, :], y.to(y_ptr.dtype.element_ty), mask=token < seqlen)


def launch(fault: str, v: torch.Tensor, weight: torch.Tensor, chunk_size: int = 16) -> torch.Tensor:
    """Launch the kernel with one fault."""
    batch, num_kv_heads, seqlen, dim = v.shape
    num_heads, lags = weight.shape
    y = torch.empty(batch, num_heads, seqlen, dim, device=v.device, dtype=v.dtype)
    side = max(16, triton.next_power_of_2(lags - 1)) if lags > 1 else 16
    # NaN around the weights, as in the solution's launcher.
    around = torch.full((weight.numel() + 256,), float("nan"), device=v.device, dtype=weight.dtype)
    around[128:-128] = weight.flatten()
    weight = around[128:-128]
    sizes = {"D": dim, "LAGS": lags, "SIDE": side, "CHUNK": chunk_size}
    groups, grid = num_heads // num_kv_heads, (triton.cdiv(seqlen, chunk_size), num_heads, batch)
    if fault == "plain global":
        global_kernel[grid](v, weight, y, seqlen, groups, **sizes)
    else:
        faulty_kernel[grid](v, weight, y, seqlen, groups, **sizes, FAULT=fault)
    return y
