"""Exercises on what a pattern lets through: what reaches a token in several layers, captured mass."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._static_patterns_masks import EXACT, FROM_SCRATCH

# ---- reach -------------------------------------------------------------------------------------------------


def reach(keep: torch.Tensor, layers: int) -> torch.Tensor:
    """Which inputs can change position i after some layers with residual connections."""
    step = keep.float() + torch.eye(len(keep))
    paths = torch.eye(len(keep))
    for _ in range(layers):
        paths = (step @ paths > 0).float()
    return paths > 0


def _reach_reference(keep: torch.Tensor, layers: int) -> tuple[torch.Tensor, ...]:
    n = len(keep)
    seen = [{i} for i in range(n)]
    for _ in range(layers):
        before, seen = seen, [seen[i].union(*(seen[j] for j in range(n) if keep[i, j])) for i in range(n)]
        if seen == before:  # and so for ever
            break
    return (torch.tensor([[j in seen[i] for j in range(n)] for i in range(n)]),)


def _reach_inputs(rng: np.random.Generator) -> list[Case]:
    def some(n: int, keys: int) -> torch.Tensor:
        keep = torch.from_numpy(rng.random((n, n)) < keys / n)
        return keep.tril(-1)

    n = 16
    gap = torch.arange(n)[:, None] - torch.arange(n)
    many = torch.from_numpy(rng.random((48, 48)) < 0.9)
    many[:24, 24:] = False  # the first half never hears the second: 0 paths, whatever the other counts are
    return [
        Case("two layers", {"keep": some(14, 3), "layers": 2}),
        Case("one layer", {"keep": some(14, 3), "layers": 1}),
        Case("a window, many layers", {"keep": (gap >= 0) & (gap < 3), "layers": 5}),
        Case("no layer", {"keep": some(9, 4), "layers": 0}),
        Case("both directions", {"keep": torch.from_numpy(rng.random((12, 12)) < 0.15), "layers": 2}),
        Case("more paths than a number can count", {"keep": many, "layers": 300}),
    ]


def _reach_mutant(fault: str, keep: torch.Tensor, layers: int) -> torch.Tensor:
    n = len(keep)
    step, count = keep.float() + torch.eye(n), layers
    if fault == "no residual":
        step = keep.float()
    if fault == "one layer too few":
        count = max(0, layers - 1)
    if fault == "one layer too many":
        count = layers + 1
    if fault == "the wrong way round":
        step = step.T
    if fault == "paths counted":
        return torch.matrix_power(step, count) > 0
    if fault == "paths counted in float64":
        return torch.matrix_power(step.double(), count) > 0
    if fault == "paths counted in whole numbers":
        ways = torch.eye(n, dtype=torch.int64)
        for _ in range(count):
            ways = step.long() @ ways
        return ways > 0
    if fault == "one layer whatever is asked":
        return step > 0
    paths = torch.eye(n)
    for _ in range(count):
        paths = (step @ paths > 0).float()
    return paths > 0


REACH = Exercise(
    id="sparse/static_patterns/reach",
    title="what can reach a token through several layers",
    signature="reach(keep [N, N] bool, layers) -> reached [N, N], bool",
    outputs=(Output("reached", "bool"),),
    make_inputs=_reach_inputs,
    reference=_reach_reference,
    solution=reach,
    from_scratch=FROM_SCRATCH,
    properties={
        "two layers": "i reaches j if i sees some m, and m sees j.",
        "one layer": "After one layer: what the pattern shows, and the token itself.",
        "a window, many layers": "L layers of a window of w keys reach back L (w - 1) tokens.",
        "no layer": "Without a layer a token knows itself alone.",
        "both directions": "keep[i, j] says that i sees j: rows are queries.",
        "more paths than a number can count": "You need whether there is a path, not how many.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _reach_mutant,
        {
            "no residual": "A token loses itself between layers. The residual connection carries it: add the "
            "identity "
            "to the mask.",
            "one layer too few": "One layer is missing: layers = 1 is the pattern itself with the identity.",
            "one layer too many": "There is one layer too many: layers = 0 is the identity.",
            "the wrong way round": "Rows and columns are swapped: the result says whom a token reaches, not who "
            "reaches it.",
            "paths counted": "Numbers of paths grow until they overflow, and infinity times 0 is NaN, which is not "
            "above 0. After each layer keep only whether the number is above 0.",
            "paths counted in float64": "Numbers of paths grow beyond float64 too, and infinity times 0 is NaN. "
            "After each layer keep only whether the number is above 0.",
            "paths counted in whole numbers": "Numbers of paths grow beyond 64 bits and come out as anything. After "
            "each layer keep only whether the number is above 0.",
            "one layer whatever is asked": "The number of layers makes no difference: this is one layer's pattern.",
        },
    ),
    hints=(
        "A product of two masks, read as numbers, counts the ways from i to j over one m.",
        "step = keep or identity. Start from the identity, multiply by step once a layer, and turn every product "
        "back into "
        "0 and 1.",
        "step = keep.float() + torch.eye(len(keep))\npaths = torch.eye(len(keep))\nfor _ in range(layers):\n"
        "    paths = (step @ paths > 0).float()\nreturn paths > 0",
    ),
)

# ---- captured mass -----------------------------------------------------------------------------------------


def captured(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Share of each query's causal softmax that lies on the keys of a pattern."""
    n = q.shape[2]
    s = q @ k.transpose(-1, -2) / q.shape[3] ** 0.5
    past = torch.ones(n, n, dtype=torch.bool).tril()
    p = torch.softmax(s.masked_fill(~past, float("-inf")), dim=-1)
    return (p * keep).sum(dim=-1)


