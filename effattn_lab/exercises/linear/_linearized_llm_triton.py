"""Exercise: the convolution as a band matrix, in a Triton kernel. Importing this module does not import triton."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.linear._linearized_llm_parts import FROM_SCRATCH
from effattn_lab.exercises.linear._tf32 import ON_A_GPU
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.foundations.attention import repeat_kv

_SOLUTION = "effattn_lab.exercises.linear._linearized_llm_triton_solution"


def conv_triton(v: torch.Tensor, weight: torch.Tensor, chunk_size: int = 16) -> torch.Tensor:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.linear._linearized_llm_triton_solution import conv_triton as launch

    return launch(v, weight, chunk_size)


def _reference(v: torch.Tensor, weight: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
    """Lag by lag."""
    x, n = repeat_kv(v, weight.shape[0] // v.shape[1]), v.shape[2]
    out = torch.zeros_like(x)
    for lag in range(min(weight.shape[1], n)):
        out = out + weight[:, lag, None, None] * F.pad(x, (0, 0, lag, 0))[:, :, :n]
    return (out,)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str,
        n: int,
        lags: int,
        *,
        hq: int = 1,
        hkv: int = 1,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Case:
        return Case(
            name, {"v": normal(rng, batch, hkv, n, 16).to(dtype), "weight": normal(rng, hq, lags).to(dtype)}
        )

    return [
        case("equals the sum over lags", 48, 9),
        case("length not a multiple of the chunk", 37, 9),
        case("length 1", 1, 4),
        case("more lags than a chunk has tokens", 40, 30),
        case("one lag", 20, 1),
        case("batch and grouped heads", 20, 5, batch=2, hq=4, hkv=2),
        case("half-precision inputs", 40, 9, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.linear._linearized_llm_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _reference(v, weight)[0]


_N, _D, _L = 96, 16, 9


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    return {"v": normal(rng, 1, 1, _N, _D), "weight": normal(rng, 1, _L)}


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    return {"v": normal(rng, 1, 1, 32, 64).half(), "weight": normal(rng, 1, _L).half()}


_NO_KERNEL = "The result comes from PyTorch, not from a kernel: call conv_kernel[grid](...) with your two "
"products in it."

TRITON_CONV = Exercise(
    id="linear/linearized_llm/triton_conv",
    title="the convolution as two matrix products in a Triton kernel",
    signature="conv_triton(v [B, Hkv, N, D], weight [Hq, L]) -> y [B, Hq, N, D]",
    outputs=(Output("y", "v"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=conv_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("conv_kernel", "conv_triton", lambda: launcher(_SOLUTION, "conv_triton")),
    properties={
        "equals the sum over lags": "y = band @ v + band' @ v_before, each band loaded from the weights by lag."
        + ON_A_GPU,
        "length not a multiple of the chunk": "Rows past the end were loaded as 0, and a 0 is harmless here.",
        "length 1": "One token in a chunk of 16; the weights are 4. Where lag < LAGS does not hold, nothing may be "
        "read.",
        "more lags than a chunk has tokens": "SIDE is at least LAGS - 1: the values before the chunk are all there.",
        "one lag": "Nothing before the chunk is reached.",
        "batch and grouped heads": "The pointers are moved to the right heads for you.",
        "half-precision inputs": "The weights come in the dtype of the values, and tl.dot adds up in float32.",
    },
    tolerance=Tolerance(
        2e-5, 3e-5, "at most 30 products in float32 in another order; rounded to TF32 they are off by 1e-3."
    ),
    loose={
        "half-precision inputs": Tolerance(
            2e-3,
            2e-3,
            "products of fp16 numbers are exact in float32; the output, up to 10, is rounded to fp16.",
        )
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="conv_kernel",
        loads_bytes=_N * _D * 4,
        flops=2 * _N * 16 * _D,
        stores_bytes=_N * _D * 4,
        largest=8 * _N * _D,
        compiled=_compiled,
        hints={RAN: _NO_KERNEL, STORED: "More is stored than the outputs: the bands live in registers."},
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "symmetric": "The band has both sides: a token reads later tokens of its chunk. That is the leak.",
                "band transposed": "The band is transposed: every token reads the later ones. The lag is row minus "
                "column.",
                "token itself dropped": "The diagonal is missing: lag 0 is the token itself.",
                "one lag too many": "Lags run from 0 to LAGS - 1; lag LAGS reads a weight that does not exist.",
                "chunk boundary lost": "The values before the chunk are never multiplied: the first tokens of "
                "a chunk "
                "miss their past.",
                "before one off": "The lag to the values before the chunk is one too small: side counts from "
                "-SIDE to "
                "-1.",
                "one kernel for all heads": "Every head reads the first head's weights.",
            },
        ),
        Mutant(
            "later tokens read",
            partial(_fault, "later tokens read"),
            "Weights are read that do not exist: lags below 0, of later tokens. NaN lies there, on a GPU anything. "
            "The mask is (lag >= 0) & (lag < LAGS); Python's `and` in place of & keeps one of the two.",
            (partial(_fault, "later tokens read, and no second mask"), partial(_fault, "no mask")),
        ),
        Mutant(
            "lags without a weight",
            partial(_fault, "no second mask"),
            "Weights are read that do not exist: lags of LAGS and more. NaN lies there, on a GPU anything. Both "
            "bands need the mask lag < LAGS.",
            (partial(_fault, "no first mask"),),
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: FACTOR is one."}
        ),
    ),
    hints=(
        "Two bands: chunk by chunk, [CHUNK, CHUNK], and chunk by what lies before it, [CHUNK, SIDE]. Entry (row, "
        "column) is the weight of the lag between them.",
        "lag = rows[:, None] - rows[None, :] for the first, rows[:, None] - side[None, :] for the second. Load "
        "w_ptr + lag where that weight exists, 0 elsewhere, and tl.dot each band with its values.",
        "lag = rows[:, None] - rows[None, :]\n"
        "band = tl.load(w_ptr + lag, mask=(lag >= 0) & (lag < LAGS), other=0.0)\n"
        "y = tl.dot(band, v, input_precision='ieee')\n"
        "lag = rows[:, None] - side[None, :]\n... the same with mask lag < LAGS and v_before, added to y",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
