"""Attention sinks and a window: StreamingLLM's cache for decoding, and the same pattern as a mask for prefill.

A query reads the first ``sinks`` tokens and the last ``window``. Softmax has to put its weight somewhere, and heads
with nothing to say put it on tokens that every query sees: the first ones. Evicting them takes away a large part of
the denominator, and the output changes as a whole. What lies between is gone: this keeps a model fluent for ever, it
does not extend its memory.

Source: Xiao et al. 2024 (StreamingLLM), section 3; positions inside the cache as in its released code.
"""

from __future__ import annotations

import torch

from effattn_lab._validate import check_qkv, resolve_scale
from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.rotary import rotate
from effattn_lab.sparse.block_list import block_list, block_list_attention
from effattn_lab.sparse.cache import DecodeCache, gather_attention
from effattn_lab.sparse.static_patterns import dense_mask, pattern_attention, sinks_and_window


def streaming_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: int = 4,
    window: int = 256,
    scale: float | None = None,
) -> torch.Tensor:
    """The reference: causal attention to the first ``sinks`` keys and the last ``window``, positions as they are.

    Args:
        q: ``[B, Hq, seqlen_q, D]``; the last positions where ``seqlen_q < seqlen_k``.
        k, v: ``[B, Hkv, seqlen_k, D]``.
        sinks: s, at least 0. Default 4.
        window: w, at least 1, the query's own token among them. Default 256.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, seqlen_q, D]``.
    """
    return pattern_attention(q, k, v, sinks_and_window(sinks, window), scale=scale)


def streaming_attention_blocked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: int = 4,
    window: int = 256,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> torch.Tensor:
    """The same numbers from the tiles that hold a sink or a part of the window: ``O(N (s + w))`` work."""
    blocks = block_list(
        sinks_and_window(sinks, window), q.shape[2], k.shape[2], block_m=block_m, block_n=block_n
    )
    return block_list_attention(q, k, v, blocks, scale=scale)[0]


def streaming_attention_reindexed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: int = 4,
    budget: int = 256,
    rope_base: float,
    scale: float | None = None,
) -> torch.Tensor:
    """What :class:`StreamingCache` gives token by token, for all queries of a text at once.

    Counting positions inside the cache moves nothing but the sinks. The window slides with the query, so distances in
    it stay; a sink's distance stops growing at ``budget - 1``. So the scores of the sinks, and no others, are taken
    with a query turned back from its position t to ``min(t, budget - 1)``.

    Args:
        q: ``[B, Hq, N, D]``, rotated by positions 0..N-1.
        k, v: ``[B, Hkv, N, D]``, k rotated likewise.
        sinks: s, at least 0. Default 4.
        budget: tokens a query reads, more than ``sinks``. Default 256.
        rope_base: base of the model's RoPE.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, N, D]``. Lays out ``N x N`` scores: for studies, not for serving.
    """
    check_qkv(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: expected as many queries as keys ({k.shape[2]}), got {q.shape[2]}")
    if budget <= sinks:
        raise ValueError(f"budget: expected more than the {sinks} sinks, got {budget}")
    n, scale = q.shape[2], resolve_scale(scale, q.shape[3])
    keep = dense_mask(sinks_and_window(sinks, budget - sinks), n, n, device=q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    wide, keys, values = q.to(dtype), repeat_kv(k, groups).to(dtype), repeat_kv(v, groups).to(dtype)
    beyond = (torch.arange(n, device=q.device) - (budget - 1)).clamp(min=0)
    s = wide @ keys.transpose(-1, -2)
    s[..., :sinks] = rotate(wide, -beyond, base=rope_base) @ keys[:, :, :sinks].transpose(-1, -2)
    p = torch.softmax((scale * s).masked_fill(~keep, float("-inf")), dim=-1)
    return (p @ values).to(q.dtype)


class StreamingCache(DecodeCache):
    """StreamingLLM: sinks and the most recent tokens, with positions counted inside the cache.

    After ``attend(q, budget)`` there are at most ``budget`` tokens: the first ``sinks`` and the last ``budget -
    sinks``. The m kept keys then stand at positions 0..m-1 and the query at m-1, so no distance ever exceeds the
    cache. Keys arrive rotated by their positions in the text; they are turned back once, kept so, and turned by
    their place in the cache at each step.

    Args:
        sinks: first tokens that never leave, at least 0. Default 4.
        rope_base: base of the model's RoPE. None: positions stay as they are, for models without RoPE, or to see
            what happens otherwise.
        scale: default ``D ** -0.5``.
    """

    def __init__(self, sinks: int = 4, *, rope_base: float | None, scale: float | None = None) -> None:
        super().__init__(scale=scale)
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise ValueError(f"sinks: expected an integer of at least 0, got {sinks!r}")
        if rope_base is not None and not rope_base > 1:
            raise ValueError(f"rope_base: expected a number above 1 or None, got {rope_base!r}")
        self.sinks, self.rope_base = sinks, rope_base

    def _take(self, k: torch.Tensor, v: torch.Tensor) -> None:
        at = torch.arange(self.length, self.length + k.shape[2], device=k.device)
        super()._take(self._turn(k, -at), v)

    def _turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        if self.rope_base is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return rotate(wide, by, base=self.rope_base).to(x.dtype)

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        if budget <= self.sinks:
            raise ValueError(f"budget: expected more than the {self.sinks} sinks, got {budget}")
        if self.kept > budget:
            recent = self.kept - (budget - self.sinks)
            self.k = torch.cat([self.k[:, :, : self.sinks], self.k[:, :, recent:]], dim=2)
            self.v = torch.cat([self.v[:, :, : self.sinks], self.v[:, :, recent:]], dim=2)
        m = self.kept
        place = torch.arange(m, device=q.device)
        keys = self._turn(self.k, place)
        # The query stands at position length - 1 of the text, and at m - 1 of the cache.
        query = self._turn(q, place[-1:] - (self.length - 1))
        self.read = float(m)
        return gather_attention(query, keys, self.v, place.expand(*q.shape[:2], -1), scale=self.scale)
