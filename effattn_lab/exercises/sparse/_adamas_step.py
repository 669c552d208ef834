"""Exercises: which tokens are read, and a whole decode step of Adamas."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._adamas_codes import FROM_SCRATCH, sylvester

# ---- selection ---------------------------------------------------------------------------------------------


def nearest(d: torch.Tensor, budget: int) -> torch.Tensor:
    """True for the last token and the ``budget - 1`` others of least distance, of equal ones the more recent."""
    n = d.shape[-1]
    order = d.long() * n + (n - 1 - torch.arange(n))
    order[..., -1] = -1
    best = order.topk(min(budget, n), dim=-1, largest=False).indices
    return torch.zeros_like(d, dtype=torch.bool).scatter(-1, best, True)


def _nearest_reference(d: torch.Tensor, budget: int) -> tuple[torch.Tensor, ...]:
    d = d.clone()
    d[..., -1] = -1
    # Stable, from the newest to the oldest: of equals the newer stays in front.
    rank = d.flip(-1).sort(dim=-1, stable=True).indices.argsort(dim=-1)
    return (rank.flip(-1) < budget,)


def _nearest_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, budget: int, kinds: int = 100, last: int | None = None, heads: int = 3
    ) -> Case:
        d = torch.from_numpy(rng.integers(0, kinds, (2, heads, n))).to(torch.int32)
        if last is not None:
            d[..., -1] = last
        return Case(name, {"d": d, "budget": budget})

    return [
        case("the nearest", 30, 9),
        case("many ties", 40, 10, 4),
        case("all equal", 20, 6, 1),
        case("the current token is far away", 30, 8, last=192),
        case("the current token is the nearest", 30, 8, last=0),
        case("one token of budget", 12, 1, last=192),
        case("more than there are", 5, 8),
        case("the first token", 1, 4),
        case("a long context", 5000, 700, 385, heads=1),
    ]


def _nearest_mutant(fault: str, d: torch.Tensor, budget: int) -> torch.Tensor:
    n = d.shape[-1]
    place = torch.arange(n)
    wide = d.long()
    if fault == "farthest":
        wide = 1000 - wide
    if fault == "all heads alike":
        wide = wide.sum(dim=1, keepdim=True).expand_as(wide).clone()
    order = wide * n + (place if fault == "oldest of equals" else n - 1 - place)
    if fault == "recency before distance":
        order = (n - 1 - place) * 1000 + wide
    if fault == "age outweighs distance":
        order = wide * 1000 + (n - 1 - place)
    count = min(budget, n)
    if fault == "current token twice":
        best = order.topk(max(0, count - 1), dim=-1, largest=False).indices
        taken = torch.zeros_like(d, dtype=torch.bool).scatter(-1, best, True)
        taken[..., -1] = True
        return taken
    if fault != "current token not forced":
        order[..., -1] = -1
    if fault == "budget counted without the current token":
        count = min(budget + 1, n)
    if fault == "all at the last distance":
        limit = (order // n).topk(count, dim=-1, largest=False).values[..., -1:]
        return order // n <= limit
    best = order.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(d, dtype=torch.bool).scatter(-1, best, True)


NEAREST = Exercise(
    id="sparse/adamas/nearest",
    title="the nearest tokens, with ties",
    signature="nearest(d int32 [B, H, N], budget) -> taken, bool [B, H, N]",
    outputs=(Output("taken", "bool"),),
    make_inputs=_nearest_inputs,
    reference=_nearest_reference,
    solution=nearest,
    from_scratch=FROM_SCRATCH,
    properties={
        "the nearest": "The last token, and the budget - 1 others of least distance.",
        "many ties": "Of tokens at equal distance the more recent are taken.",
        "all equal": "If all are equally far it is a window of the most recent.",
        "the current token is far away": "The current token is read whatever its distance is.",
        "the current token is the nearest": "The current token counts once.",
        "one token of budget": "A budget of one is the current token alone.",
        "more than there are": "topk does not take more than there are: min(budget, N).",
        "the first token": "One token: the current one.",
        "a long context": "Thousands of tokens: age must never outweigh a distance.",
    },
    tolerance=Tolerance(0.0, 0.0, "true or false."),
    mutants=mutants(
        _nearest_mutant,
        {
            "budget counted without the current token": "One token too many: the current one counts in the budget.",
            "current token not forced": "The current token is read only if it is near. It is always read.",
            "current token twice": "Where the current token is among the nearest anyway, one token too few is read.",
            "oldest of equals": "Of equal distances the oldest are taken; take the most recent.",
            "all at the last distance": "All tokens at the distance of the last one taken are read: more than the "
            "budget.",
            "farthest": "The farthest are taken: a small distance is a likely match.",
            "recency before distance": "Age decides and distance breaks ties: it is the other way round.",
            "age outweighs distance": "In a long text age outweighs distance: multiply the distance by N, not by a "
            "constant.",
            "all heads alike": "All heads read the same tokens; each has distances of its own.",
        },
    ),
    hints=(
        "Make one integer of distance and age in which no two tokens are equal.",
        "d * N + (N - 1 - place) orders by distance first, then by age; -1 for the last token puts it in front.",
        "order = d.long() * n + (n - 1 - torch.arange(n))\norder[..., -1] = -1\n"
        "best = order.topk(min(budget, n), dim=-1, largest=False).indices\n"
        "return torch.zeros_like(d, dtype=torch.bool).scatter(-1, best, True)",
    ),
)

# ---- a whole step ------------------------------------------------------------------------------------------


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, H: torch.Tensor, t: float, budget: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of q and k, L1, the nearest and the current token, exact attention over those."""
    groups, n = q.shape[1] // k.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    tq, tk = q @ H, k @ H
    cq, ck = ((x > -t).int() + (x > 0).int() + (x > t).int() for x in (tq, tk))
    d = (cq - ck).abs().sum(dim=-1)
    order = d * n + (n - 1 - torch.arange(n))
    order[..., -1] = -1
    best = order.topk(min(budget, n), dim=-1, largest=False).indices
    taken = torch.zeros_like(d, dtype=torch.bool).scatter(-1, best, True)
    s = (q @ k.transpose(-1, -2))[:, :, 0] * q.shape[3] ** -0.5
    a = torch.softmax(s.masked_fill(~taken, float("-inf")), dim=-1)
    return a[:, :, None] @ v, taken


