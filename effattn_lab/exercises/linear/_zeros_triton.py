"""Exercise: a Triton kernel that sums three states in one pass. Importing this module does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.linear._tf32 import ON_A_GPU
from effattn_lab.exercises.linear._zeros_states import State, unit
from effattn_lab.exercises.linear._zeros_weights import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal

_SOLUTION = "effattn_lab.exercises.linear._zeros_triton_solution"


def zeros_triton(k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, chunk_size: int = 16) -> State:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.linear._zeros_triton_solution import zeros_triton as launch

    found: State = launch(k, v, s, chunk_size)
    return found


def _reference(k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, **_: Any) -> State:
    """All tokens at once, measured from their maximum."""
    m = s.amax(dim=-1)
    s = s - m[..., None]
    kt, w = k.transpose(-1, -2), torch.exp(s)
    return (
        (kt * w[..., None, :]) @ v, (kt * s[..., None, :]) @ v, kt @ v, w.sum(dim=-1), s.sum(dim=-1), m,
    )  # fmt: skip


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, *, heads: int = 1, batch: int = 1, d: int = 16, dv: int = 16,
        shift: float = 0.0, slope: float = 0.0, dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        k, v = unit(normal(rng, batch, heads, n, d)), normal(rng, batch, heads, n, dv)
        s = normal(rng, batch, heads, n) + shift + slope * torch.arange(n)
        return Case(name, {"k": k.to(dtype), "v": v.to(dtype), "s": s})

    return [
        case("equals the three sums", 48, slope=0.05),
        case("length not a multiple of the chunk", 37),
        case("length 1", 1),
        case("logits that rise", 33, slope=15.0),
        case("logits that fall", 33, slope=-0.2, shift=-5.0),
        case("batch and heads", 20, batch=2, heads=3),
        case("more dimensions than values", 33, d=32),
        case("half-precision inputs", 40, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.linear._zeros_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> State:
    return _reference(k.float(), v.float(), s)


_N, _D = 96, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    shape = (1, 1, _N, _D)
    return {"k": unit(normal(rng, *shape)), "v": normal(rng, *shape), "s": normal(rng, 1, 1, _N)}


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    shape = (1, 1, 32, 64)
    return {
        "k": unit(normal(rng, *shape)).half(),
        "v": normal(rng, *shape).half(),
        "s": normal(rng, 1, 1, 32),
    }


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call zeros_kernel[grid](...) with your loop in it."
)

TRITON_STATES = Exercise(
    id="linear/zeros/triton_states",
    title="a Triton kernel: three states in one pass",
    signature=(
        "zeros_triton(k [B, H, N, D], v [B, H, N, V], s [B, H, N]) -> (F, G, H [B, H, D, V], E, P, m [B, H]), float32"
    ),
    outputs=tuple(Output(name, "float32") for name in ("F", "G", "H", "E", "P", "m")),
    make_inputs=_inputs,
    reference=_reference,
    solution=zeros_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("zeros_kernel", "zeros_triton", lambda: launcher(_SOLUTION, "zeros_triton")),
    properties={
        "equals the three sums": "The last lines of your chunk: move the origin to the new maximum, then add "
        "k^T v with three weights." + ON_A_GPU,
        "length not a multiple of the chunk": "Rows past the end have k = 0, but a logit of -inf: -inf times 0 is "
        "NaN. tl.where(here, s - top, 0.0).",
        "length 1": "One token in a chunk of 16.",
        "logits that rise": "Each chunk's maximum is above the last one's: what was summed has to move.",
        "logits that fall": "The maximum stays that of the first chunk.",
        "batch and heads": "The pointers are moved to the right head for you.",
        "more dimensions than values": "F, G and H are [D, V]: the dimensions of k are their rows.",
        "half-precision inputs": "tl.dot wants both operands in one type: (k * w[:, None]).to(v.dtype). The sums "
        "stay in float32.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "float32 products and sums in another order; a float32 tl.dot rounded to TF32, or weights kept in "
        "fp16, is off by 3e-4 and is rejected.",
    ),
    loose={
        "logits that rise": Tolerance(
            5e-5,
            5e-3,
            "logits are measured from 480: G is a sum of numbers of that size, and where they cancel, of their "
            "rounding, 3e-5 each and 33 of them twice.",
        ),
        "half-precision inputs": Tolerance(
            4e-3,
            1e-2,
            "weighted keys are rounded to fp16, 5e-4 of numbers of size 1/4 to 1; 40 terms add up to 2e-3.",
        ),
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="zeros_kernel",
        loads_bytes=(2 * _N * _D + _N) * 4,
        flops=6 * _N * _D * _D,
        stores_bytes=3 * (_D * _D + 1) * 4,
        largest=_N * _N - 1,
        compiled=_compiled,
        hints={
            RAN: _NO_KERNEL,
            STORED: "More is stored than the results. The sums live in registers: they need not be written for "
            "every chunk.",
        },
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "chunk boundary lost": "The states start anew in every chunk: use f = ... * f + ..., g += and "
                "h +=.",
                "F not faded": "When the maximum moves from m to top, the old f is multiplied by e^(m - top).",
                "G not moved": "When the maximum moves from m to top, the old g gains (m - top) h.",
                "G moved after H": "g is moved with an h that holds this chunk's tokens already; their logits "
                "are measured from top as they are. Take the old h.",
                "P not moved": "When the maximum moves, p gains (m - top) for each of the `first` tokens before.",
                "P moved by the chunk": "p gains (m - top) for each token before this chunk: there are `first` of "
                "them, not CHUNK.",
                "E not faded": "When the maximum moves from m to top, the old e is multiplied by e^(m - top), "
                "as f is.",
                "m not kept": "m is never set to top: the next chunk moves what has been moved already, and the "
                "result is measured from elsewhere than its m says. End with m = top.",
                "F without the exponential": "f is summed with s itself. Its weights are e^(s - top).",
                "maximum of the chunk alone": "The maximum of this chunk alone is taken: it may be below that of "
                "an earlier one. tl.maximum(m, ...).",
                "rows past the end": "Rows past the end have the logit -inf and the key 0, and -inf times 0 is "
                "NaN: use tl.where(here, s - top, 0.0).",
                "weights in half": "The weights are rounded to fp16 on the way: three digits are left.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: LOWEST is one."}
        ),
    ),
    hints=(
        "New maximum; weights from it; three sums, of which two have to move first; two scalars; m = top.",
        "top = tl.maximum(m, tl.max(s, 0)); w = tl.exp(s - top); s = tl.where(here, s - top, 0.0). f is "
        "multiplied by e^(m - top), g gains (m - top) * h, before anything is added.",
        "f = tl.exp(m - top) * f + tl.dot(tl.trans((k * w[:, None]).to(v.dtype)), v, input_precision='ieee')\n"
        "g += (m - top) * h + tl.dot(tl.trans((k * s[:, None]).to(v.dtype)), v, input_precision='ieee')\n"
        "h += tl.dot(tl.trans(k), v, input_precision='ieee')\ne = tl.exp(m - top) * e + tl.sum(w, 0)\n"
        "p += (m - top) * first + tl.sum(s, 0)\nm = top",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
