"""Which tile each GPU gets: one table, chosen with the x-ray (`effattn xray flash`)."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """``block_m`` queries by ``block_n`` keys, worked on by ``num_warps`` warps, ``num_stages`` loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    fwd: Tile
    dkdv: Tile
    dq: Tile


_T = Tile
PREPROCESS = Tile(64, 0, 4, 1)
_ROW = Tiles(_T(32,32,4,2),_T(32,32,4,2),_T(32,32,4,2))
def pad_head_dim(d): return max(16, 1 << (d - 1).bit_length())
def architecture(device): return "interpreter"
def choose_tiles(d, dtype, arch): return _ROW
