"""Is it the target's distribution? Pearson's chi-square test, its power, and the wrong rules that it must catch.

A test that never rejects proves nothing, so each comes with its power: the distribution that a wrong rule emits is
known in closed form, and from it the probability that n samples expose the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effattn_lab.linear.speculative import overlap, residual, verify


@dataclass(frozen=True)
class ChiSquare:
    """Statistic ``sum (counts - n p)^2 / (n p)``, degrees of freedom, and P(at least that | counts come from p)."""

    statistic: float
    dof: int
    p_value: float


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> ChiSquare:
    """Test counts against a distribution.

    Args:
        counts: ``[V]``, how often each value came. probs: ``[V]``, the distribution claimed, adding up to 1.

    Raises:
        ValueError: a cell of positive probability that expects fewer than 5 counts: the chi-square law is then off.
            Put such cells together first.
    """
    counts, probs = counts.double(), probs.double()
    if counts.dim() != 1 or counts.shape != probs.shape:
        raise ValueError(
            f"probs: expected the shape of counts {tuple(counts.shape)}, got {tuple(probs.shape)}"
        )
    used = probs > 0
    if bool(counts[~used].any()):  # what cannot happen has happened
        return ChiSquare(float("inf"), int(used.sum()) - 1, 0.0)
    expected = probs[used] / probs.sum() * counts.sum()
    if expected.numel() < 2 or float(expected.min()) < 5:
        raise ValueError(
            f"counts: expected two cells or more, each of 5 expected counts or more, got {float(expected.min()):.2g}"
        )
    statistic = ((counts[used] - expected) ** 2 / expected).sum()
    dof = expected.numel() - 1
    tail = torch.special.gammaincc(torch.tensor(dof / 2.0, dtype=torch.float64), statistic / 2)
    return ChiSquare(float(statistic), dof, float(tail))


def power(probs: torch.Tensor, wrong: torch.Tensor, n: int, level: float = 1e-3) -> float:
    """Probability that n samples of ``wrong`` are rejected as samples of ``probs`` at ``level``.

    The statistic is then, for large n, noncentral chi-square with ``lambda = n sum (wrong - p)^2 / p``: a mixture,
    with Poisson(lambda / 2) weights, of central ones with ``dof + 2 j`` degrees.
    """
    probs, wrong = probs.double(), wrong.double()
    if bool((wrong[probs == 0] > 0).any()):
        raise ValueError("wrong: expected no mass where probs is 0; one sample there decides")
    used = probs > 0
    half = float(n * ((wrong - probs)[used] ** 2 / probs[used]).sum()) / 2
    dof = int(used.sum()) - 1
    critical = critical_value(dof, level)
    spread = 12 * half**0.5 + 30
    j = torch.arange(max(0, int(half - spread)), int(half + spread) + 1, dtype=torch.float64)
    rate = torch.tensor(max(half, 1e-300), dtype=torch.float64)
    weight = torch.exp(j * rate.log() - half - torch.lgamma(j + 1))
    tail = torch.special.gammaincc(dof / 2 + j, torch.full_like(j, critical / 2))
    return min(1.0, float((weight * tail).sum()))


def critical_value(dof: int, level: float) -> float:
    """The statistic that is exceeded with probability ``level`` under the claimed distribution, by bisection."""
    low, high = 0.0, 10.0 * (dof + 100)
    a = torch.tensor(dof / 2.0, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        tail = float(torch.special.gammaincc(a, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if tail > level else (low, middle)
    return (low + high) / 2


def _from_target(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.minimum(p, q) + (1 - overlap(p, q))[..., None] * p


def _upside_down(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    accepted = torch.where(p > 0, q * torch.clamp(q / p, max=1.0), q)
    return accepted + (1 - accepted.sum(dim=-1, keepdim=True)) * residual(p, q)


def _always(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return q


def _largest(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    rest = torch.nn.functional.one_hot(residual(p, q).argmax(dim=-1), p.shape[-1]).to(p.dtype)
    return torch.minimum(p, q) + (1 - overlap(p, q))[..., None] * rest


#: What one position emits, ``rule(p, q) -> [..., V]``, when the rule is wrong.
WRONG_RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "resample from p": _from_target,
    "accept with q/p": _upside_down,
    "accept everything": _always,
    "likeliest of the residual": _largest,
}


def draw_rounds(p: torch.Tensor, q: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """First tokens ``[n]`` of n rounds of one draft, judged by the right rule; ``p``, ``q`` are fixed, ``[V]``."""
    u = torch.rand(n, 3, generator=generator, dtype=p.dtype)
    sums = q.cumsum(0)
    drafts = torch.searchsorted(sums, u[:, 0].contiguous() * sums[-1], right=True).clamp(max=len(q) - 1)
    both = torch.stack([p, p]).expand(n, 2, -1)
    tokens, _ = verify(both, q.expand(n, 1, -1), drafts[:, None], u[:, 1:2], u[:, 2])
    return tokens[:, 0]
