"""Exercises on Quest's pages: their bounds, the score of a page, and which pages are read."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

#: What the lab asks to write.
FROM_SCRATCH = ("effattn_lab.sparse.quest", "effattn_lab.sparse.eviction", "effattn_lab.sparse.cache")

# ---- bounds ------------------------------------------------------------------------------------------------


def bounds(k: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest key of each page and channel."""
    pages = [k[:, :, i : i + page] for i in range(0, k.shape[2], page)]
    least = torch.stack([p.amin(dim=2) for p in pages], dim=2)
    return least, torch.stack([p.amax(dim=2) for p in pages], dim=2)


def bounds_reference(k: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    rest = -k.shape[2] % page
    up, down = (
        torch.cat([k, k.new_full((*k.shape[:2], rest, k.shape[3]), x)], dim=2).unflatten(2, (-1, page))
        for x in (float("inf"), float("-inf"))
    )
    return up.amin(dim=3), down.amax(dim=3)


def _bounds_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, page: int, shift: float = 0.0) -> Case:
        return Case(name, {"k": normal(rng, 2, 3, n, 8) + shift, "page": page})

    return [
        case("whole pages", 32, 8),
        case("a last page that is not full", 21, 8, 3.0),
        case("a last page that is not full", 21, 8, -3.0),
        case("one token", 1, 16),
        case("pages of one token", 5, 1),
        case("fewer tokens than a page", 6, 16, 2.0),
        case("keys of any size", 11, 4, 2000.0),
        case("keys of any size", 11, 4, -2000.0),
    ]


