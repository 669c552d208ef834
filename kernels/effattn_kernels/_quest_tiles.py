"""Which tiles each GPU gets for Quest: one table, chosen with ``effattn xray quest``.

Both kernels stream and multiply no matrices. A tile must compile without spills; none was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._adamas_tiles import Tile, power
from ._tiles import nearest


class Tiles(NamedTuple):
    """One tile a kernel."""

    bounds: Tile
    scores: Tile


def _row(*tiles: tuple[int, int, int]) -> Tiles:
    return Tiles(*(Tile(block, 0, warps, stages) for block, warps, stages in tiles))


# architecture -> {largest head dim: (pages, warps, stages) of bounds and scores}. Both widen to fp32 in registers, so
# the dtype makes no difference to the tile.
_ANY = {128: _row((16, 4, 1), (32, 4, 1)), 256: _row((8, 4, 1), (16, 4, 1))}
TABLE: dict[str, dict[int, Tiles]] = {
    "interpreter": _ANY,
    "sm75": _ANY,
    "sm80": _ANY,
    "sm89": _ANY,
    "sm90": _ANY,
    "sm100": _ANY,
    "sm120": _ANY,
    "gfx942": _ANY,
}

__all__ = ["TABLE", "Tile", "Tiles", "choose_tiles", "power"]


def choose_tiles(head_dim: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row. An architecture it doesn't know gets the tiles of the T4, which run anywhere."""
    rows = TABLE.get(nearest(arch)) or TABLE["sm75"]
    return next(tiles for largest, tiles in sorted(rows.items()) if head_dim <= largest)
