"""Exercise: bounds of pages in a Triton kernel. Importing this does not import triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import (
    Case,
    Exercise,
    Kernel,
    Mutant,
    Outcome,
    Output,
    Probe,
    Tolerance,
    Trial,
    Value,
)
from effattn_lab.exercises.kernels import (
    RAN,
    STORED,
    counted,
    device,
    launcher,
    probes,
    require_triton,
    source,
)
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._quest_pages import FROM_SCRATCH, bounds_reference

_SOLUTION = "effattn_lab.exercises.sparse._quest_triton_solution"


def bounds_triton(k: torch.Tensor, page: int, block: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.sparse._quest_triton_solution import bounds_triton as launch

    return launch(k, page, block)


def _reference(k: torch.Tensor, page: int, **_: Any) -> tuple[torch.Tensor, ...]:
    return bounds_reference(k, page)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, page: int, *, batch: int = 1, heads: int = 1, shift: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        return Case(name, {"k": (normal(rng, batch, heads, n, 16) + shift).to(dtype), "page": page})

    return [
        case("whole pages", 64, 16),
        case("keys all positive", 32, 8, shift=6.0),
        case("keys all negative", 32, 8, shift=-6.0),
        case("a last page that is not full", 21, 8, shift=6.0),
        case("a last page that is not full", 21, 8, shift=-6.0),
        case("one token", 1, 16),
        case("pages of one token", 5, 1),
        case("more pages than a tile", 70, 4),
        case("batch and heads", 20, 8, batch=2, heads=2),
        case("half-precision inputs", 40, 16, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.sparse._quest_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(*args: Any) -> tuple[torch.Tensor, ...]:
    return _reference(*args)


_N, _D, _P = 128, 16, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    return {"k": normal(rng, 1, 1, _N, _D), "page": _P}


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    return {"k": normal(rng, 1, 1, 128, 64).half(), "page": _P}


_ONCE = "each key is loaded once"
_TWICE = "More is loaded than the keys: load each once, with a mask (rows past the last page have no tokens either)."


def _loads_once(fn: Callable[..., Any]) -> str | None:
    moved = counted(fn, _sample).loads_bytes
    return None if moved <= 4 * _N * _D else f"{moved} bytes are loaded; the keys have {4 * _N * _D}"


def _loaded_once(outcomes: Sequence[Outcome]) -> str | None:
    moved = outcomes[0].loads_bytes
    return None if moved <= 4 * _N * _D else f"{moved} bytes are loaded; the keys have {4 * _N * _D}"


def _once_cases(rng: np.random.Generator) -> list[Case]:
    return [Case(_ONCE, _sample(rng))]


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call bounds_kernel[grid](...) with your loop in it."
)

TRITON_BOUNDS = Exercise(
    id="sparse/quest/triton_bounds",
    title="a Triton kernel for the bounds of pages",
    signature="bounds_triton(k [B, H, N, D], page) -> (least [B, H, pages, D], greatest [B, H, pages, D])",
    outputs=(Output("least", "k"), Output("greatest", "k")),
    make_inputs=_inputs,
    reference=_reference,
    solution=bounds_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("bounds_kernel", "bounds_triton", lambda: launcher(_SOLUTION, "bounds_triton")),
    properties={
        "whole pages": "Token j of page p is p * page + j; tl.minimum and tl.maximum with what is there already.",
        "keys all positive": "The least key is above 0 here: nothing but keys may count.",
        "keys all negative": "The greatest key is below 0 here: nothing but keys may count.",
        "a last page that is not full": "What lies past the last token must lose in the least and in the greatest: "
        "another value in each.",
        "one token": "One token is a page: both bounds are the key.",
        "pages of one token": "With pages of one token both bounds are the keys.",
        "more pages than a tile": "A program has BLOCK pages; rows says which.",
        "batch and heads": "The pointers are moved to the right head for you.",
        "half-precision inputs": "Smallest and largest are among the numbers: half precision rounds nothing.",
    },
    tolerance=Tolerance(
        0.0, 0.0, "smallest and largest of numbers are among the numbers: nothing is rounded."
    ),
    probes=(
        *probes(
            _reference,
            _inputs,
            _sample,
            kernel="bounds_kernel",
            loads_bytes=4 * _N * _D,
            flops=0,
            stores_bytes=2 * 4 * _N // _P * _D,
            largest=4 * _N * _D,  # the interpreter copies the keys, by byte
            compiled=_compiled,
            hints={RAN: _NO_KERNEL, STORED: "More is stored than two bounds a page."},
        ),
        Probe(_ONCE, _loads_once, _TWICE, Trial(_once_cases, _loaded_once, kernel=True)),
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "padded with zeros": "What lies past the last token counts as a key of zeros. It has to be inf for "
                "the least and -inf for the greatest.",
                "padded with infinity": "inf stands for what is missing in the greatest too, and wins: -inf there.",
                "begun at zero": "The bounds begin at 0: no key is that small if all are positive. Begin at inf and "
                "-inf.",
                "every so many tokens": "A page holds every n-th token. It holds neighbours: rows * page + j.",
                "first token missed": "The first token of each page is left out.",
                "last token alone": "Each token replaces the one before: take the minimum with what is there.",
                "loaded twice": _TWICE,
                "the wrong way round": "The results come in another order: yours are (greatest, least), expected "
                "(least, greatest).",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: INFINITY is one."}
        ),
    ),
    hints=(
        "A loop over the tokens of a page; all BLOCK pages take their token j at once.",
        "tl.load with a mask gives `other` where a token does not exist; tl.where puts in what a bound needs there.",
        "for j in range(0, page):\n    token = rows * page + j\n    real = token < seqlen\n"
        "    k = tl.load(k_ptr + token * D + channels, mask=real, other=0.0).to(tl.float32)\n"
        '    least = tl.minimum(least, tl.where(real, k, float("inf")))\n'
        '    greatest = tl.maximum(greatest, tl.where(real, k, float("-inf")))',
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
