"""Exercises: attention over the pages taken, and a step of H2O's cache, which evicts."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._quest_pages import FROM_SCRATCH

# ---- attention over pages ----------------------------------------------------------------------------------


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, taken: torch.Tensor, page: int) -> torch.Tensor:
    """Exact attention of one query over the tokens of the pages taken, which alone are read."""
    groups = q.shape[1] // k.shape[1]
    keep = taken.repeat_interleave(page, dim=-1)[..., : k.shape[2]]
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = (x[b, h // groups, keep[b, h]] for x in (k, v))
            s = q[b, h] @ keys.T * q.shape[3] ** -0.5
            out[b, h] = torch.softmax(s, dim=-1) @ values
    return out


def _decode_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, taken: torch.Tensor, page: int
) -> tuple[torch.Tensor, ...]:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    keep = taken.repeat_interleave(page, dim=-1)[..., : k.shape[2], None]
    k, v = (x.masked_fill(~keep, 0.0) for x in (k, v))
    s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    s = s.masked_fill(~keep.transpose(-1, -2), float("-inf"))
    return (torch.softmax(s, dim=-1) @ v,)


def _decode_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int = 40, page: int = 8, count: int = 3, hq: int = 3, hkv: int = 3, *,
        size: float = 1.0, unread: bool = False,
    ) -> Case:  # fmt: skip
        p = -(-n // page)
        order = normal(rng, 2, hq, p)
        order[..., -1] = 99.0
        if unread:  # one page that no head takes
            order[..., 0] = -99.0
        taken = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order.topk(min(count, p)).indices, True)
        q = normal(rng, 2, hq, 1, 8, size=2.0 * size)
        k, v = normal(rng, 2, hkv, n, 8, size=size), normal(rng, 2, hkv, n, 6)
        if unread:
            k[:, :, :page] = float("inf")
            v[:, :, :page] = float("inf")
        # v has the head dimension of the output
        return Case(
            name, {"q": q, "k": k, "v": torch.cat([v, v[..., :2]], dim=-1), "taken": taken, "page": page}
        )

    return [
        case("only the pages taken"),
        case("a last page that is not full", 37),
        case("all pages: full attention", 40, count=5),
        case("grouped heads", hq=6, hkv=2),
        case("large scores", size=12.0),
        case("what is not taken is not read", unread=True),
        case("one token", 1, count=1),
    ]


def _decode_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, taken: torch.Tensor, page: int
) -> torch.Tensor:
    groups, n = q.shape[1] // k.shape[1], k.shape[2]
    if fault == "wrong KV head":
        k, v = (x.repeat(1, groups, 1, 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    keep = taken.repeat_interleave(page, dim=-1)[..., :n]
    if fault == "pages as tokens":
        keep = torch.zeros_like(keep)
        keep[..., : taken.shape[-1]] = taken[..., :n]
        keep[..., -1] = True
    if fault == "current token left out" and n > 1:
        keep = keep.clone()
        keep[..., -1] = False
    if fault == "every head the first one's pages":
        keep = keep[:, :1].expand_as(keep)
    if fault == "all pages":
        keep = torch.ones_like(keep)
    if fault not in ("masked after reading", "all pages", "weights not renormalised"):
        k, v = (x.masked_fill(~keep[..., None], 0.0) for x in (k, v))
    s = (q @ k.transpose(-1, -2)) * (1.0 if fault == "not scaled" else q.shape[-1] ** -0.5)
    hidden = ~keep[:, :, None]
    if fault == "score 0 instead of minus infinity":
        p = torch.softmax(s.masked_fill(hidden, 0.0), dim=-1)
    elif fault == "weights not renormalised":
        p = torch.softmax(s, dim=-1).masked_fill(hidden, 0.0)
    elif fault == "overflow":
        e = s.exp().masked_fill(hidden, 0.0)
        p = e / e.sum(dim=-1, keepdim=True)
    else:
        p = torch.softmax(s.masked_fill(hidden, float("-inf")), dim=-1)
    return p @ v


DECODE = Exercise(
    id="sparse/quest/decode",
    title="exact attention over the pages taken",
    signature="decode(q [B, Hq, 1, D], k [B, Hkv, N, D], v [B, Hkv, N, D], taken bool [B, Hq, P], page) -> "
    "out [B, Hq, 1, D]",
    outputs=(Output("out", "q"),),
    make_inputs=_decode_inputs,
    reference=_decode_reference,
    solution=decode,
    from_scratch=FROM_SCRATCH,
    properties={
        "only the pages taken": "Softmax over the tokens of the taken pages, and over no others.",
        "a last page that is not full": "A page has `page` places, the last one fewer tokens: cut the mask to N.",
        "all pages: full attention": "With every page taken it is ordinary attention.",
        "grouped heads": "Query head h reads KV head h // (Hq / Hkv).",
        "large scores": "torch.softmax subtracts the maximum; exp alone overflows.",
        "what is not taken is not read": "Keys and values of other pages are infinite here. 0 times infinity is NaN: "
        "pick "
        "the rows before multiplying.",
        "one token": "One token: its value comes back.",
    },
    tolerance=Tolerance(
        1e-5, 1e-5, "a softmax of 40 scores and a sum of 40 values of size 1 in float32: 1e-6."
    ),
    loose={
        "large scores": Tolerance(
            1e-3, 1e-3, "scores of size 500 are rounded to 5e-5, and so are the logarithms of the weights."
        )
    },
    mutants=mutants(
        _decode_mutant,
        {
            "score 0 instead of minus infinity": "Hidden scores are set to 0, which is a score like any other: "
            "minus infinity has weight 0.",
            "weights not renormalised": "The softmax is over all keys and cut afterwards: the weights no longer sum "
            "to 1.",
            "masked after reading": "All keys and values are read and then masked: 0 times infinity is NaN, and "
            "nothing was saved.",
            "overflow": "exp of a large score is infinite: use torch.softmax.",
            "not scaled": "The scores lack 1 / sqrt(D). Quest's page score needs none, attention does.",
            "pages as tokens": "Page numbers are used as token numbers: page p holds tokens p * page and following.",
            "current token left out": "The newest token is left out: the current page holds it.",
            "every head the first one's pages": "All heads read the pages of the first: taken[b, h] is each head's "
            "own.",
            "all pages": "All pages are read, whatever was taken.",
            "wrong KV head": "Query heads meet the wrong KV heads: h // groups.",
        },
    ),
    hints=(
        "Turn the pages into tokens, pick these rows of k and v, then it is attention as always.",
        "keep = taken.repeat_interleave(page, dim=-1)[..., :N] marks tokens; k[b, h // groups, keep[b, h]] picks "
        "rows.",
        "for each b, h:\n    keys, values = (x[b, h // groups, keep[b, h]] for x in (k, v))\n"
        "    s = q[b, h] @ keys.T * q.shape[3] ** -0.5\n    out[b, h] = torch.softmax(s, dim=-1) @ values",
    ),
)

# ---- H2O ---------------------------------------------------------------------------------------------------


def h2o(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor, budget: int, recent: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step: evict down to the budget, attend over what stays, add the attention to sigma."""
    n = k.shape[2]
    keep = torch.ones_like(sigma, dtype=torch.bool)
    if n > budget:
        old = n - recent
        heavy = sigma[..., :old].topk(budget - recent, dim=-1).indices
        keep[..., :old] = False
        keep.scatter_(-1, heavy, True)
    s = (q @ k.transpose(-1, -2))[:, :, 0] * q.shape[-1] ** -0.5
    a = torch.softmax(s.masked_fill(~keep, float("-inf")), dim=-1)
    return a[:, :, None] @ v, keep, (sigma + a).masked_fill(~keep, 0.0)


