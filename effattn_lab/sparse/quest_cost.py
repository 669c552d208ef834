"""Bytes that a decode step reads, and what is kept, for the rules of this chapter. Per layer and KV head.

A token's key and value are ``2 D`` numbers of ``itemsize`` bytes, 2 by default. Outputs and the query
are not counted.
Conventions of :mod:`effattn_lab.foundations.cost_model`.
"""

from __future__ import annotations

from effattn_lab._validate import check_positive_int


def _token_bytes(head_dim: int, itemsize: int) -> int:
    check_positive_int("head_dim", head_dim)
    check_positive_int("itemsize", itemsize)
    return 2 * head_dim * itemsize


def full_bytes(seqlen: int, head_dim: int, itemsize: int = 2) -> int:
    """Every key and value: ``2 D b N``."""
    check_positive_int("seqlen", seqlen)
    return seqlen * _token_bytes(head_dim, itemsize)


def evicted_bytes(budget: int, head_dim: int, itemsize: int = 2) -> int:
    """StreamingLLM and SnapKV: what is kept is read, ``2 D b k``, however long the text was."""
    check_positive_int("budget", budget)
    return budget * _token_bytes(head_dim, itemsize)


def h2o_bytes(budget: int, head_dim: int, itemsize: int = 2) -> int:
    """The same, and a float32 score a token, read and written."""
    return evicted_bytes(budget, head_dim, itemsize) + 8 * budget


def oracle_bytes(seqlen: int, budget: int, head_dim: int, itemsize: int = 2) -> int:
    """Every key, and the values of the chosen: ``D b (N + k)``."""
    check_positive_int("seqlen", seqlen)
    check_positive_int("budget", budget)
    return (seqlen + min(budget, seqlen)) * _token_bytes(head_dim, itemsize) // 2


def metadata_bytes(seqlen: int, head_dim: int, page_size: int = 16, itemsize: int = 2) -> int:
    """Two bounds a page and channel: ``2 D b ceil(N / P)``."""
    check_positive_int("seqlen", seqlen)
    check_positive_int("page_size", page_size)
    return -(-seqlen // page_size) * _token_bytes(head_dim, itemsize)


def decode_bytes(seqlen: int, budget: int, head_dim: int, page_size: int = 16, itemsize: int = 2) -> int:
    """Quest: the bounds of all pages, then ``k`` tokens."""
    chosen = evicted_bytes(min(budget, seqlen), head_dim, itemsize)
    return metadata_bytes(seqlen, head_dim, page_size, itemsize) + chosen


def load_fraction(seqlen: int, budget: int, page_size: int = 16) -> float:
    """``1 / P + k / N``: the part of the cache that a step of Quest reads. N a multiple of P."""
    return decode_bytes(seqlen, budget, 1, page_size, 1) / full_bytes(seqlen, 1, 1)


def best_page_size(seqlen: int, pages: int) -> float:
    """The page size of least traffic if ``pages`` pages must be read whatever their size: ``sqrt(N / n)``.

    ``1 / P + n P / N`` is least where its terms are equal.
    """
    check_positive_int("seqlen", seqlen)
    check_positive_int("pages", pages)
    return float((seqlen / pages) ** 0.5)