def _step_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, H: torch.Tensor, t: float, budget: int
) -> tuple[torch.Tensor, ...]:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    edges = torch.tensor([-t, 0.0, t], dtype=q.dtype)
    cq, ck = (torch.bucketize((x @ H).contiguous(), edges) for x in (q, k))
    (taken,) = _nearest_reference((cq - ck).abs().sum(dim=-1), budget)
    s = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) * q.shape[-1] ** -0.5
    a = torch.softmax(s.masked_fill(~taken, float("-inf")), dim=-1)
    return torch.einsum("bhn,bhnd->bhd", a, v)[:, :, None], taken


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int = 40, budget: int = 12, hq: int = 3, hkv: int = 3, t: float = 1.0, *, d: int = 16,
        uneven: bool = False,
    ) -> Case:  # fmt: skip
        matrix = sylvester(d).float()
        while True:
            q, k, v = normal(rng, 2, hq, 1, d, size=1.5), normal(rng, 2, hkv, n, d), normal(rng, 2, hkv, n, d)
            if uneven:  # two channels that decide the product
                q[..., :2] *= 4
                k[..., :2] *= 4
            rotated = torch.cat([x.double().flatten(0, -2) @ matrix.double() for x in (q, k)]).abs()
            # float32 must not decide on which side of a threshold a coordinate lies
            if rotated.min() > 1e-5 and (rotated - t).abs().min() > 1e-5:
                break
        return Case(name, {"q": q, "k": k, "v": v, "H": matrix, "t": t, "budget": budget})

    return [
        case("the nearest by code"),
        case("channels of unequal energy", uneven=True, t=1.5),
        case("wide thresholds: signs alone", t=50.0),
        case("grouped heads", hq=6, hkv=2),
        case("budget for all: full attention", 20, 20),
        case("one token of budget", 20, 1),
        case("the first token", 1, 4),
    ]


