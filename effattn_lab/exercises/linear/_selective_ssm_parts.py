"""Exercises: discretise, one token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.linear.selective_ssm",
    "effattn_lab.linear.selective_ssm_conv",
    "effattn_lab.linear.selective_ssm_layer",
    "effattn_lab.linear.scans",
    "effattn_kernels.selective_ssm",
)


def decays(rng: np.random.Generator, channels: int, size: int) -> torch.Tensor:
    """A ``[E, S]``: about -1, -2, ... -S in every channel, as Mamba starts."""
    base = -torch.arange(1.0, size + 1).repeat(channels, 1)
    return base * torch.exp(normal(rng, channels, size, size=0.3))


def steps(rng: np.random.Generator, *shape: int, low: float = 0.02, high: float = 1.5) -> torch.Tensor:
    """Positive step sizes, spread evenly over their magnitudes."""
    return torch.from_numpy(np.exp(rng.uniform(np.log(low), np.log(high), shape))).float()


# ---- discretise --------------------------------------------------------------------------------------------


def discretize(
    delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_bar and B_bar ``[N, E, S]`` of steps ``delta [N, E]``, A ``[E, S]``, B ``[N, S]``."""
    x = delta[:, :, None] * A
    gain = torch.expm1(x) / A if exact else delta[:, :, None]
    return torch.exp(x), gain * B[:, None, :]


def _discretize_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, e: int, s: int, exact: bool, **span: float) -> Case:
        return Case(
            name,
            {
                "delta": steps(rng, n, e, **span),
                "A": decays(rng, e, s),
                "B": normal(rng, n, s),
                "exact": exact,
            },
        )

    return [
        case("the rule of the code", 7, 5, 4, False),
        case("the exact rule", 7, 5, 4, True),
        case("one of each", 1, 1, 1, False),
        case("tiny steps", 6, 4, 3, True, low=1e-6, high=1e-4),
        case("large steps", 6, 4, 16, True, low=20.0, high=60.0),
        case("large steps", 6, 4, 16, False, low=20.0, high=60.0),
    ]