def _captured_reference(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = torch.zeros(q.shape[:3], dtype=q.dtype)
    for t in range(q.shape[2]):
        s = torch.einsum("bhd,bhnd->bhn", q[:, :, t], k[:, :, : t + 1]) / q.shape[3] ** 0.5
        out[:, :, t] = torch.softmax(s, dim=-1)[..., keep[t, : t + 1]].sum(-1)
    return (out,)


def _captured_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, *, size: float = 1.5, share: float = 0.4, whole: bool = False) -> Case:
        keep = torch.from_numpy(rng.random((n, n)) < share).tril() | torch.eye(n, dtype=torch.bool)
        if whole:
            keep = torch.ones(n, n, dtype=torch.bool).tril()
        q, k = normal(rng, 2, 3, n, 16, size=size), normal(rng, 2, 3, n, 16, size=size)
        return Case(name, {"q": q, "k": k, "keep": keep})

    return [
        case("share of the full softmax", 24),
        case("one token", 1),
        case("the whole past", 17, whole=True),
        case("huge scores", 20, size=12.0),
        case("few keys of many", 200, share=0.02),
    ]


def _captured_mutant(fault: str, q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    s = q @ k.transpose(-1, -2)
    if fault != "no scale":
        s = s / q.shape[3] ** 0.5
    past = torch.ones(n, n, dtype=torch.bool).tril()
    if fault == "the future in the denominator":
        past = torch.ones_like(past)
    if fault == "softmax inside the pattern":
        past = keep
    s = s.masked_fill(~past, float("-inf"))
    p = torch.softmax(s, dim=-1)
    if fault == "keys counted":
        return (keep.sum(-1) / past.sum(-1)).expand(q.shape[:3]).clone()
    if fault == "summed over queries":
        return (p * keep).sum(dim=-2)
    if fault == "what is lost":
        return 1 - (p * keep).sum(dim=-1)
    if fault == "largest weight alone":
        return (p * keep).amax(dim=-1)
    if fault == "no max subtraction":
        e = torch.exp(s)
        return (e * keep).sum(-1) / e.sum(-1)
    return (p * keep).sum(dim=-1)


CAPTURED = Exercise(
    id="sparse/static_patterns/captured",
    title="captured mass",
    signature="captured(q [B, H, N, D], k [B, H, N, D], keep [N, N] bool) -> mass [B, H, N]",
    outputs=(Output("mass", "q"),),
    make_inputs=_captured_inputs,
    reference=_captured_reference,
    solution=captured,
    from_scratch=FROM_SCRATCH,
    properties={
        "share of the full softmax": "First the causal softmax over all keys, then the sum over those that the "
        "pattern "
        "keeps.",
        "one token": "One key has all of the weight.",
        "the whole past": "A pattern that keeps the whole past captures 1.",
        "huge scores": "torch.softmax subtracts the largest score for you.",
        "few keys of many": "The sum runs over the keys of one query, the last axis.",
    },
    tolerance=Tolerance(
        2e-5,
        2e-5,
        "a softmax of up to 200 float32 scores; scores of some hundreds are rounded to 3e-5 of one.",
    ),
    loose={
        "huge scores": Tolerance(
            2e-3, 2e-3, "scores of some hundreds in float32: rounding moves a weight by 1e-4 of itself."
        )
    },
    mutants=mutants(
        _captured_mutant,
        {
            "no scale": "The scores are not divided by the root of D.",
            "the future in the denominator": "Keys after the query take part in the softmax: mask them first.",
            "softmax inside the pattern": "The softmax is taken over the pattern's keys alone, so its sum is always "
            "1. The "
            "share is of the full softmax.",
            "keys counted": "This is the share of keys, not of their weights.",
            "summed over queries": "The sum runs over queries. Each query has a share of its own: sum over the last "
            "axis.",
            "what is lost": "This is what the pattern loses, one minus the captured mass.",
            "largest weight alone": "Only the largest kept weight is returned, not their sum.",
            "no max subtraction": "e^s overflows for scores of some hundreds: use torch.softmax.",
        },
    ),
    hints=(
        "The pattern does not change the softmax; it only says which of its weights you add up.",
        "Scores over the root of D, causal mask, softmax over the last axis, times keep, summed.",
        "s = q @ k.transpose(-1, -2) / q.shape[3] ** 0.5\n"
        "past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()\n"
        "p = torch.softmax(s.masked_fill(~past, float('-inf')), dim=-1)\nreturn (p * keep).sum(dim=-1)",
    ),
)
