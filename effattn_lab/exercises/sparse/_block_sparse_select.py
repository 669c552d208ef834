"""Exercises on the choice: the fewest blocks that hold a share of the weight, and MoBA's gate."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._block_sparse_scores import FROM_SCRATCH, NEG_INF

EXACT = Tolerance(0.0, 0.0, "a block is chosen or not.")

# ---- by mass -----------------------------------------------------------------------------------------------


def select(weight: torch.Tensor, tau: float) -> torch.Tensor:
    """First and own block given, then in descending order until the sum reaches tau of the row's total."""
    n = weight.shape[-1]
    given = torch.eye(n, dtype=torch.bool)
    given[:, 0] = True
    rest = weight.masked_fill(given, 0.0)
    order = torch.sort(rest, dim=-1, descending=True, stable=True).indices
    falling = torch.gather(rest, -1, order)
    before = (weight * given).sum(dim=-1, keepdim=True) + falling.cumsum(dim=-1) - falling
    takes = before < tau * weight.sum(dim=-1, keepdim=True)
    return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, order, takes) | given


def _select_reference(weight: torch.Tensor, tau: float) -> tuple[torch.Tensor, ...]:
    keep = torch.zeros_like(weight, dtype=torch.bool)
    rows = weight.flatten(0, -2).tolist()
    n = weight.shape[-1]
    for at, row in enumerate(rows):
        own = at % n
        chosen = {0, own}
        have, total = sum(row[j] for j in chosen), sum(row)
        for j in sorted(set(range(own)) - chosen, key=lambda j: (-row[j], j)):
            if have >= tau * total:
                break
            chosen.add(j)
            have += row[j]
        keep.view(-1, n)[at, list(chosen)] = True
    return (keep,)


def _weights(rng: np.random.Generator, n: int, sharp: float, per: float = 8.0) -> torch.Tensor:
    """Rows as XAttention's: 0 above the diagonal, each sums to ``per``."""
    s = normal(rng, 2, 2, n, n, size=sharp).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), NEG_INF)
    return per * torch.softmax(s, dim=-1)


def _select_inputs(rng: np.random.Generator) -> list[Case]:
    n = 10
    past = torch.ones(n, n, dtype=torch.bool).tril()
    heavy = _weights(rng, n, 1.0)
    heavy[..., 0] += 100.0
    own = torch.eye(n)
    late = _weights(rng, n, 1.0) + 100.0 * own
    # Sixteenths of dyadic sums: float32 adds them exactly, so that "reaches" is not a matter of rounding.
    equal = past.float().expand(2, 2, n, n) * torch.from_numpy(rng.integers(1, 3, (2, 2, n, 1))).float()
    some = (torch.from_numpy(rng.integers(1, 5, (2, 2, n, n))).float() / 4).masked_fill(~past, 0.0)
    light = _weights(rng, n, 2.0)
    light[..., 0] = 0.0
    light = light.masked_fill(torch.eye(n, dtype=torch.bool) & (torch.arange(n) > 0)[:, None], 0.0)
    light[..., 0, 0] = 8.0
    return [
        Case("the smallest set", {"weight": _weights(rng, n, 1.5), "tau": 0.7}),
        Case("the smallest set", {"weight": _weights(rng, n, 0.3), "tau": 0.9}),
        Case("the first block counts first", {"weight": heavy, "tau": 0.9}),
        Case("the own block counts first", {"weight": late, "tau": 0.9}),
        Case("given blocks without weight", {"weight": light, "tau": 0.6}),
        Case("of equal blocks the earlier", {"weight": equal, "tau": 0.5}),
        Case("exactly tau is enough", {"weight": some, "tau": 0.75}),
        Case("nothing wanted", {"weight": _weights(rng, n, 1.0), "tau": 0.0}),
        Case("one block", {"weight": _weights(rng, 1, 1.0), "tau": 0.9}),
    ]


