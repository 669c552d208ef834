"""Which tiles each GPU gets for linear attention: one table, chosen with ``effattn xray linear_attention``.

A tile must compile without spills, fit the shared memory that one block may take, and use the tensor cores where
the GPU has them. No tile here was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._tiles import nearest


class Tile(NamedTuple):
    """``chunk`` tokens by ``block_k`` features by ``block_v`` values, for ``num_warps`` warps."""

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return f"{self.chunk}x{self.block_k}x{self.block_v}"


class Tiles(NamedTuple):
    """One tile a kernel. The chunk is the same in all, as the kernels meet at its borders."""

    states: Tile
    outputs: Tile
    delta: Tile
    dstates: Tile
    dqdk: Tile
    dv: Tile


def _row(chunk: int, *tiles: tuple[int, int, int, int]) -> Tiles:
    states, outputs, dstates, dqdk, dv = (Tile(chunk, *t) for t in tiles)
    return Tiles(states, outputs, Tile(chunk, 0, 64, 4, 1), dstates, dqdk, dv)


# (architecture, bytes an element) -> chunk, then (BLOCK_K, BLOCK_V, warps, stages) for states, outputs, dstates,
# dqdk and dv. Of the tiles that pass, the table has those with the fewest instructions a token.
TABLE: dict[tuple[str, int], Tiles] = {
    ("interpreter", 2): _row(32, *[(32, 32, 4, 1)] * 5),
    ("interpreter", 4): _row(32, *[(32, 32, 4, 1)] * 5),
    ("sm75", 2): _row(32, (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
    ("sm75", 4): _row(32, *[(32, 32, 8, 1)] * 5),
    ("sm80", 2): _row(64, (64, 64, 2, 2), (64, 64, 2, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 2, 2)),
    ("sm80", 4): _row(32, *[(32, 32, 4, 2)] * 2, (32, 32, 8, 2), *[(32, 32, 4, 2)] * 2),
    ("sm89", 2): _row(64, (64, 64, 2, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    ("sm89", 4): _row(32, *[(32, 32, 4, 2)] * 2, (32, 32, 8, 2), *[(32, 32, 4, 2)] * 2),
    ("sm90", 2): _row(64, (64, 64, 2, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 2, 2)),
    ("sm90", 4): _row(32, *[(32, 32, 4, 2)] * 2, (32, 32, 8, 2), *[(32, 32, 4, 2)] * 2),
    ("sm100", 2): _row(64, (64, 32, 4, 3), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm100", 4): _row(32, *[(32, 32, 4, 2)] * 2, (32, 32, 8, 2), *[(32, 32, 4, 2)] * 2),
    ("sm120", 2): _row(64, (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm120", 4): _row(32, *[(32, 32, 4, 2)] * 2, *[(32, 32, 8, 2)] * 2, (32, 32, 4, 2)),
    ("gfx942", 2): _row(64, *[(64, 64, 4, 1)] * 5),
    ("gfx942", 4): _row(64, *[(64, 64, 4, 1)] * 5),
}

# Rows that do not begin at multiples of 16 bytes are loaded element by element, and every address takes registers:
# with the tiles above dstates at head dim 60 spills on each of these GPUs, 56 bytes a thread on an A100 and 344 on an
# RTX PRO 6000. More warps and smaller tiles hold it.
UNALIGNED = _row(64, (64, 32, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2))

# fp16 states are scaled, one multiplication between two products, and dqdk then needs a few registers more. So it
# does where query heads share a key head: its loop over them carries dK along, and with the tiles above spills 64
# bytes a thread on an RTX PRO 6000. And above 128 dimensions (bf16, 256, A100: 16 bytes).
FP16_DQDK: dict[str, Tile] = {"sm80": Tile(64, 64, 32, 4, 2), "sm120": Tile(64, 32, 64, 4, 2)}
SMALL_DQDK = Tile(64, 32, 64, 4, 2)


def block(dim: int, largest: int) -> int:
    """Width of a tile: the next power of two, from 16 (the least a ``tl.dot`` takes) to what the table allows."""
    return min(largest, max(16, 1 << (dim - 1).bit_length()))


def choose_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, arch: str, groups: int = 1) -> Tiles:
    """The table's row, cut to the dimensions there are. Unknown architectures get the cautious tiles of the T4."""
    arch = nearest(arch)
    row = TABLE.get((arch, dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    if arch.startswith("sm") and dtype.itemsize == 2 and row.states.chunk == UNALIGNED.states.chunk:
        if key_dim % 16 or value_dim % 16:
            row = UNALIGNED
        elif groups > 1 or max(key_dim, value_dim) > 128:
            row = row._replace(dqdk=SMALL_DQDK)
        elif dtype is torch.float16 and arch in FP16_DQDK:
            row = row._replace(dqdk=FP16_DQDK[arch])
    return Tiles(*(_cut(t, key_dim, value_dim) for t in row))


def _cut(tile: Tile, key_dim: int, value_dim: int) -> Tile:
    tile = tile._replace(block_v=block(value_dim, tile.block_v))
    return tile._replace(block_k=block(key_dim, tile.block_k)) if tile.block_k else tile
