"""Bytes and operations of a decode step of Adamas, per layer and KV head, and its codes' memory.

Conventions of :mod:`effattn_lab.sparse.quest_cost`: 16-bit keys and values by default.
"""

from __future__ import annotations

import math

from effattn_lab._validate import check_positive_int
from effattn_lab.sparse.quest_cost import evicted_bytes, full_bytes


def code_bytes(seqlen: int, head_dim: int) -> int:
    """Two bits a coordinate and key: ``N D / 4`` bytes."""
    check_positive_int("seqlen", seqlen)
    check_positive_int("head_dim", head_dim)
    return seqlen * head_dim // 4


def selection_bytes(seqlen: int) -> int:
    """Distances as 16-bit integers, written once and read once: ``4 N``."""
    check_positive_int("seqlen", seqlen)
    return 4 * seqlen


def decode_bytes(seqlen: int, budget: int, head_dim: int, itemsize: int = 2, *, fused: bool = False) -> int:
    """Codes of all keys, the distances, then ``k`` keys and values.

    Args:
        fused: distances are used where they are made and never written. Default False.
    """
    scan = code_bytes(seqlen, head_dim) + (0 if fused else selection_bytes(seqlen))
    return scan + evicted_bytes(min(budget, seqlen), head_dim, itemsize)


def traffic_ratio(
    seqlen: int, budget: int, head_dim: int, itemsize: int = 2, *, fused: bool = False
) -> float:
    """How many times fewer bytes than full attention."""
    return full_bytes(seqlen, head_dim, itemsize) / decode_bytes(
        seqlen, budget, head_dim, itemsize, fused=fused
    )


def hadamard_adds(head_dim: int) -> int:
    """Additions of one fast transform: ``D log2 D``; the matrix itself would take ``D (D - 1)``."""
    check_positive_int("head_dim", head_dim)
    return head_dim * int(math.log2(head_dim))