def _select_mutant(fault: str, weight: torch.Tensor, tau: float) -> torch.Tensor:
    n = weight.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool).tril()
    given = torch.eye(n, dtype=torch.bool)
    if fault != "first block not given":
        given[:, 0] = True
    if fault == "own block not given":
        given = torch.zeros_like(given)
        given[:, 0] = True
    if fault == "nothing given":
        given = torch.zeros_like(given)
    given = given & past
    total = weight.sum(dim=-1, keepdim=True)
    rest = weight.masked_fill(given | ~past, 0.0)
    rank = rest.masked_fill(rest == 0, 1e9) if fault == "smallest first" else rest
    if fault == "later of equals":
        order = (n - 1) - torch.sort(rank.flip(-1), dim=-1, descending=True, stable=True).indices
    else:
        order = torch.sort(rank, dim=-1, descending=fault != "smallest first", stable=True).indices
    if fault == "order of the text":
        order = torch.arange(n).expand_as(order)
    falling = torch.gather(rest, -1, order)
    have = (weight * given).sum(dim=-1, keepdim=True)
    if fault == "given not counted":
        have = torch.zeros_like(have)
    before = have + falling.cumsum(dim=-1) - falling
    wanted = tau * total
    if fault == "tau of one":
        wanted = torch.full_like(total, tau)
    if fault == "tau of the rest":
        wanted, before = tau * (total - have), before - have
    asks = before < wanted
    if fault == "one more at equality":
        asks = before <= wanted
    if fault == "the block that crosses left out":
        asks = before + falling <= wanted
    if fault == "one count for all rows":
        count = (asks & (falling > 0)).sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
        asks = torch.arange(n) < count
    if fault == "above a share of the largest":
        return ((rest >= (1 - tau) * rest.amax(dim=-1, keepdim=True)) & (rest > 0)) | given
    return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, order, asks & (falling > 0)) | given


SELECT = Exercise(
    id="sparse/block_sparse/select",
    title="the fewest blocks that hold a share of the weight",
    signature="select(weight [B, H, m, m], tau) -> keep [B, H, m, m], bool",
    outputs=(Output("keep", "bool"),),
    make_inputs=_select_inputs,
    reference=_select_reference,
    solution=select,
    from_scratch=FROM_SCRATCH,
    properties={
        "the smallest set": "Sort the other blocks of the past in descending order and take them until the sum, the "
        "given blocks included, reaches tau times the row's total. The block that crosses it is taken.",
        "the first block counts first": "Block 0 is always taken, and its weight counts before any other's.",
        "the own block counts first": "The block on the diagonal is always taken, and counts before any other.",
        "given blocks without weight": "Block 0 and the own block are taken whatever they weigh.",
        "of equal blocks the earlier": "torch.sort(..., descending=True, stable=True) keeps equal blocks in order.",
        "exactly tau is enough": "A sum of exactly tau times the total has reached it: no further block.",
        "nothing wanted": "With tau = 0 the given blocks alone are taken.",
        "one block": "The first block is its own.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _select_mutant,
        {
            "first block not given": "Block 0 is not always taken. It holds the sink.",
            "own block not given": "The own block, on the diagonal, is not always taken.",
            "nothing given": "Neither block 0 nor the own block is given: both are taken before any other.",
            "given not counted": "The given blocks' weight is not counted: the sum starts at 0, so too many follow.",
            "tau of the rest": "The share is taken of what the given blocks leave. It is tau of the row's whole "
            "weight, theirs included.",
            "tau of one": "The sum is compared with tau itself. A row does not sum to 1: compare with tau times its "
            "total.",
            "the block that crosses left out": "The block that crosses tau is left out: the sum stays below.",
            "one more at equality": "Where the sum is exactly tau times the total, one more block is taken.",
            "smallest first": "Blocks are taken in ascending order: the largest come first.",
            "order of the text": "Blocks are taken in the order of the text, not by weight.",
            "later of equals": "Of equal blocks the later is taken: sort with stable=True, descending=True.",
            "one count for all rows": "All rows of a head take as many blocks as the neediest. Each has its own "
            "count: that is what the threshold is for.",
            "above a share of the largest": "Blocks are judged one by one against the largest. The rule is about "
            "their sum.",
        },
    ),
    hints=(
        "given: column 0 and the diagonal. Whether a block is taken depends on the sum of all that come before it.",
        "order = sort of the rest, descending, stable; falling = gather; before = weight of the given + "
        "falling.cumsum(-1) - falling. Take where before < tau * total; scatter brings it back into place.",
        "n = weight.shape[-1]\ngiven = torch.eye(n, dtype=torch.bool)\ngiven[:, 0] = True\n"
        "rest = weight.masked_fill(given, 0.0)\n"
        "order = torch.sort(rest, dim=-1, descending=True, stable=True).indices\n"
        "falling = torch.gather(rest, -1, order)\n"
        "before = (weight * given).sum(-1, keepdim=True) + falling.cumsum(-1) - falling\n"
        "takes = before < tau * weight.sum(-1, keepdim=True)\n"
        "return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, order, takes) | given",
    ),
)

