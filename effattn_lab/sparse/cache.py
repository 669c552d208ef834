"""One interface for every way to decode from fewer keys: ``append`` what the layer made, ``attend`` with a budget.

A cache belongs to one layer and one batch of equally long sequences. It gets keys after RoPE, as they come from the
model, and decides what it keeps and what it reads. ``budget`` counts tokens a query head reads, the current one
among them.

Some caches *evict*: memory is bounded, and what is gone is gone. Others *select*: all is kept, and each query chooses
anew what to read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale


class DecodeCache(ABC):
    """Keys and values of one layer, and a rule which of them a query reads.

    Args:
        scale: multiplies the scores. Default ``D ** -0.5``.

    Attributes:
        length: tokens appended so far, evicted ones too.
        read: tokens that the last :meth:`attend` read, as a mean over query heads.
    """

    def __init__(self, *, scale: float | None = None) -> None:
        self.scale = scale
        self.length = 0
        self.read = 0.0
        self.k = self.v = torch.empty(0)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take the next ``n`` tokens: k after RoPE and v, ``[B, Hkv, n, D]``."""
        check_qkv(k, k, v)
        if self.length and (k.shape[:2] != self.k.shape[:2] or k.shape[3] != self.k.shape[3]):
            raise ValueError(
                f"k: expected the batch, heads and head_dim of the tokens before, "
                f"{(*self.k.shape[:2], self.k.shape[3])}, got shape {tuple(k.shape)}"
            )
        self._take(k, v)
        self.length += k.shape[2]

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take a prompt of ``n`` tokens with its queries ``[B, Hq, n, D]``: some rules ask what these looked at.

        The prompt's own attention is the model's business, and full.
        """
        check_qkv(q, k, v)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q: expected a query for each of the {k.shape[2]} tokens, got {q.shape[2]}")
        if self.length:
            raise ValueError(f"prefill: expected an empty cache, got one with {self.length} tokens")
        self.append(k, v)

    def _take(self, k: torch.Tensor, v: torch.Tensor) -> None:
        empty = self.length == 0
        self.k = k if empty else torch.cat([self.k, k], dim=2)
        self.v = v if empty else torch.cat([self.v, v], dim=2)

    def attend(self, q: torch.Tensor, budget: int | None = None) -> torch.Tensor:
        """Attention of the newest token over at most ``budget`` tokens.

        Args:
            q: ``[B, Hq, 1, D]``, after RoPE, of the token appended last.
            budget: tokens a head may read, at least 1; None: all that are kept.

        Returns:
            ``[B, Hq, 1, D]``.
        """
        if not self.length:
            raise ValueError("cache: expected at least one token appended before attend, got none")
        if q.dim() != 4 or q.shape[2] != 1:
            raise ValueError(f"q: expected one query [B, Hq, 1, D], got shape {tuple(q.shape)}")
        check_qkv(q, self.k[:, :, :1], self.v[:, :, :1])
        if budget is not None:
            check_positive_int("budget", budget)
        return self._attend(q, self.k.shape[2] if budget is None else budget)

    @abstractmethod
    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        """Choose and attend; sets :attr:`read`."""

    @property
    def kept(self) -> int:
        """Tokens in memory."""
        return self.k.shape[2] if self.length else 0


class FullCache(DecodeCache):
    """All keys, whatever the budget: what the others are measured against."""

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        self.read = float(self.kept)
        p = torch.softmax(decode_scores(q, self.k, scale=self.scale), dim=-1)
        out = p.unflatten(1, (self.k.shape[1], -1)) @ self.v.to(p.dtype)  # [B, Hkv, G, D]
        return out.flatten(1, 2)[:, :, None].to(q.dtype)


def gather_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Exact softmax of one query over the keys that ``index`` names, each head its own.

    Args:
        q: ``[B, Hq, 1, D]``.
        k, v: ``[B, Hkv, N, D]``.
        index: int64 ``[B, Hq, n]``, positions 0..N-1, each at most once among the valid.
        valid: bool, shape of ``index``: entries that count. Default all.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, 1, D]``; 0 for a head without a valid entry. Scores in at least float32.
    """
    scale = resolve_scale(scale, q.shape[3])
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Whole rows of the flat cache: the only keys touched are those that are read.
    head = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    begin = (torch.arange(q.shape[0], device=q.device)[:, None] * k.shape[1] + head) * k.shape[2]
    rows = (begin[..., None] + index).flatten()
    keys, values = (
        x.reshape(-1, x.shape[3]).index_select(0, rows).view(*index.shape, -1).to(dtype) for x in (k, v)
    )
    s = scale * (q.to(dtype) @ keys.transpose(-1, -2))[:, :, 0]
    if valid is not None:
        s = s.masked_fill(~valid, float("-inf"))
    lse = torch.logsumexp(s, dim=-1, keepdim=True)
    p = torch.exp(s - lse.masked_fill(lse.isneginf(), 0.0))
    return (p[:, :, None] @ values).to(q.dtype)


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    page_size: int = 1,
    scale: float | None = None,
) -> torch.Tensor:
    """:func:`gather_attention` over pages, with one list a query head or one for all heads that share keys.

    Args:
        q: ``[B, Hq, 1, D]``.
        k, v: ``[B, Hkv, N, D]``.
        index: int64 ``[B, Hq, n]``, or ``[B, Hkv, n]``: then the query heads of a KV head read the same. Page ``p``
            holds the tokens ``p P`` to ``p P + P - 1``; those outside ``0..N-1`` do not exist and are skipped, so -1
            names nothing. A page named twice counts twice.
        valid: bool, shape of ``index``: pages that count. Default all.
        page_size: P tokens a page. Default 1: ``index`` names tokens.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, 1, D]``; 0 for a head without a valid token. Scores in at least float32.
    """
    check_qkv(q, k, v)
    check_positive_int("page_size", page_size)
    if q.shape[2] != 1:
        raise ValueError(f"q: expected one query [B, Hq, 1, D], got shape {tuple(q.shape)}")
    if index.dim() != 3 or index.shape[0] != q.shape[0] or index.shape[1] not in (q.shape[1], k.shape[1]):
        raise ValueError(
            f"index: expected [{q.shape[0]}, {q.shape[1]} or {k.shape[1]}, n], got shape {tuple(index.shape)}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"index: expected int64, got {index.dtype}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != index.shape):
        raise ValueError(
            f"valid: expected bool of the shape of index {tuple(index.shape)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    tokens = (index[..., None] * page_size + torch.arange(page_size, device=q.device)).flatten(2)
    here = (tokens >= 0) & (tokens < k.shape[2])
    if valid is not None:
        here &= valid.repeat_interleave(page_size, dim=2)
    tokens, here = (
        x.repeat_interleave(q.shape[1] // index.shape[1], dim=1) for x in (tokens.where(here, 0), here)
    )
    return gather_attention(q, k, v, tokens, valid=here, scale=scale)


def captured_mass(
    q: torch.Tensor, k: torch.Tensor, index: torch.Tensor, *, valid: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Share of the full softmax that the chosen keys hold, ``mu = sum_{j in S} a_j``, ``[B, Hq]``.

    The right measure of a choice: ``o - o_S = (1 - mu) (o_rest - o_S)``, so the error is at most ``1 - mu`` times the
    spread of the values.
    """
    a = torch.softmax(decode_scores(q, k, scale=scale), dim=-1)
    held = torch.gather(a, 2, index)
    if valid is not None:
        held = held.masked_fill(~valid, 0.0)
    return held.sum(dim=-1)


def decode_scores(q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Scaled scores of one query ``[B, Hq, 1, D]`` against all keys: ``[B, Hq, N]`` in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    # [B, Hkv, G, D]: a group's queries meet its keys together, no key is copied for them.
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))[:, :, :, 0]
    return resolve_scale(scale, q.shape[3]) * (grouped @ k.to(dtype).transpose(-1, -2)).flatten(1, 2)


def shared_by_group(score: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``score [B, Hq, n]``, for each query head the largest in its group: heads that share keys choose alike.

    Else a group of ``G`` heads may name ``G`` times as many tokens, and the keys of all of them are loaded.
    """
    groups = score.shape[1] // num_kv_heads
    return score.unflatten(1, (num_kv_heads, groups)).amax(dim=2).repeat_interleave(groups, dim=1)
