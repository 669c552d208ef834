"""Exercises: compose two steps, one round of a parallel scan."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._selective_ssm_parts import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal

# ---- compose -----------------------------------------------------------------------------------------------


def combine(
    a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """First ``h -> a1 h + b1``, then ``h -> a2 h + b2``, as one map."""
    return a2 * a1, a2 * b1 + b2


def _combine_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, a1: torch.Tensor, a2: torch.Tensor) -> Case:
        return Case(name, {"a1": a1, "b1": normal(rng, 5), "a2": a2, "b2": normal(rng, 5)})

    one, two = (torch.from_numpy(rng.uniform(0.1, 0.9, 5)).float() for _ in range(2))
    return [
        case("two steps", one, two),
        case("the first step forgets all", torch.zeros(5), two),
        case("the second step forgets all", one, torch.zeros(5)),
        case("nothing decays", torch.ones(5), torch.ones(5)),
    ]


def _combine_fault(
    fault: str, a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return {
        "wrong order": (a1 * a2, a1 * b2 + b1),
        "b1 not decayed": (a1 * a2, b1 + b2),
        "both decayed": (a1 * a2, a2 * (b1 + b2)),
        "decays added": (a1 + a2, a2 * b1 + b2),
        "first decay lost": (a2.clone(), a2 * b1 + b2),
        "first write lost": (a1 * a2, b2.clone()),
        "first decay twice": (a1 * a2, a1 * a2 * b1 + b2),
    }[fault]


COMBINE = Exercise(
    id="linear/selective_ssm/combine",
    title="two steps are one step",
    signature="combine(a1, b1, a2, b2) -> (a, b), all of one shape; step 1 comes first",
    outputs=(Output("a", "a1"), Output("b", "b1")),
    make_inputs=_combine_inputs,
    reference=lambda **x: combine(**x),
    solution=combine,
    from_scratch=FROM_SCRATCH,
    properties={
        "two steps": "Put a1 h + b1 in the place of h in a2 h + b2 and multiply out.",
        "the first step forgets all": "With a1 = 0, b1 is still there, decayed by a2.",
        "the second step forgets all": "With a2 = 0 only b2 is left.",
        "nothing decays": "With both decays 1 the writes add up.",
    },
    tolerance=Tolerance(1e-6, 1e-6, "one product and one sum in float32"),
    mutants=mutants(
        _combine_fault,
        {
            "wrong order": "The steps are composed in the wrong order: a2 acts on what step 1 left, so a2 "
            "multiplies b1.",
            "b1 not decayed": "b1 is in the state when step 2 comes, so it decays by a2.",
            "both decayed": "b2 is written by step 2 itself and does not decay in it.",
            "decays added": "Decays multiply: of half, half is a quarter.",
            "first decay lost": "a is the decay of both steps together, a2 a1.",
            "first write lost": "What step 1 wrote is gone: b lacks a2 b1.",
            "first decay twice": "b1 is written after a1 has acted: it decays by a2 alone.",
        },
    ),
    hints=(
        "Step 1 gives h1 = a1 h + b1, step 2 gives a2 h1 + b2. Which factor has h, and what stands alone?",
        "a2 (a1 h + b1) + b2: multiply out.",
        "return a2 * a1, a2 * b1 + ...",
    ),
)


# ---- one round of doubling ---------------------------------------------------------------------------------


def double(a: torch.Tensor, b: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every entry absorbs the one ``step`` places before it, those without one stay; ``a, b [N, ...]``."""
    new_a, new_b = combine(a[:-step], b[:-step], a[step:], b[step:])
    return torch.cat([a[:step], new_a]), torch.cat([b[:step], new_b])


