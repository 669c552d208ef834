"""Which tiles of keys does each tile of queries read? The form in which every sparse pattern reaches a kernel.

A tile of ``block_m`` queries keeps a list of the ``block_n``-wide tiles of keys in which it sees anything. A tile
that it sees whole needs no mask. For any other the list names one of a few tile masks, each kept once: a static
pattern has few, since they repeat along the sequence.

Where every query chooses for itself (MoBA, NSA) a tile of queries lists what any of them chose, and one bit a query
says which of them look there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.sparse.static_patterns import MaskMod


@dataclass(frozen=True)
class BlockList:
    """Tiles to read, for each head and each tile of queries.

    Attributes:
        index: int32 ``[Bl, Hl, Mq, W]``, tiles of keys, ascending; entries from ``count`` on are 0 and not read.
        count: int32 ``[Bl, Hl, Mq]``, how many of them.
        tile: int32 ``[Bl, Hl, Mq, W]``: 0 where the whole tile is seen, else ``t + 1`` for mask ``t`` of ``tiles``.
        tiles: bool ``[T, block_m, block_n]``, True where the query may look; T at least 1.
        seqlen_q, seqlen_k: lengths that it was made for.
        rows: bool ``[Bl, Hl, Mq, W, block_m]``, which queries of the tile look at the listed tile, on top of its
            mask. Default None: all of them.

    ``Bl`` and ``Hl`` are 1 where all sequences or all query heads share a list. The last tile of queries or keys may
    stick out over the end: what lies there is hidden by the reader of the list, not by ``tiles``.
    """

    index: torch.Tensor
    count: torch.Tensor
    tile: torch.Tensor
    tiles: torch.Tensor
    seqlen_q: int
    seqlen_k: int
    rows: torch.Tensor | None = None

    @property
    def block_m(self) -> int:
        """Queries a tile."""
        return self.tiles.shape[1]

    @property
    def block_n(self) -> int:
        """Keys a tile."""
        return self.tiles.shape[2]

    def density(self) -> float:
        """Tiles read, as a share of all tiles of the whole (not only the causal) square."""
        return self.count.double().mean().item() / -(-self.seqlen_k // self.block_n)


class _Row(NamedTuple):
    """One row of tiles: for each head which columns are seen, and by which mask."""

    columns: list[list[int]]
    masks: list[list[int]]


def block_list(
    mask: MaskMod, seqlen_q: int, seqlen_k: int, *, block_m: int = 64, block_n: int = 64, heads: int = 1
) -> BlockList:
    """The list of a pattern, found row of tiles by row of tiles; no ``N x N`` mask is ever held.

    Args:
        mask: see :mod:`effattn_lab.sparse.static_patterns`. Queries are the last ``seqlen_q`` positions.
        seqlen_q, seqlen_k: lengths, each at least 1, ``seqlen_q <= seqlen_k``.
        block_m, block_n: queries and keys a tile. Default 64.
        heads: heads that the pattern tells apart. Default 1: one list for all.
    """
    for name, value in (
        ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k), ("block_m", block_m), ("block_n", block_n), ("heads", heads),
    ):  # fmt: skip
        check_positive_int(name, value)
    if seqlen_q > seqlen_k:
        raise ValueError(f"seqlen_q: expected at most seqlen_k {seqlen_k}, got {seqlen_q}")
    known: dict[bytes, int] = {}
    tiles: list[torch.Tensor] = []
    zero, h = torch.zeros(1, dtype=torch.int64), torch.arange(heads)[:, None, None]
    columns = -(-seqlen_k // block_n)
    j = torch.arange(seqlen_k)
    found: list[_Row] = []
    for begin in range(0, seqlen_q, block_m):
        i = torch.arange(begin, min(begin + block_m, seqlen_q))[:, None] + seqlen_k - seqlen_q
        keep = mask(zero, h, i, j).expand(heads, len(i), seqlen_k)
        # Beyond the ends a tile continues as "seen" for the test of wholeness and as "hidden" for that of emptiness.
        cut = _tiled(keep, block_m, block_n, columns, fill=False)
        whole = _tiled(keep, block_m, block_n, columns, fill=True).all(dim=(1, 3))
        rows = _Row([], [])
        for head in range(heads):
            here = cut[head].any(dim=(0, 2)).nonzero()[:, 0].tolist()
            which = []
            for column in here:
                if whole[head, column]:
                    which.append(0)
                    continue
                content = cut[head, :, column].contiguous()
                key = content.numpy().tobytes()
                if key not in known:
                    known[key] = len(tiles)
                    tiles.append(content)
                which.append(known[key] + 1)
            rows.columns.append(here)
            rows.masks.append(which)
        found.append(rows)
    width = max(1, max(len(x) for rows in found for x in rows.columns))
    index = torch.zeros(1, heads, len(found), width, dtype=torch.int32)
    tile, count = torch.zeros_like(index), torch.zeros(1, heads, len(found), dtype=torch.int32)
    for m, rows in enumerate(found):
        for head in range(heads):
            n = len(rows.columns[head])
            count[0, head, m] = n
            index[0, head, m, :n] = torch.tensor(rows.columns[head], dtype=torch.int32)
            tile[0, head, m, :n] = torch.tensor(rows.masks[head], dtype=torch.int32)
    masks = torch.stack(tiles) if tiles else torch.ones(1, block_m, block_n, dtype=torch.bool)
    return BlockList(index, count, tile, masks, seqlen_q, seqlen_k)


def causal_block_list(selected: torch.Tensor, seqlen: int, block_size: int) -> BlockList:
    """The list of a choice of whole blocks, causal inside the diagonal ones.

    Args:
        selected: bool ``[B, Hq, n, n]``, which blocks of keys each block of queries reads, with
            ``n = ceil(N / block_size)``; what lies above the diagonal is not read, whatever it says.
        seqlen: N.
        block_size: tokens a block, of queries and keys alike.
    """
    check_positive_int("seqlen", seqlen)
    check_positive_int("block_size", block_size)
    n = -(-seqlen // block_size)
    if selected.dtype != torch.bool or selected.dim() != 4 or selected.shape[2:] != (n, n):
        raise ValueError(
            f"selected: expected bool [B, Hq, {n}, {n}], got {selected.dtype} {tuple(selected.shape)}"
        )
    past = torch.ones(n, n, dtype=torch.bool, device=selected.device).tril()
    index, count, listed = _compact(selected & past)
    row = torch.arange(n, device=selected.device)[:, None]
    tile = ((index == row) & listed).to(torch.int32)
    triangle = torch.ones(1, block_size, block_size, dtype=torch.bool, device=selected.device).tril()
    return BlockList(index, count, tile, triangle, seqlen, seqlen)


def per_query_block_list(
    chosen: torch.Tensor, block_size: int, *, block_m: int = 64, block_n: int = 64
) -> BlockList:
    """The list where every query chooses whole blocks for itself, causal inside: MoBA, NSA's fine branch.

    A tile of queries lists the tiles of every block that one of its queries chose; ``rows`` says which did.

    Args:
        chosen: bool ``[B, Hq, N, ceil(N / block_size)]``; keys after the query are not read, whatever it says.
        block_size: tokens a block, a multiple of ``block_n``.
        block_m, block_n: queries and keys a tile. Default 64.
    """
    for name, value in (("block_size", block_size), ("block_m", block_m), ("block_n", block_n)):
        check_positive_int(name, value)
    if block_size % block_n:
        raise ValueError(f"block_n: expected a divisor of block_size {block_size}, got {block_n}")
    if (
        chosen.dtype != torch.bool
        or chosen.dim() != 4
        or chosen.shape[3] != -(-chosen.shape[2] // block_size)
    ):
        raise ValueError(
            f"chosen: expected bool [B, Hq, N, ceil(N / {block_size})], got {chosen.dtype} {tuple(chosen.shape)}"
        )
    n, device = chosen.shape[2], chosen.device
    lines, columns = -(-n // block_m), -(-n // block_n)
    asks = torch.nn.functional.pad(chosen, (0, 0, 0, lines * block_m - n)).unflatten(2, (lines, block_m))
    asks = asks.repeat_interleave(block_size // block_n, dim=-1)[..., :columns].transpose(3, 4)
    # How far the tile of keys begins after the tile of queries; from block_m on, no query of it has come that far.
    ahead = (
        torch.arange(columns, device=device) * block_n - torch.arange(lines, device=device)[:, None] * block_m
    )
    index, count, listed = _compact(asks.any(dim=-1) & (ahead < block_m))
    at = index.long()
    rows = torch.gather(asks, 3, at[..., None].expand(*at.shape, block_m)) & listed[..., None]
    # One mask for each way in which the diagonal can cross a tile.
    step = math.gcd(block_m, block_n)
    crossing = torch.arange(step - block_n, block_m, step, device=device)
    query, key = torch.arange(block_m, device=device)[:, None], torch.arange(block_n, device=device)
    tiles = key + crossing[:, None, None] <= query
    ahead = torch.gather(ahead.expand(*at.shape[:3], columns), 3, at)
    tile = (ahead - (step - block_n)) // step + 1
    tile = tile.masked_fill((ahead <= -block_n) | ~listed, 0).to(torch.int32)
    return BlockList(index, count, tile, tiles, n, n, rows)


def _compact(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bool ``[B, H, Mq, columns]`` to ``(index [B, H, Mq, W], count [B, H, Mq], listed [B, H, Mq, W])``."""
    count = chosen.sum(dim=-1, dtype=torch.int32)
    width = max(1, int(count.max()))
    # A stable sort puts the chosen first and leaves their order.
    index = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices[..., :width].to(torch.int32)
    listed = torch.arange(width, device=chosen.device) < count[..., None]
    return index.masked_fill(~listed, 0), count, listed