# ---- MoBA's gate -------------------------------------------------------------------------------------------


def gate(q: torch.Tensor, k: torch.Tensor, block: int, top_k: int) -> torch.Tensor:
    """A query's own block, and the top_k - 1 before it whose mean key fits best."""
    means = torch.stack([x.mean(dim=2) for x in k.split(block, dim=2)], dim=2)
    own = torch.arange(q.shape[2])[:, None] // block
    at = torch.arange(means.shape[2])
    score = (q @ means.transpose(-1, -2)).masked_fill(at >= own, NEG_INF)
    best = score.topk(min(top_k - 1, len(at)), dim=-1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best.indices, ~best.values.isneginf())
    return chosen | (at == own)


def _gate_reference(q: torch.Tensor, k: torch.Tensor, block: int, top_k: int) -> tuple[torch.Tensor, ...]:
    b, h, n, _ = q.shape
    blocks = -(-n // block)
    chosen = torch.zeros(b, h, n, blocks, dtype=torch.bool)
    for i in range(n):
        own = i // block
        before = k[:, :, : own * block].unflatten(2, (own, block)).mean(dim=3) if own else None
        chosen[:, :, i, own] = True
        if before is None:
            continue
        score = torch.einsum("bhd,bhmd->bhm", q[:, :, i], before)
        for x in range(b):
            for y in range(h):
                best = sorted(range(own), key=lambda m, x=x, y=y: -score[x, y, m].item())[: top_k - 1]  # type: ignore[misc]
                chosen[x, y, i, best] = True
    return (chosen,)


def _gate_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, block: int, top_k: int, *, size: float = 1.5, drift: float = 0.0) -> Case:
        q, k = normal(rng, 2, 2, n, 8, size=size), normal(rng, 2, 2, n, 8)
        if drift:  # every later key fits every query better
            q = q.abs()
            k = k + torch.linspace(-drift, drift, n)[:, None]
        return Case(name, {"q": q, "k": k, "block": block, "top_k": top_k})

    return [
        case("the best before, and the own", 40, 5, 3),
        case("later keys would win", 32, 4, 3, drift=4.0),
        case("a last block that is not full", 27, 5, 2),
        case("its own block alone", 20, 4, 1),
        case("fewer blocks than top_k", 14, 4, 9),
        case("one token", 1, 4, 3),
        case("blocks of one token", 9, 1, 4),
        case("huge scores", 40, 4, 6, size=100.0),
    ]


def _gate_mutant(fault: str, q: torch.Tensor, k: torch.Tensor, block: int, top_k: int) -> torch.Tensor:
    parts = k.split(block, dim=2)
    means = torch.stack([x.mean(dim=2) for x in parts], dim=2)
    if fault == "largest key":
        means = torch.stack([x.amax(dim=2) for x in parts], dim=2)
    if fault == "first key of a block":
        means = torch.stack([x[:, :, 0] for x in parts], dim=2)
    if fault == "unit means":
        means = means / means.norm(dim=-1, keepdim=True)
    if fault == "sum of all keys so far":
        means = torch.stack([x.sum(dim=2) for x in parts], dim=2).cumsum(dim=2)
    own, at = torch.arange(q.shape[2])[:, None] // block, torch.arange(means.shape[2])
    asks = q
    if fault == "a block of queries chooses together":
        asks = torch.cat([x.mean(dim=2, keepdim=True).expand_as(x) for x in q.split(block, dim=2)], dim=2)
    score = asks @ means.transpose(-1, -2)
    if fault == "size of the score":
        score = score.abs()
    if fault == "the worst":
        score = -score
    count = top_k - 1
    if fault == "own block scored":
        score, count = score.masked_fill(at > own, NEG_INF), top_k
    elif fault == "future blocks chosen":
        score = score.masked_fill(at == own, NEG_INF)
    else:
        score = score.masked_fill(at >= own, NEG_INF)
    if fault == "top_k beside the own":
        count = top_k
    best = score.topk(min(count, len(at)), dim=-1)
    real = ~best.values.isneginf()
    if fault == "through a softmax":
        best = torch.softmax(score, dim=-1).nan_to_num(0.0).topk(min(count, len(at)), dim=-1)
        real = best.values > 0
    if fault == "-inf chosen":
        real = torch.ones_like(real)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best.indices, real)
    if fault in ("own block scored", "own block forgotten"):
        return chosen
    return chosen | (at == own)


