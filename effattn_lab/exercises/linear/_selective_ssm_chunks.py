"""Exercise: the scan a chunk at a time, so that only one chunk's states exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Mutant, Outcome, Output, Probe, Tolerance, Trial
from effattn_lab.exercises.linear._selective_ssm_parts import FROM_SCRATCH, decays, reference_scan, steps
from effattn_lab.exercises.linear._selective_ssm_scans import double
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch


def chunked_scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The scan, a chunk at a time: y ``[E, N]`` and the last state ``[E, S]``."""
    out = []
    for i in range(0, u.shape[1], chunk_size):
        u_c, d_c, B_c, C_c = (x[:, i : i + chunk_size].T for x in (u, delta, B, C))  # time first
        a, b = torch.exp(d_c[:, :, None] * A), (d_c * u_c)[:, :, None] * B_c[:, None, :]
        step = 1
        while step < len(a):
            a, b = double(a, b, step)
            step *= 2
        states = a * h + b  # [C, E, S]
        out.append((states * C_c[:, None, :]).sum(-1).T)
        h = states[-1]
    return torch.cat(out, dim=1), h


def _chunked_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, chunk: int, *, e: int = 4, s: int = 3, empty: bool = False, **span: float
    ) -> Case:
        return Case(
            name,
            {
                "u": normal(rng, e, n), "delta": steps(rng, e, n, **span), "A": decays(rng, e, s),
                "B": normal(rng, s, n), "C": normal(rng, s, n),
                "h": torch.zeros(e, s) if empty else normal(rng, e, s), "chunk_size": chunk,
            },
        )  # fmt: skip

    slow: dict[str, Any] = {"low": 0.002, "high": 0.1}
    return [
        case("one chunk", 12, 16, **slow),
        case("several chunks", 48, 8, **slow),
        case("a ragged end", 37, 8, **slow),
        case("chunks of one token", 9, 1, **slow),
        case("one token", 1, 8, **slow),
        case("an empty state", 20, 8, empty=True, **slow),
        case("strong decay", 64, 32, s=16, low=5.0, high=20.0),
    ]


