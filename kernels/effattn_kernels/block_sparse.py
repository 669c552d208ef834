"""Block-sparse attention in Triton: `block_list_attention`, and XAttention's scores that make such a list.

One kernel serves every pattern, since all of them arrive as a list of tiles: static patterns, sinks and a window,
XAttention's chosen blocks; and, with one bit a query, MoBA and NSA, where each query chooses for itself. The kernels
are in `_block_sparse_fwd` and `_xattention`, the tile table in `_block_sparse_tiles`. To read first: the PyTorch
versions of the same names, ``effattn_lab.sparse.block_list`` and ``effattn_lab.sparse.block_sparse``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import MODE, require
from ._block_sparse_tiles import MASS, MASS_ELEMENTS, ScoreTile, choose_tiles, cut_to_list
from ._block_sparse_validate import check_block_list_inputs, check_score_inputs
from ._tiles import architecture, pad_head_dim
from ._validate import HEAD_DIM_RANGE
from .flash import Launch, _cdiv, _on

__all__ = ["BlockList", "antidiagonal_scores", "block_list_attention", "launches", "xattention_scores"]


@dataclass(frozen=True)
class BlockList:
    """Tiles to read, as ``effattn_lab.sparse.block_list.BlockList`` has them; any object with these names will do.

    index: int32 ``[Bl, Hl, Mq, W]``, tiles of keys; entries from ``count`` on are 0 and not read.
    count: int32 ``[Bl, Hl, Mq]``, how many of them.
    tile: int32 ``[Bl, Hl, Mq, W]``: 0 where the whole tile is seen, else ``t + 1`` for mask ``t`` of ``tiles``.
    tiles: bool ``[T, block_m, block_n]``, True where the query may look; both sides multiples of 16.
    seqlen_q, seqlen_k: lengths that it was made for.
    rows: bool ``[Bl, Hl, Mq, W, block_m]``, which queries of the tile look at the listed tile. Default None: all.

    ``Bl`` and ``Hl`` are 1 where all sequences or all query heads share a list.
    """

    index: torch.Tensor
    count: torch.Tensor
    tile: torch.Tensor
    tiles: torch.Tensor
    seqlen_q: int
    seqlen_k: int
    rows: torch.Tensor | None = None


def block_list_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Any,
    *,
    scale: float | None = None,
    check_list: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax over the listed tiles; the keys and values of other tiles are not read.

    A query sees key ``j`` iff a listed tile holds ``j``, that tile's mask shows it, and, with ``rows``, the query's
    own bit for that tile is set. Causality is the list's business. Forward only: for gradients use the PyTorch form.

    Args:
        q: ``[B, Hq, seqlen_q, D]``, float16, bfloat16 or float32, any strides, 16 <= D <= 256.
        k: ``[B, Hkv, seqlen_k, D]``; ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads key head
            ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, seqlen_k, D]``.
        blocks: a `BlockList`. Its tile need not be the GPU's: larger ones are worked off in parts.
        scale: factor on the scores; None means ``D ** -0.5``.
        check_list: look at every entry first, for none may point outside. On a GPU this waits for it; False where the
            list is known to be good, as in a loop over the layers of a model. Default True.

    Returns:
        ``(out [B, Hq, seqlen_q, D]`` in the dtype of q, ``lse [B, Hq, seqlen_q]`` in float32, natural logarithm). A
        query that sees no key has output 0 and lse -inf.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1, over a list, as in block-sparse FlashAttention
    (Dao et al. 2022, section 3.3).
    """
    require()
    check_block_list_inputs(q, k, v, blocks, scale, check_list, MODE)
    from ._block_sparse_fwd import _block_sparse_fwd_kernel

    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0.0:  # the kernel takes the maximum after scaling; the sign goes into q
        q, scale = -q, -scale
    batch, num_heads, seqlen_q, head_dim = q.shape
    list_m, list_n = blocks.tiles.shape[1:]
    index, count, which = (x.to(q.device).contiguous() for x in (blocks.index, blocks.count, blocks.tile))
    tiles = blocks.tiles.to(q.device).contiguous().view(torch.uint8)
    rows = getattr(blocks, "rows", None)
    rows_ptr = tiles if rows is None else rows.to(q.device).contiguous().view(torch.uint8)
    tile = cut_to_list(choose_tiles(head_dim, q.dtype, architecture(q.device)).fwd, list_m, list_n)
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    shared_b, shared_h = (n == 1 for n in count.shape[:2])
    lines = count.shape[2]
    with _on(q.device):
        _block_sparse_fwd_kernel[(_cdiv(seqlen_q, tile.block_m), num_heads, batch)](
            q, k, v, out, lse, index, count, which, tiles, rows_ptr, scale,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            0 if shared_b else count.shape[1] * lines, 0 if shared_h else lines, index.shape[3],
            num_heads, num_heads // k.shape[1], seqlen_q, k.shape[2],
            HEAD_DIM=head_dim, BLOCK_D=pad_head_dim(head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            LIST_M=list_m, LIST_N=list_n, PER_ROW=rows is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def antidiagonal_scores(
    q: torch.Tensor, k: torch.Tensor, *, stride: int = 8, scale: float | None = None
) -> torch.Tensor:
    """One score for each ``S x S`` tile: ``T_nm = scale / S sum_a q_(nS + S - 1 - a) . k_(mS + a)``.

    Args:
        q: ``[B, Hq, N, D]``, float16, bfloat16 or float32, any strides, any D.
        k: ``[B, Hkv, N, D]``.
        stride: S. Default 8. A last tile that sticks out counts what it has.
        scale: None means ``D ** -0.5``.

    Returns:
        ``[B, Hq, ceil(N / S), ceil(N / S)]`` in float32, unmasked.

    Raises:
        ValueError, RuntimeError: see `block_list_attention`.

    Source: Xu et al. 2025 (XAttention), section 2.1.
    """
    require()
    check_score_inputs(q, k, stride, None, scale, MODE)
    tiles = _cdiv(q.shape[2], stride)
    tile = choose_tiles(q.shape[3], q.dtype, architecture(q.device)).scores
    out = torch.empty(*q.shape[:2], tiles, tiles, dtype=torch.float32, device=q.device)
    _products(q, k, out, stride, scale, tile, columns=tiles, per=1, width=1, parts=1, sums=False)
    return out


def xattention_scores(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int = 128, stride: int = 8, scale: float | None = None
) -> torch.Tensor:
    """``A_IJ = sum_(n in I) sum_(m in J) softmax_(m <= n)(T_n)_m``: the weight of whole blocks, T never stored.

    Args:
        q, k, stride, scale: see `antidiagonal_scores`.
        block_size: tokens a block, a multiple of the stride, at most 4096 strides. Default 128.

    Returns:
        ``[B, Hq, n, n]`` with ``n = ceil(N / block_size)``, in float32; 0 above the diagonal.

    Raises:
        ValueError, RuntimeError: see `block_list_attention`.

    Source: Xu et al. 2025 (XAttention), section 2.1 and 2.2. Its code stores the whole map of tiles; here the
    softmax is split at the blocks.
    """
    require()
    check_score_inputs(q, k, stride, block_size, scale, MODE)
    from ._xattention import _block_sparse_mass_kernel

    tiles, per, blocks = _cdiv(q.shape[2], stride), block_size // stride, _cdiv(q.shape[2], block_size)
    tile = choose_tiles(q.shape[3], q.dtype, architecture(q.device)).scores
    width, parts, rows, block_j = _grouping(per, blocks, tile)
    heads = q.shape[:2]
    sums = torch.empty(*heads, tiles, blocks * parts, dtype=torch.float32, device=q.device)
    _products(q, k, sums, stride, scale, tile, blocks * parts, per, width, parts, sums=True)
    out = torch.empty(*heads, blocks, blocks, dtype=torch.float32, device=q.device)
    with _on(q.device):
        _block_sparse_mass_kernel[(blocks, heads[0] * heads[1])](
            sums, out, tiles, per, blocks, WIDTH=width, PARTS=parts, ROWS=rows, BLOCK_J=block_j,
            num_warps=MASS.num_warps, num_stages=MASS.num_stages,
        )  # fmt: skip
    return out


def _grouping(per: int, blocks: int, tile: ScoreTile) -> tuple[int, int, int, int]:
    """How the ``per`` tiles of a block lie in the kernels: ``(WIDTH, PARTS, ROWS, BLOCK_J)``."""
    padded = 1 << (per - 1).bit_length()
    width = min(padded, tile.block_n)
    most = 1 << (blocks - 1).bit_length()
    return width, padded // width, padded, max(1, min(MASS.block_n, MASS_ELEMENTS // padded, most))


def _products(q, k, out, stride, scale, tile, columns, per, width, parts, sums):  # type: ignore[no-untyped-def]
    from ._xattention import _block_sparse_antidiagonal_kernel

    batch, num_heads, seqlen, head_dim = q.shape
    tiles, block_k = _cdiv(seqlen, stride), min(tile.block_k, pad_head_dim(head_dim))
    grid = (_cdiv(columns * width, tile.block_n), _cdiv(tiles, tile.block_m), batch * num_heads)
    with _on(q.device):
        _block_sparse_antidiagonal_kernel[grid](
            q, k, out, head_dim**-0.5 if scale is None else float(scale), *q.stride(), *k.stride(),
            num_heads, num_heads // k.shape[1], seqlen, tiles, per, columns, stride * _cdiv(head_dim, block_k),
            HEAD_DIM=head_dim, BLOCK_K=block_k,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STRIDE=stride, WIDTH=width, PARTS=parts, SUMS=sums,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    block_m: int = 128,
    block_n: int = 128,
    per_row: bool = False,
    stride: int = 8,
) -> list[Launch]:
    """The kernels with the tiles they get on ``arch`` (``"sm80"``, ``"gfx942"``, ...): fwd, scores, mass.

    Contiguous inputs. Causal or not, window or not is the list's business: the kernels are the same.

    Args:
        block_m, block_n: the list's tiles. Default 128, XAttention's.
        per_row: with one bit a query. Default False.
        stride: of the scores, for blocks of ``block_n``. Default 8.
    """
    low, high = HEAD_DIM_RANGE
    if not low <= head_dim <= high:
        raise ValueError(f"head_dim: expected {low} to {high}, got {head_dim}")
    from ._block_sparse_fwd import _block_sparse_fwd_kernel
    from ._xattention import _block_sparse_antidiagonal_kernel, _block_sparse_mass_kernel

    tiles = choose_tiles(head_dim, dtype, arch)
    fwd, scores = cut_to_list(tiles.fwd, block_m, block_n), tiles.scores
    width, parts, rows, block_j = _grouping(block_n // stride, MASS.block_n, scores)
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    kinds = {
        "q_ptr": element, "k_ptr": element, "v_ptr": element, "o_ptr": element, "tiles_ptr": "u8", "rows_ptr": "u8",
        "index_ptr": "i32", "count_ptr": "i32", "tile_ptr": "i32",
    }  # fmt: skip
    listed = {
        "BLOCK_D": pad_head_dim(head_dim), "BLOCK_M": fwd.block_m, "BLOCK_N": fwd.block_n,
        "LIST_M": block_m, "LIST_N": block_n, "PER_ROW": per_row,
    }  # fmt: skip
    grouped = {"WIDTH": width, "PARTS": parts, "ROWS": rows, "BLOCK_J": block_j}
    products = {
        "BLOCK_K": min(scores.block_k, pad_head_dim(head_dim)), "BLOCK_M": scores.block_m,
        "BLOCK_N": scores.block_n, "STRIDE": stride, "SUMS": True, **grouped,
    }  # fmt: skip
    out = []
    for name, kernel, values, tile in (
        ("fwd", _block_sparse_fwd_kernel, listed, fwd),
        ("scores", _block_sparse_antidiagonal_kernel, products, scores),
        ("mass", _block_sparse_mass_kernel, grouped, MASS._replace(block_m=rows, block_n=block_j)),
    ):
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = f"*{kinds.get(arg, 'fp32')}:16"
            elif arg == "sm_scale":
                signature[arg] = "fp32"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                signature[arg] = "i32:16" if head_dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg] = "constexpr"
                constexprs[arg] = {"HEAD_DIM": head_dim, **values}[arg]
            else:
                signature[arg] = "i32"
        out.append(Launch(name, kernel, signature, constexprs, tile))
    return out