def _h2o_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor, budget: int, recent: int
) -> tuple[torch.Tensor, ...]:
    order = sigma.clone()
    order[..., max(0, k.shape[2] - recent) :] = float("inf")
    age = torch.arange(k.shape[2], dtype=order.dtype)
    newer = (order[..., None, :] == order[..., :, None]) & (age > age[:, None])
    better = (order[..., None, :] > order[..., :, None]) | newer
    keep = better.sum(dim=-1) < budget
    s = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / q.shape[-1] ** 0.5
    e = torch.where(keep, torch.exp(s - s.amax(dim=-1, keepdim=True)), torch.zeros_like(s))
    a = e / e.sum(dim=-1, keepdim=True)
    return torch.einsum("bhn,bhnd->bhd", a, v)[:, :, None], keep, torch.where(keep, sigma + a, 0.0)


def _h2o_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, budget: int, recent: int, *, heavy: bool = False) -> Case:
        sigma = normal(rng, 2, 3, n).abs() + 0.05
        if heavy:  # all that was asked for so far lies in the window
            sigma[..., n - recent : -1] += 5.0
        sigma[..., -1] = 0.0
        return Case(
            name,
            {
                "q": normal(rng, 2, 3, 1, 8, size=2.0), "k": normal(rng, 2, 3, n, 8), "v": normal(rng, 2, 3, n, 8),
                "sigma": sigma, "budget": budget, "recent": recent,
            },
        )  # fmt: skip

    return [
        case("the lightest leaves", 17, 16, 8),
        case("several leave", 24, 12, 4),
        case("recent tokens stay", 20, 12, 6),
        case("heavy tokens inside the window", 20, 12, 6, heavy=True),
        case("only recent tokens", 20, 6, 6),
        case("the newest has no score yet", 16, 8, 1),
        case("room for all", 10, 16, 8),
        case("the first token", 1, 4, 2),
    ]


