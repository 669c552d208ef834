"""Exercise: the body of a Triton kernel that scans. Importing this module does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.linear._selective_ssm_parts import FROM_SCRATCH, decays, steps
from effattn_lab.exercises.making import mutants, normal

_SOLUTION = "effattn_lab.exercises.linear._selective_ssm_triton_solution"


def ssm_triton(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    block: int = 32,
) -> torch.Tensor:  # fmt: skip
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.linear._selective_ssm_triton_solution import ssm_triton as launch

    return launch(u, delta, A, B, C, D, block)


def _reference(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    h, rows = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, None, :] * A) * h + B[:, t, :, None] * (delta * u)[:, t, None, :]
        rows.append((h * C[:, t, :, None]).sum(1) + D * u[:, t])
    return (torch.stack(rows, dim=1),)


def _draw(rng: np.random.Generator, batch: int, n: int, e: int, s: int, **span: float) -> dict[str, Value]:
    return {
        "u": normal(rng, batch, n, e), "delta": steps(rng, batch, n, e, **span),
        "A": decays(rng, e, s).T.contiguous(),
        "B": normal(rng, batch, n, s), "C": normal(rng, batch, n, s), "D": normal(rng, e) + 1.0,
    }  # fmt: skip


def _half(values: dict[str, Value]) -> dict[str, Value]:
    """u, delta, B and C in fp16; A and D stay in float32, as in a model."""
    return {n: v.half() if isinstance(v, torch.Tensor) and n not in "AD" else v for n, v in values.items()}


def _inputs(rng: np.random.Generator) -> list[Case]:
    slow = {"low": 0.005, "high": 0.3}
    return [
        Case("equals the recurrence", _draw(rng, 1, 24, 16, 4, **slow)),
        Case("one token", _draw(rng, 1, 1, 16, 4)),
        Case("channels not a multiple of the block", _draw(rng, 1, 6, 40, 2, **slow)),
        Case("batch", _draw(rng, 2, 6, 8, 4, **slow)),
        Case("strong decay", _draw(rng, 1, 12, 8, 16, low=5.0, high=20.0)),
        Case("half-precision inputs", _half(_draw(rng, 1, 24, 16, 4, **slow))),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.linear._selective_ssm_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor
) -> torch.Tensor:
    wide = (x.float() for x in (u, delta, A, B, C, D))
    return _reference(*wide)[0].to(u.dtype)


_N, _E, _S = 32, 32, 8


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    return _draw(rng, 1, _N, _E, _S)


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    return _half(_draw(rng, 1, 4, 64, 16))


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call ssm_kernel[grid](...) with your lines in it."
)

_LAYOUT = (
    "Here states are rows and channels are columns: B and C, vectors over states, need [:, None]; delta and u, over "
    "channels, need [None, :]; and y sums over the rows."
)

TRITON_SCAN = Exercise(
    id="linear/selective_ssm/triton_scan",
    title="a Triton kernel that scans",
    signature="ssm_triton(u [B, N, E], delta [B, N, E], A [S, E], B [B, N, S], C [B, N, S], D [E]) -> y "
    "[B, N, E]",
    outputs=(Output("y", "u"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=ssm_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("ssm_kernel", "ssm_triton", lambda: launcher(_SOLUTION, "ssm_triton"), _LAYOUT),
    properties={
        "equals the recurrence": "Your step of one token: h, then y. h is [S, BLOCK]: states are its rows.",
        "one token": "h starts at 0: y = (C . B) delta u + D u.",
        "channels not a multiple of the block": "Channels past the end were loaded as 0 and are not "
        "stored: nothing to do.",
        "batch": "The pointers stand at the right sequence already.",
        "strong decay": "exp(delta A) underflows to 0, which is right.",
        "half-precision inputs": "Everything is float32 after the loads, and so must h stay.",
    },
    tolerance=Tolerance(
        5e-5, 5e-5, "up to 24 products in float32, added in the same order as the reference; of size 5"
    ),
    loose={
        "strong decay": Tolerance(5e-5, 2e-3, "delta u B is about 20 here, 16 such terms may cancel"),
        "half-precision inputs": Tolerance(
            2e-3,
            1e-3,
            "y is rounded to fp16, 5e-4 of its size; a state rounded at each token loses several times that",
        ),
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="ssm_kernel",
        loads_bytes=4 * (2 * _N * _E + 2 * _N * _S + _E * _S),
        flops=0,
        stores_bytes=4 * _N * _E,
        largest=_N * _E * _S - 1,
        compiled=_compiled,
        hints={
            RAN: _NO_KERNEL,
            STORED: "More is stored than the outputs. The state lives in registers: it need not be "
            "written for every "
            "token.",
        },
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "B without delta": "The write lacks delta: B[:, None] * (delta * u)[None, :].",
                "B and C swapped": "B and C have changed places: B writes, C reads.",
                "A without delta": "The decay is exp(delta A), not exp(A).",
                "base 2": "tl.exp2 is used on a natural exponent: use tl.exp, or multiply A by 1/ln 2 first.",
                "decayed after the write": "The new token is decayed as well: decay the old h, then write.",
                "past forgotten": "h is overwritten: the old h, decayed, belongs into the sum.",
                "state in half": "h is rounded to fp16 at each token: three digits are left. Keep it in "
                "float32.",
                "read before the write": "y is read from the old h: a token sees itself. Write first.",
                "skip missing": "The skip D u is missing in y.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: FACTOR is one."}
        ),
    ),
    hints=(
        "Two lines: h and y, as in your step of one token. Only the axes differ: states are the rows of h.",
        "delta[None, :] * A is [S, BLOCK]. The write is B[:, None] times (delta * u)[None, :]. For y, "
        "multiply h by "
        "C[:, None] and sum over axis 0 with tl.sum.",
        "h = tl.exp(delta[None, :] * A) * h + ...\ny = tl.sum(h * C[:, None], 0) + ...",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
