"""H2O and SnapKV: caches that drop tokens by how much attention they have had.

Both decide before the query that may need a token exists. H2O looks at everything that was asked so far, SnapKV at
what the end of the prompt asks.

Source: Zhang et al. 2023 (H2O), section 4; Li et al. 2024 (SnapKV), section 4; details of released code are named.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int, resolve_scale
from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.sparse.cache import DecodeCache, decode_scores, gather_attention

#: Queries whose attention is held at once while a prompt's sums are taken.
_ROWS = 256


def attention_received(
    q: torch.Tensor, k: torch.Tensor, *, last: int | None = None, scale: float | None = None
) -> torch.Tensor:
    """How much attention each key got from the last queries, ``sum_t a_tj`` over the query heads that share it.

    Args:
        q: ``[B, Hq, N, D]``, causal.
        k: ``[B, Hkv, N, D]``.
        last: count the last W queries only. Default None: all.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hkv, N]`` in at least float32; it sums to ``W Hq / Hkv``.
    """
    scale, n = resolve_scale(scale, q.shape[3]), k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys = repeat_kv(k, groups).to(dtype)
    total = torch.zeros(*q.shape[:2], n, dtype=dtype, device=q.device)
    begin = 0 if last is None else max(0, n - last)
    for t in range(begin, n, _ROWS):
        rows = q[:, :, t : t + _ROWS].to(dtype)
        end = t + rows.shape[2]
        s = scale * rows @ keys[:, :, :end].transpose(-1, -2)
        s = s.masked_fill(~visible(rows.shape[2], end, causal=True, device=q.device), float("-inf"))
        total[:, :, :end] += torch.softmax(s, dim=-1).sum(dim=2)
    return total.unflatten(1, (k.shape[1], groups)).sum(dim=2)


class H2OCache(DecodeCache):
    """Half of the budget for the tokens that had most attention so far, half for the most recent.

    ``sigma_j`` sums the attention that token j received while it was kept. When more than ``budget`` are there, those
    of least ``sigma`` go, never one of the recent. Each KV head decides for itself, by the sum over its query heads.

    Args:
        heavy: share of the budget for heavy hitters, from 0 to 1. Default 0.5. One place is always for the current.
        scale: default ``D ** -0.5``.

    Attributes:
        sigma: ``[B, Hkv, kept]``.
    """

    def __init__(self, heavy: float = 0.5, *, scale: float | None = None) -> None:
        super().__init__(scale=scale)
        if isinstance(heavy, bool) or not 0 <= heavy <= 1:
            raise ValueError(f"heavy: expected a share from 0 to 1, got {heavy!r}")
        self.heavy = heavy
        self.sigma = torch.empty(0)

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().prefill(q, k, v)
        self.sigma = attention_received(q, k, scale=self.scale)

    def _take(self, k: torch.Tensor, v: torch.Tensor) -> None:
        fresh = torch.zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        self.sigma = fresh if self.length == 0 else torch.cat([self.sigma, fresh], dim=2)
        super()._take(k, v)

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        if self.kept > budget:
            recent = max(1, budget - int(self.heavy * budget))
            old = self.kept - recent
            heaviest = _top(self.sigma[:, :, :old], budget - recent)
            newest = torch.arange(old, self.kept, device=q.device).expand(*self.k.shape[:2], -1)
            stay = torch.cat([heaviest, newest], dim=-1)
            self.k, self.v = _chosen(self.k, stay), _chosen(self.v, stay)
            self.sigma = torch.gather(self.sigma, 2, stay)
        a = torch.softmax(decode_scores(q, self.k, scale=self.scale), dim=-1)
        self.sigma = self.sigma + a.unflatten(1, (self.k.shape[1], -1)).sum(dim=2)
        self.read = float(self.kept)
        everything = torch.arange(self.kept, device=q.device).expand(*q.shape[:2], -1)
        return gather_attention(q, self.k, self.v, everything, scale=self.scale)


class SnapKVCache(DecodeCache):
    """The prompt is cut once, by what its last ``window`` queries looked at; later tokens all stay.

    At the first ``attend`` the prompt is cut so that ``budget`` tokens are left in all: its window, and before it the
    tokens of most votes. A vote is the attention from the window's queries, smoothed over ``pool`` neighbours so that
    whole phrases stay. The query heads of a KV head vote together; the released code lets each choose for itself and
    so keeps the keys once for each query head. From then on ``read`` grows by one a step.

    Args:
        window: W, queries at the end of the prompt that vote. Default 32.
        pool: neighbours a vote is averaged over, odd. Default 5; beyond the ends zeros count, as in their code.
        pooling: "avg", the default, or "max".
        scale: default ``D ** -0.5``.
    """

    def __init__(
        self, window: int = 32, pool: int = 5, pooling: str = "avg", *, scale: float | None = None
    ) -> None:
        super().__init__(scale=scale)
        check_positive_int("window", window)
        check_positive_int("pool", pool)
        if pool % 2 == 0:
            raise ValueError(f"pool: expected an odd number, else votes move by half a token, got {pool}")
        if pooling not in ("avg", "max"):
            raise ValueError(f"pooling: expected avg or max, got {pooling!r}")
        self.window, self.pool, self.pooling = window, pool, pooling
        self._votes: torch.Tensor | None = None

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().prefill(q, k, v)
        if k.shape[2] > self.window:
            votes = attention_received(q, k, last=self.window, scale=self.scale)[..., : -self.window]
            smooth = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
            self._votes = smooth(votes, self.pool, stride=1, padding=self.pool // 2)

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        if self._votes is not None and self.kept > budget:
            before = self._votes.shape[-1]
            after = self.kept - before  # the window, and what came since
            if budget <= after:
                raise ValueError(
                    f"budget: expected more than the {after} tokens of the window and after it, got {budget}"
                )
            best = _top(self._votes, budget - after)
            rest = torch.arange(before, self.kept, device=q.device).expand(*self.k.shape[:2], -1)
            stay = torch.cat([best, rest], dim=-1)
            self.k, self.v = _chosen(self.k, stay), _chosen(self.v, stay)
        self._votes = None
        self.read = float(self.kept)
        everything = torch.arange(self.kept, device=q.device).expand(*q.shape[:2], -1)
        return gather_attention(q, self.k, self.v, everything, scale=self.scale)


def _top(score: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` largest, ascending. Of equal ones the earlier: pooling makes many."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _chosen(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x [B, Hkv, N, D]`` at ``index [B, Hkv, n]``."""
    return torch.gather(x, 2, index[..., None].expand(-1, -1, -1, x.shape[3]))