def _h2o_mutant(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sigma: torch.Tensor,
    budget: int,
    recent: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = k.shape[2]
    order = -sigma if fault == "lightest stay" else sigma.clone()
    if fault == "tallies before the choice":
        order = sigma + torch.softmax((q @ k.transpose(-1, -2))[:, :, 0] * q.shape[-1] ** -0.5, dim=-1)
    if fault == "all heads alike":
        order = sigma.sum(dim=1, keepdim=True).expand_as(sigma).clone()
    if fault == "all that is old goes":
        order = torch.arange(n, dtype=sigma.dtype).expand_as(sigma).clone()
    if fault == "the first tokens stay":
        order = -torch.arange(n, dtype=sigma.dtype).expand_as(sigma).clone()
    if fault == "newest alone protected":
        recent = 1
    if fault == "one recent too few":
        recent -= 1
    if fault != "recent not protected":
        order[..., max(0, n - recent) :] = float("inf")
    count = min(n, budget)
    if fault == "window beside the budget":
        count = min(n, budget + recent)
    if fault == "one more for the newest":
        count = min(n, budget + 1)
    if fault == "one leaves a step" and n > budget:
        count = n - 1
    keep = torch.zeros_like(sigma, dtype=torch.bool).scatter(-1, order.topk(count, dim=-1).indices, True)
    s = (q @ k.transpose(-1, -2))[:, :, 0] * (1.0 if fault == "not scaled" else q.shape[-1] ** -0.5)
    a = torch.softmax(s.masked_fill(~keep, float("-inf")), dim=-1)
    if fault == "attends before it evicts":
        a = torch.softmax(s, dim=-1)
    new = sigma + a
    if fault == "sigma replaced":
        new = a
    if fault == "scores added":
        new = sigma + s
    if fault == "running mean":
        new = (sigma + a) / 2
    if fault == "sigma not updated":
        new = sigma
    return (
        a[:, :, None] @ v,
        keep,
        new if fault == "dropped keep their score" else new.masked_fill(~keep, 0.0),
    )


H2O = Exercise(
    id="sparse/quest/h2o",
    title="a step of the heavy-hitter cache",
    signature="h2o(q [B, H, 1, D], k [B, H, n, D], v [B, H, n, D], sigma [B, H, n], budget, recent) -> "
    "(out [B, H, 1, D], keep bool [B, H, n], sigma [B, H, n])",
    outputs=(Output("out", "q"), Output("keep", "bool"), Output("sigma", "sigma")),
    make_inputs=_h2o_inputs,
    reference=_h2o_reference,
    solution=h2o,
    from_scratch=FROM_SCRATCH,
    properties={
        "the lightest leaves": "With one token too many, the one of least sigma goes, if it isn't recent.",
        "several leave": "Keep the budget - recent heaviest of the older tokens.",
        "recent tokens stay": "The last `recent` tokens stay, whatever their sigma.",
        "heavy tokens inside the window": "What is recent is not counted among the heavy: choose among the older.",
        "only recent tokens": "With budget = recent it is a sliding window.",
        "the newest has no score yet": "The newest token has sigma 0 and is always recent.",
        "room for all": "While n <= budget nothing leaves.",
        "the first token": "One token: nothing leaves, and it gets all the attention.",
    },
    tolerance=Tolerance(
        1e-5, 1e-5, "a softmax and a sum over at most 24 numbers of size 1 in float32: 1e-6."
    ),
    mutants=mutants(
        _h2o_mutant,
        {
            "lightest stay": "The tokens of least sigma stay: it is the heavy ones that should.",
            "recent not protected": "Recent tokens can be evicted: the newest has sigma 0 and goes at once.",
            "newest alone protected": "Only the newest is protected; all of the last `recent` tokens are.",
            "one recent too few": "One recent token too few is protected: the newest is one of the `recent`.",
            "tallies before the choice": "This step's attention is in the tallies that decide who stays. First the "
            "choice, then the attention, then the tallies.",
            "all heads alike": "All heads keep the same tokens. Each has tallies of its own.",
            "window beside the budget": "The recent tokens come on top of the budget: half of it is theirs.",
            "one more for the newest": "One token too many: the current one counts in the budget.",
            "one leaves a step": "Only one token leaves, although more are too many: go down to the budget.",
            "all that is old goes": "The newest tokens stay, whatever attention they got: that is a window.",
            "the first tokens stay": "The first tokens stay, whatever attention they got.",
            "attends before it evicts": "The softmax is over all tokens, those just dropped among them: evict first.",
            "sigma replaced": "sigma is the last attention alone. It adds up over the steps.",
            "scores added": "Scores are added to sigma; attention weights are, after the softmax.",
            "running mean": "sigma is averaged; it is a sum.",
            "sigma not updated": "The attention of this step is not added to sigma.",
            "dropped keep their score": "Dropped tokens keep their sigma: set it to 0, they are gone.",
            "not scaled": "The scores lack 1 / sqrt(D).",
        },
    ),
    hints=(
        "Three things in this order: who stays, attention over those, and their new sums.",
        "Nothing leaves while n <= budget. Else all of the last `recent` stay, and of sigma[..., : n - recent] the "
        "budget - recent largest.",
        "keep[..., :old] = False\nkeep.scatter_(-1, sigma[..., :old].topk(budget - recent, dim=-1).indices, True)\n"
        "s = (q @ k.transpose(-1, -2))[:, :, 0] * q.shape[-1] ** -0.5\n"
        'a = torch.softmax(s.masked_fill(~keep, float("-inf")), dim=-1)\n'
        "return a[:, :, None] @ v, keep, (sigma + a).masked_fill(~keep, 0.0)",
    ),
)
