"""Exercise: the short causal convolution, with the tail that lets it go on."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._selective_ssm_parts import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal


def short_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tail: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution of ``x [E, N]`` after ``tail [E, W - 1]``: y ``[E, N]`` and the new tail."""
    width, length = weight.shape[1], x.shape[1]
    seen = torch.cat([tail, x], dim=1)
    y = bias[:, None] + sum(weight[:, k, None] * seen[:, k : k + length] for k in range(width))
    return y, seen[:, length:]


def _conv_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, *, e: int = 4, w: int = 4, past: bool = False) -> Case:
        tail = normal(rng, e, w - 1) if past else torch.zeros(e, w - 1)
        return Case(
            name, {"x": normal(rng, e, n), "weight": normal(rng, e, w), "bias": normal(rng, e), "tail": tail}
        )

    return [
        case("a sequence from its beginning", 20),
        case("after other tokens", 20, past=True),
        case("one token", 1, past=True),
        case("fewer tokens than taps", 2, past=True, w=5),
        case("two taps", 9, past=True, w=2),
    ]


def _conv_fault(
    fault: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tail: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width, length = weight.shape[1], x.shape[1]
    past = torch.zeros_like(tail) if fault == "tail ignored" else tail
    seen = torch.cat([past, x], dim=1)
    keep = torch.cat([tail, x], dim=1)[:, length:]
    if fault == "tail from the front":
        keep = torch.cat([tail, x], dim=1)[:, : width - 1]
    elif fault == "tail forgets the old one":
        keep = torch.cat([torch.zeros_like(tail), x], dim=1)[:, length:]
    if fault == "sees the future":
        after = torch.cat([tail, x, torch.zeros_like(x[:, :1])], dim=1)
        seen = after[:, 1:]
    elif fault == "sees all from the future":
        seen = torch.cat([x, torch.zeros_like(tail)], dim=1)
    elif fault == "late by one":
        seen = torch.cat([torch.zeros_like(x[:, :1]), tail, x], dim=1)
    taps = weight.flip(1) if fault == "taps reversed" else weight
    if fault == "channels mixed":
        taps = taps.mean(0, keepdim=True).expand_as(taps)
    y = torch.zeros_like(x)
    for k in range(1 if fault == "oldest tap missing" else 0, width):
        y = y + taps[:, k, None] * seen[:, k : k + length]
    return (y if fault == "bias missing" else y + bias[:, None]), keep


CONV = Exercise(
    id="linear/selective_ssm/short_conv",
    title="a short causal convolution that can go on",
    signature="short_conv(x [E, N], weight [E, W], bias [E], tail [E, W - 1]) -> (y [E, N], tail [E, W - 1])",
    outputs=(Output("y", "x"), Output("tail", "x")),
    make_inputs=_conv_inputs,
    reference=lambda **x: short_conv(**x),
    solution=short_conv,
    from_scratch=(*FROM_SCRATCH, "torch.conv1d", "torch.nn.functional.conv1d"),
    properties={
        "a sequence from its beginning": "y[t] = bias + sum over k of weight[:, k] x[t - (W - 1) + k]: "
        "the last tap "
        "meets token t itself.",
        "after other tokens": "What stands before the first token is the tail, oldest first.",
        "one token": "The window is the tail and the token; the new tail is the window without its oldest "
        "entry.",
        "fewer tokens than taps": "The new tail still holds some of the old one.",
        "two taps": "W is the width of weight, not always 4.",
    },
    tolerance=Tolerance(1e-5, 1e-5, "five products in float32, of size 10 at most: rounded to 1e-6"),
    mutants=mutants(
        _conv_fault,
        {
            "sees the future": "y[t] uses x[t + 1]: the window is one too late. A language model that "
            "trains with this "
            "reads the answer.",
            "sees all from the future": "The padding stands on the right: y[t] uses the tokens after t "
            "instead of those "
            "before it.",
            "late by one": "y[t] ends at x[t - 1]: a token does not see itself.",
            "taps reversed": "The taps are in the wrong order: weight[:, -1] meets the newest token.",
            "channels mixed": "Each channel has taps of its own: weight[e] belongs to x[e].",
            "tail ignored": "Zeros stand before the first token instead of the tail.",
            "tail from the front": "The new tail is what was seen last, not what was seen first.",
            "tail forgets the old one": "With fewer new tokens than W - 1 the new tail still begins with "
            "some of the "
            "old one: cut it from tail and x together.",
            "oldest tap missing": "W taps, not W - 1: the sum over k begins at 0.",
            "bias missing": "The bias is not added.",
        },
    ),
    hints=(
        "Put the tail in front of x. Then no case is special: every output is a window of W of these.",
        "seen = torch.cat([tail, x], dim=1) has N + W - 1 columns. Tap k of all outputs at once meets "
        "seen[:, k : k + N].",
        "seen = torch.cat([tail, x], dim=1)\ny = bias[:, None] + sum(... for k in range(W))\n"
        "... and the last W - 1 columns of seen: seen[:, N:]",
    ),
)