def _tiled(keep: torch.Tensor, block_m: int, block_n: int, columns: int, *, fill: bool) -> torch.Tensor:
    """``[heads, rows, Nk]`` to ``[heads, block_m, columns, block_n]``, ends filled up."""
    heads, rows, keys = keep.shape
    out = torch.full((heads, block_m, columns * block_n), fill, dtype=torch.bool)
    out[:, :rows, :keys] = keep
    return out.view(heads, block_m, columns, block_n)


def block_list_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockList, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax over the listed tiles, one tile of queries after the other; the keys of other tiles are not read.

    Args:
        q: ``[B, Hq, seqlen_q, D]``.
        k, v: ``[B, Hkv, seqlen_k, D]``.
        blocks: made for these lengths; its batch and head axes are 1 or those of ``q``.
        scale: default ``D ** -0.5``.

    Returns:
        ``(out [B, Hq, seqlen_q, D], lse [B, Hq, seqlen_q])``, lse in at least float32; 0 and -inf where a query sees
        no key.
    """
    check_qkv(q, k, v)
    scale = resolve_scale(scale, q.shape[3])
    batch, heads, seqlen_q = q.shape[:3]
    seqlen_k, bm, bn = k.shape[2], blocks.block_m, blocks.block_n
    if (blocks.seqlen_q, blocks.seqlen_k) != (seqlen_q, seqlen_k):
        raise ValueError(
            f"blocks: expected a list for lengths {seqlen_q} and {seqlen_k}, "
            f"got {blocks.seqlen_q} and {blocks.seqlen_k}"
        )
    for axis, (have, want) in enumerate(zip(blocks.count.shape[:2], (batch, heads))):
        if have not in (1, want):
            raise ValueError(f"blocks: expected 1 or {want} {('sequences', 'query heads')[axis]}, got {have}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    columns = -(-seqlen_k // bn)
    k_tiles, v_tiles = (_pad(x.to(dtype), columns * bn).unflatten(2, (columns, bn)) for x in (k, v))
    own = torch.arange(heads, device=q.device) // (heads // k.shape[1])
    b_, h_ = torch.arange(batch, device=q.device)[:, None, None], own[:, None]
    index = blocks.index.to(q.device).long().expand(batch, heads, -1, -1)
    tile = blocks.tile.to(q.device).long().expand(batch, heads, -1, -1)
    count = blocks.count.to(q.device).expand(batch, heads, -1)
    masks = torch.cat([torch.ones_like(blocks.tiles[:1]), blocks.tiles]).to(q.device)
    inside = torch.arange(bn, device=q.device)
    outs, lses = [], []
    for m, q_m in enumerate(q.to(dtype).split(bm, dim=2)):
        width = max(1, int(count[:, :, m].max()))
        at = index[:, :, m, :width]
        keys, values = k_tiles[b_, h_, at], v_tiles[b_, h_, at]  # [B, Hq, width, bn, D]
        keep = masks[tile[:, :, m, :width]][..., : q_m.shape[2], :]  # [B, Hq, width, bm, bn]
        listed = torch.arange(width, device=q.device) < count[:, :, m, None]
        real = at[..., None] * bn + inside < seqlen_k
        keep = keep & (listed[..., None] & real)[..., None, :]
        if blocks.rows is not None:
            asks = blocks.rows[:, :, m, :width, : q_m.shape[2]].to(q.device)
            keep = keep & asks[..., None]
        s = scale * torch.einsum("bhmd,bhwnd->bhmwn", q_m, keys)
        s = s.masked_fill(~keep.transpose(2, 3), float("-inf")).flatten(3)
        lse = torch.logsumexp(s, dim=-1)
        p = torch.exp(s - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
        outs.append(p @ values.flatten(2, 3))
        lses.append(lse)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _pad(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))
