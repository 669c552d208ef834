"""Exercise: what the end of a prompt votes for (SnapKV)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._quest_pages import FROM_SCRATCH


def _attention(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool = True) -> torch.Tensor:
    """Weights ``[B, H, W, N]`` of the last W queries."""
    w, n = q.shape[2], k.shape[2]
    s = (q @ k.transpose(-1, -2)) * scale
    later = torch.arange(n) > torch.arange(n - w, n)[:, None]
    return torch.softmax(s.masked_fill(later, float("-inf")) if causal else s, dim=-1)


def snapkv(q: torch.Tensor, k: torch.Tensor, budget: int, pool: int) -> torch.Tensor:
    """True for the window, and for the tokens before it that its queries vote for."""
    w, n = q.shape[2], k.shape[2]
    keep = torch.ones(*k.shape[:3], dtype=torch.bool)
    if n <= budget:
        return keep
    s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    later = torch.arange(n) > torch.arange(n - w, n)[:, None]
    a = torch.softmax(s.masked_fill(later, float("-inf")), dim=-1)
    votes = a.sum(dim=2)[..., : n - w]
    votes = F.avg_pool1d(votes, pool, stride=1, padding=pool // 2)
    keep[..., : n - w] = False
    return keep.scatter(-1, votes.topk(budget - w, dim=-1).indices, True)


def _votes(q: torch.Tensor, k: torch.Tensor, pool: int) -> torch.Tensor:
    w, n = q.shape[2], k.shape[2]
    votes = F.pad(_attention(q, k, q.shape[-1] ** -0.5).sum(dim=2)[..., : n - w], (pool // 2, pool // 2))
    return votes.unfold(-1, pool, 1).mean(dim=-1)


def _snapkv_reference(q: torch.Tensor, k: torch.Tensor, budget: int, pool: int) -> tuple[torch.Tensor, ...]:
    w, n = q.shape[2], k.shape[2]
    keep = torch.ones(*k.shape[:3], dtype=torch.bool)
    if n > budget:
        votes = _votes(q, k, pool)
        better = (votes[..., None, :] > votes[..., :, None]).sum(dim=-1)
        keep[..., : n - w] = better < budget - w
    return (keep,)


def _snapkv_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, w: int, budget: int, pool: int = 3, *, crowd: float = 0.0, apart: float = 0.0
    ) -> Case:
        while True:
            q, k = normal(rng, 2, 3, w, 8, size=2.0 if not apart else 1.0), normal(rng, 2, 3, n, 8)
            q, k = q + apart, k - apart
            if crowd:  # the window's first query would like the last key, which it does not see
                k[:, :, -1] = crowd * q[:, :, 0] / q[:, :, 0].norm(dim=-1, keepdim=True)
            if n <= budget or n - w <= budget - w:
                break
            rank = _votes(q.double(), k.double(), pool).sort(dim=-1, descending=True).values
            gap = 1 - rank[..., budget - w] / rank[..., budget - w - 1]
            if gap.min() > 1e-4:  # float32 must not decide who stays
                break
        return Case(name, {"q": q, "k": k, "budget": budget, "pool": pool})

    return [
        case("the tokens of most votes", 40, 6, 18),
        case("no neighbour helps", 40, 6, 18, 1),
        case("a wider neighbourhood", 48, 4, 20, 7),
        case("the window does not see ahead", 40, 4, 16, crowd=9.0),
        case("all scores negative", 40, 8, 18, apart=1.7),
        case("one query votes", 32, 1, 9),
        case("one place beside the window", 30, 8, 9),
        case("room for all", 20, 6, 20),
    ]


def _snapkv_mutant(fault: str, q: torch.Tensor, k: torch.Tensor, budget: int, pool: int) -> torch.Tensor:
    w, n = q.shape[2], k.shape[2]
    keep = torch.ones(*k.shape[:3], dtype=torch.bool)
    if n <= budget:
        return keep
    a = _attention(q, k, 1.0 if fault == "not scaled" else q.shape[-1] ** -0.5, fault != "no causal mask")
    if fault == "window left out of the softmax":
        a = _attention(q, k, q.shape[-1] ** -0.5)[..., : n - w]
        a = torch.cat([a / a.sum(dim=-1, keepdim=True), a.new_zeros(*a.shape[:3], w)], dim=-1)
    if fault == "masked with 0":
        later = torch.arange(n) > torch.arange(n - w, n)[:, None]
        s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        a = torch.softmax(s.masked_fill(later, 0.0), dim=-1)
    votes = a.sum(dim=2)
    if fault == "scores summed":
        votes = (q @ k.transpose(-1, -2)).sum(dim=2)
    if fault == "last query alone":
        votes = a[:, :, -1]
    if fault == "first query alone":
        votes = a[:, :, 0]
    if fault == "window competes":
        smooth = F.avg_pool1d(votes, pool, stride=1, padding=pool // 2)
        return torch.zeros_like(keep).scatter(-1, smooth.topk(budget, dim=-1).indices, True)
    whole, votes = votes, votes[..., : n - w]
    if fault == "averaged with the window":
        smooth = F.avg_pool1d(whole, pool, stride=1, padding=pool // 2)[..., : n - w]
    elif fault == "fewer neighbours at the ends":
        smooth = F.avg_pool1d(votes, pool, stride=1, padding=pool // 2, count_include_pad=False)
    elif fault == "maximum of the neighbours":
        # of equal votes the earlier
        smooth = F.max_pool1d(votes, pool, stride=1, padding=pool // 2)
        smooth = smooth - 1e-9 * torch.arange(n - w)
    elif fault == "neighbours of one side":
        smooth = F.pad(votes, (pool - 1, 0)).unfold(-1, pool, 1).mean(dim=-1)
    elif fault == "not smoothed":
        smooth = votes
    else:
        smooth = F.avg_pool1d(votes, pool, stride=1, padding=pool // 2)
    if fault == "least votes":
        smooth = -smooth
    if fault == "all heads alike":
        smooth = smooth.mean(dim=1, keepdim=True).expand_as(smooth)
    count = budget if fault == "budget without the window" else budget - w
    keep[..., : n - w] = False
    return keep.scatter(-1, smooth.topk(min(count, n - w), dim=-1).indices, True)


SNAPKV = Exercise(
    id="sparse/quest/snapkv",
    title="what the end of a prompt votes for",
    signature="snapkv(q [B, H, W, D], k [B, H, N, D], budget, pool) -> keep, bool [B, H, N]",
    outputs=(Output("keep", "bool"),),
    make_inputs=_snapkv_inputs,
    reference=_snapkv_reference,
    solution=snapkv,
    from_scratch=FROM_SCRATCH,
    properties={
        "the tokens of most votes": "Votes are attention weights, summed over the window's queries and averaged over "
        "`pool` neighbours; the budget - W best stay, and the window.",
        "no neighbour helps": "With pool = 1 the votes stay as they are.",
        "a wider neighbourhood": "pool neighbours: pool // 2 on either side; beyond the ends zeros count.",
        "the window does not see ahead": "A query in the window sees no later key, not even in the softmax.",
        "all scores negative": "A hidden key has no weight, however small the other scores are: -inf, not 0.",
        "one query votes": "W = 1: the last query's weights are the votes.",
        "one place beside the window": "budget = W + 1: one token beside the window.",
        "room for all": "A prompt that fits is left whole.",
    },
    tolerance=Tolerance(0.0, 0.0, "true or false; inputs are drawn so that the last place is won by 1e-4."),
    mutants=mutants(
        _snapkv_mutant,
        {
            "no causal mask": "Queries of the window see keys after themselves: mask them before the softmax.",
            "masked with 0": "Hidden scores are set to 0, the largest of all where the others are negative: -inf.",
            "averaged with the window": "The last tokens before the window are averaged with tokens inside it: cut "
            "the window off first.",
            "fewer neighbours at the ends": "At the ends the average is over fewer neighbours. It divides by pool: "
            "zeros count.",
            "window left out of the softmax": "The window's own keys are left out of the softmax: a query that "
            "looks at "
            "the window has little left to vote with, and should.",
            "window competes": "The window's tokens compete for places: they all stay, and only tokens before it are "
            "ranked.",
            "budget without the window": "The window comes on top of the budget: budget - W others stay.",
            "not smoothed": "The votes are not averaged over their neighbours.",
            "neighbours of one side": "The average takes earlier neighbours only: pool // 2 on either side.",
            "maximum of the neighbours": "The maximum of the neighbours is taken (a variant of the paper's code); "
            "here "
            "it is their average.",
            "scores summed": "Scores are summed. Each query has one vote to share: softmax first.",
            "last query alone": "Only the last query votes. All W do.",
            "first query alone": "Only the window's first query votes. All W do.",
            "least votes": "The tokens of fewest votes stay.",
            "all heads alike": "All heads keep the same tokens. Each votes for itself.",
            "not scaled": "The scores lack 1 / sqrt(D): too sharp a softmax makes other votes.",
        },
    ),
    hints=(
        "Attention of the last W queries, one sum over them, one average over neighbours, one topk.",
        "Row i of the window is position N - W + i. votes = a.sum(dim=2)[..., : N - W]; F.avg_pool1d(votes, pool, "
        "stride=1, padding=pool // 2) keeps the length.",
        's = (q @ k.mT) * q.shape[-1] ** -0.5\na = torch.softmax(s.masked_fill(later, float("-inf")), dim=-1)\n'
        "votes = F.avg_pool1d(a.sum(dim=2)[..., : n - w], pool, stride=1, padding=pool // 2)\n"
        "keep[..., : n - w] = False\nreturn keep.scatter(-1, votes.topk(budget - w, dim=-1).indices, True)",
    ),
)