def _discretize_fault(
    fault: str, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    x = delta[:, :, None] * A
    exact = not exact if fault == "the rules swapped" else exact
    decay, one = torch.exp(x), torch.expm1(x)
    if fault == "first order A":
        decay = 1 + x
    elif fault == "wrong sign":
        decay = torch.exp(-x)
    elif fault == "A without delta":
        decay = torch.exp(A).expand_as(x)
    if fault == "always exact" or (exact and fault != "never exact"):
        gain = one / A
        if fault == "cancellation":
            gain = (torch.exp(x) - 1) / A
        elif fault == "no minus one":
            gain = torch.exp(x) / A
        elif fault == "multiplied":
            gain = one * A
        elif fault == "divided by delta A":
            gain = one / x
    else:
        gain = torch.ones_like(x) if fault == "B without delta" else delta[:, :, None].expand_as(x)
    return decay, gain * B[:, None, :]


DISCRETIZE = Exercise(
    id="linear/selective_ssm/discretize",
    title="from a differential equation to a step",
    signature="discretize(delta [N, E], A [E, S], B [N, S], exact) -> (A_bar [N, E, S], B_bar [N, E, S])",
    outputs=(Output("A_bar", "A"), Output("B_bar", "A")),
    make_inputs=_discretize_inputs,
    reference=lambda delta, A, B, exact: discretize(delta, A, B, exact),
    solution=discretize,
    from_scratch=FROM_SCRATCH,
    properties={
        "the rule of the code": "With exact=False: A_bar = exp(delta A), B_bar = delta B.",
        "the exact rule": "With exact=True: B_bar = (exp(delta A) - 1) / A times B.",
        "one of each": "One token, one channel, one state.",
        "tiny steps": "exp(x) - 1 loses its digits where x is near 0; torch.expm1 keeps them.",
        "large steps": "exp(delta A) is 0 then, which is right: nothing is left of the state.",
    },
    tolerance=Tolerance(
        1e-5, 1e-6, "a product, an exponential, a quotient in float32: a few roundings of 6e-8 each"
    ),
    loose={
        "tiny steps": Tolerance(
            1e-5,
            1e-12,
            "B_bar is about 1e-5 here, so only its relative error means anything: a few roundings",
        )
    },
    mutants=mutants(
        _discretize_fault,
        {
            "B without delta": "B is not multiplied by delta: with exact=False, B_bar is delta B.",
            "first order A": "A_bar is 1 + delta A, the first two terms of the exponential: for delta A "
            "below -2 "
            "its size is above 1, and the state explodes.",
            "wrong sign": "exp(-delta A) grows: A is negative already.",
            "A without delta": "A is not multiplied by delta inside the exponential: then the step size "
            "changes "
            "nothing of the decay.",
            "the rules swapped": "The two rules have changed places: exact=True asks for (exp(delta A) - 1) / A "
            "times B, exact=False for delta B.",
            "always exact": "exact=False asks for the rule of the code, delta B; the exact one came.",
            "never exact": "exact=True asks for (exp(delta A) - 1) / A times B; delta B came.",
            "cancellation": "exp(x) - 1 where x is about 1e-5: of seven digits two are left. "
            "torch.expm1(x) has all.",
            "no minus one": "The -1 is missing in (exp(delta A) - 1) / A.",
            "multiplied": "exp(delta A) - 1 is divided by A, not multiplied.",
            "divided by delta A": "exp(delta A) - 1 is divided by A, not by delta A: one delta too many.",
        },
    ),
    hints=(
        "delta needs a last axis for the states, B one for the channels: delta[:, :, None], B[:, None, :].",
        "x = delta[:, :, None] * A has shape [N, E, S]. A_bar is its exponential in both rules; only the "
        "factor in "
        "front of B differs.",
        "x = delta[:, :, None] * A\ngain = torch.expm1(x) / A if exact else delta[:, :, None]\n"
        "... then exp(x), and gain times B",
    ),
)


# ---- one token ---------------------------------------------------------------------------------------------


def scan_step(
    h: torch.Tensor, u: torch.Tensor, dt: torch.Tensor, bias: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    C: torch.Tensor, D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One token: y ``[E]`` and the new state ``[E, S]``."""
    delta = F.softplus(dt + bias)
    h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
    return h @ C + D * u, h


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, e: int, s: int, *, where: float = -1.0, empty: bool = False) -> Case:
        h = torch.zeros(e, s) if empty else normal(rng, e, s)
        return Case(
            name,
            {
                "h": h, "u": normal(rng, e), "dt": where + normal(rng, e), "bias": normal(rng, e, size=0.5),
                "A": decays(rng, e, s), "B": normal(rng, s), "C": normal(rng, s), "D": normal(rng, e) + 1.0,
            },
        )  # fmt: skip

    return [
        case("one token", 6, 4),
        case("the first token", 6, 4, empty=True),
        case("one channel, one state", 1, 1),
        case("as many channels as states", 5, 5),
        case("tiny steps", 6, 4, where=-13.0, empty=True),
        case("large steps", 6, 4, where=110.0),
    ]


def _step_fault(fault: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, u, dt, bias, A, B, C, D = inputs
    delta = F.softplus(dt + bias)
    if fault == "softplus missing":
        delta = dt + bias
    elif fault == "bias after softplus":
        delta = F.softplus(dt) + bias
    elif fault == "bias missing":
        delta = F.softplus(dt)
    elif fault == "softplus by hand":
        delta = torch.log(1 + torch.exp(dt + bias))
    decay = torch.exp(delta[:, None] * A)
    if fault == "swapped":
        B, C = C, B
    write = (delta * u)[:, None] * B
    if fault == "B without delta":
        write = u[:, None] * B
    new = decay * h + write
    if fault == "decayed after the write":
        new = decay * (h + write)
    elif fault == "not decayed":
        new = h + write
    elif fault == "overwritten":
        new = decay * h + (1 - decay) * write
    read = h if fault == "read before the write" else new
    y = read @ C
    if fault == "gate on skip":
        y = D * y
    elif fault != "skip missing":
        y = y + D * (delta * u if fault == "skip with delta" else u)
    return y, new


STEP = Exercise(
    id="linear/selective_ssm/step",
    title="one token: decay, write, read",
    signature="scan_step(h [E, S], u [E], dt [E], bias [E], A [E, S], B [S], C [S], D [E]) -> (y [E], h "
    "[E, S])",
    outputs=(Output("y", "u"), Output("h", "u")),
    make_inputs=_step_inputs,
    reference=lambda **x: scan_step(**x),
    solution=scan_step,
    from_scratch=FROM_SCRATCH,
    properties={
        "one token": "delta = softplus(dt + bias); h' = exp(delta A) h + delta u B; y = C . h' + D u.",
        "the first token": "The state is empty: only the write and the skip are left.",
        "one channel, one state": "All is a number.",
        "as many channels as states": "With E = S a wrong axis does not show in a shape: B and C run "
        "along states, "
        "delta and u along channels.",
        "tiny steps": "softplus of -13 is 2e-6; 1 + exp(-13) has lost its digits. Use F.softplus.",
        "large steps": "exp(110) is infinite in float32, softplus(110) is 110. Use F.softplus.",
    },
    tolerance=Tolerance(
        2e-5, 2e-5, "sums of 4 or 5 products in float32 of size 10, each rounded to 6e-8 of its size"
    ),
    loose={
        "tiny steps": Tolerance(
            2e-5, 1e-9, "the state is about 1e-6 here: only its relative error means anything"
        ),
        "large steps": Tolerance(
            2e-5,
            1e-3,
            "delta u B is about 200 here: sums of such numbers that may cancel are rounded to 1e-4",
        ),
    },
    mutants=mutants(
        _step_fault,
        {
            "softplus missing": "delta is dt + bias itself: without softplus a step can be negative, and "
            "then the "
            "state grows.",
            "bias after softplus": "The bias is added inside the softplus, before it.",
            "bias missing": "The bias is not added to dt.",
            "softplus by hand": "log(1 + exp(x)) overflows for large x, and for very negative x it has no "
            "digits left: "
            "F.softplus handles both ends.",
            "swapped": "B and C have changed places: B writes, C reads.",
            "B without delta": "The write lacks delta: h' = exp(delta A) h + delta u B. Without it a "
            "token that "
            "should be skipped (delta near 0) is written in full.",
            "decayed after the write": "The new token is decayed as well: a decay too many. Decay the old "
            "state, then "
            "write.",
            "not decayed": "The old state is not multiplied by exp(delta A).",
            "overwritten": "The write is multiplied by 1 - exp(delta A), as in a gated RNN; here it is "
            "delta.",
            "read before the write": "y is read from the old state: a token would not see itself. Write "
            "first.",
            "gate on skip": "D u is added to C . h'; D does not multiply it.",
            "skip missing": "The skip D u is missing in y.",
            "skip with delta": "The skip is D u, without delta.",
        },
    ),
    hints=(
        "Four lines: delta, the decay [E, S], the new state, y.",
        "delta[:, None] * A is [E, S]; the write is the outer product of delta * u [E] and B [S]; h @ C "
        "sums over the "
        "states.",
        "delta = F.softplus(dt + bias)\nh = torch.exp(delta[:, None] * A) * h + ...  # the outer product\n"
        "return h @ C + ..., h",
    ),
)


def reference_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token: ``u, delta [E, N]``, A ``[E, S]``, ``B, C [S, N]``, h ``[E, S]``."""
    rows = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, None] * A) * h + (delta[:, t] * u[:, t])[:, None] * B[:, t]
        rows.append(h @ C[:, t])
    return torch.stack(rows, dim=1), h
