"""Flash attention in readable PyTorch: online softmax, tiles, backward by recomputation.

Same function as :func:`effattn_lab.foundations.attention.attention`, computed without ever holding an
``N x N`` matrix. Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022; Dao 2023 (deferred
division, only the log-sum-exp stored).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import repeat_kv

NEG_INF = float("-inf")


def online_softmax(scores: torch.Tensor, block: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last axis with its normaliser found in one pass over blocks.

    Carries ``m`` (largest score so far) and ``l`` (sum of ``exp(s - m)`` so far); a new block moves the origin
    from ``m`` to ``m'`` and multiplies ``l`` by ``exp(m - m')``.

    Args:
        scores: ``[..., N]``, floating point; may hold -inf for hidden entries.
        block: scores read at a time, at least 1. The result does not depend on it.

    Returns:
        ``(probs [..., N], lse [...])``; where all scores are -inf, probabilities 0 and lse -inf.
    """
    if not scores.is_floating_point() or scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(
            "scores: expected a floating-point tensor with a last axis of at least 1, "
            f"got {scores.dtype} {tuple(scores.shape)}"
        )
    check_positive_int("block", block)
    m_i = torch.full_like(scores[..., 0], NEG_INF)
    l_i = torch.zeros_like(m_i)
    for s in scores.split(block, dim=-1):
        m_new = torch.maximum(m_i, s.amax(dim=-1))
        origin = _finite(m_new)
        l_i = l_i * torch.exp(m_i - origin) + torch.exp(s - origin[..., None]).sum(dim=-1)
        m_i = m_new
    lse = m_i + torch.log(l_i)
    return torch.exp(scores - _finite(lse)[..., None]), lse


def merge(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both.

    ``L = log(e^La + e^Lb)``, ``o = e^(La - L) o_a + e^(Lb - L) o_b``: associative and commutative, so parts may be
    computed anywhere and merged in any order.

    Args:
        o_a, o_b: outputs ``[..., D]``, each normalised over its own keys.
        lse_a, lse_b: their log-sum-exps ``[...]``; -inf for a part with no visible key.

    Returns:
        ``(o [..., D], lse [...])``.
    """
    for name, o, part in (("lse_a", o_a, lse_a), ("lse_b", o_b, lse_b)):
        if part.shape != o.shape[:-1]:
            raise ValueError(f"{name}: expected shape {tuple(o.shape[:-1])}, got {tuple(part.shape)}")
    if o_a.shape != o_b.shape:
        raise ValueError(f"o_b: expected the shape of o_a {tuple(o_a.shape)}, got {tuple(o_b.shape)}")
    lse = torch.logaddexp(lse_a, lse_b)
    origin = _finite(lse)
    weight_a = torch.exp(lse_a - origin)[..., None]
    weight_b = torch.exp(lse_b - origin)[..., None]
    return weight_a * o_a + weight_b * o_b, lse


def _finite(x: torch.Tensor) -> torch.Tensor:
    """-inf becomes 0: with no key seen yet any origin will do, but ``-inf - -inf`` is NaN."""
    return torch.where(torch.isneginf(x), torch.zeros_like(x), x)


def tile_step(
    m_i: torch.Tensor, l_i: torch.Tensor, acc: torch.Tensor, s: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absorb one tile of scores into the running state of a query tile.

    Invariant, before and after: ``l = sum_seen exp(s - m)`` and ``acc = sum_seen exp(s - m) v``.

    Args:
        m_i: largest score so far ``[..., block_q]``; -inf at the start.
        l_i: running sum ``[..., block_q]``; 0 at the start.
        acc: unnormalised output ``[..., block_q, D]``; 0 at the start.
        s: scores of this tile ``[..., block_q, block_k]``, scaled, -inf where hidden.
        v: values of this tile ``[..., block_k, D]``.

    Returns:
        the new ``(m_i, l_i, acc)``.
    """
    m_new = torch.maximum(m_i, s.amax(dim=-1))
    origin = _finite(m_new)
    alpha = torch.exp(m_i - origin)  # moves the origin of the sums; 0 at the first tile
    p = torch.exp(s - origin[..., None])  # [..., block_q, block_k]
    l_i = alpha * l_i + p.sum(dim=-1)
    acc = alpha[..., None] * acc + p @ v
    return m_new, l_i, acc


def _tile_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, first_row: int, first_col: int, causal: bool
) -> torch.Tensor:
    """Scores of one tile, with the causal mask only where the tile crosses the diagonal.

    ``first_row`` is the *position* of the tile's first query (offset rule applied), ``first_col`` its first key.
    """
    s = scale * (q @ k.transpose(-1, -2))
    if causal and first_col + k.shape[2] - 1 > first_row:
        rows = torch.arange(first_row, first_row + q.shape[2], device=q.device)[:, None]
        cols = torch.arange(first_col, first_col + k.shape[2], device=q.device)
        s = s.masked_fill(cols > rows, NEG_INF)
    return s


