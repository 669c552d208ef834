"""Quest: bound a page's best score from its smallest and largest keys, and read the pages of largest bound.

Keys lie in pages of P tokens. For each page and channel two numbers are kept, the least and the greatest key. For a
query, ``U_p = sum_i max(q_i M_pi, q_i m_pi)`` is at least ``q . k_j`` for every key of the page: no page is ever
under-rated. It is a bound, not an estimate: each channel may take its extreme from another token.

Beside it the ceiling of all selectors: :class:`OracleCache` reads the ``budget`` keys of largest score.

Source: Tang et al. 2024 (Quest), sections 3.2 and 3.3; the current page is always read, as in its CUDA path.
"""

from __future__ import annotations

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.sparse.cache import (
    DecodeCache,
    decode_scores,
    gather_attention,
    shared_by_group,
    sparse_decode,
)


def page_bounds(k: torch.Tensor, page_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest key of each page and channel.

    Args:
        k: keys after RoPE ``[B, Hkv, N, D]``, N at least 1.
        page_size: P, at least 1. Default 16. The last page may hold fewer.

    Returns:
        ``(least, greatest)``, each ``[B, Hkv, ceil(N / P), D]``.
    """
    check_positive_int("page_size", page_size)
    if k.dim() != 4 or 0 in k.shape:
        raise ValueError(f"k: expected a non-empty tensor [B, Hkv, N, D], got shape {tuple(k.shape)}")
    rest = -k.shape[2] % page_size
    # The last key once more: it changes neither bound.
    full = torch.cat([k, k[:, :, -1:].expand(-1, -1, rest, -1)], dim=2)
    pages = full.unflatten(2, (-1, page_size))
    return pages.amin(dim=3), pages.amax(dim=3)


def page_scores(q: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """``U_p = relu(q) . M_p - relu(-q) . m_p``: the bound as two products, unscaled.

    ``max(q_i M_i, q_i m_i)`` is ``q_i M_i`` where ``q_i`` is positive and ``q_i m_i`` where it is negative.

    Args:
        q: ``[B, Hq, 1, D]``.
        least, greatest: ``[B, Hkv, pages, D]``, see :func:`page_bounds`.

    Returns:
        ``[B, Hq, pages]`` in at least float32.
    """
    if least.shape != greatest.shape:
        raise ValueError(
            f"greatest: expected the shape of least {tuple(least.shape)}, got {tuple(greatest.shape)}"
        )
    up = decode_scores(q.clamp_min(0.0), greatest, scale=1.0)
    return up - decode_scores((-q).clamp_min(0.0), least, scale=1.0)


def select_pages(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The last page, and the ``count - 1`` others of largest score.

    Args:
        scores: ``[B, Hq, pages]``.
        count: pages to read, at least 1; all, if there are no more.

    Returns:
        int64 ``[B, Hq, min(count, pages)]``, ascending. Which of equal scores are taken is not defined.
    """
    check_positive_int("count", count)
    pages = scores.shape[-1]
    taken = min(count, pages)
    others = torch.topk(scores[..., : pages - 1], taken - 1, dim=-1).indices
    last = torch.full_like(scores[..., :1], pages - 1, dtype=torch.int64)
    return torch.cat([others, last], dim=-1).sort(dim=-1).values


class QuestCache(DecodeCache):
    """Keeps everything; a query reads ``budget // page_size`` pages, the current one among them.

    Args:
        page_size: P. Default 16.
        share: query heads of one KV head read the same pages, by their largest bound. Default False: each its own,
            as in the paper, whose models have a KV head for each query head.
        scale: default ``D ** -0.5``.

    ``attend`` wants a budget of at least one page. Bounds are updated as keys arrive; only the last page changes.
    """

    def __init__(self, page_size: int = 16, *, share: bool = False, scale: float | None = None) -> None:
        super().__init__(scale=scale)
        check_positive_int("page_size", page_size)
        self.page_size, self.share = page_size, share
        self.least = self.greatest = torch.empty(0)

    def _take(self, k: torch.Tensor, v: torch.Tensor) -> None:
        whole = self.length // self.page_size  # pages that stay as they are
        super()._take(k, v)
        least, greatest = page_bounds(self.k[:, :, whole * self.page_size :], self.page_size)
        if whole:
            least = torch.cat([self.least[:, :, :whole], least], dim=2)
            greatest = torch.cat([self.greatest[:, :, :whole], greatest], dim=2)
        self.least, self.greatest = least, greatest

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        if budget >= self.kept:
            count = self.least.shape[2]
        elif budget >= self.page_size:
            count = budget // self.page_size
        else:
            raise ValueError(f"budget: expected at least one page of {self.page_size} tokens, got {budget}")
        scores = page_scores(q, self.least, self.greatest)
        if self.share:
            scores = shared_by_group(scores, self.k.shape[1])
        pages = select_pages(scores, count)
        self.read = float(pages.shape[-1] * self.page_size - (-self.kept % self.page_size))
        return sparse_decode(q, self.k, self.v, pages, page_size=self.page_size, scale=self.scale)


class OracleCache(DecodeCache):
    """Reads the ``budget`` keys of largest score, found by computing all of them.

    No choice of as many keys holds more of the softmax's weight. It costs a pass over all keys, so it is a ceiling
    for others, not a way to save time. It is not the choice of least error either: that depends on the values.
    """

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        index = torch.topk(decode_scores(q, self.k, scale=self.scale), min(budget, self.kept), dim=-1).indices
        self.read = float(index.shape[-1])
        return gather_attention(q, self.k, self.v, index, scale=self.scale)
