"""Exercises: blocks of keys serve the queries that chose them; NSA's scores of blocks from the coarse branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch
from effattn_lab.exercises.sparse._block_sparse_scores import FROM_SCRATCH, NEG_INF

# ---- blocks serve queries ----------------------------------------------------------------------------------


def serve(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, block: int
) -> torch.Tensor:
    """Block after block: the queries that chose it, a running softmax each."""
    n = len(q)
    top, total, acc = q.new_full((n,), NEG_INF), q.new_zeros(n), torch.zeros_like(v)
    place = torch.arange(n)
    for b in range(chosen.shape[1]):
        rows = chosen[:, b].nonzero()[:, 0]
        if not len(rows):
            continue
        cols = slice(b * block, (b + 1) * block)
        s = q[rows] @ k[cols].T / q.shape[1] ** 0.5
        s = s.masked_fill(place[cols] > rows[:, None], NEG_INF)
        new = torch.maximum(top[rows], s.amax(dim=-1))
        p, old = torch.exp(s - new[:, None]), torch.exp(top[rows] - new)
        total[rows] = old * total[rows] + p.sum(dim=-1)
        acc[rows] = old[:, None] * acc[rows] + p @ v[cols]
        top[rows] = new
    return acc / total[:, None]


def _serve_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, block: int
) -> tuple[torch.Tensor, ...]:
    n = len(q)
    keep = chosen.repeat_interleave(block, dim=1)[:, :n] & torch.ones(n, n, dtype=torch.bool).tril()
    p = torch.softmax((q @ k.T / q.shape[1] ** 0.5).masked_fill(~keep, NEG_INF), dim=-1)
    infinite = v.isinf()
    out = p @ v.masked_fill(infinite, 0.0)
    return (out.masked_fill(p @ infinite.to(p) > 0, float("inf")),)


def _choices(rng: np.random.Generator, n: int, block: int, count: int) -> torch.Tensor:
    """Each query its own block and up to ``count - 1`` earlier ones."""
    blocks, own = -(-n // block), torch.arange(n)[:, None] // block
    draw = torch.from_numpy(rng.random((n, blocks))).masked_fill(torch.arange(blocks) >= own, -1.0)
    best = draw.topk(min(count - 1, blocks), dim=-1)
    chosen = torch.zeros(n, blocks, dtype=torch.bool).scatter(1, best.indices, best.values >= 0)
    return chosen | (torch.arange(blocks) == own)


def _serve_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, block: int, count: int, *, size: float = 1.5, drift: float = 0.0) -> Case:
        q, k, v = normal(rng, n, 8, size=size), normal(rng, n, 8, size=size), normal(rng, n, 8)
        if drift:  # scores rise along the text: every block moves the maximum
            q, k = q.abs(), k + torch.linspace(-drift, drift, n)[:, None]
        return Case(name, {"q": q, "k": k, "v": v, "chosen": _choices(rng, n, block, count), "block": block})

    unread = case("blocks not chosen are not read", 36, 4, 2, size=0.7)
    unread.kwargs["v"][8] = float("inf")  # type: ignore[index]  # the first key of block 2
    alone = case("a block that only its own queries read", 20, 4, 2)
    alone.kwargs["chosen"][8:, 1] = False  # type: ignore[index]
    foreign = case("only earlier blocks chosen", 40, 5, 3)
    own = torch.arange(40)[:, None] // 5 == torch.arange(8)
    foreign.kwargs["chosen"][5:] &= ~own[5:]  # type: ignore[index,operator]
    return [
        case("softmax over what was chosen", 40, 5, 3),
        case("a last block that is not full", 27, 5, 3),
        case("its own block alone", 18, 6, 1),
        unread,
        alone,
        case("rising scores", 32, 4, 4, drift=5.0),
        case("huge scores", 24, 4, 3, size=12.0),
        case("one token", 1, 4, 3),
        foreign,
    ]


_WORK = "no query meets a key of a block that it did not choose"
_EVERYBODY = (
    "Every query meets the keys of every block, or all scores are laid out N x N. Take the rows that chose the "
    "block, chosen[:, b].nonzero()[:, 0], and compute with them alone."
)
_LONG, _BLOCK, _SPARE = 6144, 128, 32 * 2**20  # one float a pair of 6144 would take 151 MB


def _work(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(5)
    n, block, dim = 128, 8, 8
    q, k, v = (normal(rng, n, dim) for _ in range(3))
    chosen = _choices(rng, n, block, 2)
    seen = watch(fn, q, k, v, chosen, block)
    needed = 4 * dim * block * int(chosen.sum())
    if seen.matmul_flops > 2 * needed:
        return f"matrix products took {seen.matmul_flops} FLOPs; {needed} are needed"
    if seen.largest > n * n // 2:
        return f"a tensor of shape {seen.shape} was made for {n} queries"
    return None


def _long_inputs(rng: np.random.Generator) -> list[Case]:
    q, k, v = (normal(rng, _LONG, 8) for _ in range(3))
    chosen = _choices(rng, _LONG, _BLOCK, 3)
    rows = tuple(rng.integers(0, _LONG, 16).tolist())
    return [Case(_WORK, {"q": q, "k": k, "v": v, "chosen": chosen, "block": _BLOCK}, rows)]


def _long_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        given = outcome.case.kwargs
        q, k, v = (given[name].double() for name in "qkv")  # type: ignore[union-attr]
        keep = given["chosen"].repeat_interleave(_BLOCK, dim=1)[:, :_LONG]  # type: ignore[union-attr]
        for row in (0, _LONG - 1, *outcome.case.secret):
            at = keep[row, : row + 1].nonzero()[:, 0]
            want = torch.softmax(k[at] @ q[row] / 8**0.5, dim=0) @ v[at]
            if not near(outcome.values[0][row], want, 1e-4):
                return f"with N = {_LONG} the results are wrong"
    return None


def _serve_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, block: int
) -> torch.Tensor:
    n = len(q)
    if fault == "everybody meets everything":
        keep = chosen.repeat_interleave(block, dim=1)[:, :n] & torch.ones(n, n, dtype=torch.bool).tril()
        return torch.softmax((q @ k.T / q.shape[1] ** 0.5).masked_fill(~keep, NEG_INF), dim=-1) @ v
    top, total, acc = q.new_full((n,), NEG_INF), q.new_zeros(n), torch.zeros_like(v)
    place = torch.arange(n)
    for b in range(chosen.shape[1]):
        if fault == "last block dropped" and b and b == chosen.shape[1] - 1:
            break
        rows = chosen[:, b].nonzero()[:, 0]
        if fault == "own block always served":
            rows = (chosen[:, b] | (place // block == b)).nonzero()[:, 0]
        if fault == "own block not served":
            rows = rows[rows // block != b]
        if not len(rows):
            continue
        cols = slice(b * block, (b + 1) * block)
        s = q[rows] @ k[cols].T
        s = s if fault == "no scale" else s / q.shape[1] ** 0.5
        if fault == "own token hidden":
            first = (place[cols] == 0) & (rows[:, None] == 0)
            s = s.masked_fill((place[cols] >= rows[:, None]) & ~first, NEG_INF)
        elif fault == "keys counted from 0":
            s = s.masked_fill(torch.arange(len(k[cols])) > rows[:, None], NEG_INF)
        elif fault != "no mask in the own block":
            s = s.masked_fill(place[cols] > rows[:, None], NEG_INF)
        new = s.new_zeros(len(rows)) if fault == "no maximum" else torch.maximum(top[rows], s.amax(dim=-1))
        origin = new.masked_fill(new.isneginf(), 0.0) if fault == "own token hidden" else new
        p = torch.exp(s - origin[:, None])
        old = torch.ones_like(new) if fault == "no maximum" else torch.exp(top[rows] - origin)
        if fault == "each block its own softmax":
            acc[rows] = acc[rows] + p / p.sum(dim=-1, keepdim=True) @ v[cols]
            total[rows] = total[rows] + 1
            continue
        if fault == "last block wins":
            acc[rows], total[rows] = p @ v[cols], p.sum(dim=-1)
            continue
        kept = torch.ones_like(old) if fault == "output not rescaled" else old
        total[rows] = (torch.ones_like(old) if fault == "sum not rescaled" else old) * total[rows] + p.sum(
            dim=-1
        )
        acc[rows] = kept[:, None] * acc[rows] + p @ v[cols]
        top[rows] = new
    safe = fault in ("last block dropped", "own token hidden", "own block not served")
    return acc / (total.masked_fill(total == 0, 1.0) if safe else total)[:, None]


SERVE = Exercise(
    id="sparse/block_sparse/serve",
    title="each block serves the queries that chose it",
    signature="serve(q, k, v [N, D], chosen [N, m] bool, block) -> out [N, D]",
    outputs=(Output("out", "q"),),
    make_inputs=_serve_inputs,
    reference=_serve_reference,
    solution=serve,
    from_scratch=FROM_SCRATCH,
    properties={
        "softmax over what was chosen": "Every query ends with one softmax over the tokens of its blocks, none "
        "of them after itself.",
        "a last block that is not full": "Slices past the end are shorter by themselves.",
        "its own block alone": "In its own block a query sees the keys up to itself: place[cols] <= row.",
        "blocks not chosen are not read": "A value of block 2 is infinite here. It may spoil the queries that chose "
        "the block, and no other: 0 times infinity is NaN.",
        "a block that only its own queries read": "A block may have few askers, or none.",
        "rising scores": "When the maximum of a query rises, its sum and output shrink by e^(old - new).",
        "huge scores": "Subtract the running maximum before the exponential.",
        "one token": "One query, one key: the output is its value.",
        "only earlier blocks chosen": "chosen alone says who reads what. Here no query beyond the first block chose "
        "its own.",
    },
    tolerance=Tolerance(3e-5, 3e-5, "softmax of up to 20 float32 scores in another order."),
    loose={
        "huge scores": Tolerance(
            2e-3, 2e-3, "scores of some hundreds in float32: rounding moves a weight by 1e-4 of itself."
        )
    },
    probes=(Probe(_WORK, _work, _EVERYBODY, Trial(_long_inputs, _long_judge, memory_bytes=_SPARE)),),
    mutants=mutants(
        _serve_mutant,
        {
            "everybody meets everything": _EVERYBODY,
            "no mask in the own block": "In their own block queries see keys after themselves.",
            "own token hidden": "A query does not see its own key: mask place > row, not >=.",
            "keys counted from 0": "The mask counts the keys of each block from 0. Compare their positions in the "
            "text, place[cols], with rows.",
            "no scale": "The scores are not divided by the root of D.",
            "no maximum": "No maximum is subtracted: e^s overflows for large scores.",
            "output not rescaled": "acc is not multiplied by e^(old - new) when the maximum moves.",
            "sum not rescaled": "total is not multiplied by e^(old - new) when the maximum moves.",
            "each block its own softmax": "Each block is normalised by itself, and the results are averaged. All "
            "blocks of a query share one denominator.",
            "last block wins": "A block overwrites what earlier blocks gave: add to it.",
            "last block dropped": "The last block serves nobody.",
            "own block always served": "A block serves its own queries although they did not choose it.",
            "own block not served": "A block serves the later queries that chose it, but not its own.",
        },
    ),
    hints=(
        "Running maximum, sum and output for every query, as in flash attention; but a block touches only the rows "
        "that chose it.",
        "rows = chosen[:, b].nonzero()[:, 0]; read top[rows], compute, write back with top[rows] = new. Keys at "
        "positions cols are hidden where they are greater than rows[:, None].",
        "rows = chosen[:, b].nonzero()[:, 0]\ncols = slice(b * block, (b + 1) * block)\n"
        "s = q[rows] @ k[cols].T / q.shape[1] ** 0.5\n"
        "s = s.masked_fill(place[cols] > rows[:, None], float('-inf'))\n"
        "new = torch.maximum(top[rows], s.amax(-1))\np = torch.exp(s - new[:, None])\n"
        "old = torch.exp(top[rows] - new)\ntotal[rows] = old * total[rows] + p.sum(-1)\n"
        "acc[rows] = old[:, None] * acc[rows] + p @ v[cols]\ntop[rows] = new",
    ),
)

# ---- NSA's scores of blocks --------------------------------------------------------------------------------


def fine_scores(p: torch.Tensor, groups: int, length: int, stride: int, select: int) -> torch.Tensor:
    """Weights of compressed blocks, shared out to selectable ones, summed over a group of ``groups`` heads."""
    n = p.shape[2]
    begin = torch.arange(p.shape[3])[:, None] * stride
    first = torch.arange(-(-n // select)) * select
    shared = torch.minimum(begin + length, first + select) - torch.maximum(begin, first)
    score = p @ (shared.clamp(min=0) / stride).to(p.dtype)
    return score.unflatten(1, (-1, groups)).sum(dim=2)


def _fine_reference(
    p: torch.Tensor, groups: int, length: int, stride: int, select: int
) -> tuple[torch.Tensor, ...]:
    b, h, n, c = p.shape
    out = torch.zeros(b, h // groups, n, -(-n // select), dtype=p.dtype)
    for i in range(c):
        for x in range(
            i * stride, i * stride + length, stride
        ):  # strides of the block, each in one selectable block
            if x // select < out.shape[3]:
                out[..., x // select] += p[..., i].unflatten(1, (-1, groups)).sum(dim=2)
    return (out,)


def _fine_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, length: int, stride: int, select: int, *,
        hkv: int = 2, groups: int = 2, causal: bool = True,
    ) -> Case:  # fmt: skip
        count = max(0, (n - length) // stride + 1)
        s = normal(rng, 2, hkv * groups, n, count, size=1.5)
        seen = torch.arange(count) * stride + length - 1 <= torch.arange(n)[:, None]
        p = torch.softmax(s.masked_fill(~seen, NEG_INF) if causal else s, dim=-1).nan_to_num(0.0)
        return Case(name, {"p": p, "groups": groups, "length": length, "stride": stride, "select": select})

    return [
        case("overlap in strides", 48, 8, 4, 16),
        case("no overlap", 40, 8, 8, 8),
        case("one head a group", 32, 8, 4, 16, hkv=3, groups=1),
        case("one group", 32, 8, 4, 8, hkv=1, groups=4),
        case("a last block that is not full", 43, 8, 4, 16),
        case("no whole compressed block", 6, 8, 4, 8),
        case("a last block beyond the compressed ones", 70, 32, 16, 64),
        case("compressed blocks of four strides", 64, 16, 4, 32),
        case("all blocks weighted by all queries", 40, 8, 4, 16, causal=False),
    ]


def _fine_mutant(
    fault: str, p: torch.Tensor, groups: int, length: int, stride: int, select: int
) -> torch.Tensor:
    n, c = p.shape[2], p.shape[3]
    begin, first = torch.arange(c)[:, None] * stride, torch.arange(-(-n // select)) * select
    shared = (torch.minimum(begin + length, first + select) - torch.maximum(begin, first)).clamp(min=0)
    weights = (shared / stride).to(p.dtype)
    if fault == "in tokens":
        weights = shared.to(p.dtype)
    if fault == "any overlap counts 1":
        weights = (shared > 0).to(p.dtype)
    if fault == "whole blocks alone":
        weights = torch.where(shared == length, weights, 0.0)
    if fault == "block of the first token":
        weights = (begin // select == first // select).to(p.dtype) * length / stride
    if fault == "shared out to one":
        weights = (shared / length).to(p.dtype)
    if fault == "stride forgotten":
        begin = torch.arange(c)[:, None] * length
        shared = (torch.minimum(begin + length, first + select) - torch.maximum(begin, first)).clamp(min=0)
        weights = (shared / stride).to(p.dtype)
    if fault == "two strides at most":
        weights = (shared.clamp(max=2 * stride) / stride).to(p.dtype)
    score = p @ weights
    if fault == "masked again":
        score = score * (first <= torch.arange(n)[:, None])
    if fault == "last block dropped" and n > select:
        score[..., n // select :] = 0
    if fault == "heads of a group apart":
        return score.unflatten(1, (groups, -1)).sum(dim=1)
    score = score.unflatten(1, (-1, groups))
    if fault == "mean of the heads":
        return score.mean(dim=2)
    if fault == "one head of a group":
        return score[:, :, 0].clone()
    return score.amax(dim=2) if fault == "largest of the heads" else score.sum(dim=2)


FINE = Exercise(
    id="sparse/block_sparse/fine_scores",
    title="NSA: from coarse weights to scores of blocks",
    signature="fine_scores(p [B, Hq, N, c], groups, length, stride, select) -> score [B, Hq / groups, N, m]",
    outputs=(Output("score", "p"),),
    make_inputs=_fine_inputs,
    reference=_fine_reference,
    solution=fine_scores,
    from_scratch=FROM_SCRATCH,
    properties={
        "overlap in strides": "Compressed block i covers tokens i d .. i d + l - 1, block j covers j l' .. j l' + l' "
        "- 1. p of i goes to j, times the number of tokens that they share over d.",
        "no overlap": "With l = d = l' blocks coincide: the score is the weight.",
        "one head a group": "groups = 1: each head for itself.",
        "one group": "Scores are summed over the heads of a group, which share keys; m = ceil(N / l').",
        "a last block that is not full": "The last block counts too: m = ceil(N / l').",
        "no whole compressed block": "Without a compressed block (c = 0) all scores are 0.",
        "a last block beyond the compressed ones": "The last tokens may lie in no compressed block: their block "
        "counts, with score 0. m = ceil(N / l'), not from c.",
        "compressed blocks of four strides": "With l = 4 d a compressed block shares up to four strides.",
        "all blocks weighted by all queries": "p holds its mask already. Share out what it says, whoever asks.",
    },
    tolerance=Tolerance(2e-5, 2e-5, "sums of up to 24 weights, each at most 2, in float32."),
    mutants=mutants(
        _fine_mutant,
        {
            "in tokens": "The overlap is counted in tokens. It is in strides: tokens over d.",
            "any overlap counts 1": "Every overlapping block counts once, whether half or whole of it lies inside.",
            "whole blocks alone": "Compressed blocks that reach over a border are left out.",
            "block of the first token": "A compressed block counts where its first token lies. It may lie in two "
            "blocks, a part in each.",
            "shared out to one": "The shares are parts of l, so that each weight is given out once. The rule counts "
            "strides: tokens over d.",
            "stride forgotten": "Compressed blocks begin every d tokens, not every l.",
            "last block dropped": "The last block, which is not full, has no score.",
            "two strides at most": "Overlaps are cut off at two strides. That is the most for l = 2 d alone.",
            "masked again": "Scores of later blocks are set to 0. p holds its mask already: share out what it says.",
            "one head of a group": "Only the first head of each group counts: sum over all of them.",
            "heads of a group apart": "The sum runs over heads of different groups. Heads h groups .. h groups + "
            "groups - 1 share keys: unflatten(1, (-1, groups)), then sum axis 2.",
            "mean of the heads": "The mean over the heads is taken: sum.",
            "largest of the heads": "The largest of a group's heads is taken. The group's heads add up.",
        },
    ),
    hints=(
        "A table [c, m] of weights, then one product p @ table; then the sum over the heads of a group.",
        "shared = min(end of i, end of j) - max(begin of i, begin of j), not below 0; divide by stride.",
        "begin = torch.arange(p.shape[3])[:, None] * stride\n"
        "first = torch.arange(-(-p.shape[2] // select)) * select\n"
        "shared = torch.minimum(begin + length, first + select) - torch.maximum(begin, first)\n"
        "score = p @ (shared.clamp(min=0) / stride).to(p.dtype)\n"
        "return score.unflatten(1, (-1, groups)).sum(dim=2)",
    ),
)
