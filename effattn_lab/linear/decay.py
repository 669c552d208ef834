"""Products of decays that cannot overflow: only sums of log decays, never a difference, never a positive exponent.

Between key j and query i lies the decay ``exp(g_(j+1) + ... + g_i)``. Textbooks write it ``exp(G_i) exp(-G_j)`` with
running sums ``G``, so that it splits into a factor of the query and one of the key; but ``exp(-G_j)`` grows without
bound (float32 ends at ``exp(88)``), and ``G_i - G_j`` cancels where both are large. Here a border is put between j
and i instead: the query's factor sums from the border to i, the key's from j to the border. Both are at most 1, and
``-inf`` is a legal log decay: everything before it is forgotten.

``g`` is a log decay, at most 0, on the axis before the last: ``[..., N, K]`` a channel, ``[..., N, 1]`` a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def up_to(g: torch.Tensor) -> torch.Tensor:
    """``sum_(t <= i) g_t``, ``[..., N, K]``: from the border before the first token to token i, its own included."""
    return g.cumsum(dim=-2)


def before(g: torch.Tensor) -> torch.Tensor:
    """``sum_(t < i) g_t``, ``[..., N, K]``: what a state that is read before token i's decay has gone through."""
    return up_to(F.pad(g[..., :-1, :], (0, 0, 1, 0)))


def after(g: torch.Tensor) -> torch.Tensor:
    """``sum_(t > j) g_t``, ``[..., N, K]``: what token j's key goes through up to the border after the last token."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(dim=-2).flip(-2)


def segment_sums(g: torch.Tensor) -> torch.Tensor:
    """``sum_(j < t <= i) g_t`` as ``[..., N, N]`` (query i, key j) for a decay a head ``g [..., N]``; -inf for j > i.

    The mask comes first and the running sum after it, so each column starts from 0 at its own key.
    Source: Dao and Gu 2024 (Mamba-2), ``segsum``.
    """
    n = g.shape[-1]
    keep = torch.ones(n, n, dtype=torch.bool, device=g.device)
    steps = g[..., :, None].expand(*g.shape, n).masked_fill(~keep.tril(-1), 0.0)
    return steps.cumsum(dim=-2).masked_fill(~keep.tril(), -torch.inf)


def head_scores(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``a_ij = q_i . k_j exp(sum_(j < t <= i) g_t)`` for j <= i, else 0: one matrix product, one mask of decays.

    ``q, k [..., N, K]``, ``g [..., N]`` to ``[..., N, N]``.
    """
    return (q @ k.transpose(-1, -2)) * segment_sums(g).exp()


def channel_scores(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``a_ij = sum_d q_id k_jd exp(sum_(j < t <= i) g_td)`` for j <= i, else 0: each channel decays on its own.

    The decay stands inside the sum over d, so no mask can be laid over ``q k^T``. Halving: queries of the second half
    meet keys of the first half at the border between them, one product of two factors that the decays only shrink;
    then each half by itself. All halves of one size are done at once, ``log2 N`` products; together they compute the
    ``N (N - 1) / 2`` pairs below the diagonal, and none that a causal mask would throw away.

    ``q, k, g [..., N, K]`` to ``[..., N, N]``. Source: the sub-blocks of Yang et al. 2024 (GLA), section 4.3, taken
    to their end.
    """
    n = q.shape[-2]
    padded = 1 << (n - 1).bit_length()
    q, k, g = (F.pad(x, (0, 0, 0, padded - n)) for x in (q, k, g))
    blocks = (q * k).sum(-1)[..., None, None]  # [..., padded, 1, 1]: a token sees itself undecayed
    size = 1
    while size < padded:
        (_, q_late), (k_early, _), (g_early, g_late) = (
            x.unflatten(-2, (padded // (2 * size), 2, size)).unbind(-3) for x in (q, k, g)
        )
        across = (q_late * up_to(g_late).exp()) @ (k_early * after(g_early).exp()).transpose(-1, -2)
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        upper = torch.cat([first, torch.zeros_like(first)], dim=-1)
        blocks = torch.cat([upper, torch.cat([across, second], dim=-1)], dim=-2)
        size *= 2
    return blocks[..., 0, :n, :n]


def scores(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """:func:`head_scores` for ``g [..., N, 1]``, :func:`channel_scores` for ``[..., N, K]``."""
    return head_scores(q, k, g[..., 0]) if g.shape[-1] == 1 else channel_scores(q, k, g)
