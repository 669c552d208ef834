"""Exercise: a Triton kernel that walks a list of blocks. Importing this does not import triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, Output, Tolerance, Value
from effattn_lab.exercises.kernels import RAN, STORED, device, launcher, probes, require_triton, source
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._block_sparse_scores import FROM_SCRATCH
from effattn_lab.foundations.attention import repeat_kv

_SOLUTION = "effattn_lab.exercises.sparse._block_sparse_triton_solution"
_BLOCK = 16


def block_list_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, index: torch.Tensor, count: torch.Tensor,
    block: int = _BLOCK,
) -> torch.Tensor:  # fmt: skip
    """The model solution, with triton imported when it is called."""
    require_triton()
    from effattn_lab.exercises.sparse._block_sparse_triton_solution import block_list_triton as launch

    return launch(q, k, v, scale, index, count, block)


def _listed(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool ``[B, H, m, m]``: what the list names."""
    real = torch.arange(index.shape[3]) < count.cpu()[..., None]
    wide = torch.zeros(*index.shape[:3], index.shape[2] + 1, dtype=torch.bool)
    return wide.scatter(-1, index.cpu().long().masked_fill(~real, index.shape[2]), True)[..., :-1]


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    index: torch.Tensor,
    count: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    n = q.shape[2]
    k, v = (repeat_kv(x.nan_to_num(posinf=0.0), q.shape[1] // k.shape[1]) for x in (k, v))
    keep = _listed(index, count).repeat_interleave(_BLOCK, 2).repeat_interleave(_BLOCK, 3)[:, :, :n, :n]
    keep = keep & torch.ones(n, n, dtype=torch.bool).tril()
    s = (scale * q @ k.transpose(-1, -2)).masked_fill(~keep.to(q.device), float("-inf"))
    return (torch.softmax(s, dim=-1) @ v,)


def _list(
    rng: np.random.Generator,
    batch: int,
    heads: int,
    n: int,
    most: int,
    never: int = -1,
    own_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries its own and up to ``most - 1`` earlier ones; the rest is no entry.

    Ascending; with ``own_first`` the own block comes first and the others in any order.
    """
    m = -(-n // _BLOCK)
    index = torch.from_numpy(rng.integers(0, m, (batch, heads, m, most))).int()
    count = torch.zeros(batch, heads, m, dtype=torch.int32)
    for line in np.ndindex(batch, heads, m):
        own = line[2]
        before = rng.permutation([x for x in range(own) if x != never])[: int(rng.integers(most // 2, most))]
        names = [own, *before.tolist()] if own_first else sorted([*before.tolist(), own])
        index[(*line, slice(len(names)))] = torch.tensor(names, dtype=torch.int32)
        count[line] = len(names)
    return index, count


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, most: int = 3, *, hq: int = 1, hkv: int = 1, batch: int = 1, size: float = 1.5,
        never: int = -1, own_first: bool = False, dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        q, k = normal(rng, batch, hq, n, 16, size=size), normal(rng, batch, hkv, n, 16, size=size)
        v = normal(rng, batch, hkv, n, 16)
        index, count = _list(rng, batch, hq, n, most, never, own_first)
        if never >= 0:
            for x in (k, v):  # its own queries read it too: they are left out of the list's rows below
                x[:, :, never * _BLOCK : (never + 1) * _BLOCK] = float("inf")
            index[:, :, never, 0], count[:, :, never] = 0, 1
        tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        return Case(name, {**tensors, "scale": 0.25, "index": index, "count": count})

    return [
        case("softmax over the listed blocks", 80),
        case("length not a multiple of the block", 53),
        case("one token", 1),
        case("blocks not listed are not read", 90, never=2),
        case("each head its own list", 80, batch=2, hq=2, hkv=1),
        case("half-precision inputs", 50, size=1.0, dtype=torch.float16),
        case("entries in any order", 80, 4, own_first=True),
        case("huge scores", 48, size=12.0),
    ]


def _fault(fault: str, *args: Any) -> Any:
    require_triton()
    from effattn_lab.exercises.sparse._block_sparse_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(*args: Any) -> torch.Tensor:
    return _reference(*args)[0].to(args[0].dtype)


_N, _D = 96, 16


def _sample(rng: np.random.Generator) -> dict[str, Value]:
    q, k, v = (normal(rng, 1, 1, _N, _D) for _ in range(3))
    index, count = _list(rng, 1, 1, _N, 3)
    return {"q": q, "k": k, "v": v, "scale": 0.25, "index": index, "count": count}


def _compiled(rng: np.random.Generator) -> dict[str, Value]:
    q, k, v = (normal(rng, 1, 1, 64, 64).half() for _ in range(3))
    index, count = _list(rng, 1, 1, 64, 3)
    return {"q": q, "k": k, "v": v, "scale": 0.125, "index": index, "count": count}


_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call block_list_kernel[grid](...) with your loop."
)

TRITON_FORWARD = Exercise(
    id="sparse/block_sparse/triton_forward",
    title="a Triton kernel over a list of blocks",
    signature="block_list_triton(q [B, Hq, N, D], k, v [B, Hkv, N, D], scale, index [B, Hq, m, W], count [B, Hq, m]) "
    "-> out [B, Hq, N, D]",
    outputs=(Output("out", "q"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=block_list_triton,
    from_scratch=FROM_SCRATCH,
    kernel=Kernel("block_list_kernel", "block_list_triton", lambda: launcher(_SOLUTION, "block_list_triton")),
    properties={
        "softmax over the listed blocks": "count_ptr + line holds the number of blocks; index_ptr + line * width + t "
        "names the t-th; then mask, and a running maximum, sum and output.",
        "length not a multiple of the block": "The last block sticks out; keys beyond the end lie after every query.",
        "one token": "One query, one key.",
        "blocks not listed are not read": "Keys and values of a block that no line names hold infinities.",
        "each head its own list": "line counts blocks of queries over all heads: head * blocks + own.",
        "half-precision inputs": "The dots add up in float32; p is rounded to v's type before it meets v.",
        "entries in any order": "The own block comes first here. Compare positions in every block, not in the last "
        "entry alone.",
        "huge scores": "Subtract the running maximum of each row before tl.exp: e^s overflows, and far below another "
        "row's maximum it is 0.",
    },
    tolerance=Tolerance(
        1e-4,
        1e-4,
        "float32 scores up to 20 and a softmax of up to 48 keys in another order; TF32 is off by 1e-2.",
    ),
    loose={
        "half-precision inputs": Tolerance(
            4e-3, 4e-3, "weights are rounded to fp16 before they meet the values, 5e-4 of their size."
        ),
        "huge scores": Tolerance(
            2e-3, 2e-3, "scores of some hundreds in float32: rounding moves a weight by 1e-4 of itself."
        ),
    },
    probes=probes(
        _reference,
        _inputs,
        _sample,
        kernel="block_list_kernel",
        loads_bytes=3 * _N * _D * 4,
        flops=4 * _N * _BLOCK * _D,
        stores_bytes=_N * _D * 4,
        largest=_N * _N - 1,
        compiled=_compiled,
        hints={RAN: _NO_KERNEL, STORED: "More is stored than the outputs."},
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "list not read": "The loop visits blocks 0, 1, 2, … instead of those that the list names.",
                "whole width": "The loop runs over all W entries of the line. Only the first count are entries.",
                "last entry dropped": "The last entry of a line is not read: it is the own block.",
                "first head's list": "All heads use the lines of the first: line = head * blocks + own.",
                "list of the KV head": "The line is the KV head's. Each query head has lines of its own.",
                "index counts tokens": "The index is used as a token's position. It counts blocks: times BLOCK.",
                "no mask in the own block": "Queries see later keys of their own block: col <= row.",
                "masked by place in the list": "Keys are compared by their place in the list. Their position is "
                "block * BLOCK + tile.",
                "masked in the last entry alone": "Only the last entry of a line is masked. Entries have no order: "
                "compare positions in every block.",
                "own token hidden": "A query does not see its own key: col <= row, not <.",
                "no maximum": "No maximum is subtracted: e^s overflows for large scores.",
                "one maximum a tile": "One maximum is subtracted in the whole tile. A row far below it sums to 0: "
                "tl.max(s, 1), one for each row.",
                "output not rescaled": "acc is not multiplied by e^(old - new) when the maximum moves.",
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _fault, {"plain global": "The compiler does not see ordinary global variables: NOTHING is one."}
        ),
    ),
    hints=(
        "Two tl.load for the list, tl.where for the mask, and the update of step 5 in Triton's words: tl.maximum, "
        "tl.max(s, 1), tl.exp, tl.sum(p, 1), tl.dot.",
        "count = tl.load(count_ptr + line) before the loop, block = tl.load(index_ptr + line * width + t) inside. "
        "The mask compares col[None, :] with row. tl.dot wants p in v's type: p.to(v.dtype).",
        "count = tl.load(count_ptr + line)\n...\nblock = tl.load(index_ptr + line * width + t)\n...\n"
        's = tl.where(col[None, :] <= row, s, float("-inf"))\nnew = tl.maximum(top, tl.max(s, 1))\n'
        'origin = tl.where(new == float("-inf"), 0.0, new)\np = tl.exp(s - origin[:, None])\n'
        "old = tl.exp(top - origin)\ntotal = total * old + tl.sum(p, 1)\n"
        'acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")\ntop = new',
    ),
    device=device,
    source=lambda: source(_SOLUTION),
)
