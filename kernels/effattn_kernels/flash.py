"""FlashAttention in Triton: `flash_attention`, forward and backward.

The kernels are in `_flash_fwd` and `_flash_bwd`, the tile table in `_tiles`, the input checks in
`_validate`. To read first: the PyTorch version of the same name, ``effattn_lab.full.flash``.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import MODE, require
from ._tiles import PREPROCESS, Tile, architecture, choose_tiles, pad_head_dim
from ._validate import HEAD_DIM_RANGE, check_attention_inputs

__all__ = ["Launch", "flash_attention", "launches"]


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention ``softmax(scale q k^T) v`` that never stores the score matrix.

    Args:
        q: ``[B, Hq, seqlen_q, D]``, float16, bfloat16 or float32, any strides, 16 <= D <= 256.
        k: ``[B, Hkv, seqlen_k, D]``; ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads
            key head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, seqlen_k, D]``.
        causal: a query sees the keys up to its own position. The queries are the *last* positions:
            query ``i`` sees key ``j`` iff ``j <= i + seqlen_k - seqlen_q``.
        scale: factor on the scores; None means ``D ** -0.5``.
        window_size: with ``causal`` a query sees that many keys, itself included; without, the keys
            closer than ``window_size`` on both sides. None means no window.
        return_lse: also return the log-sum-exp of each row of scores.

    Returns:
        ``out [B, Hq, seqlen_q, D]`` in the dtype of q, and with ``return_lse`` ``lse [B, Hq, seqlen_q]``
        in float32 (natural logarithm). A row that sees no key has output 0 and lse -inf.
        Both are differentiable once; gradients are the same bits on every run.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2; dQ in a pass of its own.
    """
    require()
    check_attention_inputs(q, k, v, scale, window_size, MODE)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0.0:  # the kernels take the maximum after scaling; the sign goes into q
        q, scale = -q, -scale
    out, lse = _FlashAttention.apply(q, k, v, bool(causal), scale, window_size, bool(return_lse))
    return (out, lse) if return_lse else out