def _chunked_fault(
    fault: str, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    h: torch.Tensor, chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, first = [], h
    for i in range(0, u.shape[1], chunk_size):
        u_c, d_c, B_c, C_c = (x[:, i : i + chunk_size].T for x in (u, delta, B, C))
        a, b = torch.exp(d_c[:, :, None] * A), (d_c * u_c)[:, :, None] * B_c[:, None, :]
        if fault == "B without delta":
            b = u_c[:, :, None] * B_c[:, None, :]
        elif fault == "the exact rule":
            b = (torch.expm1(d_c[:, :, None] * A) / A) * u_c[:, :, None] * B_c[:, None, :]
        elif fault == "the exact rule without u":
            b = (torch.expm1(d_c[:, :, None] * A) / A) * B_c[:, None, :]
        elif fault == "u forgotten":
            b = d_c[:, :, None] * B_c[:, None, :]
        elif fault == "decay off by one":
            b = a * b
        elif fault == "decay of the token before":
            a = torch.cat([torch.ones_like(a[:1]), a[:-1]])
        if fault == "divided decays":
            total = a.cumprod(0)
            states = total * (h + (b / total).cumsum(0))
        else:
            for step in (2**k for k in range((len(a) - 1).bit_length())):
                a, b = double(a, b, step)
            if fault == "border not decayed":
                states = h + b
            elif fault == "border decayed by the whole chunk":
                states = a[-1] * h + b
            elif fault == "border forgotten":
                states = b
            else:
                states = a * h + b
        read = torch.cat([h[None], states[:-1]]) if fault == "read before the write" else states
        out.append((read * C_c[:, None, :]).sum(-1).T)
        h = states[-1]
        if fault == "chunk boundary lost":
            h = torch.zeros_like(h)
        elif fault == "first state kept":
            h = first
        elif fault == "border without the past":
            h = b[-1]
    y = torch.cat(out, dim=1)
    if fault == "last chunk dropped":
        whole = u.shape[1] // chunk_size * chunk_size
        y[:, whole:] = 0
    return y, h


def _all_at_once(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return chunked_scan(u, delta, A, B, C, h, u.shape[1])


_SMALL = "no tensor of all tokens, channels and states"
_WHOLE = (
    "A tensor of all N tokens with all their states was made: the chunk alone needs them. Slice first, then "
    "discretise."
)


def _watched(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(3)
    n, e, s, chunk = 128, 6, 4, 16
    arguments = (
        normal(rng, e, n), steps(rng, e, n), decays(rng, e, s), normal(rng, s, n), normal(rng, s, n),
        torch.zeros(e, s), chunk,
    )  # fmt: skip
    seen = watch(fn, *arguments)
    if seen.largest >= n * e * s:
        return f"with N = {n}, E = {e}, S = {s} a tensor of shape {seen.shape} was made"
    return None


#: Chunks of 32,768 numbers, which torch leaves to one thread: a thread's stack would count as memory.
_N, _E, _S, _CHUNK = 4096, 128, 16, 16
#: One tensor of all states takes 34 MB, and there are three; those of a chunk 130 kB each, y 2 MB.
_SPARE = 64 * 2**20


def _trial_inputs(rng: np.random.Generator) -> list[Case]:
    return [
        Case(
            _SMALL,
            {
                "u": normal(rng, _E, _N), "delta": steps(rng, _E, _N), "A": decays(rng, _E, _S),
                "B": normal(rng, _S, _N), "C": normal(rng, _S, _N), "h": torch.zeros(_E, _S), "chunk_size": _CHUNK,
            },
        )
    ]  # fmt: skip


def _trial_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        wide = {n: v.double() for n, v in outcome.case.kwargs.items() if isinstance(v, torch.Tensor)}
        for got, want in zip(outcome.values, reference_scan(**wide)):
            if got.shape != want.shape or not bool(((got - want).abs() <= 1e-3 * (1 + want.abs())).all()):
                return f"with N = {_N} and chunks of {_CHUNK} the results are wrong"
    return None


CHUNKED = Exercise(
    id="linear/selective_ssm/chunked_scan",
    title="the scan, a chunk at a time",
    signature="chunked_scan(u [E, N], delta [E, N], A [E, S], B [S, N], C [S, N], h [E, S], chunk_size) "
    "-> (y [E, N], h [E, S])",
    outputs=(Output("y", "u"), Output("h", "u")),
    make_inputs=_chunked_inputs,
    reference=reference_scan,
    solution=chunked_scan,
    from_scratch=FROM_SCRATCH,
    properties={
        "one chunk": "Inside a chunk: the maps, the scan of the maps, then each scanned map applied to "
        "the state that the "
        "chunk found.",
        "several chunks": "The state after a chunk's last token is what the next chunk finds.",
        "a ragged end": "The last chunk is shorter; slices take care of it.",
        "chunks of one token": "Nothing to scan: states = a h + b.",
        "one token": "One token, one chunk.",
        "an empty state": "With h = 0 the first chunk's states are its scanned b.",
        "strong decay": "Decays underflow to 0, which is right; whoever divides by them gets infinity.",
    },
    tolerance=Tolerance(
        5e-5, 5e-5, "up to 48 products in float32 added in another order than the reference; terms of size 5"
    ),
    loose={
        "strong decay": Tolerance(
            5e-5, 2e-3, "delta u B is about 20 here, 16 such terms may cancel: rounded to 3e-4 of that"
        )
    },
    probes=(Probe(_SMALL, _watched, _WHOLE, Trial(_trial_inputs, _trial_judge, memory_bytes=_SPARE)),),
    mutants=(
        *mutants(
            _chunked_fault,
            {
                "B without delta": "The write lacks delta: b = delta u B.",
                "the exact rule": "b comes from the exact rule, (exp(delta A) - 1) / A. Here it is the code's: b = "
                "delta u B.",
                "the exact rule without u": "u is missing in b, and the rule is the exact one; here b = delta u B.",
                "u forgotten": "u is missing in b: the map of a token is h -> a h + delta u B.",
                "border forgotten": "states = b is what the chunk's own tokens leave, from an empty state. What "
                "stood before the chunk is missing: a h + b.",
                "decay off by one": "A token is decayed by its own step already when it is written: b is "
                "delta u B, "
                "without the decay.",
                "decay of the token before": "A token decays the state by its own step, not by that of "
                "the token before.",
                "divided decays": "b is divided by the product of the decays so far: that product "
                "underflows to 0, and "
                "the quotient is infinite. The scan needs products only.",
                "border not decayed": "What came before the chunk decays inside it too: states = a h + b "
                "with the scanned "
                "a.",
                "border decayed by the whole chunk": "Each token sees the border state through its own "
                "product of decays, "
                "a[t], not through that of the whole chunk.",
                "read before the write": "y[t] reads the state before token t is written: a token sees "
                "itself.",
                "chunk boundary lost": "The state starts anew in every chunk: what came before is "
                "forgotten at its "
                "border. Hand on states[-1].",
                "first state kept": "Every chunk starts from the state given at the beginning; hand on "
                "states[-1].",
                "border without the past": "The chunk hands on its own writes alone, b[-1]; the state "
                "after it is "
                "a[-1] h + b[-1].",
                "last chunk dropped": "The last, shorter chunk is never computed.",
            },
        ),
        Mutant("all at once", _all_at_once, _WHOLE),
    ),
    hints=(
        "A loop over chunks. Inside: a and b for this chunk's tokens only, rounds of double() with step "
        "1, 2, 4, ..., "
        "then states, y, and the new h.",
        "Time first makes it easy: u_c = u[:, i : i + chunk_size].T is [C, E], and a = exp(delta_c[:, :, "
        "None] * A) is "
        "[C, E, S]. After the rounds states = a * h + b.",
        "a, b = torch.exp(d_c[:, :, None] * A), (d_c * u_c)[:, :, None] * B_c[:, None, :]\n"
        "step = 1\nwhile step < len(a):\n    a, b = double(a, b, step)\n    step *= 2\n"
        "states = a * h + b\n... y of the chunk is (states * C_c[:, None, :]).sum(-1).T, and h = states[-1]",
    ),
)
