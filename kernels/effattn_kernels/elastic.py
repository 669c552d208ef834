"""Elastic Attention's prefill in Triton: full and sparse heads in one launch, `elastic_attention`.

Two launches, one for the full heads and one for the sparse, would first gather Q, K and V of each kind into tensors
of their own and scatter the outputs back. Here nothing is moved: a program asks what mode its head has in its prompt.

The kernel is in `_elastic_fwd`. To read first: the PyTorch version of the same name, ``effattn_lab.sparse.elastic``.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

from . import MODE, require
from ._tiles import Tile, architecture, choose_tiles, nearest, pad_head_dim
from ._validate import HEAD_DIM_RANGE, check_attention_inputs

__all__ = ["Launch", "choose_tile", "elastic_attention", "launches"]

# (architecture, bytes an element, padded head dim) -> tile, where flash's forward tile spills (16 to 48 bytes a
# thread, on L4 8): sinks and a mode take registers.
OWN_TILES: dict[tuple[str, int, int], Tile] = {
    ("sm89", 2, 64): Tile(128, 64, 8, 3),
    ("sm75", 4, 256): Tile(16, 16, 4, 1),
    ("sm80", 4, 256): Tile(32, 16, 4, 1),
    ("gfx942", 4, 256): Tile(32, 32, 4, 1),
}


def choose_tile(head_dim: int, dtype: torch.dtype, arch: str) -> Tile:
    """Flash's forward tile (`_tiles`), or one of `OWN_TILES`."""
    shared = choose_tiles(head_dim, dtype, arch).fwd
    return OWN_TILES.get((nearest(arch), dtype.itemsize, pad_head_dim(head_dim)), shared)


def elastic_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full: torch.Tensor,
    *,
    sinks: int = 128,
    window: int = 1024,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention whose heads read all keys, or the first ``sinks`` and the last ``window``; forward only.

    Args:
        q: ``[B, Hq, seqlen_q, D]``, float16, bfloat16 or float32, any strides, 16 <= D <= 256. Queries are the
            *last* positions.
        k, v: ``[B, Hkv, seqlen_k, D]``; ``Hq`` is a multiple of ``Hkv``.
        full: the mode of each head in each prompt, ``[B, Hkv]`` as a router decides it or ``[B, Hq]``: True or 1 for
            full, False or 0 for sparse. bool or int; a floating-point tensor must hold 0 and 1 alone (checked, which
            on a GPU waits for it).
        sinks: at least 0. Default 128.
        window: at least 1, the query's own token among them. Default 1024.
        scale: factor on the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of each row of scores.

    Returns:
        ``out [B, Hq, seqlen_q, D]`` in the dtype of q, and with ``return_lse`` ``lse [B, Hq, seqlen_q]`` in float32
        (natural logarithm). A row that sees no key has output 0 and lse -inf.

    Raises:
        ValueError: an argument is wrong, or a gradient is wanted: the router is trained with both modes computed
            (``effattn_lab.sparse.elastic``), and with the decision made nothing is left to train.
        RuntimeError: kernels cannot run here.

    Source: Tang et al. 2026 (Elastic Attention), section 3.3 and appendix E: one kernel for both kinds of heads.
    """
    require()
    check_attention_inputs(q, k, v, scale, None, MODE)
    mode = _modes(q, k, full)
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks: expected an integer of at least 0, got {sinks!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window: expected an integer of at least 1, got {window!r}")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("full", full)):
            if x.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient (this kernel has no backward), got "
                    "requires_grad=True; call it under torch.no_grad() or detach"
                )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0.0:  # the kernel takes the maximum after scaling; the sign goes into q
        q, scale = -q, -scale
    out, lse = _forward(q, k, v, mode, min(sinks, k.shape[2]), min(window, k.shape[2]), scale)
    return (out, lse) if return_lse else out


def _modes(q: torch.Tensor, k: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """``full`` as int32, contiguous, ``[B, Hkv]`` or ``[B, Hq]``."""
    if not isinstance(full, torch.Tensor):
        raise ValueError(f"full: expected a torch.Tensor, got {type(full).__name__}")
    shapes = [(q.shape[0], k.shape[1]), (q.shape[0], q.shape[1])]
    if tuple(full.shape) not in shapes:
        raise ValueError(
            f"full: expected one mode a head of each prompt, shape {shapes[0]} or {shapes[1]}, "
            f"got {tuple(full.shape)}"
        )
    if full.device != q.device:
        raise ValueError(f"full: expected the device of q, {q.device}, got {full.device}")
    if full.is_complex():
        raise ValueError(f"full: expected bool, an integer or a floating-point dtype, got {full.dtype}")
    if full.is_floating_point() and not bool(((full == 0) | (full == 1)).all()):
        raise ValueError(
            "full: expected 0 and 1 alone, got other numbers; a soft decision has no single mode to launch"
        )
    return (full != 0).to(torch.int32).contiguous()


def _forward(q, k, v, mode, sinks, window, scale):  # type: ignore[no-untyped-def]
    from ._elastic_fwd import _elastic_fwd_kernel

    batch, num_heads, seqlen_q, head_dim = q.shape
    tile = choose_tile(head_dim, q.dtype, architecture(q.device))
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    grid = (batch * num_heads, -(-seqlen_q // tile.block_m))
    on = torch.cuda.device(q.device) if q.device.type == "cuda" else contextlib.nullcontext()
    with on:
        _elastic_fwd_kernel[grid](
            q, k, v, mode, out, lse, scale,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            num_heads, num_heads // k.shape[1], num_heads // mode.shape[1], seqlen_q, k.shape[2], sinks, window,
            HEAD_DIM=head_dim, BLOCK_D=pad_head_dim(head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


class Launch(NamedTuple):
    """Everything a compiler needs to build one kernel as `elastic_attention` would launch it."""

    name: str
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> triton type; ":16" marks what is divisible by 16
    constexprs: dict[str, Any]
    tile: Tile


def launches(
    head_dim: int, dtype: torch.dtype, arch: str, *, causal: bool = True, window: bool = True
) -> list[Launch]:
    """The one kernel with the tile it gets on ``arch`` (``"sm80"``, ...), for contiguous inputs.

    ``causal`` and ``window`` change nothing: it is always causal, and whether a head has a window is known at run
    time only.
    """
    del causal, window
    low, high = HEAD_DIM_RANGE
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not low <= head_dim <= high:
        raise ValueError(f"head_dim: expected {low} to {high}, got {head_dim!r}")
    from ._elastic_fwd import _elastic_fwd_kernel

    tile = choose_tile(head_dim, dtype, arch)
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    values = {
        "HEAD_DIM": head_dim, "BLOCK_D": pad_head_dim(head_dim), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for arg in _elastic_fwd_kernel.arg_names:
        if arg == "mode_ptr":
            signature[arg] = "*i32:16"
        elif arg == "lse_ptr":
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
            signature[arg], constexprs[arg] = "constexpr", values[arg]
        else:
            signature[arg] = "i32"
    return [Launch("fwd", _elastic_fwd_kernel, signature, constexprs, tile)]
