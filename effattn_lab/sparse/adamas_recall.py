"""Which estimator finds the keys of largest product? Random keys, with what matters varied one thing at a time.

Three kinds of keys: all channels alike; channels of unequal energy; unequal channels and keys of many lengths. 64
keys a head share a part of 0.2 to 0.8 with the query. Every vector has a root mean square of ``SIZE``, but for the
last kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.sparse.codes import (
    bucketize,
    hadamard,
    hamming_distance,
    l1_naive,
    l1_packed,
    pack,
    released_distance,
)
from effattn_lab.sparse.quest import page_bounds, page_scores

SIZE = 4.0
KINDS = ("channels alike", "channels unequal", "unequal, lengths free")

#: An estimator: q ``[H, 1, D]`` and k ``[H, N, D]`` to one number a key, larger for likelier.
Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make(
    kind: str, *, heads: int = 8, seqlen: int = 2048, head_dim: int = 128, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """q ``[heads, 1, D]`` and k ``[heads, N, D]`` of one of :data:`KINDS`; the related keys are scattered."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (("heads", heads), ("seqlen", seqlen), ("head_dim", head_dim)):
        check_positive_int(name, value)
    g = torch.Generator().manual_seed(seed)
    energy = torch.exp((0.0 if kind == KINDS[0] else 1.5) * torch.randn(heads, 1, head_dim, generator=g))
    q, k = (energy * torch.randn(heads, n, head_dim, generator=g) for n in (1, seqlen))
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    count = min(64, seqlen)
    place = torch.rand(heads, seqlen, generator=g).argsort(-1)[:, :count, None].expand(-1, -1, head_dim)
    part = 0.2 + 0.6 * torch.rand(heads, count, 1, generator=g)
    related = part * q + (1 - part.square()).sqrt() * torch.gather(k, 1, place)
    k = k.scatter(1, place, related)
    k = SIZE * k / k.square().mean(-1, keepdim=True).sqrt()
    if kind == KINDS[2]:
        k = k * torch.exp(0.5 * torch.randn(heads, seqlen, 1, generator=g))
    return SIZE * q, k


def _codes(x: torch.Tensor, t: float, transform: bool) -> torch.Tensor:
    return bucketize(hadamard(x) if transform else x, (-t, 0.0, t))


def by_distance(t: float, *, transform: bool = True) -> Estimate:
    """Minus the L1 distance of codes with thresholds -t, 0, t."""
    return lambda q, k: -l1_naive(_codes(q, t, transform), _codes(k, t, transform)).float()


def by_packed(t: float, count: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Estimate:
    """The same from packed words, counted by one of ``l1_packed``, ``released_distance``, ``hamming_distance``."""
    return lambda q, k: -count(pack(_codes(q, t, True)), pack(_codes(k, t, True))).float()


def by_sign(*, transform: bool = True) -> Estimate:
    """One bit a coordinate: minus the number of signs that differ."""
    return lambda q, k: -((_codes(q, 0.0, transform) > 1) != (_codes(k, 0.0, transform) > 1)).sum(-1).float()


def by_product(t: float) -> Estimate:
    """Product of the same codes moved to -1.5 .. 1.5: a long key keeps what its length adds, within two bits."""

    def estimate(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        a, b = (_codes(x, t, True).float() - 1.5 for x in (q, k))
        return (a * b).sum(-1)

    return estimate


def by_length(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Minus the exact squared distance: no codes, and still not the product."""
    return -(q - k).square().sum(-1)


def by_page(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Quest's bound, 16 tokens a page, given to each of its tokens."""
    bounds = page_bounds(k[None], 16)
    return page_scores(q[None], *bounds)[0].repeat_interleave(16, dim=-1)[:, : k.shape[1]]


ESTIMATES: dict[str, Estimate] = {
    "codes of k itself, thresholds 4": by_distance(4.0, transform=False),
    "codes of kH, thresholds 4": by_packed(4.0, l1_packed),
    "codes of kH, thresholds 10": by_distance(10.0),
    "codes of kH, {1, 2} counted 3": by_packed(4.0, released_distance),
    "codes of kH, bits that differ": by_packed(4.0, hamming_distance),
    "signs of kH": by_sign(),
    "product of codes of kH": by_product(4.0),
    "exact distance": by_length,
    "Quest's bound, pages of 16": by_page,
    "oracle": lambda q, k: (q @ k.transpose(-1, -2))[:, 0],
}


def recall_and_mass(
    estimate: Estimate, q: torch.Tensor, k: torch.Tensor, budget: int = 64
) -> tuple[float, float]:
    """Share of the ``budget`` keys of largest product that the estimator finds, and the softmax weight it holds."""
    check_positive_int("budget", budget)
    scores = (q @ k.transpose(-1, -2))[:, 0] * q.shape[-1] ** -0.5
    chosen = estimate(q, k).topk(budget, dim=-1).indices
    best = scores.topk(budget, dim=-1).indices
    hit = (chosen[..., None] == best[..., None, :]).any(-1).float().mean()
    return float(hit), float(torch.softmax(scores, dim=-1).gather(-1, chosen).sum(-1).mean())