def _bounds_mutant(fault: str, k: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    rest = -k.shape[2] % page
    fill = k.new_zeros(*k.shape[:2], rest, k.shape[3])
    if fault != "padded with zeros":
        fill = k[:, :, -1:].expand_as(fill)
    full = torch.cat([k, fill], dim=2)
    pages = full.unflatten(2, (-1, page))
    if fault == "every so many tokens":
        pages = full.unflatten(2, (page, -1)).transpose(2, 3)
    if fault == "last token of a page missed" and page > 1:
        pages = pages[:, :, :, :-1]
    if fault == "of absolute values":
        pages = pages.abs()
    least, greatest = pages.amin(dim=3), pages.amax(dim=3)
    if fault == "means":
        least = greatest = pages.mean(dim=3)
    if fault == "of all tokens so far":
        least, greatest = least.cummin(dim=2).values, greatest.cummax(dim=2).values
    if fault == "one bound for all channels":
        least = least.amin(dim=3, keepdim=True).expand_as(least).contiguous()
        greatest = greatest.amax(dim=3, keepdim=True).expand_as(greatest).contiguous()
    if fault == "padded with 100":
        least, greatest = (
            torch.cat([k, torch.full_like(fill, x)], dim=2).unflatten(2, (-1, page)) for x in (100.0, -100.0)
        )
        return least.amin(dim=3), greatest.amax(dim=3)
    if fault == "largest magnitude":
        greatest = torch.maximum(greatest, -least)
        least = -greatest
    return least, greatest


BOUNDS = Exercise(
    id="sparse/quest/bounds",
    title="least and greatest key of a page",
    signature="bounds(k [B, H, N, D], page) -> (least [B, H, pages, D], greatest [B, H, pages, D])",
    outputs=(Output("least", "k"), Output("greatest", "k")),
    make_inputs=_bounds_inputs,
    reference=bounds_reference,
    solution=bounds,
    from_scratch=FROM_SCRATCH,
    properties={
        "whole pages": "Page p holds tokens p * page .. p * page + page - 1; amin and amax over them, by channel.",
        "a last page that is not full": "The last page counts with the tokens it has; nothing may be added to it.",
        "one token": "One token is a page: both bounds are the key.",
        "pages of one token": "With pages of one token both bounds are the keys.",
        "fewer tokens than a page": "There is one page, and it is not full.",
        "keys of any size": "No number is large enough to fill a page with, but infinity.",
    },
    tolerance=Tolerance(
        0.0, 0.0, "smallest and largest of numbers are among the numbers: nothing is rounded."
    ),
    mutants=mutants(
        _bounds_mutant,
        {
            "padded with zeros": "The last page is filled up with zeros, and they count: a bound of 0 that no key "
            "has.",
            "padded with 100": "The last page is filled up with a large number. There are larger ones: infinity.",
            "every so many tokens": "A page holds every n-th token. It holds neighbours: page consecutive ones.",
            "last token of a page missed": "The last token of each page is left out: its slice ends one too early.",
            "of absolute values": "The bounds are those of |k|. Keep the signs: the query's sign decides which "
            "counts.",
            "means": "Both are the page's mean. A mean bounds nothing.",
            "of all tokens so far": "The bounds include all earlier pages: each page has its own.",
            "one bound for all channels": "The bound is taken over the channels too. There is one for each channel.",
            "largest magnitude": "The bounds are plus and minus the largest magnitude: right, but looser than need "
            "be.",
        },
    ),
    hints=(
        "Cut the keys into slices of `page` tokens; the last one may be shorter.",
        "k[:, :, i : i + page].amin(dim=2) is one page's lower bound; stack the pages on axis 2.",
        "pages = [k[:, :, i : i + page] for i in range(0, k.shape[2], page)]\n"
        "least = torch.stack([p.amin(dim=2) for p in pages], dim=2)\n"
        "greatest = torch.stack([p.amax(dim=2) for p in pages], dim=2)",
    ),
)

# ---- scores ------------------------------------------------------------------------------------------------


def scores(q: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """U_p = sum_i max(q_i M_pi, q_i m_pi), the KV heads repeated for their query heads."""
    groups = q.shape[1] // least.shape[1]
    least, greatest = (x.repeat_interleave(groups, dim=1) for x in (least, greatest))
    return torch.maximum(q * greatest, q * least).sum(dim=-1)


def _scores_reference(
    q: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    heads = least.shape[1]
    q = q.unflatten(1, (heads, -1))
    up = torch.einsum("bhgnd,bhpd->bhgp", q.clamp(min=0), greatest)
    down = torch.einsum("bhgnd,bhpd->bhgp", (-q).clamp(min=0), least)
    return ((up - down).flatten(1, 2),)


def _scores_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, pages: int = 5, hq: int = 3, hkv: int = 3, d: int = 8, shift: float = 0.0) -> Case:
        keys = normal(rng, 2, hkv, pages, 4, d) + shift
        least, greatest = keys.amin(dim=3), keys.amax(dim=3)
        return Case(name, {"q": normal(rng, 2, hq, 1, d, size=2.0), "least": least, "greatest": greatest})

    same = case("pages of one token", 6)
    same.kwargs["least"].copy_(same.kwargs["greatest"])  # type: ignore[union-attr, arg-type]
    return [
        case("an upper bound", 7),
        case("all keys positive", shift=4.0),
        case("all keys negative", shift=-4.0),
        same,
        case("grouped heads", hq=6, hkv=2),
        case("one page", 1),
        case("as many pages as channels", 8, d=8),
    ]


def _scores_mutant(fault: str, q: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    groups = q.shape[1] // least.shape[1]
    if fault == "wrong KV head":
        least, greatest = (x.repeat(1, groups, 1, 1) for x in (least, greatest))
    else:
        least, greatest = (x.repeat_interleave(groups, dim=1) for x in (least, greatest))
    if fault == "page bound with the wrong sign":
        return torch.minimum(q * greatest, q * least).sum(dim=-1)
    if fault == "greatest alone":
        return (q * greatest).sum(dim=-1)
    if fault == "size of the query times greatest":
        return (q.abs() * greatest).sum(dim=-1)
    if fault == "middle of the page":
        return (q * (least + greatest) / 2).sum(dim=-1)
    if fault == "better of the two products":
        return torch.maximum((q * greatest).sum(dim=-1), (q * least).sum(dim=-1))
    if fault == "negative part added":
        return (q.clamp(min=0) * greatest).sum(dim=-1) + ((-q).clamp(min=0) * least).sum(dim=-1)
    if fault == "negative part left out":
        return (q.clamp(min=0) * greatest).sum(dim=-1)
    u = torch.maximum(q * greatest, q * least).sum(dim=-1)
    if fault == "scaled":
        u = u * q.shape[-1] ** -0.5
    if fault == "largest magnitude":
        u = (q.abs() * torch.maximum(greatest.abs(), least.abs())).sum(dim=-1)
    if fault == "best channel":
        return torch.maximum(q * greatest, q * least).amax(dim=-1)
    return torch.softmax(u, dim=-1) if fault == "softmax of the scores" else u


SCORES = Exercise(
    id="sparse/quest/scores",
    title="the best score a page may hold",
    signature="scores(q [B, Hq, 1, D], least [B, Hkv, pages, D], greatest [B, Hkv, pages, D]) -> U [B, Hq, pages]",
    outputs=(Output("U", "q"),),
    make_inputs=_scores_inputs,
    reference=_scores_reference,
    solution=scores,
    from_scratch=FROM_SCRATCH,
    properties={
        "an upper bound": "In each channel the larger of q_i M_i and q_i m_i, then the sum over channels.",
        "all keys positive": "A negative q_i has its best product with the least key.",
        "all keys negative": "A positive q_i has its best product with the greatest key, though that is negative.",
        "pages of one token": "With one key a page the bound is the score itself, q . k.",
        "grouped heads": "Query heads 0 .. Hq / Hkv - 1 read KV head 0, and so on: repeat_interleave.",
        "one page": "One page, one number a head.",
        "as many pages as channels": "With pages = D no shape stops you from a sum over the wrong axis.",
    },
    tolerance=Tolerance(1e-5, 1e-5, "sums of 8 products of size 10 in float32: a few 1e-6."),
    mutants=mutants(
        _scores_mutant,
        {
            "page bound with the wrong sign": "The smaller of the two products is summed: a lower bound. "
            "No page may be rated too low.",
            "greatest alone": "q M alone: where q_i is negative the least key gives the larger product.",
            "size of the query times greatest": "|q| M: the sign of q_i must meet the keys' signs. Where q_i < 0 "
            "the least key counts.",
            "middle of the page": "The middle of the page is an estimate: single keys lie above it.",
            "better of the two products": "The maximum is taken after the sum. It belongs inside, for each channel.",
            "negative part added": "relu(-q) m is added; it is to be subtracted, since q_i m_i = -relu(-q_i) m_i.",
            "negative part left out": "Channels with negative q_i are left out: they count with q_i m_i.",
            "scaled": "The scores are scaled by 1 / sqrt(D). Here they are not: only their order is used.",
            "largest magnitude": "|q| times the largest magnitude: a bound, but one that no sign of a key lowers.",
            "best channel": "The maximum over the channels is taken; it is their sum.",
            "softmax of the scores": "The scores go through a softmax. Only their order is used: leave them.",
            "wrong KV head": "Query heads meet the wrong KV heads: repeat_interleave, not repeat.",
        },
    ),
    hints=(
        "Which of the two bounds gives channel i its largest product depends on the sign of q_i alone.",
        "torch.maximum(q * greatest, q * least) decides channel by channel; q [B, Hq, 1, D] broadcasts over pages.",
        "groups = q.shape[1] // least.shape[1]\n"
        "least, greatest = (x.repeat_interleave(groups, dim=1) for x in (least, greatest))\n"
        "return torch.maximum(q * greatest, q * least).sum(dim=-1)",
    ),
)

# ---- which pages -------------------------------------------------------------------------------------------


def pages(u: torch.Tensor, count: int) -> torch.Tensor:
    """True for the last page and the ``count - 1`` others of largest score."""
    taken = torch.zeros_like(u, dtype=torch.bool)
    taken[..., -1] = True
    others = min(count, u.shape[-1]) - 1
    best = u[..., :-1].topk(others, dim=-1).indices
    return taken.scatter(-1, best, torch.ones_like(best, dtype=torch.bool))


def _pages_reference(u: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    order = u.clone()
    order[..., -1] = float("inf")
    rank = (order[..., None, :] > order[..., :, None]).sum(dim=-1)  # how many are better
    return (rank < count,)


def _pages_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, count: int, last: float | None = None, size: float = 3.0) -> Case:
        u = normal(rng, 2, 3, n, size=size)
        if last is not None:
            u[..., -1] = last
        return Case(name, {"u": u, "count": count})

    return [
        case("the best pages", 12, 5),
        case("the current page is always read", 12, 4, -99.0),
        case("the current page is one of the best", 12, 4, 99.0),
        case("one page", 9, 1, -99.0),
        case("more than there are", 5, 8),
        case("exactly all", 6, 6),
        case("the first page of a text", 1, 1),
        case("scores of any size", 12, 4, -99.0, 1e5),
    ]


def _pages_mutant(fault: str, u: torch.Tensor, count: int) -> torch.Tensor:
    n = u.shape[-1]

    def top(x: torch.Tensor, k: int) -> torch.Tensor:
        k = max(0, min(k, x.shape[-1]))
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(k, dim=-1).indices, True)

    if fault == "current page not forced":
        return top(u, count)
    if fault == "1000 for infinity":
        return top(torch.cat([u[..., :-1], torch.full_like(u[..., :1], 1000.0)], dim=-1), count)
    if fault == "smallest scores":
        u = -u
    if fault == "largest sizes":
        u = u.abs()
    if fault == "all heads alike":
        u = u.mean(dim=1, keepdim=True).expand_as(u).clone()
    forced = u.clone()
    forced[..., 0 if fault == "first page forced" else n - 1] = float("inf")
    if fault == "budget without the current page":
        return top(forced, count + 1)
    if fault == "current page counted twice":
        taken = top(u, count - 1)
        taken[..., -1] = True
        return taken
    if fault == "scores above the mean":
        taken = u > u.mean(dim=-1, keepdim=True)
        taken[..., -1] = True
        return taken
    if fault == "last pages":
        return torch.arange(n).expand_as(u) >= n - count
    return top(forced, count)


PAGES = Exercise(
    id="sparse/quest/pages",
    title="which pages are read",
    signature="pages(u [B, H, pages], count) -> taken, bool [B, H, pages]",
    outputs=(Output("taken", "bool"),),
    make_inputs=_pages_inputs,
    reference=_pages_reference,
    solution=pages,
    from_scratch=FROM_SCRATCH,
    properties={
        "the best pages": "The last page, and the count - 1 others of largest score.",
        "the current page is always read": "The last page holds the current token: it is read whatever its score is.",
        "the current page is one of the best": "The last page counts once: choose among the others.",
        "one page": "A count of one page is the current page alone.",
        "more than there are": "topk does not take more than there are: min(count, pages).",
        "exactly all": "All pages.",
        "the first page of a text": "One page, which is the current one.",
        "scores of any size": "Scores are not scaled and may be huge: the current page needs no score at all.",
    },
    tolerance=Tolerance(0.0, 0.0, "true or false; scores are drawn without ties."),
    mutants=mutants(
        _pages_mutant,
        {
            "current page not forced": "The current page is taken only where its score is among the best. It holds "
            "the "
            "token just written: always read it.",
            "budget without the current page": "One page too many: the current page counts in the budget.",
            "current page counted twice": "Where the current page is among the best anyway, one page too few is "
            "read.",
            "1000 for infinity": "A large score was put in for the current page, and others are larger: infinity.",
            "smallest scores": "The pages of smallest score are taken.",
            "largest sizes": "The absolute score is ranked: a very negative bound is a very bad page.",
            "all heads alike": "All heads read the same pages. Each head chooses for itself.",
            "first page forced": "The first page is forced instead of the last.",
            "scores above the mean": "A threshold takes another number of pages each time. The budget is a count.",
            "last pages": "The last pages are taken: a window. The scores are not used.",
        },
    ),
    hints=(
        "One page is settled before any score is looked at. How many are left to choose, and among which?",
        "u[..., :-1].topk(min(count, u.shape[-1]) - 1, dim=-1).indices are the others.",
        "taken = torch.zeros_like(u, dtype=torch.bool)\ntaken[..., -1] = True\n"
        "best = u[..., :-1].topk(min(count, u.shape[-1]) - 1, dim=-1).indices\n"
        "return taken.scatter(-1, best, torch.ones_like(best, dtype=torch.bool))",
    ),
)
