"""Exercise: loop bounds and mask of a Triton kernel for sinks and window. Importing this does not import triton."""

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
from effattn_lab.exercises.sparse._streaming_masks import FROM_SCRATCH
from effattn_lab.foundations.attention import repeat_kv

_SOLUTION = "effattn_lab.exercises.sparse._streaming_triton_solution"


def streaming_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: int, window: int, block: int = 16
) -> torch.Tensor:
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.sparse._streaming_triton_solution import streaming_triton as launch

    return launch(q, k, v, scale, sinks, window, block)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: int, window: int, **_: Any
) -> tuple[torch.Tensor, ...]:
    groups, (nq, nk) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (repeat_kv(x.nan_to_num(posinf=0.0), groups) for x in (k, v))
    i, j = torch.arange(nk - nq, nk)[:, None], torch.arange(nk)
    keep = (j <= i) & ((j < sinks) | (i - j < window))
    s = (scale * q @ k.transpose(-1, -2)).masked_fill(~keep.to(q.device), float("-inf"))
    return (torch.softmax(s, dim=-1) @ v,)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, nq: int, nk: int | None = None, *, sinks: int = 4, window: int = 20, hq: int = 1, hkv: int = 1,
        batch: int = 1, size: float = 1.5, unread: bool = False, dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        nk = nq if nk is None else nk
        q, k = normal(rng, batch, hq, nq, 16, size=size), normal(rng, batch, hkv, nk, 16, size=size)
        v = normal(rng, batch, hkv, nk, 16)
        if unread:  # tiles that no query needs
            for x in (k, v):
                x[:, :, 16 : (nk - nq - window + 1) // 16 * 16] = float("inf")
        tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        return Case(name, {**tensors, "scale": 0.25, "sinks": sinks, "window": window})

    return [
        case("equals the mask", 80),
        case("length not a multiple of the tile", 53),
        case("no sinks", 60, sinks=0),
        case("one token", 1, window=7),
        case("last queries of a longer text", 18, 90),
        case("tiles outside the pattern are not read", 10, 160, window=23, unread=True),
        case("batch and grouped heads", 40, batch=2, hq=4, hkv=2),
        case("sinks over two tiles", 90, sinks=20, window=16),
        case("half-precision inputs", 50, size=1.0, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.sparse._streaming_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(*args: Any) -> torch.Tensor:
    return _reference(*args)[0].to(args[0].dtype)


_N, _D = 96, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    q, k, v = (normal(rng, 1, 1, _N, _D) for _ in range(3))
    return {"q": q, "k": k, "v": v, "scale": 0.25, "sinks": 4, "window": 20}


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    q, k, v = (normal(rng, 1, 1, 64, 64).half() for _ in range(3))
    return {"q": q, "k": k, "v": v, "scale": 0.125, "sinks": 4, "window": 20}


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call streaming_kernel[grid](...) with your bounds."
)

#: A property that NaN cannot show: each tile of the text is needed by some program, only not by every one.
FRUGAL = "no tile is read in vain"
_IN_VAIN = (
    "The loop visits tiles in which the queries of the program see nothing. It ends with the tile of the last query, "
    "and begins with that of the first query's oldest key."
)


def _limit() -> int:
    """Bytes of q, and of the tiles of k and v in which a program's queries see anything, on `_sample`."""
    tiles = 0
    for begin in range(0, _N, 16):
        seen = {j for i in range(begin, begin + 16) for j in range(i + 1) if j < 4 or i - j < 20}
        tiles += len({j // 16 for j in seen})
    return 4 * _D * (_N + tiles * 2 * 16)


def _in_vain(loads_bytes: int) -> str | None:
    if loads_bytes > _limit():
        return f"{loads_bytes} bytes are loaded where the tiles that are needed have {_limit()}"
    return None


def _frugal(fn: Callable[..., Any]) -> str | None:
    return _in_vain(counted(fn, _sample).loads_bytes)


def _frugal_alone(outcomes: Sequence[Outcome]) -> str | None:
    return _in_vain(outcomes[0].loads_bytes)


TRITON_FORWARD = Exercise(
    id="sparse/streaming/triton_forward",
    title="a Triton kernel for sinks and window",
    signature="streaming_triton(q [B, Hq, Nq, D], k, v [B, Hkv, Nk, D], scale, sinks, window) -> out [B, Hq, Nq, D]",
    outputs=(Output("out", "q"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=streaming_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("streaming_kernel", "streaming_triton", lambda: launcher(_SOLUTION, "streaming_triton")),
    properties={
        "equals the mask": "first, end and sink_tiles as in your bounds, for one tile of queries that begins at "
        "position begin; then see, the mask of step 1 for pos and j.",
        "length not a multiple of the tile": "end may not pass the last tile of keys, tl.cdiv(seqlen_k, BLOCK).",
        "no sinks": "Without sinks sink_tiles is 0.",
        "one token": "One query, one key.",
        "last queries of a longer text": "begin and pos are positions in the text; they are computed for you.",
        "tiles outside the pattern are not read": "Keys of other tiles hold infinities here, and 0 times infinity "
        "is NaN: the "
        "loop must not visit them.",
        "batch and grouped heads": "The pointers are moved to the right heads for you.",
        "sinks over two tiles": "20 sinks need two tiles of 16, and those that the window reads are not read twice.",
        "half-precision inputs": "Integers decide what is seen: nothing changes in half precision.",
    },
    tolerance=Tolerance(
        1e-4,
        1e-4,
        "float32 scores up to 20 and a softmax of up to 40 keys in another order; TF32 is off by 1e-2.",
    ),
    loose={
        "half-precision inputs": Tolerance(
            4e-3, 4e-3, "weights are rounded to fp16 before they meet the values, 5e-4 of their size."
        )
    },
    probes=(
        Probe(
            FRUGAL,
            _frugal,
            _IN_VAIN,
            Trial(lambda rng: [Case(FRUGAL, _sample(rng))], _frugal_alone, kernel=True),
        ),
        *probes(
            _reference,
            _inputs,
            _sample,
            kernel="streaming_kernel",
            loads_bytes=3 * _N * _D * 4,
            flops=4 * _N * 16 * _D,
            stores_bytes=_N * _D * 4,
            largest=_N * _N - 1,
            compiled=_compiled,
            hints={RAN: _NO_KERNEL, STORED: "More is stored than the outputs."},
        ),
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "sinks dropped": "No tile is read for the sinks: sink_tiles is min(cdiv(sinks, BLOCK), first).",
                "window one long": "The window is one key too long in the mask: pos - j < window.",
                "window of the last query": "The loop begins at the last query's window. The tile's first query "
                "looks "
                "further back.",
                "last tile dropped": "end is one tile short: the tile of the last query belongs to the loop.",
                "tiles read twice": "Sink tiles that the window reads too are read again, so their keys count twice.",
                "everything read": "The loop begins too early: its first tile is that of the first query's oldest "
                "key, begin - window + 1.",
                "whole sink tiles": "All keys of the sink tiles are seen. Only j < sinks are sinks.",
                "causal alone": "The mask is causal attention's: neither sinks nor window are in it.",
                "the future seen": "Keys after the query are seen: j <= pos is missing.",
                "rows from 0": "Positions are counted from 0, but the queries are the last of the text: begin = "
                "start + "
                "seqlen_k - seqlen_q.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(_fault, {"the future read": _IN_VAIN}),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: FACTOR is one."}
        ),
    ),
    hints=(
        "Three lines from step 7 in front of the loop, one line from step 1 inside it.",
        "tl.maximum and tl.minimum in place of clamp; tl.cdiv(a, b) rounds up. pos is a column, j a row.",
        "first = tl.maximum(begin - window + 1, 0) // BLOCK\n"
        "end = tl.minimum((begin + BLOCK - 1) // BLOCK + 1, tl.cdiv(seqlen_k, BLOCK))\n"
        "sink_tiles = tl.minimum(tl.cdiv(sinks, BLOCK), first)\n...\n"
        "see = (j <= pos) & ((j < sinks) | (pos - j < window))",
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
