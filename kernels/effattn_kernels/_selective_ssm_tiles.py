"""Which tiles each GPU gets for the selective scan: one table, chosen with ``effattn xray selective_ssm``.

A tile is ``block_e`` channels with all their states, one warp (on AMD a wavefront). More channels a thread
share the loads and conversions of B and C and the address arithmetic, and hold more registers. It must compile
without spills. No tile here was chosen by timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._tiles import nearest

STATES = 16  # what the table is made for: with more states a channel, a tile has fewer channels


class Tile(NamedTuple):
    """``block_e`` channels by ``block_s`` states; ``chunk`` tokens between stored states, ``unroll`` a turn."""

    block_e: int
    block_s: int
    chunk: int
    unroll: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return f"{self.block_e}x{self.block_s}, {max(self.chunk, self.unroll)}"


class Tiles(NamedTuple):
    """One tile a kernel. The two backward kernels meet at the borders of chunks: they share the chunk."""

    scan: Tile
    carry: Tile
    dreads: Tile
    dwrites: Tile


def _row(scan: tuple[int, int], carry: int, dreads: int, dwrites: int, chunk: int) -> Tiles:
    return Tiles(
        Tile(scan[0], STATES, 0, scan[1], 1, 1),
        Tile(carry, STATES, 0, 1, 1, 1),
        Tile(dreads, STATES, chunk, 1, 1, 1),
        Tile(dwrites, STATES, chunk, chunk, 1, 1),
    )


# (architecture, bytes an element) -> (channels, unroll) of the scan, channels of carry, dreads and dwrites, chunk.
TABLE: dict[tuple[str, int], Tiles] = {
    ("interpreter", 2): _row((32, 2), 32, 32, 32, 4),
    ("interpreter", 4): _row((32, 2), 32, 32, 32, 4),
    ("sm75", 2): _row((64, 2), 32, 64, 32, 4),
    ("sm75", 4): _row((64, 2), 32, 64, 32, 4),
    ("sm80", 2): _row((64, 2), 32, 64, 32, 4),
    ("sm80", 4): _row((64, 2), 32, 64, 32, 4),
    ("sm89", 2): _row((64, 2), 32, 64, 32, 4),
    ("sm89", 4): _row((64, 2), 32, 64, 32, 4),
    ("sm90", 2): _row((64, 2), 32, 64, 32, 4),
    ("sm90", 4): _row((64, 2), 32, 64, 32, 4),
    ("sm100", 2): _row((64, 2), 32, 64, 32, 4),
    ("sm100", 4): _row((64, 2), 32, 64, 32, 4),
    ("sm120", 2): _row((64, 2), 32, 64, 32, 4),
    ("sm120", 4): _row((64, 2), 32, 64, 32, 4),
    ("gfx942", 2): _row((64, 2), 64, 64, 64, 4),
    ("gfx942", 4): _row((64, 2), 64, 64, 64, 4),
}

# Where 16 does not divide the channels, every row is loaded element by element and each address takes registers: with
# chunks of 4 dwrites spills 16 bytes a thread on an A100, 24 on a B200.
UNALIGNED_CHUNK = 2

# The sequence is cut into segments, walked side by side, until about so many programs run: eight warps for each
# multiprocessor of the largest GPU, enough to hide the latency of a load. A segment has at least SEGMENT
# tokens, since each costs a state written and read.
PROGRAMS, SEGMENT = 1024, 256


def choose_tiles(state_size: int, dtype: torch.dtype, arch: str, per_group: int = 16) -> Tiles:
    """The table's row, cut for more states a channel. Unknown architectures get the cautious tiles of the T4.

    ``per_group``: channels that share B and C; it matters whether 16 divides them.
    """
    row = TABLE.get((nearest(arch), dtype.itemsize)) or TABLE["sm75", dtype.itemsize]
    if arch.startswith("sm") and per_group % 16:
        row = row._replace(
            dreads=row.dreads._replace(chunk=UNALIGNED_CHUNK),
            dwrites=row.dwrites._replace(chunk=UNALIGNED_CHUNK, unroll=UNALIGNED_CHUNK),
        )
    block_s = 1 << (state_size - 1).bit_length()
    shrink = max(1, block_s // STATES)
    return Tiles(*(t._replace(block_e=max(1, t.block_e // shrink), block_s=block_s) for t in row))


def choose_segment(seqlen: int, programs: int, arch: str) -> int:
    """Tokens a segment, a multiple of 64; one segment launches ``programs``. The interpreter always splits."""
    if arch == "interpreter":
        return 64
    wanted = max(1, min(-(-PROGRAMS // programs), seqlen // SEGMENT))
    return -(-seqlen // (64 * wanted)) * 64
