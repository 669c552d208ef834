"""Which tiles each GPU gets for the delta rule: one table, chosen with ``effattn xray delta_rule``.

A tile must compile without spills, fit the shared memory that one block may take, and use the tensor cores where
the GPU has them. No tile here was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._linear_attention_tiles import Tile, block
from ._tiles import nearest


class Tiles(NamedTuple):
    """One tile a kernel; the chunk is the same in all. ``states`` holds all of K, in up to four blocks."""

    transform: Tile
    states: Tile
    outputs: Tile


def _row(chunk: int, *tiles: tuple[int, int, int, int]) -> Tiles:
    return Tiles(*(Tile(chunk, *t) for t in tiles))


# (architecture, bytes an element) -> {largest K: chunk, then (BLOCK_K, BLOCK_V, warps, stages) of the three kernels}.
# Of the tiles that pass, the table has those with the fewest instructions a token.
#
# transform: one warp does a chunk. Its matrices are 16 x 16, and further warps would mostly repeat the same work: two
# take 1.4 times the instructions. 32 columns of K at a time, since with 64 it spills 16 bytes a thread on an A100.
# states: with 64 columns and two warps it spills on every one of these GPUs (64 bytes on an A100, 112 on an RTX PRO
# 6000). B200 multiplies 64 x 64 tiles with four warps through tensor memory, which doubles the instructions.
_FP32 = {
    64: _row(32, (32, 32, 4, 1), (64, 16, 4, 1), (32, 32, 4, 1)),
    256: _row(32, (32, 32, 4, 1), (64, 16, 4, 1), (32, 32, 4, 1)),
}
_LARGE = {
    128: _row(64, (32, 64, 1, 1), (128, 32, 4, 2), (64, 64, 4, 2)),
    256: _row(64, (32, 64, 1, 1), (64, 32, 4, 1), (64, 64, 4, 2)),
}
_SMALL = _row(64, (32, 64, 1, 1), (64, 64, 4, 2), (64, 64, 2, 2))
_MATRIX_CORES = {
    64: _row(64, (32, 64, 1, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
    128: _row(64, (32, 64, 1, 1), (128, 32, 4, 1), (64, 64, 4, 1)),
    256: _row(64, (32, 64, 1, 1), (64, 32, 4, 1), (64, 64, 4, 1)),
}
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {256: _row(32, (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1))},
    ("interpreter", 4): {256: _row(32, (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1))},
    ("sm75", 2): _FP32,  # no tensor cores since Triton 3.3: the path of fp32
    ("sm75", 4): _FP32,
    ("sm80", 2): {64: _SMALL, **_LARGE},
    ("sm80", 4): _FP32,
    ("sm89", 2): {
        64: _SMALL._replace(outputs=Tile(64, 64, 64, 4, 2)),
        **_LARGE,
    },  # two warps: 16 bytes a thread
    ("sm89", 4): _FP32,
    ("sm90", 2): {64: _SMALL, **_LARGE},
    ("sm90", 4): _FP32,
    ("sm100", 2): {64: _row(64, (32, 64, 1, 1), (64, 32, 2, 2), (64, 64, 4, 2)), **_LARGE},
    ("sm100", 4): _FP32,
    ("sm120", 2): {64: _SMALL, **_LARGE},
    ("sm120", 4): _FP32,
    ("gfx942", 2): _MATRIX_CORES,
    ("gfx942", 4): _MATRIX_CORES,
}

# Rows that do not begin at multiples of 16 bytes are loaded element by element, and every address takes registers:
# at head dim 60 the transform with one warp spills 48 bytes a thread on an A100.
UNALIGNED = {
    64: _row(64, (32, 64, 2, 1), (64, 64, 4, 2), (64, 64, 4, 2)),
    256: _row(64, (32, 64, 2, 1), (64, 32, 8, 1), (64, 64, 8, 2)),
}


def choose_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row, cut to the dimensions there are. Unknown architectures get the cautious tiles of the T4."""
    arch = nearest(arch)
    rows = TABLE.get((arch, dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    if arch.startswith("sm") and rows is not _FP32 and (key_dim % 16 or value_dim % 16):
        rows = UNALIGNED
    row = next(tiles for largest, tiles in sorted(rows.items()) if key_dim <= largest)
    return Tiles(
        *(t._replace(block_k=block(key_dim, t.block_k), block_v=block(value_dim, t.block_v)) for t in row)
    )
