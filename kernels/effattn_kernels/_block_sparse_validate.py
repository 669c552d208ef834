"""Bad input to the kernels over block lists gets a ValueError that names the argument, what was expected and came."""

from __future__ import annotations

from typing import Any

import torch

from ._validate import HEAD_DIM_RANGE, _check_device, _check_scale, _check_tensors

SMALLEST_TILE = 16  # what a tl.dot takes
MOST_ROWS = 4096  # rows of tiles that a block may have in the scores


def check_block_list_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Any,
    scale: float | None,
    check_list: bool,
    mode: str,
) -> None:
    """Raise ValueError unless `block_list_attention` can compute exactly what was asked.

    Args:
        q, k, v: what the caller passed for ``[B, Hq, Nq, D]``, ``[B, Hkv, Nk, D]``, ``[B, Hkv, Nk, D]``.
        blocks: what it passed for a block list.
        scale: softmax scale or None.
        check_list: look at the list's entries too.
        mode: ``"interpreter"`` or ``"compiled"``; compiled kernels need tensors on a GPU.
    """
    _check_tensors(q, k, v)
    low, high = HEAD_DIM_RANGE
    if not low <= q.shape[3] <= high:
        raise ValueError(f"q: expected a head dimension from {low} to {high}, got {q.shape[3]}")
    _check_scale(scale)
    _check_list(q, k, blocks)
    if check_list:
        _check_entries(blocks, -(-k.shape[2] // blocks.tiles.shape[2]))
    _no_gradient("block_list.block_list_attention", q=q, k=k, v=v)
    _check_device(q, mode)


def check_score_inputs(
    q: torch.Tensor, k: torch.Tensor, stride: int, block_size: int | None, scale: float | None, mode: str
) -> None:
    """Raise ValueError unless the scores can be computed: lengths alike, sizes that divide."""
    _check_tensors(q, k, k)
    for name, value in (("stride", stride), ("block_size", stride if block_size is None else block_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: expected as many queries as keys ({k.shape[2]}), got {q.shape[2]}")
    if block_size is not None and block_size % stride:
        raise ValueError(f"stride: expected a divisor of block_size {block_size}, got {stride}")
    if block_size is not None and block_size // stride > MOST_ROWS:
        raise ValueError(f"block_size: expected at most {MOST_ROWS} strides of {stride}, got {block_size}")
    _check_scale(scale)
    _no_gradient("block_sparse", q=q, k=k)
    _check_device(q, mode)


def _check_list(q: torch.Tensor, k: torch.Tensor, blocks: Any) -> None:
    """Its tensors, shapes and lengths; nothing that waits for a GPU."""
    fields = {"index": torch.int32, "count": torch.int32, "tile": torch.int32, "tiles": torch.bool}
    for name, dtype in fields.items():
        x = getattr(blocks, name, None)
        if not isinstance(x, torch.Tensor) or x.dtype != dtype:
            came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"blocks: expected {name} in {dtype}, got {came}")
    lengths = (getattr(blocks, "seqlen_q", None), getattr(blocks, "seqlen_k", None))
    if lengths != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"blocks: expected a list for lengths {q.shape[2]} and {k.shape[2]}, got {lengths[0]} and {lengths[1]}"
        )
    tiles = blocks.tiles
    if tiles.dim() != 3 or 0 in tiles.shape or any(n % SMALLEST_TILE for n in tiles.shape[1:]):
        raise ValueError(
            f"blocks: expected tiles [T, block_m, block_n] with sides that are multiples of {SMALLEST_TILE}, "
            f"got shape {tuple(tiles.shape)}"
        )
    lines = -(-q.shape[2] // tiles.shape[1])
    if blocks.count.dim() != 3 or blocks.count.shape[2] != lines:
        raise ValueError(
            f"blocks: expected count [Bl, Hl, {lines}], one line for each {tiles.shape[1]} queries, "
            f"got shape {tuple(blocks.count.shape)}"
        )
    for axis, want in enumerate(q.shape[:2]):
        have = blocks.count.shape[axis]
        if have not in (1, want):
            raise ValueError(f"blocks: expected 1 or {want} {('sequences', 'query heads')[axis]}, got {have}")
    shape = blocks.index.shape
    if (
        blocks.index.dim() != 4
        or shape[:3] != blocks.count.shape
        or shape[3] < 1
        or blocks.tile.shape != shape
    ):
        raise ValueError(
            f"blocks: expected index and tile {(*blocks.count.shape, 'W')}, "
            f"got {tuple(shape)} and {tuple(blocks.tile.shape)}"
        )
    rows = getattr(blocks, "rows", None)
    if rows is not None and (rows.dtype != torch.bool or rows.shape != (*shape, tiles.shape[1])):
        raise ValueError(
            f"blocks: expected rows in torch.bool of shape {(*shape, tiles.shape[1])} or None, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )


def _check_entries(blocks: Any, columns: int) -> None:
    """No entry may send a kernel outside of its tensors. On a GPU this waits for it once."""
    limits = {"index": columns - 1, "count": blocks.index.shape[3], "tile": blocks.tiles.shape[0]}
    ends = torch.stack([torch.stack(getattr(blocks, name).aminmax()) for name in limits]).tolist()
    for (name, most), (low, high) in zip(limits.items(), ends):
        if low < 0 or high > most:
            raise ValueError(f"blocks: expected {name} from 0 to {most}, got {low} to {high}")


def _no_gradient(instead: str, **tensors: torch.Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient (this kernel is forward only), got "
                f"requires_grad=True; use torch.no_grad(), or effattn_lab.sparse.{instead}"
            )