class _FlashAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp: O(N) beside the inputs, nothing of size N^2."""

    @staticmethod
    def forward(ctx: Any, q, k, v, causal, scale, window_size, return_lse):  # type: ignore[no-untyped-def]
        # lse2: in log2 units, as the kernels keep it.
        out, lse2 = _forward(q, k, v, causal, scale, window_size)
        ctx.save_for_backward(q, k, v, out, lse2)
        ctx.options = (causal, scale, window_size)
        ctx.set_materialize_grads(False)
        return out, lse2 * math.log(2) if return_lse else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:  # only the log-sum-exp was used
            dout = torch.zeros_like(out)
        dq, dk, dv = _backward(q, k, v, out, lse, dout, dlse, ctx.needs_input_grad, *ctx.options)
        return dq, dk, dv, None, None, None, None


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _forward(q, k, v, causal, scale, window_size):  # type: ignore[no-untyped-def]
    from ._flash_fwd import _flash_fwd_kernel

    batch, num_heads, seqlen_q, head_dim = q.shape
    groups, seqlen_k = num_heads // k.shape[1], k.shape[2]
    tile = choose_tiles(head_dim, q.dtype, architecture(q.device)).fwd

    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)

    grid = (_cdiv(seqlen_q, tile.block_m), num_heads, batch)
    with _on(q.device):
        _flash_fwd_kernel[grid](
            q, k, v, out, lse, scale,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            num_heads, groups, seqlen_q, seqlen_k, window_size or 0,
            HEAD_DIM=head_dim, BLOCK_D=pad_head_dim(head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            CAUSAL=causal, WINDOW=window_size is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def _backward(q, k, v, out, lse, dout, dlse, needs_grad, causal, scale, window_size):  # type: ignore[no-untyped-def]
    from ._flash_bwd import _flash_bwd_dkdv_kernel, _flash_bwd_dq_kernel, _flash_bwd_preprocess_kernel

    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1], k.shape[2]
    groups = num_heads // num_kv_heads
    tiles = choose_tiles(head_dim, q.dtype, architecture(q.device))
    block_d = pad_head_dim(head_dim)

    delta = torch.empty_like(lse)
    with _on(q.device):
        _flash_bwd_preprocess_kernel[(_cdiv(seqlen_q, PREPROCESS.block_m), num_heads, batch)](
            out, dout, delta, *out.stride(), *dout.stride(), num_heads, seqlen_q,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=PREPROCESS.block_m,
            num_warps=PREPROCESS.num_warps, num_stages=PREPROCESS.num_stages,
        )  # fmt: skip
    if dlse is not None:
        # d lse_i / d s_ij = P_ij, so an upstream dlse enters as dS = P (dP - (D - dlse)).
        # Rows that saw no key have nothing to pass on, whatever came from above.
        delta = torch.where(lse.isneginf(), 0.0, delta - dlse)

    shared = dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, CAUSAL=causal, WINDOW=window_size is not None,
    )  # fmt: skip
    lengths = (num_heads, groups, seqlen_q, seqlen_k, window_size or 0)
    dq = dk = dv = None
    if needs_grad[1] or needs_grad[2]:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        tile = tiles.dkdv
        with _on(q.device):
            _flash_bwd_dkdv_kernel[(_cdiv(seqlen_k, tile.block_n), num_kv_heads, batch)](
                q, k, v, dout, lse, delta, dk, dv, scale,
                *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dk.stride(), *dv.stride(), *lengths,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
            )  # fmt: skip
    if needs_grad[0]:
        dq = torch.empty_like(q)
        tile = tiles.dq
        with _on(q.device):
            _flash_bwd_dq_kernel[(_cdiv(seqlen_q, tile.block_m), num_heads, batch)](
                q, k, v, dout, lse, delta, dq, scale,
                *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dq.stride(), *lengths,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
            )  # fmt: skip
    return dq, dk, dv


class Launch(NamedTuple):
    """Everything a compiler needs to build one kernel as `flash_attention` would launch it."""

    name: str  # "fwd", "preprocess", "dkdv", "dq"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> triton type; ":16" marks what is divisible by 16
    constexprs: dict[str, Any]
    tile: Tile


def launches(
    head_dim: int, dtype: torch.dtype, arch: str, *, causal: bool = True, window: bool = False
) -> list[Launch]:
    """The four kernels of `flash_attention` with the tiles they get on ``arch`` (``"sm80"``, ``"gfx942"``, ...).

    Contiguous inputs are assumed: last stride 1, the others and all addresses divisible by 16.
    """
    low, high = HEAD_DIM_RANGE
    if not low <= head_dim <= high:
        raise ValueError(f"head_dim: expected {low} to {high}, got {head_dim}")
    from ._flash_bwd import _flash_bwd_dkdv_kernel, _flash_bwd_dq_kernel, _flash_bwd_preprocess_kernel
    from ._flash_fwd import _flash_fwd_kernel

    tiles = choose_tiles(head_dim, dtype, arch)
    kernels = [
        ("fwd", _flash_fwd_kernel, tiles.fwd),
        ("preprocess", _flash_bwd_preprocess_kernel, PREPROCESS),
        ("dkdv", _flash_bwd_dkdv_kernel, tiles.dkdv),
        ("dq", _flash_bwd_dq_kernel, tiles.dq),
    ]
    values = {"HEAD_DIM": head_dim, "BLOCK_D": pad_head_dim(head_dim), "CAUSAL": causal, "WINDOW": window}
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    rows = []
    for name, kernel, tile in kernels:
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        for arg in kernel.arg_names:
            if arg in ("lse_ptr", "delta_ptr"):
                signature[arg] = "*fp32:16"
            elif arg.endswith("_ptr"):
                signature[arg] = f"*{element}:16"
            elif arg == "sm_scale":
                signature[arg] = "fp32"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                signature[arg] = "i32:16" if head_dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg] = "constexpr"
                constexprs[arg] = {**values, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
