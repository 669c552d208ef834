"""Attention over a pattern that is fixed before any token is seen.

A pattern is a *mask function*, FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)``: index tensors in, True where the
query may look. So each of them also goes into ``torch.nn.attention.flex_attention.create_block_mask`` as it is.
Positions are absolute and begin at 0; queries that are the last of a longer sequence keep theirs (the offset rule).

Source: Child et al. 2019 (strided, fixed); Beltagy et al. 2020 (window and global tokens); Zaheer et al. 2020
(random blocks); Ding et al. 2023 (dilated segments).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import attention, repeat_kv

#: ``(b, h, q_idx, kv_idx) -> bool``; the four broadcast against each other.
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def causal() -> MaskMod:
    """Keys up to the query's own position."""
    return lambda b, h, i, j: j <= i


def strided(stride: int, part: str = "union") -> MaskMod:
    """Sparse Transformer, strided: the last ``stride`` keys and itself, and every ``stride``-th key before.

    ``A1_i = {i - l, ..., i}`` and ``A2_i = {j <= i: (i - j) mod l = 0}``. For data with a period: rows of an image.

    Args:
        stride: l, about the square root of the length.
        part: "local" (A1), "column" (A2), or their "union", the default: the paper gives them to different heads or
            layers, or to one head together.
    """
    check_positive_int("stride", stride)
    parts: dict[str, MaskMod] = {
        "local": lambda b, h, i, j: (j <= i) & (i - j <= stride),
        "column": lambda b, h, i, j: (j <= i) & ((i - j) % stride == 0),
    }
    return _part(part, parts)


