"""Exercise: L1 distance of packed codes in a Triton kernel. Importing this does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.making import mutants
from effattn_lab.exercises.sparse._adamas_codes import EXACT, FROM_SCRATCH, draw_codes, pack
from effattn_lab.exercises.sparse._adamas_distance import unpacked

_SOLUTION = "effattn_lab.exercises.sparse._adamas_triton_solution"


def distances_triton(a: torch.Tensor, b: torch.Tensor, block: int = 128) -> torch.Tensor:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.sparse._adamas_triton_solution import distances_triton as launch

    return launch(a, b, block)


def _reference(a: torch.Tensor, b: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
    b = b.repeat_interleave(a.shape[1] // b.shape[1], dim=1)
    return ((unpacked(a.cpu())[:, :, None] - unpacked(b.cpu())).abs().sum(-1).to(torch.int32).to(a.device),)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int = 70, words: int = 2, hq: int = 1, hkv: int = 1, batch: int = 1,
        codes: tuple[int, ...] = (0, 1, 2, 3), same: bool = False,
    ) -> Case:  # fmt: skip
        table = torch.tensor(codes, dtype=torch.uint8)
        a, b = (
            table[draw_codes(rng, batch, *shape, 16 * words).long() % len(codes)]
            for shape in ((hq,), (hkv, n))
        )
        if same:
            b = a[:, :, None].expand_as(b).contiguous()
        return Case(name, {"a": pack(a), "b": pack(b)})

    return [
        case("all pairs of codes"),
        case("the two codes in the middle", 20, 1, codes=(1, 2)),
        case("the two outer codes", 20, 1, codes=(0, 3)),
        case("several words", 30, 4),
        case("length not a multiple of the tile", 131, 1),
        case("one key", 1),
        case("batch and grouped heads", 20, hq=4, hkv=2, batch=2),
        case("equal codes", 20, same=True),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.sparse._adamas_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(*args: Any) -> torch.Tensor:
    return _reference(*args)[0]


_N, _W = 96, 4


def _drawn(rng: np.random.Generator, n: int, words: int) -> dict[str, Value]:
    return {"a": pack(draw_codes(rng, 1, 1, 16 * words)), "b": pack(draw_codes(rng, 1, 1, n, 16 * words))}


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    return _drawn(rng, _N, _W)


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    return _drawn(rng, 128, 8)


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call distances_kernel[grid](...) with your line in it."
)

TRITON_DISTANCES = Exercise(
    id="sparse/adamas/triton_distances",
    title="a Triton kernel for distances of codes",
    signature="distances_triton(a int32 [B, Hq, W], b int32 [B, Hkv, N, W]) -> d int32 [B, Hq, N]",
    outputs=(Output("d", "int32"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=distances_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("distances_kernel", "distances_triton", lambda: launcher(_SOLUTION, "distances_triton")),
    properties={
        "all pairs of codes": "x must hold |a_i - b_i| in each pair of bits: a ^ b does, but for {1, 2}.",
        "the two codes in the middle": "01 ^ 10 is 11: clear its high bit.",
        "the two outer codes": "00 ^ 11 is 11 too, and stays.",
        "several words": "The sum runs over all words of a key.",
        "length not a multiple of the tile": "What lies past the last key is masked for you.",
        "one key": "One key, one program.",
        "batch and grouped heads": "The pointers are moved to the right heads for you.",
        "equal codes": "A distance of 0.",
    },
    tolerance=EXACT,
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="distances_kernel",
        loads_bytes=4 * _W * _N,
        flops=0,
        stores_bytes=4 * _N,
        largest=4 * _N * _W,  # the interpreter copies the keys, by byte
        compiled=_compiled,
        hints={RAN: _NO_KERNEL, STORED: "More is stored than a distance for each key."},
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "{1, 2} counted 3": "{1, 2} counts 3: its pair of bits is still 11. Clear the high one.",
                "mended for {0, 3} too": "The pair {0, 3} is cleared as well: a ^ (a >> 1) tells 1 and 2 from 0 "
                "and 3.",
                "mended for the outer pair": "The pair {0, 3} is cleared instead of {1, 2}.",
                "neighbours mixed": "Bits of two neighbouring coordinates were compared: after a shift by one keep "
                "the low bit of each pair, & 0x55555555.",
                "low bit cleared": "{1, 2} counts 2: the low bit was cleared, not the high one.",
                "both bits cleared": "{1, 2} counts 0: both of its bits were cleared.",
                "coordinates that differ": "Coordinates that differ are counted, not by how much.",
                "last word alone": "Only one word of each key is in the sum: total += and not total =.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: LOW is one."}
        ),
    ),
    hints=(
        "Write down a ^ b for all six pairs of different codes. Which is not the difference, and which bit is "
        "one too many?",
        "Step 4 has the mark: both bits of x are set, and the two bits of a differ. It stands at the low bit of a "
        "pair; << 1 moves it to the high one.",
        "x = a ^ b\ncentral = x & (x >> 1) & (a ^ (a >> 1)) & 0x55555555\nx = x ^ (central << 1)",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
