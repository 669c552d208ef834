"""Which tiles each GPU gets for attention over a block list and for XAttention's scores: one table.

Chosen with ``effattn xray block_sparse``, with one bit a query too (`launches`, ``per_row``): no spills, shared
memory that one block may take, tensor cores where the GPU has them, and of those that pass one with the largest
BLOCK_M tried, since each key loaded serves BLOCK_M queries. No tile here was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._tiles import Tile, nearest


class ScoreTile(NamedTuple):
    """``block_m x block_n`` tiles of the score matrix at a time, ``block_k`` of their ``stride * D`` products."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}"


class Tiles(NamedTuple):
    """Attention over the list; the antidiagonals' products."""

    fwd: Tile
    scores: ScoreTile


def _row(fwd: tuple[int, int, int, int], scores: tuple[int, int, int, int, int]) -> Tiles:
    return Tiles(Tile(*fwd), ScoreTile(*scores))


# Elements of L that a program of the mass kernel holds at a time; it multiplies nothing, and any GPU takes it.
MASS_ELEMENTS = 2048
MASS = Tile(0, 64, 4, 1)  # rows are the block's; at most 64 blocks at a time

# (architecture, bytes an element) -> {largest head dim: fwd (BLOCK_M, BLOCK_N, warps, stages), scores (BLOCK_M,
# BLOCK_N, BLOCK_K, warps, stages)}. A list with smaller tiles cuts fwd's to them. The scores take the head dimension
# in steps of BLOCK_K, so their tile does not depend on it.
#
# T4 (sm75) and fp32 on every NVIDIA GPU multiply without tensor cores: small tiles, see `_tiles`. On Blackwell
# (sm100) fp32 stays below 64 rows: Triton 3.7.1 may give dots of 64 rows and more to its tensor cores, rounded to
# TF32, though the kernel asks for IEEE (triton-lang/triton issue 10176, mended by pull request 10180). The x-ray
# shows it: in fp32 there must be no tensor-core instruction.
_SCORES = (128, 128, 32, 8, 3)
_SCORES_FP32 = (64, 64, 16, 8, 1)
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {256: _row((32, 32, 4, 1), (32, 32, 32, 4, 1))},
    ("interpreter", 4): {256: _row((32, 32, 4, 1), (32, 32, 32, 4, 1))},
    ("sm75", 2): {
        64: _row((64, 32, 8, 1), _SCORES_FP32),
        128: _row((32, 32, 8, 1), _SCORES_FP32),
        256: _row((16, 16, 8, 1), _SCORES_FP32),
    },
    ("sm75", 4): {
        64: _row((64, 32, 8, 1), _SCORES_FP32),
        128: _row((32, 16, 8, 1), _SCORES_FP32),
        256: _row((16, 16, 8, 1), _SCORES_FP32),
    },
    ("sm80", 2): {
        64: _row((128, 64, 8, 3), _SCORES),
        128: _row((128, 32, 8, 3), _SCORES),
        256: _row((64, 32, 8, 2), _SCORES),
    },
    ("sm80", 4): {
        64: _row((64, 32, 8, 2), _SCORES_FP32),
        128: _row((64, 16, 8, 1), _SCORES_FP32),
        256: _row((16, 16, 8, 1), _SCORES_FP32),
    },
    ("sm89", 2): {
        64: _row((128, 64, 8, 3), _SCORES),
        128: _row((128, 32, 8, 3), _SCORES),
        256: _row((64, 32, 8, 2), _SCORES),
    },
    ("sm89", 4): {
        64: _row((64, 32, 8, 2), _SCORES_FP32),
        128: _row((32, 16, 8, 2), _SCORES_FP32),
        256: _row((16, 16, 8, 1), _SCORES_FP32),
    },
    ("sm90", 2): {
        64: _row((128, 64, 8, 3), _SCORES),
        128: _row((128, 64, 8, 3), _SCORES),
        256: _row((64, 32, 8, 2), _SCORES),
    },
    ("sm90", 4): {
        64: _row((64, 32, 8, 2), _SCORES_FP32),
        128: _row((32, 16, 8, 2), _SCORES_FP32),
        256: _row((16, 16, 8, 2), _SCORES_FP32),
    },
    ("sm100", 2): {
        64: _row((128, 64, 8, 3), _SCORES),
        128: _row((128, 32, 8, 3), _SCORES),
        256: _row((64, 32, 8, 2), _SCORES),
    },
    ("sm100", 4): {
        64: _row((32, 32, 8, 2), (32, 64, 16, 4, 1)),
        128: _row((32, 16, 8, 2), (32, 64, 16, 4, 1)),
        256: _row((16, 16, 8, 1), (32, 64, 16, 4, 1)),
    },
    ("sm120", 2): {
        64: _row((128, 64, 8, 3), _SCORES),
        128: _row((128, 32, 8, 3), _SCORES),
        256: _row((64, 32, 8, 2), _SCORES),
    },
    ("sm120", 4): {
        64: _row((64, 32, 8, 2), _SCORES_FP32),
        128: _row((32, 16, 8, 2), _SCORES_FP32),
        256: _row((16, 16, 8, 1), _SCORES_FP32),
    },
    ("gfx942", 2): {
        128: _row((128, 64, 4, 2), (128, 128, 32, 4, 2)),
        256: _row((64, 32, 4, 1), (128, 128, 32, 4, 2)),
    },
    ("gfx942", 4): {
        64: _row((128, 64, 4, 2), (64, 64, 32, 4, 2)),
        128: _row((128, 32, 4, 1), (64, 64, 32, 4, 2)),
        256: _row((64, 32, 4, 1), (64, 64, 32, 4, 2)),
    },
}


def choose_tiles(head_dim: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row. An architecture it doesn't know gets the cautious tiles of the T4, which run anywhere."""
    rows = TABLE.get((nearest(arch), dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    return rows[min((d for d in rows if d >= head_dim), default=max(rows))]


def cut_to_list(tile: Tile, list_m: int, list_n: int) -> Tile:
    """The tile, cut to the largest power of two that divides the list's sides."""
    return tile._replace(
        block_m=min(tile.block_m, list_m & -list_m), block_n=min(tile.block_n, list_n & -list_n)
    )
