"""Which tile each GPU gets: one table, chosen with the x-ray (``effattn xray flash``).

A tile must compile without spills, fit the shared memory that one block may take, and use the tensor cores
where the GPU has them, with the causal mask and without, with a window and without. Of those that do, the table has
the largest tried: a tile of BLOCK_M queries uses each key it loads BLOCK_M times, so traffic falls as BLOCK_M
grows. No tile here was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """``block_m`` queries by ``block_n`` keys, for ``num_warps`` warps, with ``num_stages`` loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return f"{self.block_m}x{self.block_n}" if self.block_n else f"{self.block_m}"


class Tiles(NamedTuple):
    """Tiles of the three kernels that multiply matrices."""

    fwd: Tile
    dkdv: Tile
    dq: Tile


def _row(*tiles: tuple[int, int, int, int]) -> Tiles:
    return Tiles(*(Tile(*t) for t in tiles))


# The preprocess kernel streams rows and multiplies nothing: any tile does. (BLOCK_M, unused, warps, stages)
PREPROCESS = Tile(32, 0, 4, 1)

# (architecture, bytes an element) -> {largest head dim: fwd, dkdv, dq}, each (BLOCK_M, BLOCK_N, warps, stages).
#
# T4 (sm75): Triton has had no tensor-core path for it since 3.3. tl.dot becomes scalar multiply-adds, each thread
# keeps whole rows of the operands, and a 64 x 64 tile spills 3 KB a thread: hence the small tiles. With 16-bit
# inputs even 16 x 16 spills in the backward at head dim 256 (dkdv 904, dq 296 bytes a thread).
# fp32 (4 bytes) takes the same path on every NVIDIA GPU, because its dots are IEEE; MI300X has fp32 matrix
# cores. T4 at head dim 256: only 2 warps fit into its 64 KiB, and dkdv spills 648 bytes.
# Blackwell (sm100) with fp32 tiles of 64 x 32 at head dim 128 spilled 784 bytes where A100 spilled none: the same
# source, another register allocator. A table row is worth nothing on a GPU it was not compiled for.
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("interpreter", 2): {256: _row((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1))},
    ("interpreter", 4): {256: _row((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1))},
    ("sm75", 2): {
        64: _row((64, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
        128: _row((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        256: _row((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("sm75", 4): {
        64: _row((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        128: _row((32, 16, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
        256: _row((16, 16, 8, 1), (16, 16, 2, 1), (16, 16, 8, 1)),
    },
    ("sm80", 2): {
        64: _row((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        128: _row((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm80", 4): {
        128: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        256: _row((32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    ("sm89", 2): {
        64: _row((128, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        128: _row((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm89", 4): {
        64: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: _row((32, 16, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
        256: _row((32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    ("sm90", 2): {
        64: _row((128, 128, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        128: _row((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        256: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm90", 4): {
        64: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: _row((32, 16, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2)),
        256: _row((32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    ("sm100", 2): {
        64: _row((128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
        128: _row((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        256: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm100", 4): {
        64: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: _row((32, 16, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2)),
        256: _row((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("sm120", 2): {
        64: _row((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        128: _row((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("sm120", 4): {
        64: _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: _row((32, 16, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
        256: _row((32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    ("gfx942", 2): {
        64: _row((128, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 2)),
        128: _row((128, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 2)),
        256: _row((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
    ("gfx942", 4): {
        64: _row((128, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 2)),
        128: _row((128, 64, 4, 2), (32, 64, 4, 1), (128, 32, 4, 1)),
        256: _row((64, 32, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)),
    },
}

# Architectures without a row of their own use the one with the same instructions and no more shared memory.
_NEAREST = {
    "sm86": "sm89",
    "sm87": "sm80",
    "sm103": "sm100",
    "sm121": "sm120",
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}


def nearest(arch: str) -> str:
    """The architecture whose rows a table has for ``arch``."""
    return _NEAREST.get(arch, arch)


def pad_head_dim(head_dim: int) -> int:
    """Width of the tile: the next power of two, at least 16 (the least a ``tl.dot`` takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def architecture(device: torch.device) -> str:
    """Row of the table for a device: ``"interpreter"``, ``"sm90"``, ``"gfx942"``, ..."""
    from . import MODE

    if MODE != "compiled":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def choose_tiles(head_dim: int, dtype: torch.dtype, arch: str) -> Tiles:
    """The table's row. An architecture it doesn't know gets the cautious tiles of the T4, which run anywhere."""
    rows = TABLE.get((nearest(arch), dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    return next(tiles for largest, tiles in sorted(rows.items()) if head_dim <= largest)
