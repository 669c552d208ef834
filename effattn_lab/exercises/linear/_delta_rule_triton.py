"""Exercise: the triangular system, solved in a Triton kernel's registers. Importing this does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.linear._delta_rule_chunks import _forward_reference
from effattn_lab.exercises.linear._delta_rule_token import FROM_SCRATCH, rates, unit
from effattn_lab.exercises.making import mutants, normal

_SOLUTION = "effattn_lab.exercises.linear._delta_rule_triton_solution"


def delta_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, scale: float, chunk_size: int = 16
) -> torch.Tensor:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.linear._delta_rule_triton_solution import delta_triton as launch

    return launch(q, k, v, beta, scale, chunk_size)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, scale: float, **_: Any
) -> tuple[torch.Tensor, ...]:
    return (_forward_reference(q, k, v, beta, torch.zeros_like(beta), scale, 1)[0],)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, *, hq: int = 1, hkv: int = 1, batch: int = 1, dv: int = 16, scale: float = 0.25,
        dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        q, k, v = normal(rng, batch, hq, n, 16), unit(rng, batch, hkv, n, 16), normal(rng, batch, hkv, n, dv)
        beta = rates(rng, batch, hkv, n)
        return Case(
            name,
            {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "beta": beta.to(dtype), "scale": scale},
        )

    return [
        case("equals token by token", 40),
        case("one chunk", 16),
        case("length 1", 1),
        case("grouped heads, more values than keys", 20, hq=2, dv=32),
        case("half-precision inputs", 36, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.linear._delta_rule_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, scale: float
) -> torch.Tensor:
    return _reference(q, k, v, beta, scale)[0]


_N, _D = 96, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    return {
        "q": normal(rng, 1, 1, _N, _D),
        "k": unit(rng, 1, 1, _N, _D),
        "v": normal(rng, 1, 1, _N, _D),
        "beta": rates(rng, 1, 1, _N),
        "scale": 0.3,
    }


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    shape = (1, 1, 32, 64)
    half = {"q": normal(rng, *shape).half(), "k": unit(rng, *shape).half(), "v": normal(rng, *shape).half()}
    return {**half, "beta": rates(rng, *shape[:3]).half(), "scale": 0.3}


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call delta_kernel[grid](...) with your lines in it."
)

TRITON_FORWARD = Exercise(
    id="linear/delta_rule/triton_forward",
    title="a Triton kernel that solves in registers",
    signature="delta_triton(q [B, Hq, N, D], k, v, beta [B, Hkv, N], scale) -> out [B, Hq, N, V]",
    outputs=(Output("out", "q"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=delta_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("delta_kernel", "delta_triton", lambda: launcher(_SOLUTION, "delta_triton")),
    properties={
        "equals token by token": "x is R first: beta times what the state's answer lacks. Then, for each row j in "
        "turn, "
        "take column j of lower times row j of x away from x.",
        "one chunk": "With an empty state R = beta V: if this is right and longer sequences are not, look at the "
        "state's "
        "answer, tl.dot(k, s).",
        "length 1": "One token in a chunk of 16: the rows past the end have beta 0 and write nothing.",
        "grouped heads, more values than keys": "The pointers are moved to the right heads for you.",
        "half-precision inputs": "x and lower stay in float32. Only operands of a tl.dot want one type: "
        "s.to(k.dtype).",
    },
    tolerance=Tolerance(
        1e-4,
        1e-4,
        "40 tokens of steps off by 1e-6 each, and mirrored states keep errors; a float32 tl.dot rounded to TF32 "
        "is off "
        "by 1e-3 and is rejected.",
    ),
    loose={
        "half-precision inputs": Tolerance(
            1e-2,
            4e-2,
            "the state and the writes are rounded to fp16 for every product, 5e-4 of a size of 4, 36 times.",
        )
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="delta_kernel",
        loads_bytes=(3 * _N * _D + _N) * 4,
        flops=4 * _N * _D * _D,
        stores_bytes=_N * _D * 4,
        largest=_N * _N - 1,
        compiled=_compiled,
        hints={
            RAN: _NO_KERNEL,
            STORED: "More is stored than the outputs: system, solution and state live in registers.",
        },
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "inclusive triangle": "lower has a diagonal: a finished row is taken out of itself. Only rows below: "
                "rows[:, None] > rows[None, :].",
                "not solved": "x is R as it is: the tokens of a chunk do not see each other's writes.",
                "one term of the series": "lower @ x uses the given rows where the finished ones belong. One row "
                "at a "
                "time.",
                "stops early": "The last row but one is never taken out of the last: j runs to C - 2 inclusive.",
                "state not asked": "The answer of the state, tl.dot(k, s), is missing: only the first chunk is "
                "right.",
                "beta on the value only": "beta scales v but not the answer: x = beta * (v - answer).",
                "no beta in R": "beta is missing in x: R is beta times what the state's answer lacks. The beta in "
                "lower does not reach it.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: LAST is one."}
        ),
    ),
    hints=(
        "The same rows as in step 3, from the other side: once row j is finished, take it out of all rows below "
        "at once.",
        "A tile cannot be indexed. Row j: tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0). Column j likewise, with "
        "rows[None, :] and axis 1.",
        "x = beta * (v - tl.dot(k, s.to(k.dtype), input_precision='ieee'))\nfor j in range(0, C - 1):\n"
        "    done = tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)\n"
        "    column = tl.sum(tl.where(rows[None, :] == j, lower, 0.0), 1)\n    x -= column[:, None] * done[None, :]",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