def fixed(stride: int, summary: int = 8, part: str = "union", heads: int = 1) -> MaskMod:
    """Sparse Transformer, fixed: the query's own block of ``stride`` keys, and the last ``summary`` of every block.

    ``A1_i = {j <= i: floor(j/l) = floor(i/l)}`` and ``A2_i = {j <= i: j mod l >= l - c}``. The summary cells are read
    by everybody, so a model learns to write there what others may need.

    Args:
        stride: l, the block's length.
        summary: c, from 1 to ``stride``; the paper takes 8, 16 or 32 of 128 or 256.
        part: "local" (A1), "summary" (A2), or their "union", the default.
        heads: how many heads take summaries of their own: head ``h`` reads the ``(h mod heads)``-th run of c cells,
            counted from the block's end. Default 1: the same for all. ``heads * summary`` may not exceed ``stride``.
    """
    for name, value in (("stride", stride), ("summary", summary), ("heads", heads)):
        check_positive_int(name, value)
    if heads * summary > stride:
        raise ValueError(
            f"summary: expected heads * summary of at most stride {stride}, got {heads} * {summary}"
        )

    def summaries(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        from_end = stride - 1 - j % stride
        return (j <= i) & (torch.div(from_end, summary, rounding_mode="floor") == h % heads)

    parts: dict[str, MaskMod] = {
        "local": lambda b, h, i, j: (j <= i) & (_floor(j, stride) == _floor(i, stride)),
        "summary": summaries,
    }
    return _part(part, parts)


def longformer(window: int, global_tokens: Sequence[int] = (), dilation: int = 1) -> MaskMod:
    """Longformer, for encoders: ``window / 2`` keys to either side, and global tokens that see and are seen by all.

    ``j = i + d u`` with ``|u| <= w / 2``. The mask alone: the paper also projects global tokens' queries, keys and
    values by matrices of their own.

    Args:
        window: w, even, at least 2; a query sees ``w + 1`` keys, itself among them.
        global_tokens: their positions, any number, each at least 0.
        dilation: d, step between the window's keys. Default 1.
    """
    check_positive_int("window", window)
    check_positive_int("dilation", dilation)
    if window % 2:
        raise ValueError(f"window: expected an even number, half of it on either side, got {window}")
    for token in global_tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"global_tokens: expected positions of at least 0, got {token!r}")
    wanted = tuple(sorted(set(global_tokens)))

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        gap = i - j
        keep = (gap.abs() <= dilation * (window // 2)) & (gap % dilation == 0)
        for token in wanted:
            keep = keep | (i == token) | (j == token)
        return keep

    return mask


def bigbird(
    seqlen: int, block: int = 64, window: int = 3, random: int = 3, heads: int = 1, seed: int = 0
) -> MaskMod:
    """BigBird, for encoders, in blocks: a window, random blocks, and the first and last block global.

    As in the released code: random blocks are drawn once for each head and query block, never from the window or the
    global blocks, and stay. Where fewer than ``random`` are left, all of them are taken.

    Args:
        seqlen: N; positions beyond it are an error of the caller's.
        block: b, tokens a block. Default 64.
        window: blocks of the window, odd, the query's own among them. Default 3.
        random: r, random key blocks for each query block. Default 3; 0 for none.
        heads: with draws of their own; head ``h`` takes draw ``h mod heads``. Default 1.
        seed: of the draws.
    """
    for name, value in (("seqlen", seqlen), ("block", block), ("window", window), ("heads", heads)):
        check_positive_int(name, value)
    if window % 2 == 0:
        raise ValueError(f"window: expected an odd number of blocks, got {window}")
    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise ValueError(f"random: expected an integer of at least 0, got {random!r}")
    blocks = -(-seqlen // block)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for head in range(heads):
        for row in range(blocks):
            left = [c for c in range(1, blocks - 1) if abs(c - row) > window // 2]
            take = torch.randperm(len(left), generator=generator)[:random]
            drawn[head, row, [left[t] for t in take.tolist()]] = True

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        row, col = _floor(i, block), _floor(j, block)
        last = blocks - 1
        keep = ((row - col).abs() <= window // 2) | (row == 0) | (row == last) | (col == 0) | (col == last)
        return keep | drawn.to(i.device)[h % heads, row, col]

    return mask


def dilated(segment: int, rate: int, heads: int = 1) -> MaskMod:
    """One pattern of LongNet, causal: inside a segment of ``segment`` tokens, every ``rate``-th row sees every
    ``rate``-th key. Rows in between see nothing; :func:`dilated_attention` gives them to other patterns.

    Args:
        segment: w, tokens a segment.
        rate: r, from 1 to ``segment``.
        heads: head ``h`` begins at offset ``(h mod heads) mod r``. Default 1: all at 0.
    """
    for name, value in (("segment", segment), ("rate", rate), ("heads", heads)):
        check_positive_int(name, value)
    if rate > segment:
        raise ValueError(f"rate: expected at most the segment {segment}, got {rate}")

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        offset = (h % heads) % rate
        mine = ((i % segment) % rate == offset) & ((j % segment) % rate == offset)
        return (j <= i) & (_floor(i, segment) == _floor(j, segment)) & mine

    return mask


def sinks_and_window(sinks: int, window: int) -> MaskMod:
    """Streaming sparse attention: the first ``sinks`` keys and the last ``window``, itself among them; causal.

    ``I(i) = {j < s} + {j: i - j < w}``, positions as they are. See :mod:`effattn_lab.sparse.streaming` for the cache.

    Args:
        sinks: s, at least 0.
        window: w, at least 1.
    """
    check_positive_int("window", window)
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks: expected an integer of at least 0, got {sinks!r}")
    return lambda b, h, i, j: (j <= i) & ((j < sinks) | (i - j < window))


def union(*masks: MaskMod) -> MaskMod:
    """Keys that at least one of the patterns shows."""
    if not masks:
        raise ValueError("masks: expected at least one, got none")

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        keep = masks[0](b, h, i, j)
        for other in masks[1:]:
            keep = keep | other(b, h, i, j)
        return keep

    return mask


def dense_mask(
    mask: MaskMod, seqlen_q: int, seqlen_k: int, *, heads: int = 1, device: torch.device | str | None = None
) -> torch.Tensor:
    """The pattern written out, bool ``[heads, seqlen_q, seqlen_k]``; queries are the last positions."""
    for name, value in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k), ("heads", heads)):
        check_positive_int(name, value)
    if seqlen_q > seqlen_k:
        raise ValueError(f"seqlen_q: expected at most seqlen_k {seqlen_k}, got {seqlen_q}")
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    h = torch.arange(heads, device=device)[:, None, None]
    i = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)
    return mask(zero, h, i, j).expand(heads, seqlen_q, seqlen_k)


def pattern_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: MaskMod, *, scale: float | None = None
) -> torch.Tensor:
    """The reference: exact softmax over the keys that the pattern shows.

    Args:
        q: ``[B, Hq, seqlen_q, D]``; the last positions where ``seqlen_q < seqlen_k``.
        k, v: ``[B, Hkv, seqlen_k, D]``.
        mask: a pattern of this module, or any function of FlexAttention's signature. It decides about causality too.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, seqlen_q, D]``; 0 where a query sees no key.
    """
    check_qkv(q, k, v)
    keep = dense_mask(mask, q.shape[2], k.shape[2], heads=q.shape[1], device=q.device)
    return attention(q, k, v, mask=keep, scale=scale)


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Sequence[int],
    rates: Sequence[int],
    *,
    scale: float | None = None,
    heads: int | None = None,
) -> torch.Tensor:
    """LongNet: several dilated patterns, mixed by their softmax denominators.

    ``o = sum_m a_m o_m`` with ``a_m = Z_m / sum Z``: one softmax over the *multiset* of keys, where a key that two
    patterns show counts twice. Only the rows and keys of a pattern are gathered, ``w / r`` of each segment.

    Args:
        q, k, v: ``[B, Hq, N, D]``, ``[B, Hkv, N, D]``; causal.
        segments: w of each pattern; the paper grows them geometrically.
        rates: r of each pattern, as many. A rate of 1 among them, or some rows may see nothing (they get 0).
        scale: default ``D ** -0.5``.
        heads: see :func:`dilated`. Default: Hq, so heads cover different rows.

    Returns:
        ``[B, Hq, N, D]``.
    """
    check_qkv(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: expected as many queries as keys ({k.shape[2]}), got {q.shape[2]}")
    if not segments or len(segments) != len(rates):
        raise ValueError(
            f"rates: expected one for each of {len(segments)} segments (at least 1), got {len(rates)}"
        )
    scale, heads = resolve_scale(scale, q.shape[3]), q.shape[1] if heads is None else heads
    check_positive_int("heads", heads)
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    q_, k_, v_ = q.to(dtype), repeat_kv(k, groups).to(dtype), repeat_kv(v, groups).to(dtype)
    top = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
    parts = []
    for segment, rate in zip(segments, rates):
        dilated(segment, rate, heads)  # refuses what does not fit
        out, lse = torch.zeros_like(v_), torch.full_like(top, float("-inf"))
        for head in range(q.shape[1]):
            for begin in range((head % heads) % rate, q.shape[2], segment):
                rows = torch.arange(begin, min(_end(begin, segment), q.shape[2]), rate, device=q.device)
                s = scale * q_[:, head, rows] @ k_[:, head, rows].transpose(-1, -2)
                s = s.masked_fill(rows > rows[:, None], float("-inf"))
                out[:, head, rows] = torch.softmax(s, dim=-1) @ v_[:, head, rows]
                lse[:, head, rows] = torch.logsumexp(s, dim=-1)
        parts.append((out, lse))
        top = torch.maximum(top, lse)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = [torch.exp(lse - top) for _, lse in parts]
    total = torch.stack(weights).sum(dim=0)
    mixed = torch.stack([w[..., None] * o for w, (o, _) in zip(weights, parts)]).sum(dim=0)
    return (mixed / total.masked_fill(total == 0, 1.0)[..., None]).to(q.dtype)


def _end(begin: int, segment: int) -> int:
    """First position after the segment in which ``begin`` lies."""
    return (begin // segment + 1) * segment


def _floor(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.div(x, size, rounding_mode="floor")


def _part(part: str, parts: dict[str, MaskMod]) -> MaskMod:
    if part == "union":
        return union(*parts.values())
    if part not in parts:
        raise ValueError(f"part: expected one of {', '.join([*parts, 'union'])}, got {part!r}")
    return parts[part]