def _double_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, step: int, *more: int) -> Case:
        a = torch.from_numpy(rng.uniform(0.1, 0.95, (n, *more))).float()
        return Case(name, {"a": a, "b": normal(rng, n, *more), "step": step})

    return [
        case("neighbours", 8, 1, 3),
        case("further apart", 13, 4, 3),
        case("two axes behind", 9, 2, 3, 2),
        case("hardly any pair", 9, 8, 2),
        case("no pair", 5, 8, 2),
        case("one token", 1, 1, 2),
    ]


def _double_fault(
    fault: str, a: torch.Tensor, b: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = a.clone(), b.clone()
    if fault == "wraps around":
        old_a, old_b = torch.roll(a, step, 0), torch.roll(b, step, 0)
        return a * old_a, a * old_b + b
    if fault == "in place":
        for t in range(step, len(a)):
            b[t], a[t] = a[t] * b[t - step] + b[t], a[t] * a[t - step]
        return a, b
    if fault == "one too far":
        step += 1
    first, then = (a[:-step], b[:-step]), (a[step:], b[step:])
    if fault == "looks ahead":
        new = combine(*first, *then)
        return torch.cat([new[0], a[max(0, len(a) - step) :]]), torch.cat(
            [new[1], b[max(0, len(b) - step) :]]
        )
    new = combine(*then, *first) if fault == "wrong order" else combine(*first, *then)
    head_a, head_b = a[:step], b[:step]
    if fault == "first ones lost":
        head_a, head_b = torch.zeros_like(head_a), torch.zeros_like(head_b)
    if fault == "decays not combined":
        return a, torch.cat([head_b, new[1]])
    if fault == "writes not combined":
        return torch.cat([head_a, new[0]]), b
    return torch.cat([head_a, new[0]]), torch.cat([head_b, new[1]])


DOUBLE = Exercise(
    id="linear/selective_ssm/double",
    title="one round of a parallel scan",
    signature="double(a [N, ...], b [N, ...], step) -> (a [N, ...], b [N, ...])",
    outputs=(Output("a", "a"), Output("b", "b")),
    make_inputs=_double_inputs,
    reference=lambda **x: double(**x),
    solution=double,
    from_scratch=FROM_SCRATCH,
    properties={
        "neighbours": "Entry t combines entry t - 1 (first) and itself (then), both as they came in.",
        "further apart": "Entry t combines entry t - step and itself.",
        "two axes behind": "Only the first axis is time; slices a[step:] leave the others alone.",
        "hardly any pair": "Only the last entry has a partner.",
        "no pair": "Nobody has a partner: everything stays. (Slices past the end are empty, which is right.)",
        "one token": "Nobody has a partner.",
    },
    tolerance=Tolerance(1e-6, 1e-6, "one product and one sum in float32"),
    mutants=mutants(
        _double_fault,
        {
            "wraps around": "The first entries combine with the last ones: torch.roll goes round in a "
            "circle, and the "
            "future flows into the past.",
            "in place": "Entries are overwritten while others still need the old ones: that is the "
            "sequential scan. "
            "Compute all from what came in.",
            "one too far": "The partner stands step places before, not step + 1.",
            "looks ahead": "Entry t combines with entry t + step: the future. Its partner stands before it.",
            "wrong order": "The pair is combined in the wrong order: the earlier entry comes first.",
            "first ones lost": "The first step entries have no partner and stay as they are; here they "
            "are lost.",
            "decays not combined": "a does not change: after the round an entry stands for twice as many "
            "tokens, and "
            "its decay is theirs.",
            "writes not combined": "b does not change: it has to take in a[t] times the b of the entry "
            "before.",
        },
    ),
    hints=(
        "All pairs at once: a[:-step] are the earlier entries, a[step:] the later ones. combine() takes "
        "whole slices.",
        "The first step entries stay: torch.cat([a[:step], combined]). If step >= N, a[step:] and "
        "a[:-step] are empty.",
        "new_a, new_b = combine(a[:-step], b[:-step], a[step:], b[step:])\n"
        "return torch.cat([a[:step], new_a]), ...",
    ),
)
