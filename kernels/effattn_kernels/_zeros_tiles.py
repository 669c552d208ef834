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
# outputs}. Of the tiles that pass, the table has those with the fewest instructions a token. One stage: three fp32
# tiles leave no registers for loads in flight: with two stages the state kernel spills 280 bytes a thread on an A100.
# It loads the next chunk before it stores the border, which is as far as one program can overlap them. On L4 and RTX
# PRO 6000 the tile takes 8 warps: with 4 the compiler spills 16 and 56 bytes a thread.
# fp32 on NVIDIA GPUs and everything on a T4 multiplies without tensor cores.
_FLOAT32 = {
    64: _row(32, (64, 32, 8, 1), (64, 32, 8, 1)),
    # Above 64 dimensions outputs with BLOCK_K = 64 spill some 4 KB a thread on every NVIDIA GPU but the T4.
    256: _row(32, (64, 32, 8, 1), (32, 32, 8, 1)),
}
_T4 = {256: _row(32, (32, 32, 8, 1), (32, 32, 8, 1))}
_AMPERE = {64: _row(64, (64, 64, 4, 1), (64, 64, 4, 1)), 256: _row(64, (128, 64, 8, 1), (64, 64, 4, 1))}
_ADA = {64: _row(64, (64, 64, 8, 1), (64, 64, 4, 1)), 256: _row(64, (128, 32, 8, 1), (64, 32, 4, 1))}
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {256: _row(32, (32, 32, 4, 1), (32, 32, 4, 1))},
    ("interpreter", 4): {256: _row(32, (32, 32, 4, 1), (32, 32, 4, 1))},
    ("sm75", 2): _T4,
    ("sm75", 4): _T4,
    ("sm80", 2): _AMPERE,
    ("sm80", 4): _FLOAT32,
    ("sm89", 2): _ADA,
    ("sm89", 4): _FLOAT32,
    ("sm90", 2): _AMPERE,
    ("sm90", 4): _FLOAT32,
    ("sm100", 2): _AMPERE,
    ("sm100", 4): _FLOAT32,
    ("sm120", 2): _ADA,
    ("sm120", 4): _FLOAT32,
    ("gfx942", 2): _AMPERE,
    ("gfx942", 4): {256: _row(64, (64, 64, 4, 1), (64, 64, 4, 1))},
}

# Rows that do not begin at multiples of 16 bytes are loaded element by element, and every address takes registers.
UNALIGNED = {64: _row(64, (64, 32, 8, 1), (64, 64, 4, 1)), 256: _row(64, (128, 16, 8, 1), (64, 32, 4, 1))}


def choose_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row, cut to the dimensions there are. Unknown architectures get the cautious tiles of the T4."""
    arch = nearest(arch)
    by_dim = TABLE.get((arch, dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    if by_dim[max(by_dim)].states.chunk == 64 and arch.startswith("sm") and (key_dim % 16 or value_dim % 16):
        by_dim = UNALIGNED
    largest = max(key_dim, value_dim)
    row = by_dim[min((d for d in by_dim if d >= largest), default=max(by_dim))]
    return Tiles(
        *(t._replace(block_k=block(key_dim, t.block_k), block_v=block(value_dim, t.block_v)) for t in row)
    )
