"""Which tiles each GPU gets for Adamas: one table, chosen with ``effattn xray adamas``.

A tile must compile without spills and fit the shared memory that one block may take. All four kernels are bound by
memory: what counts is that enough loads are in flight, not how often a tile is used again. No tile here was chosen
by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._tiles import nearest


class Tile(NamedTuple):
    """``block`` rows, keys, tokens or splits at a time; ``split``: tokens a program of the decode kernel."""

    block: int
    split: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return f"{self.block}/{self.split}" if self.split else f"{self.block}"


class Tiles(NamedTuple):
    """One tile a kernel."""

    encode: Tile
    distances: Tile
    decode: Tile
    merge: Tile


def _row(*tiles: tuple[int, int, int, int]) -> Tiles:
    return Tiles(*(Tile(*t) for t in tiles))


# (architecture, bytes an element) -> {largest head dim: (block, split, warps, stages) of encode, distances, decode,
# merge}. The split is a fixed number of tokens, not a share of the GPU: the order of additions, and so the last bit,
# does not depend on the batch or on the card. Split and block of distances are the same everywhere: the bytes counted
# in the interpreter are those that every GPU asks for. (Its merge takes two splits at a time, so that tests see both
# what is within a block and what is between blocks.)
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {256: _row((32, 0, 4, 1), (256, 0, 4, 1), (64, 256, 4, 1), (2, 0, 4, 1))},
    ("interpreter", 4): {256: _row((32, 0, 4, 1), (256, 0, 4, 1), (64, 256, 4, 1), (2, 0, 4, 1))},
}
for _arch in ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942"):
    TABLE[_arch, 2] = {
        128: _row((32, 0, 4, 1), (256, 0, 4, 1), (64, 256, 4, 2), (16, 0, 4, 1)),
        256: _row((16, 0, 4, 1), (256, 0, 4, 1), (32, 256, 4, 2), (16, 0, 4, 1)),
    }
    TABLE[_arch, 4] = {
        128: _row((32, 0, 4, 1), (256, 0, 4, 1), (32, 256, 8, 1), (16, 0, 4, 1)),
        256: _row((16, 0, 4, 1), (256, 0, 4, 1), (16, 256, 8, 1), (16, 0, 4, 1)),
    }
for _size in (2, 4):
    TABLE["sm75", _size] = {
        128: _row((32, 0, 4, 1), (256, 0, 4, 1), (32, 256, 8, 1), (16, 0, 4, 1)),
        256: _row((16, 0, 4, 1), (256, 0, 4, 1), (16, 256, 8, 1), (16, 0, 4, 1)),
    }


def power(n: int) -> int:
    """The next power of two, at least 16 (the least a ``tl.dot`` takes)."""
    return max(16, 1 << (n - 1).bit_length())


def choose_tiles(head_dim: int, dtype: torch.dtype, arch: str, *, dense: bool = True) -> Tiles:
    """The table's row. An architecture it doesn't know gets the cautious tiles of the T4, which run anywhere.

    ``dense``: the elements of a key lie side by side.
    """
    rows = TABLE.get((nearest(arch), dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    row = next(tiles for largest, tiles in sorted(rows.items()) if head_dim <= largest)
    if not dense or head_dim % 16:
        # Rows that begin anywhere are loaded element by element, and every address takes registers: with 64 tokens
        # decode spills 24 bytes a thread on an H100 at head dim 124.
        row = row._replace(decode=row.decode._replace(block=min(32, row.decode.block)))
    return row
