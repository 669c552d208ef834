"""Exercise: the loop of a Triton kernel whose state decays. Importing this module does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.linear._gated_linear_forward import forward_reference
from effattn_lab.exercises.linear._gated_linear_parts import FROM_SCRATCH, decays
from effattn_lab.exercises.linear._tf32 import ON_A_GPU
from effattn_lab.exercises.making import mutants, normal

_SOLUTION = "effattn_lab.exercises.linear._gated_linear_triton_solution"


def gated_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, chunk_size: int = 16
) -> torch.Tensor:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.linear._gated_linear_triton_solution import gated_triton as launch

    return launch(q, k, v, g, scale, chunk_size)


def _reference(**inputs: Any) -> tuple[torch.Tensor, ...]:
    return forward_reference(**inputs)[:1]


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, *, hq: int = 1, hkv: int = 1, batch: int = 1, k: int = 16, v: int = 16,
        scale: float = 0.25, low: float = -0.5, dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        return Case(name, {
            "q": normal(rng, batch, hq, n, k).to(dtype), "k": normal(rng, batch, hkv, n, k).to(dtype),
            "v": normal(rng, batch, hkv, n, v).to(dtype), "g": decays(rng, batch, hkv, n, low=low), "scale": scale,
        })  # fmt: skip

    return [
        case("equals token after token", 48),
        case("length not a multiple of the chunk", 37),
        case("length 1", 1),
        case("strong decay", 40, low=-40.0),
        case("batch and grouped heads", 20, batch=2, hq=4, hkv=2, scale=0.7),
        case("more channels than values", 33, k=32),
        case("half-precision inputs", 40, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.linear._gated_linear_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float
) -> torch.Tensor:
    return _reference(q=q, k=k, v=v, g=g.to(q.dtype), scale=scale)[0]


_N, _D = 96, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    made: dict[str, Value] = {name: normal(rng, 1, 1, _N, _D) for name in "qkv"}
    return {**made, "g": decays(rng, 1, 1, _N), "scale": 0.3}


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    made: dict[str, Value] = {name: normal(rng, 1, 1, 32, 64).half() for name in "qkv"}
    return {**made, "g": decays(rng, 1, 1, 32), "scale": 0.3}


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call gated_kernel[grid](...) with your loop in it."
)

TRITON_FORWARD = Exercise(
    id="linear/gated_linear/triton_forward",
    title="a Triton kernel whose state decays",
    signature="gated_triton(q [B, Hq, N, K], k [B, Hkv, N, K], v [B, Hkv, N, V], g [B, Hkv, N], scale) -> out",
    outputs=(Output("out", "q"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=gated_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("gated_kernel", "gated_triton", lambda: launcher(_SOLUTION, "gated_triton")),
    properties={
        "equals token after token": "The body is your chunk: the square with its decays, what the state adds, the "
        "scale, the state." + ON_A_GPU,
        "length not a multiple of the chunk": "Rows past the end were loaded as 0, log decays too: no decay. "
        "Nothing has to "
        "be masked for them.",
        "length 1": "One token in a chunk of 16.",
        "strong decay": "Above the diagonal the exponent is positive: put -inf there before you take exp. And never "
        "divide by a decay.",
        "batch and grouped heads": "The pointers are moved to the right heads for you; out is multiplied by "
        "scale, once.",
        "more channels than values": "s is [K, V]: channels are its rows.",
        "half-precision inputs": "tl.dot wants both operands in one type: s.to(q.dtype), inside.to(v.dtype), and the "
        "decayed keys .to(v.dtype). s itself stays in float32.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "float32 products and sums in another order, decays from differences of sums up to 300 (3e-5 off at "
        "worst, where "
        "they no longer count); a float32 tl.dot rounded to TF32 is off by 1e-3 and is rejected.",
    ),
    loose={
        "half-precision inputs": Tolerance(
            4e-3,
            1e-2,
            "scores, decayed keys and the state are rounded to fp16, 3e-4 of their size; 40 terms of either sign "
            "add up "
            "to a standard error of 3e-3, where the sum may cancel.",
        )
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="gated_kernel",
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
                "leaky mask": "The square inside the chunk is not masked: a token sees later tokens of its chunk.",
                "divided by the running product": "Keys are divided by the running product of decays: it "
                "underflows, and "
                "0 * inf is NaN. Take exp of differences of sums.",
                "decay off by one": "Off by one: key j's own decay counts inside the chunk. It acted before j was "
                "written.",
                "keys undecayed": "Each key is written into s as if it were the last of its chunk: multiply by "
                "exp(total - up).",
                "keys off by one": "Off by one: a key is written into s with its own decay on it. That acted before "
                "the key was written: exp(total - up), without g.",
                "keys decayed by their own g": "Each key is written into s times exp(g), its own decay. What counts "
                "is what comes after it in the chunk: exp(total - up).",
                "read undecayed": "q reads the state as the chunk found it: multiply by exp(up).",
                "read off by one": "Off by one: the state that a query reads has decayed by the query's own g, too: "
                "exp(up), not exp(up - g).",
                "scale forgotten": "out is not multiplied by scale.",
                "scaled before the square is added": "Only what comes from the state is multiplied by scale: the "
                "chunk's own part needs it as well.",
                "state undecayed": "s is handed on undecayed: multiply by exp(total).",
                "chunk boundary lost": "The state starts anew in every chunk: add to the decayed s.",
                "written before read": "The chunk's keys are in s before its queries read it: they count twice, "
                "and later "
                "ones leak.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: FACTOR is one."}
        ),
    ),
    hints=(
        "Your chunk, with one decay for all channels: up = tl.cumsum(g, 0) leads from the border to each token, "
        "total = "
        "tl.sum(g, 0) to the end.",
        "Inside: up[:, None] - up[None, :], -inf above the diagonal, tl.exp, times tl.dot(q, tl.trans(k)). The past: "
        "tl.dot(q, s) times exp(up). The state: exp(total) * s + (k exp(total - up))^T v.",
        "up, total = tl.cumsum(g, 0), tl.sum(g, 0)\n"
        'apart = tl.where(rows[:, None] >= rows[None, :], up[:, None] - up[None, :], float("-inf"))\n'
        'inside = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.exp(apart)\n'
        'out = tl.dot(q, s.to(q.dtype), input_precision="ieee") * tl.exp(up)[:, None]\n'
        'out += tl.dot(inside.to(v.dtype), v, input_precision="ieee")\n'
        "... the scale, then s",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
