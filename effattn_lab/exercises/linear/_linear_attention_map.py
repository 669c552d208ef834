"""Exercise: a positive feature map, with a gradient that stays finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.linear._linear_attention_parts import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal


def feature_map(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 without the cancellation: x + 1 right of 0, exp(x) left of it."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def _map_reference(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))),)


def _map_inputs(rng: np.random.Generator) -> list[Case]:
    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, shape)).float()

    return [
        Case("both signs", {"x": normal(rng, 2, 3, 7, 8, size=2.0)}),
        Case("right of 0", {"x": uniform(0.01, 5.0, 40)}),
        Case("left of 0", {"x": uniform(-5.0, -0.01, 40)}),
        Case("continuous at 0", {"x": torch.cat([torch.zeros(1), uniform(-1e-3, 1e-3, 20)])}),
        Case("far left", {"x": uniform(-80.0, -20.0, 4, 10)}),
        Case("far right", {"x": uniform(100.0, 1e4, 4, 10)}),
    ]


def _map_mutant(fault: str, x: torch.Tensor) -> torch.Tensor:
    made = {
        "elu alone": lambda: F.elu(x),
        "elu + 1, literally": lambda: F.elu(x) + 1,
        "never below 1e-6": lambda: (F.elu(x) + 1).clamp(min=1e-6),
        "jump at 0": lambda: torch.where(x > 0, x, torch.exp(x.clamp(max=0))),
        "relu + 1": lambda: torch.relu(x) + 1,
        "exp": lambda: torch.exp(x),
        "softplus": lambda: F.softplus(x),
        "gradient lost": lambda: torch.where(x > 0, x + 1, torch.exp(x)),
    }
    return made[fault]()


#: The gradient of the sum, as a caller sees it.
_THROUGH = """
import torch


def through(fn, x):
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        fn(x).sum().backward()
    return torch.zeros_like(x) if x.grad is None else x.grad
"""
_GRADIENT = "the gradient is finite"
_OVERFLOWS = (
    "torch.where differentiates both branches. Far right e^x is infinite, and 0 times infinity is NaN: keep it from "
    "overflowing where it is not used, x.clamp(max=0)."
)


def _gradient_inputs(rng: np.random.Generator) -> list[Case]:
    x = np.concatenate([rng.uniform(-20, -1, 20), rng.uniform(1, 20, 20), rng.uniform(100, 1e4, 20)])
    return [Case(_GRADIENT, {"x": torch.from_numpy(x).float()})]


def _gradient_judge(outcomes: Sequence[Outcome]) -> str | None:
    x, got = outcomes[0].case.kwargs["x"], outcomes[0].values[0]
    assert isinstance(x, torch.Tensor)
    if got.isnan().any():
        return f"the gradient is NaN at {int(got.isnan().sum())} of {len(x)} places, all of them above 88"
    want = x.double().clamp(max=0).exp()
    return None if near(got, want, 1e-5) else "the gradient is not 1 right of 0 and e^x left of it"


def _gradient(fn: Callable[..., Any]) -> str | None:
    names: dict[str, Any] = {}
    exec(_THROUGH, names)
    (case,) = _gradient_inputs(np.random.default_rng(5))
    return _gradient_judge([Outcome(case, (names["through"](fn, case.kwargs["x"]),))])


FEATURE_MAP = Exercise(
    id="linear/linear_attention/feature_map",
    title="a positive feature map",
    signature="feature_map(x [..., D]) -> phi(x) [..., D]",
    outputs=(Output("phi(x)", "x"),),
    make_inputs=_map_inputs,
    reference=_map_reference,
    solution=feature_map,
    from_scratch=FROM_SCRATCH,
    properties={
        "both signs": "Element by element: x + 1 where x > 0, e^x elsewhere.",
        "right of 0": "There phi(x) = x + 1.",
        "left of 0": "There phi(x) = e^x.",
        "continuous at 0": "Both branches are 1 at 0.",
        "far left": "e^-20 is 2e-9: a positive number, and float32 has room for it. Adding 1 and taking 1 away "
        "has not.",
        "far right": "x + 1 never overflows; e^x does from 89 on. Is it used where x > 0?",
    },
    tolerance=Tolerance(
        3e-6,
        0.0,
        "one exp or one addition in float32: a few units in the last place, 6e-8 each; no absolute error is "
        "allowed, since the smallest features count where all are small.",
    ),
    probes=(
        Probe(_GRADIENT, _gradient, _OVERFLOWS, Trial(_gradient_inputs, _gradient_judge, through=_THROUGH)),
    ),
    mutants=mutants(
        _map_mutant,
        {
            "elu alone": "elu(x) is negative left of 0, so weights can be negative and their sum 0. Add 1.",
            "elu + 1, literally": "elu(x) + 1 is (e^x - 1) + 1 left of 0: below x = -17 float32 rounds that to "
            "0. Write e^x itself.",
            "never below 1e-6": "Small features are lifted to a floor: a weight of 1e-9 and one of 1e-6 become "
            "equal. Write e^x itself left of 0, then no floor is needed.",
            "jump at 0": "Right of 0 the 1 is missing: phi jumps from 1 down to 0 at x = 0.",
            "relu + 1": "Left of 0 every x gives the same feature 1: nothing is left to tell keys apart.",
            "exp": "e^x is used everywhere: right of 0 it should be x + 1, and far right it overflows.",
            "softplus": "That is log(1 + e^x), another positive map; this one is x + 1 right of 0 and e^x left "
            "of it.",
            "gradient lost": _OVERFLOWS,
        },
    ),
    hints=(
        "Two branches, chosen element by element by the sign of x.",
        "torch.where(condition, a, b) computes both branches: keep e^x from overflowing where it is not used.",
        "return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))",
    ),
)
