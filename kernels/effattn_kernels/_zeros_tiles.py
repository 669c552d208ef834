"""Which tiles each GPU gets for ZeroS: one table, chosen with ``effattn xray zeros``.

A tile must compile without spills, fit the shared memory that one block may take, and use the tensor cores where
the GPU has them. The state kernel holds three tiles of ``BLOCK_K x BLOCK_V`` in fp32, linear attention's one.
No tile here was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._linear_attention_tiles import Tile, block
from ._tiles import nearest


class Tiles(NamedTuple):
    """One tile a kernel. The chunk is the same in both, as they meet at its borders."""

    states: Tile
    outputs: Tile


def _row(chunk: int, *tiles: tuple[int, int, int, int]) -> Tiles:
    return Tiles(*(Tile(chunk, *t) for t in tiles))


# (architecture, bytes an element) -> {largest head dim: chunk, then (BLOCK_K, BLOCK_V, warps, stages) for states and
# outputs}. Of the tiles that pass, the table has those with the fewest instructions a token.
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {256: _row(32, (32, 32, 4, 1), (32, 32, 4, 1))},
    ("interpreter", 4): {256: _row(32, (32, 32, 4, 1), (32, 32, 4, 1))},
    ("sm80", 2): {64: _row(64, (64, 64, 4, 2), (64, 64, 4, 2))},
}


def choose_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row, cut to the dimensions there are. Unknown architectures get the cautious tiles of the T4."""
    by_dim = TABLE.get((nearest(arch), dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    largest = max(key_dim, value_dim)
    row = by_dim[min((d for d in by_dim if d >= largest), default=max(by_dim))]
    return Tiles(
        *(t._replace(block_k=block(key_dim, t.block_k), block_v=block(value_dim, t.block_v)) for t in row)
    )
