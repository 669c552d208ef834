"""Two savings of FlashAttention-4, in readable PyTorch: fewer rescalings, and exp2 without the exp unit.

Both attack the work *between* the two matrix products, which on Blackwell takes as long as the products do.
Source: Zadouri et al. 2026; coefficients and the threshold as in the authors' code.
"""

from __future__ import annotations

import math

import torch

#: 2^f on [0, 1): 1 + c1 f + c2 f^2 + c3 f^3. Largest relative error 8.8e-5, below bf16's rounding (2^-8 = 3.9e-3).
EXP2_COEFFICIENTS = (0.695146, 0.227564, 0.077119)


def exp2_cubic(x: torch.Tensor) -> torch.Tensor:
    """``2 ** x`` from multiply-adds alone: split ``x = n + f``, a cubic for ``2^f``, an exponent shift for ``2^n``.

    Args:
        x: any shape, floating point; -inf gives 0.

    Returns:
        the same shape and dtype, within a relative 8.8e-5 of ``torch.exp2(x)``.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point tensor, got {x.dtype}")
    x = x.clamp(min=-1000.0)  # keeps the integer shift finite; 2^-1000 is as good as 0
    n = torch.floor(x)
    f = x - n
    c1, c2, c3 = EXP2_COEFFICIENTS
    mantissa = 1 + f * (c1 + f * (c2 + f * c3))  # Horner: three multiply-adds
    return torch.ldexp(mantissa, n.to(torch.int32))


def attend_conditional(
    scores: torch.Tensor, v: torch.Tensor, *, block: int = 64, threshold: float = 8.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax that moves its origin only when the maximum has grown by more than ``threshold``.

    The origin ``m`` need not be the maximum: ``acc / l`` is the same for every ``m``. It must only stay near enough
    that ``2^(s - m)`` does not overflow; ``threshold = 8`` bounds each term by ``2^8 = 256``.

    Args:
        scores: ``[..., seqlen_q, seqlen_k]``, scaled, natural units (not log2), -inf where hidden.
        v: values ``[..., seqlen_k, D]``.
        block: keys per tile, at least 1. Default 64.
        threshold: in log2 units, at least 0; 0 is the ordinary online softmax. Default 8.

    Returns:
        ``out [..., seqlen_q, D]``, ``lse [..., seqlen_q]``, and ``moved [tiles, ..., seqlen_q]``: where sums already
        gathered had to be multiplied by a correction factor. A row that sees no key gives 0 and -inf.
    """
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    if threshold < 0:
        raise ValueError(f"threshold: expected at least 0 (log2 units), got {threshold}")
    s2 = scores * math.log2(math.e)  # log2 units: exp2 is what the hardware has
    m_i = torch.full_like(s2[..., 0], float("-inf"))
    l_i = torch.zeros_like(m_i)
    acc = s2.new_zeros(*m_i.shape, v.shape[-1])
    moved = []
    for s, v_j in zip(s2.split(block, dim=-1), v.split(block, dim=-2), strict=True):
        top = torch.maximum(m_i, s.amax(dim=-1))
        stale = (top <= m_i + threshold) & ~torch.isneginf(m_i)
        m_new = torch.where(stale, m_i, top)
        origin = torch.where(torch.isneginf(m_new), 0.0, m_new)
        moved.append((m_new > m_i) & ~torch.isneginf(m_i))
        alpha = torch.exp2(m_i - origin)
        p = torch.exp2(s - origin[..., None])  # at most 2^threshold
        l_i = alpha * l_i + p.sum(dim=-1)
        acc = alpha[..., None] * acc + p @ v_j
        m_i = m_new
    out = acc / torch.where(l_i == 0, 1.0, l_i)[..., None]
    lse = (m_i + torch.log2(l_i)) * math.log(2)
    return out, lse, torch.stack(moved)