class _Flash(torch.autograd.Function):
    """Forward keeps ``q, k, v, o, lse``: nothing of size ``N x N`` survives until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool,
        scale: float,
        block_q: int,
        block_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, num_heads, seqlen_q, _ = q.shape
        seqlen_k = k.shape[2]
        out = torch.empty_like(q)
        lse = q.new_empty(batch, num_heads, seqlen_q)
        for i in range(0, seqlen_q, block_q):
            q_i = q[:, :, i : i + block_q]
            m_i = torch.full_like(q_i[..., 0], NEG_INF)
            l_i = torch.zeros_like(m_i)
            acc = torch.zeros_like(q_i)
            first_row = i + seqlen_k - seqlen_q
            last_row = first_row + q_i.shape[2] - 1
            # Tiles above the diagonal are not visited.
            end = min(seqlen_k, last_row + 1) if causal else seqlen_k
            for j in range(0, end, block_k):
                k_j, v_j = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
                s = _tile_scores(q_i, k_j, scale, first_row, j, causal)
                m_i, l_i, acc = tile_step(m_i, l_i, acc, s, v_j)
            # One division at the end; a row that saw no key has l = 0 and keeps the output 0.
            out[:, :, i : i + block_q] = acc / torch.where(l_i == 0, 1.0, l_i)[..., None]
            lse[:, :, i : i + block_q] = m_i + torch.log(l_i)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale, ctx.block_q, ctx.block_k = causal, scale, block_q, block_k
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        do, dlse = grads
        q, k, v, out, lse = ctx.saved_tensors
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # delta_i = sum_c do_ic o_ic = sum_j P_ij dP_ij; a gradient that arrives through lse only shifts it,
        # since d lse_i / d s_ij = P_ij.
        delta = (do * out).sum(dim=-1) - dlse
        for j in range(0, seqlen_k, ctx.block_k):
            k_j, v_j = k[:, :, j : j + ctx.block_k], v[:, :, j : j + ctx.block_k]
            first_query = max(0, j - (seqlen_k - seqlen_q)) if ctx.causal else 0
            for i in range(first_query // ctx.block_q * ctx.block_q, seqlen_q, ctx.block_q):
                rows, cols = slice(i, i + ctx.block_q), slice(j, j + ctx.block_k)
                s = _tile_scores(q[:, :, rows], k_j, ctx.scale, i + seqlen_k - seqlen_q, j, ctx.causal)
                dq_ij, dk_ij, dv_ij = backward_tile(
                    q[:, :, rows], k_j, v_j, do[:, :, rows], s, lse[:, :, rows], delta[:, :, rows], ctx.scale
                )
                dq[:, :, rows] += dq_ij
                dk[:, :, cols] += dk_ij
                dv[:, :, cols] += dv_ij
        return dq, dk, dv, None, None, None, None


def backward_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    s: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one tile adds to the gradients, with its probabilities recomputed from the saved log-sum-exp.

    ``P = exp(s - L)``, ``dV = P^T dO``, ``dP = dO V^T``, ``dS = P * (dP - delta)``, ``dQ = scale dS K``,
    ``dK = scale dS^T Q``.

    Args:
        q, do: queries and output gradients of the tile ``[..., block_q, D]``.
        k, v: keys and values of the tile ``[..., block_k, D]``.
        s: scaled scores of the tile ``[..., block_q, block_k]``, -inf where hidden.
        lse: log-sum-exp of each query over *all* its keys ``[..., block_q]``.
        delta: ``sum_c do_c o_c`` for each query ``[..., block_q]``.
        scale: the softmax scale.

    Returns:
        contributions ``(dq [..., block_q, D], dk [..., block_k, D], dv [..., block_k, D])``.
    """
    p = torch.exp(s - _finite(lse)[..., None])
    dv = p.transpose(-1, -2) @ do
    dp = do @ v.transpose(-1, -2)
    ds = p * (dp - delta[..., None])
    return scale * (ds @ k), scale * (ds.transpose(-1, -2) @ q), dv


@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    block_q: int = ...,
    block_k: int = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    block_q: int = ...,
    block_k: int = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, tile by tile, with O(N) extra memory; differentiable.

    Args:
        q: queries ``[B, Hq, seqlen_q, D]``.
        k, v: keys and values ``[B, Hkv, seqlen_k, D]``; Hkv divides Hq.
        causal: offset rule as in :func:`effattn_lab.foundations.attention.attention`; tiles above the diagonal
            are skipped, not masked. Default False.
        scale: multiplies the scores. Default ``D ** -0.5``.
        block_q, block_k: tile sizes, at least 1. Default 64. The result does not depend on them but for rounding.
        return_lse: also return the log-sum-exp ``[B, Hq, seqlen_q]``. Default False.

    Returns:
        ``out [B, Hq, seqlen_q, D]`` in the dtype of ``q`` (accumulated in at least float32), or ``(out, lse)``.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    check_qkv(q, k, v)
    check_positive_int("block_q", block_q)
    check_positive_int("block_k", block_k)
    scale = resolve_scale(scale, q.shape[3])
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    # repeat_kv stands outside the autograd function: its gradient sums over the group's query heads.
    out, lse = _Flash.apply(
        q.to(dtype),
        repeat_kv(k.to(dtype), groups),
        repeat_kv(v.to(dtype), groups),
        causal,
        scale,
        block_q,
        block_k,
    )
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out
