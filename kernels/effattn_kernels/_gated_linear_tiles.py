"""Which tiles each GPU gets for gated linear attention: one table, chosen with ``effattn xray gated_linear``.

A tile must compile without spills, fit the shared memory that one block may take, and use the tensor cores where
the GPU has them. No tile here was chosen by timing. Decays a channel need more registers than decays a head, since
every query and key carries one: they have rows of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._linear_attention_tiles import Tile, block
from ._tiles import nearest


class Tiles(NamedTuple):
    """One tile a kernel. The chunk is the same in all, as the kernels meet at its borders."""

    sums: Tile
    states: Tile
    outputs: Tile
    dstates: Tile
    dqdk: Tile
    dv: Tile


def _row(chunk: int, *tiles: tuple[int, int, int, int]) -> Tiles:
    states, outputs, dstates, dqdk, dv = (Tile(chunk, *t) for t in tiles)
    return Tiles(Tile(chunk, 64, 0, 4, 1), states, outputs, dstates, dqdk, dv)


# (architecture, bytes an element, decay a channel) -> chunk, then (BLOCK_K, BLOCK_V, warps, stages) for states,
# outputs, dstates, dqdk and dv.
TABLE: dict[tuple[str, int, bool], Tiles] = {
    ("interpreter", 2, False): _row(32, *[(64, 64, 4, 1)] * 5),
    ("interpreter", 2, True): _row(32, *[(64, 64, 4, 1)] * 5),
    ("interpreter", 4, False): _row(32, *[(64, 64, 4, 1)] * 5),
    ("interpreter", 4, True): _row(32, *[(64, 64, 4, 1)] * 5),
    ("sm75", 2, False): _row(32, *[(32, 32, 8, 1)] * 5),
    ("sm75", 2, True): _row(32, *[(32, 32, 8, 1)] * 5),
    ("sm75", 4, False): _row(32, *[(32, 32, 8, 1)] * 5),
    ("sm75", 4, True): _row(32, *[(32, 32, 8, 1)] * 5),
    ("sm80", 2, False): _row(
        64, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 8, 2), (64, 64, 4, 2)
    ),
    ("sm80", 2, True): _row(
        64, (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 2)
    ),
    ("sm80", 4, False): _row(32, *[(32, 32, 4, 2)] * 5),
    ("sm80", 4, True): _row(
        32, (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)
    ),
    ("sm89", 2, False): _row(
        64, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 8, 2), (64, 64, 4, 2)
    ),
    ("sm89", 2, True): _row(
        64, (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 32, 8, 2), (64, 64, 8, 2)
    ),
    ("sm89", 4, False): _row(32, *[(32, 32, 4, 2)] * 5),
    ("sm89", 4, True): _row(32, *[(32, 32, 4, 2)] * 5),
    ("sm90", 2, False): _row(
        64, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2)
    ),
    ("sm90", 2, True): _row(
        64, (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 2)
    ),
    ("sm90", 4, False): _row(32, *[(32, 32, 4, 2)] * 5),
    ("sm90", 4, True): _row(32, *[(32, 32, 4, 2)] * 5),
    ("sm100", 2, False): _row(
        64, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2)
    ),
    ("sm100", 2, True): _row(
        64, (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 2)
    ),
    ("sm100", 4, False): _row(
        32, (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 4, 2)
    ),
    ("sm100", 4, True): _row(
        32, (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)
    ),
    ("sm120", 2, False): _row(
        64, (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (16, 32, 8, 2), (64, 64, 4, 2)
    ),
    ("sm120", 2, True): _row(
        64, (64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (64, 64, 8, 2)
    ),
    ("sm120", 4, False): _row(32, *[(32, 32, 4, 2)] * 5),
    ("sm120", 4, True): _row(32, *[(32, 32, 4, 2)] * 5),
    ("gfx942", 2, False): _row(64, *[(64, 64, 4, 1)] * 5),
    ("gfx942", 2, True): _row(64, *[(64, 64, 4, 1)] * 5),
    ("gfx942", 4, False): _row(64, *[(64, 64, 4, 1)] * 5),
    ("gfx942", 4, True): _row(32, *[(64, 64, 4, 1)] * 5),
}


# With bf16, a decay a head, at most 64 channels and values and rows that begin at multiples of 16 bytes, fewer warps
# hold the tile without spilling, and execute fewer instructions a token: 28 in place of 34 for states on an A100, 39
# in place of 44 for outputs. At head dim 60 the same tiles spill, up to 256 bytes a thread.
SMALL: dict[str, dict[str, Tile]] = {
    arch: {
        "states": Tile(64, 64, 64, 2, 2),
        "outputs": Tile(64, 64, 64, 2, 2),
        "dstates": Tile(64, 64, 64, 2, 2),
        "dqdk": Tile(64, 64, 64, 4, 2),
        "dv": Tile(64, 64, 64, 2, 2),
    }
    for arch in ("sm80", "sm90")
}

# Rows that do not begin at multiples of 16 bytes are loaded element by element, and every address takes registers.
UNALIGNED: dict[tuple[str, int, bool], dict[str, Tile]] = {
    ("sm75", 2, True): {"dv": Tile(32, 32, 16, 8, 1)},
    ("sm80", 2, True): {"dstates": Tile(64, 64, 64, 8, 2)},
}


def choose_tiles(
    key_dim: int, value_dim: int, dtype: torch.dtype, arch: str, per_channel: bool, groups: int = 1
) -> Tiles:
    """The table's row, cut to the dimensions there are. Unknown architectures get the cautious tiles of the T4."""
    arch, size = nearest(arch), dtype.itemsize
    row = TABLE.get((arch, size, per_channel)) or TABLE["sm75", size, per_channel]
    aligned = key_dim % 16 == 0 and value_dim % 16 == 0
    if not aligned:
        row = row._replace(**UNALIGNED.get((arch, size, per_channel), {}))
    small = max(key_dim, value_dim) <= 64 and aligned and dtype is torch.bfloat16
    if arch in SMALL and small and not per_channel and groups == 1:
        row = row._replace(**SMALL[arch])
    tiles = Tiles(*(_cut(t, key_dim, value_dim) for t in row))
    return tiles if per_channel else tiles._replace(sums=tiles.sums._replace(block_k=1))


def _cut(tile: Tile, key_dim: int, value_dim: int) -> Tile:
    tile = tile._replace(block_k=block(key_dim, tile.block_k))
    return tile._replace(block_v=block(value_dim, tile.block_v)) if tile.block_v else tile
