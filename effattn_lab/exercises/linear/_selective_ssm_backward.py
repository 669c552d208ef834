"""Exercise: the backward pass of a scan, which is a scan from the other end."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._selective_ssm_parts import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal


def scan_backward(
    a: torch.Tensor, h: torch.Tensor, h0: torch.Tensor, dh: torch.Tensor, dh_end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``h[t] = a[t] h[t - 1] + b[t]``: db ``[N, S]``, da ``[N, S]``, dh0 ``[S]``."""
    g = torch.empty_like(dh)
    carry = dh_end
    for t in range(len(dh) - 1, -1, -1):
        g[t] = dh[t] + carry
        carry = a[t] * g[t]
    before = torch.cat([h0[None], h[:-1]])
    return g, g * before, carry


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, s: int = 4, *, ends: bool = False, only_end: bool = False) -> Case:
        a = torch.from_numpy(rng.uniform(0.2, 0.95, (n, s))).float()
        b, h0 = normal(rng, n, s), normal(rng, s)
        h, rows = h0, []
        for t in range(n):
            h = a[t] * h + b[t]
            rows.append(h)
        dh = torch.zeros(n, s) if only_end else normal(rng, n, s)
        end = normal(rng, s) if ends or only_end else torch.zeros(s)
        return Case(name, {"a": a, "h": torch.stack(rows), "h0": h0, "dh": dh, "dh_end": end})

    return [
        case("a sequence", 12),
        case("with later chunks", 12, ends=True),
        case("later chunks alone", 9, only_end=True),
        case("one token", 1, ends=True),
        case("two tokens", 2),
    ]


def _fault(
    fault: str,
    a: torch.Tensor,
    h: torch.Tensor,
    h0: torch.Tensor,
    dh: torch.Tensor,
    dh_end: torch.Tensor,
    guard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = len(dh)
    g = torch.empty_like(dh)
    if fault == "own decay":
        carry = dh_end
        for t in range(n - 1, -1, -1):
            carry = dh[t] + a[t] * carry
            g[t] = carry
        return g, g * torch.cat([h0[None], h[:-1]]), (carry if guard else a[0] * carry)
    carry = torch.zeros_like(dh_end) if fault == "end forgotten" else dh_end
    order = range(n) if fault == "runs forwards" else range(n - 1, -1, -1)
    for t in order:
        if fault == "decay off by one":
            g[t] = dh[t] + (a[t] * carry if t < n - 1 else carry)
            carry = g[t]
        else:
            g[t] = dh[t] + carry
            carry = g[t].clone() if fault == "not decayed" else a[t] * g[t]
    if fault == "later tokens forgotten":
        g = dh.clone()
        g[-1] += dh_end
    before = torch.cat([h0[None], h[:-1]])
    if fault == "state after the token":
        before = h
    elif fault == "initial state forgotten":
        before = torch.cat([torch.zeros_like(h0)[None], h[:-1]])
    da = (dh if fault == "direct part only" else g) * before
    if fault == "first decay forgotten":
        carry = g[0].clone()
    elif fault in ("decay off by one", "later tokens forgotten"):
        carry = a[0] * g[0]
    return g, da, carry


BACKWARD = Exercise(
    id="linear/selective_ssm/scan_backward",
    title="backward: a scan from the other end",
    signature="scan_backward(a [N, S], h [N, S], h0 [S], dh [N, S], dh_end [S]) -> (db [N, S], da [N, S], "
    "dh0 [S])",
    outputs=(Output("db", "a"), Output("da", "a"), Output("dh0", "a")),
    make_inputs=_inputs,
    reference=lambda **x: scan_backward(**x),
    solution=scan_backward,
    from_scratch=FROM_SCRATCH,
    properties={
        "a sequence": "g[t] = dh[t] + a[t + 1] g[t + 1], from the last token to the first; db = g.",
        "with later chunks": "dh_end is what later chunks ask of the last state: it is added to the last g.",
        "later chunks alone": "With dh = 0 only dh_end flows back, shrinking by a at each token.",
        "one token": "g = dh + dh_end; da = g h0; dh0 = a g.",
        "two tokens": "g[0] = dh[0] + a[1] g[1]: the decay of the later token.",
    },
    tolerance=Tolerance(
        2e-5, 2e-5, "twelve products in float32 of size 10 at most, rounded to 6e-8 of that each"
    ),
    mutants=(
        # Two forms of it: what reaches h0 is the last g, or is decayed once more.
        *mutants(
            _fault,
            {
                "own decay": "g passes from token t + 1 to token t through a[t], token t's own decay. Between the "
                "two stands a[t + 1], and dh_end comes in without any."
            },
            unguarded=True,
        ),
        *mutants(
            _fault,
            {
                "end forgotten": "dh_end is not used: later chunks read this chunk's last state.",
                "runs forwards": "The loop runs from the first token to the last; a gradient flows from late "
                "to early.",
                "decay off by one": "g[t] takes g[t + 1] through a[t + 1], the decay that lies between them; "
                "here it is "
                "another one.",
                "not decayed": "g[t + 1] reaches token t through the decay a[t + 1]; here it is not "
                "multiplied by it.",
                "later tokens forgotten": "g[t] lacks what the later tokens ask of h[t]: a[t + 1] g[t + 1].",
                "state after the token": "da[t] = g[t] h[t - 1]: a[t] multiplies the state before the token, "
                "not after it.",
                "initial state forgotten": "a[0] multiplies h0: da[0] = g[0] h0.",
                "direct part only": "da uses dh, the direct gradient; a[t] also matters for every later "
                "output: use g.",
                "first decay forgotten": "h0 reaches h[0] through a[0]: dh0 = a[0] g[0].",
            },
        ),
    ),
    hints=(
        "Let g[t] be the gradient of the loss by h[t], through every later token too. h[t] is used twice: "
        "where it is "
        "read (dh[t]), and in h[t + 1] = a[t + 1] h[t] + b[t + 1].",
        "Carry a[t] g[t] from token t to token t - 1; at the end it starts as dh_end, after token 0 it is "
        "dh0. Then "
        "db = g, and da is g times the state before.",
        "carry = dh_end\nfor t in reversed(range(len(dh))):\n    g[t] = dh[t] + carry\n    carry = ...\n"
        "before = torch.cat([h0[None], h[:-1]])\nreturn g, g * before, carry",
    ),
)