def _step_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, H: torch.Tensor, t: float, budget: int
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, n = q.shape[1] // k.shape[1], k.shape[2]
    if fault == "wrong KV head":
        k, v = (x.repeat(1, groups, 1, 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    tq, tk = q @ H, k @ H
    if fault == "no transform":
        tq, tk = q, k
    if fault == "unnormalised Hadamard":
        tq, tk = (x * q.shape[-1] ** 0.5 for x in (tq, tk))
    if fault == "only the keys transformed":
        tq = q
    if fault == "only the query transformed":
        tk = k
    if fault == "query scaled before coding":
        tq = tq * q.shape[-1] ** -0.5
    cq, ck = ((x > -t).int() + (x > 0).int() + (x > t).int() for x in (tq, tk))
    if fault == "differences of uint8":
        d = (cq.to(torch.uint8) - ck.to(torch.uint8)).abs().sum(dim=-1)
    elif fault == "no codes":
        d = ((tq - tk).abs().sum(dim=-1) * 4096).long()
    elif fault == "squared distance":
        d = (cq - ck).square().sum(dim=-1)
    elif fault == "{1, 2} counted 3":
        one = (cq - ck).abs()
        d = torch.where((cq + ck == 3) & (one == 1), 3 * one, one).sum(dim=-1)
    else:
        d = (cq - ck).abs().sum(dim=-1)
    if fault == "farthest":
        d = 48 - d
    order = d * n + (n - 1 - torch.arange(n))
    if fault == "oldest of equals":
        order = d * n + torch.arange(n)
    if fault != "current token not forced":
        order[..., -1] = -1
    count = budget + (fault == "budget counted without the current token")
    best = order.topk(min(count, n), dim=-1, largest=False).indices
    taken = torch.zeros_like(order, dtype=torch.bool).scatter(-1, best, True)
    s = (q @ k.transpose(-1, -2))[:, :, 0] * (1.0 if fault == "not scaled" else q.shape[3] ** -0.5)
    if fault == "attention over distances":
        s = -d.to(q.dtype)
    if fault == "attention over codes":
        s = ((cq - 1.5) @ (ck - 1.5).transpose(-1, -2))[:, :, 0] * q.shape[3] ** -0.5
    if fault == "everything attended":
        a = torch.softmax(s, dim=-1)
    elif fault == "softmax before the choice":
        a = torch.softmax(s, dim=-1) * taken
    elif fault == "masked with 0":
        a = torch.softmax(s.masked_fill(~taken, 0.0), dim=-1)
    else:
        a = torch.softmax(s.masked_fill(~taken, float("-inf")), dim=-1)
    out = a[:, :, None] @ (v @ H if fault == "values transformed" else v)
    return out, taken


STEP = Exercise(
    id="sparse/adamas/step",
    title="a decode step, whole",
    signature="step(q [B, Hq, 1, D], k [B, Hkv, N, D], v [B, Hkv, N, D], H [D, D], t, budget) -> "
    "(out [B, Hq, 1, D], taken bool [B, Hq, N])",
    outputs=(Output("out", "q"), Output("taken", "bool")),
    make_inputs=_step_inputs,
    reference=_step_reference,
    solution=step,
    from_scratch=FROM_SCRATCH,
    properties={
        "the nearest by code": "Codes of q H and k H, L1 distance, the budget - 1 nearest and the current token.",
        "channels of unequal energy": "The transform comes before the codes; it spreads large channels over all.",
        "wide thresholds: signs alone": "With thresholds far out the codes are signs.",
        "grouped heads": "Query heads 0 .. Hq / Hkv - 1 share KV head 0: repeat_interleave.",
        "budget for all: full attention": "With budget >= N it is ordinary attention.",
        "one token of budget": "The current token alone: its value comes back.",
        "the first token": "One token: its value comes back.",
    },
    tolerance=Tolerance(
        1e-5,
        1e-5,
        "a softmax of 40 scores and a sum of 40 values of size 1 in float32: 1e-6; inputs are drawn so "
        "that no coordinate lies within 1e-5 of a threshold.",
    ),
    mutants=mutants(
        _step_mutant,
        {
            "no transform": "The codes are those of q and k themselves: multiply by H first.",
            "unnormalised Hadamard": "The transform is sqrt(D) times too large for these thresholds.",
            "only the keys transformed": "The keys are transformed and the query is not: they live in two bases.",
            "only the query transformed": "The query is transformed and the keys are not: they live in two bases.",
            "differences of uint8": "Codes of uint8 are subtracted, and 0 - 1 is 255 there: .int() first.",
            "oldest of equals": "Of equal distances the oldest are taken; take the most recent, as in step 5.",
            "softmax before the choice": "The softmax runs over all tokens and the choice comes after it: "
            "the weights do not add up to 1.",
            "masked with 0": "A score of 0 still has a weight: mask with -inf.",
            "query scaled before coding": "The query is scaled by 1 / sqrt(D) before it is coded: both go through "
            "the "
            "same thresholds as they are.",
            "no codes": "The distance is of the numbers themselves; it is of their codes.",
            "squared distance": "Code differences are squared: L1 takes them as they are.",
            "{1, 2} counted 3": "The pair {1, 2} counts 3: its distance is 1.",
            "farthest": "The farthest keys are read.",
            "budget counted without the current token": "One token too many: the current one counts in the budget.",
            "current token not forced": "The current token is read only if its code is near. It is always read.",
            "attention over distances": "The weights are a softmax of distances. They only choose; attention uses q "
            "and "
            "k themselves.",
            "attention over codes": "The weights come from products of codes. Attention over the chosen is exact.",
            "everything attended": "All tokens are attended to, whatever was chosen.",
            "values transformed": "The values are transformed. They never are.",
            "not scaled": "The scores lack 1 / sqrt(D).",
            "wrong KV head": "Query heads meet the wrong KV heads: repeat_interleave, not repeat.",
        },
    ),
    hints=(
        "Two halves that share nothing but a mask: choose by codes, then attend with the original q, k and v.",
        "codes: sum((x @ H > b).int() for b in (-t, 0.0, t)); then your `nearest`, then a softmax masked with -inf.",
        "cq, ck = (sum((x @ H > b).int() for b in (-t, 0.0, t)) for x in (q, k))\n"
        "d = (cq - ck).abs().sum(dim=-1)\n... taken as in `nearest` ...\n"
        "s = (q @ k.transpose(-1, -2))[:, :, 0] * q.shape[3] ** -0.5\n"
        'a = torch.softmax(s.masked_fill(~taken, float("-inf")), dim=-1)\nreturn a[:, :, None] @ v, taken',
    ),
)
