"""Which tiles each GPU gets for linearized attention: one table, chosen with ``effattn xray linearized_llm``.

A tile must compile without spills, fit the shared memory that one block may take, and use the tensor cores where the
GPU has them. The group is part of the model, so unlike a chunk it is no tile: a block takes a part of a group where
the whole is too large. Keys and queries are held by whole rows (their lengths are divided out). Nothing was timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._tiles import nearest


class Tile(NamedTuple):
    """``block_m`` queries by ``block_n`` keys by ``block_v`` values, for ``num_warps`` warps."""

    block_m: int
    block_n: int
    block_v: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return "x".join(str(n) for n in (self.block_m, self.block_n, self.block_v) if n)


class Tiles(NamedTuple):
    """One tile a kernel; ``states`` has no queries, ``conv`` and ``dweight`` have chunks of ``block_m`` tokens."""

    states: Tile
    outputs: Tile
    conv: Tile
    dweight: Tile


def _row(*tiles: tuple[int, int, int, int, int]) -> Tiles:
    return Tiles(*(Tile(*t) for t in tiles))


# (architecture, bytes an element) -> {largest head dim: (BLOCK_M, BLOCK_N, BLOCK_V, warps, stages) for states,
# outputs, conv, dweight}.
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {
        256: _row((0, 32, 32, 4, 1), (32, 32, 32, 4, 1), (32, 0, 32, 4, 1), (32, 0, 32, 4, 1))
    },
    ("interpreter", 4): {
        256: _row((0, 32, 32, 4, 1), (32, 32, 32, 4, 1), (32, 0, 32, 4, 1), (32, 0, 32, 4, 1))
    },
}
for _arch in ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942"):
    _few = 4 if _arch == "gfx942" else 2  # AMD's warps are twice as wide
    TABLE[_arch, 2] = {
        64: _row((0, 64, 64, _few, 2), (64, 64, 64, 4, 2), (64, 0, 64, _few, 2), (64, 0, 64, 4, 2)),
        128: _row((0, 64, 64, 4, 2), (64, 64, 64, 4, 2), (64, 0, 64, _few, 2), (64, 0, 64, 4, 2)),
        256: _row((0, 32, 64, 8, 2), (32, 32, 64, 8, 2), (64, 0, 64, 4, 2), (64, 0, 64, 4, 2)),
    }
    TABLE[_arch, 4] = {
        64: _row((0, 32, 32, 8, 2), (32, 32, 32, 8, 2), (32, 0, 32, 4, 2), (32, 0, 32, 4, 2)),
        # Tiles of outputs of 32 by 32 spill some 110 bytes a thread here.
        128: _row((0, 32, 32, 8, 2), (16, 16, 16, 8, 1), (32, 0, 32, 4, 2), (32, 0, 32, 4, 2)),
        256: _row((0, 16, 16, 8, 1), (16, 16, 16, 8, 1), (32, 0, 32, 4, 2), (32, 0, 32, 4, 2)),
    }
for _size in (2, 4):
    TABLE["sm75", _size] = {
        64: _row((0, 32, 32, 8, 1), (32, 32, 32, 8, 1), (32, 0, 32, 8, 1), (32, 0, 32, 8, 1)),
        128: _row((0, 32, 32, 8, 1), (16, 16, 16, 8, 1), (32, 0, 32, 8, 1), (32, 0, 32, 8, 1)),
        256: _row((0, 16, 16, 8, 1), (16, 16, 16, 8, 1), (32, 0, 32, 8, 1), (32, 0, 32, 8, 1)),
    }

MAX_DIM = 256  # whole rows of keys and queries are held
MAX_LAGS = 129  # 128 values before a block


def power(n: int) -> int:
    """The next power of two, at least 16 (the least a ``tl.dot`` takes)."""
    return max(16, 1 << (n - 1).bit_length())


def choose_tiles(head_dim: int, value_dim: int, group_size: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row, cut to the dimensions and the group there are. Unknown architectures get the T4's tiles."""
    rows = TABLE.get((nearest(arch), dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    row = next(tiles for largest, tiles in sorted(rows.items()) if head_dim <= largest)
    if head_dim % 16 or value_dim % 16:
        # Rows that begin anywhere are loaded element by element, and every address takes registers: with 4 warps
        # states spills 8 bytes a thread on an A100 at head dim 60.
        row = row._replace(states=row.states._replace(num_warps=8), conv=row.conv._replace(num_warps=8))
    largest_v, group = power(value_dim), power(group_size)

    def cut(tile: Tile, grouped: bool) -> Tile:
        tile = tile._replace(block_v=min(tile.block_v, largest_v))
        if grouped:
            tile = tile._replace(block_m=min(tile.block_m, group), block_n=min(tile.block_n, group))
        return tile

    return Tiles(cut(row.states, True), cut(row.outputs, True), cut(row.conv, False), cut(row.dweight, False))
