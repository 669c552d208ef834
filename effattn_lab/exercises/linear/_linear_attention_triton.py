"""Exercise: the loop of a Triton kernel that carries the state. Importing this module does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.linear._linear_attention_chunks import INSIDE
from effattn_lab.exercises.linear._linear_attention_parts import FROM_SCRATCH, positive
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.foundations.attention import repeat_kv

_SOLUTION = "effattn_lab.exercises.linear._linear_attention_triton_solution"


def linear_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, chunk_size: int = 16
) -> torch.Tensor:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.linear._linear_attention_triton_solution import linear_triton as launch

    return launch(q, k, v, scale, chunk_size)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, **_: Any
) -> tuple[torch.Tensor, ...]:
    groups = q.shape[1] // k.shape[1]
    return (scale * (q @ repeat_kv(k, groups).transpose(-1, -2)).tril() @ repeat_kv(v, groups),)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, *, hq: int = 1, hkv: int = 1, batch: int = 1, f: int = 16, dv: int = 16,
        scale: float = 0.25, size: float = 1.0, dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        q, k = positive(rng, batch, hq, n, f, size=size), positive(rng, batch, hkv, n, f, size=size)
        v = normal(rng, batch, hkv, n, dv)
        return Case(name, {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "scale": scale})

    return [
        case("equals the masked square", 48),
        case("length not a multiple of the chunk", 37),
        case("length 1", 1),
        case("scale", 20, scale=0.7),
        case("batch and grouped heads", 20, batch=2, hq=4, hkv=2),
        case("more features than values", 33, f=32),
        case("half-precision inputs", 40, size=0.5, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.linear._linear_attention_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return _reference(q, k, v, scale)[0]


_N, _D = 96, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    return {
        "q": positive(rng, 1, 1, _N, _D),
        "k": positive(rng, 1, 1, _N, _D),
        "v": normal(rng, 1, 1, _N, _D),
        "scale": 0.3,
    }


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    shape = (1, 1, 32, 64)
    return {
        "q": normal(rng, *shape).half(),
        "k": normal(rng, *shape).half(),
        "v": normal(rng, *shape).half(),
        "scale": 0.3,
    }


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call linear_kernel[grid](...) with your loop in it."
)

TRITON_FORWARD = Exercise(
    id="linear/linear_attention/triton_forward",
    title="a Triton kernel that carries the state",
    signature="linear_triton(q [B, Hq, N, F], k [B, Hkv, N, F], v [B, Hkv, N, V], scale) -> out [B, Hq, N, V]",
    outputs=(Output("out", "q"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=linear_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("linear_kernel", "linear_triton", lambda: launcher(_SOLUTION, "linear_triton")),
    properties={
        "equals the masked square": "The body is your chunk without the denominator: inside, out, then s. On a "
        "GPU, tl.dot rounds float32 to TF32 unless input_precision='ieee'.",
        "length not a multiple of the chunk": "Rows past the end were loaded as 0, and here a 0 is harmless: "
        "it adds nothing to any sum.",
        "length 1": "One token in a chunk of 16.",
        "scale": "out is multiplied by scale, once.",
        "batch and grouped heads": "The pointers are moved to the right heads for you.",
        "more features than values": "s is [F, V]: features are its rows.",
        "half-precision inputs": "tl.dot wants both operands in one type: s.to(q.dtype), inside.to(v.dtype). s "
        "itself stays in float32.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "float32 products and sums in another order; a float32 tl.dot rounded to TF32, or a state kept in "
        "fp16, is off by 1e-3 and is rejected.",
    ),
    loose={
        "half-precision inputs": Tolerance(
            4e-3,
            2e-2,
            "weights of about 1 and the state are rounded to fp16, 3e-4 of their size; 40 terms of either sign "
            "add up to a standard error of 4e-3, where the sum may cancel.",
        )
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="linear_kernel",
        loads_bytes=3 * _N * _D * 4,
        flops=4 * _N * _D * _D,
        stores_bytes=_N * _D * 4,
        largest=_N * _N - 1,
        compiled=_compiled,
        hints={
            RAN: _NO_KERNEL,
            STORED: "More is stored than the outputs. The state lives in registers: it need not be written for "
            "every chunk.",
        },
    ),
    mutants=(
        *mutants(
            _fault,
            {
                **INSIDE,
                "chunk boundary lost": "The state starts anew in every chunk: what came before is forgotten at "
                "its border. Use s +=.",
                "past forgotten": "The past is missing: s is never read (tl.dot of q and s), or never added to.",
                "scale forgotten": "out is not multiplied by scale.",
                "heads tiled": "Query head h reads key head h % Hkv; it should be h // groups.",
                "state in half": "s is rounded to fp16 on the way: three digits are left. Keep it in float32.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: FACTOR is one."}
        ),
    ),
    hints=(
        "Four lines of your chunk, without the denominator: the masked square, what the state adds, the "
        "output, the state.",
        "tl.dot for @, tl.trans(k) for k^T, and tl.where(rows[:, None] >= rows[None, :], inside, 0.0) for "
        "tril. Read s before you add to it. Operands of a tl.dot have one type: cast the float32 one.",
        "inside = tl.dot(q, tl.trans(k), input_precision='ieee')\n"
        "inside = tl.where(rows[:, None] >= rows[None, :], inside, 0.0)\n"
        "out = tl.dot(q, s.to(q.dtype), input_precision='ieee')\n"
        "out += tl.dot(inside.to(v.dtype), v, input_precision='ieee')\n... the scale, then s += k^T v",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
