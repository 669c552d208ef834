"""Softmax attention: the reference that every other mechanism is tested against.

Quadratic in memory on purpose: nothing here is clever, so that it can be trusted.
Source: Vaswani et al. 2017, section 3.2; grouped heads from Ainslie et al. 2023.
"""

from __future__ import annotations

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale


def visible(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Which key may each query see?

    Queries are the *last* ``seqlen_q`` positions of the sequence (the offset rule), so query ``i`` stands at
    position ``i + seqlen_k - seqlen_q``. Causal: keys up to that position. ``window_size=W``: with ``causal``
    the last W of them, itself included; without, the keys less than W positions away on either side.

    Args:
        seqlen_q: number of queries, at least 1.
        seqlen_k: number of keys, at least 1.
        causal: hide the keys that come after the query. Default False.
        window_size: W, at least 1. Default None: no window.
        device: where to put the mask.

    Returns:
        bool tensor ``[seqlen_q, seqlen_k]``, True where the query may look.
    """
    if window_size is not None:
        check_positive_int("window_size", window_size)
    offset = seqlen_k - seqlen_q
    position = torch.arange(seqlen_q, device=device)[:, None] + offset  # [seqlen_q, 1]
    distance = position - torch.arange(seqlen_k, device=device)  # > 0: key in the past
    keep = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal:
        keep &= distance >= 0
    if window_size is not None:
        keep &= distance.abs() < window_size
    return keep


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    """A KV head for each query head: ``[B, Hkv, N, D]`` to ``[B, Hq, N, D]``.

    Query head ``h`` reads key-value head ``h // groups``: neighbours share, so heads
    repeat in place; tiling the whole list would pair head 1 with the wrong keys.
    """
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    scale: float | None,
    mask: torch.Tensor | None,
    window_size: int | None,
) -> torch.Tensor:
    """Masked, scaled scores ``[B, Hq, seqlen_q, seqlen_k]`` in at least float32; -inf where hidden."""
    scale = resolve_scale(scale, q.shape[3])
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    # Half precision is widened first: the reference must not add rounding of its own.
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = repeat_kv(k.to(dtype), q.shape[1] // k.shape[1])
    scores = scale * (q.to(dtype) @ keys.transpose(-1, -2))
    keep = visible(seqlen_q, seqlen_k, causal=causal, window_size=window_size, device=q.device)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected dtype torch.bool (True = may look), got {mask.dtype}")
        if mask.device != q.device:
            raise ValueError(f"mask: expected the device of q ({q.device}), got {mask.device}")
        try:
            keep = keep & mask.expand(scores.shape)
        except RuntimeError:
            raise ValueError(
                f"mask: expected a shape that broadcasts to {tuple(scores.shape)}, got {tuple(mask.shape)}"
            ) from None
    return scores.masked_fill(~keep, float("-inf"))


def lse(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    window_size: int | None = None,
) -> torch.Tensor:
    """Log-sum-exp of each query's visible scores, ``L_i = log sum_j exp(s_ij)``; -inf where it sees no key.

    Arguments as in :func:`attention`. Returns ``[B, Hq, seqlen_q]`` in at least float32.
    """
    check_qkv(q, k, k)
    return torch.logsumexp(_scores(q, k, causal, scale, mask, window_size), dim=-1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    window_size: int | None = None,
) -> torch.Tensor:
    """Softmax attention, ``o_i = sum_j softmax_j(scale * q_i . k_j) v_j`` over the visible keys.

    Args:
        q: queries ``[B, Hq, seqlen_q, D]``, any floating dtype.
        k: keys ``[B, Hkv, seqlen_k, D]``; Hkv divides Hq, query head h reads key head ``h // (Hq / Hkv)``.
        v: values, shape of ``k``.
        causal: each query sees keys up to its own position; with ``seqlen_q != seqlen_k`` the queries are the
            last positions (the offset rule). Default False.
        scale: multiplies the scores. Default ``D ** -0.5``.
        mask: bool, broadcastable to ``[B, Hq, seqlen_q, seqlen_k]``, True where the query may look.
        window_size: W, see :func:`visible`.

    Returns:
        ``[B, Hq, seqlen_q, D]`` in the dtype of ``q``. Computed in float64 for float64 inputs, else in float32.
        A query that sees no key gets 0.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    check_qkv(q, k, v)
    scores = _scores(q, k, causal, scale, mask, window_size)
    # softmax over nothing is 0/0; such a row has no evidence, so its output is 0.
    blind = torch.isneginf(scores).all(dim=-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    out = probs @ repeat_kv(v.to(probs.dtype), q.shape[1] // k.shape[1])
    return out.to(q.dtype)