GATE = Exercise(
    id="sparse/block_sparse/gate",
    title="MoBA's gate",
    signature="gate(q, k [B, H, N, D], block, top_k) -> chosen [B, H, N, ceil(N / block)], bool",
    outputs=(Output("chosen", "bool"),),
    make_inputs=_gate_inputs,
    reference=_gate_reference,
    solution=gate,
    from_scratch=FROM_SCRATCH,
    properties={
        "the best before, and the own": "Each query chooses for itself: its own block without a score, and the "
        "top_k - 1 earlier blocks with the largest q . mean key.",
        "later keys would win": "Here later keys fit better and better. Neither blocks after the query nor the own "
        "block's mean, which holds later keys, may have a say.",
        "a last block that is not full": "The last block may be shorter; nobody scores it, for it is the own block "
        "of all who could see it.",
        "its own block alone": "top_k counts the own block: with top_k = 1 there is no other.",
        "fewer blocks than top_k": "Where there are not so many blocks before, all of them are taken and no other.",
        "one token": "One token, one block.",
        "blocks of one token": "With blocks of one token the means are the keys: the best keys and the query's own.",
        "huge scores": "Scores of some hundreds: rank them as they are. A softmax turns the smaller ones to 0.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _gate_mutant,
        {
            "own block scored": "The own block competes by its mean, which holds keys of the future, and may lose. "
            "It is taken without a score.",
            "own block forgotten": "The own block is missing.",
            "future blocks chosen": "Blocks after the query's are chosen.",
            "top_k beside the own": "top_k earlier blocks are taken beside the own: top_k counts the own block.",
            "-inf chosen": "topk fills up with blocks of score -inf where there are too few before the query.",
            "a block of queries chooses together": "The queries of a block choose together, by their mean. In MoBA "
            "each query has a choice of its own.",
            "largest key": "The largest entry of each channel stands for a block, as in Quest. MoBA takes the mean.",
            "first key of a block": "The first key of a block stands for it: take the mean of all.",
            "unit means": "The means are brought to length 1. A block whose keys agree has a longer mean, and should "
            "win.",
            "sum of all keys so far": "The sum runs over all keys so far: each block has a mean of its own.",
            "size of the score": "Blocks are ranked by |q . mean|. A very negative score means little weight.",
            "through a softmax": "Blocks are ranked by a softmax of the scores, where far smaller ones turn 0. "
            "Rank the scores themselves.",
            "the worst": "The blocks with the smallest scores are chosen.",
        },
    ),
    hints=(
        "Scores [B, H, N, blocks] by one product with the means. What may a query not choose by score? Its own block "
        "and all after it: at >= own.",
        "masked_fill with -inf, topk(min(top_k - 1, blocks)), scatter True at the indices whose value is not -inf; "
        "then | (at == own).",
        "means = torch.stack([x.mean(dim=2) for x in k.split(block, dim=2)], dim=2)\n"
        "own = torch.arange(q.shape[2])[:, None] // block\nat = torch.arange(means.shape[2])\n"
        "score = (q @ means.transpose(-1, -2)).masked_fill(at >= own, float('-inf'))\n"
        "best = score.topk(min(top_k - 1, len(at)), dim=-1)\n"
        "chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best.indices, ~best.values.isneginf())\n"
        "return chosen | (at == own)",
    ),
)
