"""A needle that nobody asks for until the end: which rule still has it when the question comes?

Random texts of one head. Four first tokens please every query (sinks), one token is a long key in a direction of its
own, and the last query asks for that direction. The needle's value is 1, all others are 0, so the output is the
softmax weight that the needle gets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.sparse.cache import DecodeCache
from effattn_lab.sparse.eviction import H2OCache, SnapKVCache
from effattn_lab.sparse.quest import OracleCache, QuestCache
from effattn_lab.sparse.streaming import StreamingCache

#: What the chapter compares: name → a fresh cache.
RULES: dict[str, Callable[[], DecodeCache]] = {
    "StreamingLLM": lambda: StreamingCache(4, rope_base=None),
    "H2O": H2OCache,
    "SnapKV": lambda: SnapKVCache(16),
    "Quest": QuestCache,
    "oracle": OracleCache,
}


def needle_weight(
    make: Callable[[], DecodeCache],
    budget: int,
    depth: float,
    *,
    inside: bool = False,
    texts: int = 100,
    seqlen: int = 512,
    head_dim: int = 32,
    seed: int = 0,
) -> float:
    """Mean weight of the needle in the answer to a question asked after the prompt; full attention gives about 0.9.

    Args:
        make: gives an empty cache.
        budget: tokens it may read.
        depth: where the needle is, from 0 to below 1.
        inside: the prompt's last query asks for the needle too. Default False.
        texts: how many, as one batch. Default 100.
        seqlen: N, tokens of the prompt. Default 512.
        head_dim: D. Default 32.
        seed: of all of it. Default 0.
    """
    for name, value in (("texts", texts), ("seqlen", seqlen), ("head_dim", head_dim)):
        check_positive_int(name, value)
    if not 0 <= depth < 1:
        raise ValueError(f"depth: expected a share from 0 to below 1, got {depth!r}")
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, texts, 1, seqlen, head_dim, generator=g)
    q += 0.5
    k[:, :, :4] += 2.0
    needle = torch.randn(texts, 1, head_dim, generator=g)
    needle -= needle.mean(dim=-1, keepdim=True)  # no part of what all queries like
    needle /= needle.norm(dim=-1, keepdim=True)
    at = int(depth * seqlen)
    k[:, :, at] = 9 * needle
    question = 6 * needle[:, :, None]
    if inside:
        q[:, :, -1:] = question
    v = torch.zeros_like(k)
    v[:, :, at, 0] = 1.0
    cache = make()
    cache.prefill(q, k, v)
    cache.append(torch.randn(texts, 1, 1, head_dim, generator=g), torch.zeros(texts, 1, 1, head_dim))
    return float(cache.attend(question, budget)[..., 0].mean())
