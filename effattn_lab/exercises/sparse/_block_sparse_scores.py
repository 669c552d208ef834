"""Exercises on XAttention's scores: one number for each tile by its antidiagonal, and the weight of whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.sparse.block_sparse",
    "effattn_lab.sparse.block_sparse_experiment",
    "effattn_lab.sparse.block_sparse_layers",
    "effattn_lab.sparse.nsa",
    "effattn_lab.sparse.block_list",
    "effattn_kernels.block_sparse",
)
NEG_INF = float("-inf")

# ---- antidiagonals -----------------------------------------------------------------------------------------


def antidiagonal(q: torch.Tensor, k: torch.Tensor, stride: int) -> torch.Tensor:
    """One product of width S D for all tiles."""
    rest = -q.shape[2] % stride
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, rest)) for x in (q, k))
    wide_q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
    wide_k = k.unflatten(2, (-1, stride)).flatten(3)
    return wide_q @ wide_k.transpose(-1, -2) / (stride * q.shape[3] ** 0.5)


def _antidiagonal_reference(q: torch.Tensor, k: torch.Tensor, stride: int) -> tuple[torch.Tensor, ...]:
    n = q.shape[2]
    tiles = -(-n // stride)
    s = torch.zeros(*q.shape[:2], tiles * stride, tiles * stride, dtype=q.dtype)
    s[..., :n, :n] = q @ k.transpose(-1, -2) / q.shape[3] ** 0.5
    tile = s.unflatten(3, (tiles, stride)).unflatten(2, (tiles, stride)).transpose(3, 4)
    return (tile.flip(-2).diagonal(dim1=-2, dim2=-1).sum(dim=-1) / stride,)


def _antidiagonal_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, stride: int, *, dim: int = 8, heads: int = 2) -> Case:
        q, k = (normal(rng, 2, heads, n, dim, size=1.5) for _ in range(2))
        return Case(name, {"q": q, "k": k, "stride": stride})

    return [
        case("sums along antidiagonals", 32, 4),
        case("a last tile that sticks out", 29, 4),
        case("stride 1", 7, 1),
        case("one token", 1, 8),
        case("an odd stride", 21, 3, dim=5),
        case("one tile for all", 6, 8),
    ]


_ONCE = "1/S of the products are computed"
_ALL = (
    "All N x N scores are computed, and S - 1 of S thrown away. Lay S rows side by side: one product of width S D "
    "computes the sums alone."
)
_LONG, _STRIDE, _SPARE = 6144, 16, 32 * 2**20  # one float a pair of 6144 would take 151 MB


def _few_products(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(5)
    n, stride, dim = 96, 8, 8
    seen = watch(fn, normal(rng, 1, 1, n, dim), normal(rng, 1, 1, n, dim), stride)
    if seen.largest > n * n // 2:
        return f"a tensor of shape {seen.shape} was made for {n} queries and keys"
    most = 2 * n * n * dim // stride
    if seen.matmul_flops > 2 * most:
        return f"matrix products took {seen.matmul_flops} FLOPs; {most} are needed"
    return None


def _long_inputs(rng: np.random.Generator) -> list[Case]:
    q, k = (normal(rng, 1, 1, _LONG, 8) for _ in range(2))
    rows = tuple(rng.integers(0, _LONG // _STRIDE, 8).tolist())
    return [Case(_ONCE, {"q": q, "k": k, "stride": _STRIDE}, rows)]


def _long_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        q, k = (outcome.case.kwargs[name].double() for name in "qk")  # type: ignore[union-attr]
        for row in (0, _LONG // _STRIDE - 1, *outcome.case.secret):
            rows = q[:, :, row * _STRIDE : (row + 1) * _STRIDE].flip(2).flatten(2)
            keys = k.unflatten(2, (-1, _STRIDE)).flatten(3)
            want = torch.einsum("bhx,bhnx->bhn", rows, keys) / (_STRIDE * 8**0.5)
            if not near(outcome.values[0][:, :, row], want, 1e-4):
                return f"with N = {_LONG} the scores are wrong"
    return None


def _antidiagonal_mutant(fault: str, q: torch.Tensor, k: torch.Tensor, stride: int) -> torch.Tensor:
    if fault == "all scores first":
        return _antidiagonal_reference(q, k, stride)[0]
    n, rest = q.shape[2], -q.shape[2] % stride
    if fault == "last tile dropped" and n > stride:
        whole = antidiagonal(q[:, :, : n - n % stride], k[:, :, : n - n % stride], stride)
        return torch.nn.functional.pad(whole, (0, rest > 0, 0, rest > 0))
    if fault == "last row repeated":
        q, k = (torch.cat([x, x[:, :, -1:].expand(-1, -1, rest, -1)], dim=2) for x in (q, k))
    else:
        q, k = (torch.nn.functional.pad(x, (0, 0, 0, rest)) for x in (q, k))
    rows, cols = q.unflatten(2, (-1, stride)), k.unflatten(2, (-1, stride))
    norm = stride * q.shape[3] ** 0.5
    if fault == "all pairs of a tile":
        return rows.sum(dim=3) @ cols.sum(dim=3).transpose(-1, -2) / norm
    if fault == "one pair a tile":
        return q.shape[3] ** -0.5 * rows[..., -1, :] @ cols[..., 0, :].transpose(-1, -2)
    if fault == "every n-th row":
        rows, cols = (x.unflatten(2, (stride, -1)).transpose(2, 3) for x in (q, k))
    if fault == "no division by S":
        norm = q.shape[3] ** 0.5
    if fault == "no root of D":
        norm = float(stride)
    if fault == "root of S D":
        norm = (stride * q.shape[3]) ** 0.5
    if fault not in ("diagonals", "channels turned too"):
        rows = rows.flip(3)
    wide = rows.flatten(3)
    if fault == "channels turned too":
        wide = wide.flip(-1)
    return wide @ cols.flatten(3).transpose(-1, -2) / norm


ANTIDIAGONAL = Exercise(
    id="sparse/block_sparse/antidiagonal",
    title="one score for each tile, from its antidiagonal",
    signature="antidiagonal(q, k [B, H, N, D], stride) -> T [B, H, n, n], n = ceil(N / stride)",
    outputs=(Output("T", "q"),),
    make_inputs=_antidiagonal_inputs,
    reference=_antidiagonal_reference,
    solution=antidiagonal,
    from_scratch=FROM_SCRATCH,
    properties={
        "sums along antidiagonals": "T[n, m] is the sum over a of q[nS + S - 1 - a] . k[mS + a], over S and the "
        "root of D: queries upwards, keys downwards.",
        "a last tile that sticks out": "N need not be a multiple of S: rows beyond the end count 0, n is rounded up.",
        "stride 1": "With S = 1 a tile is one pair: all scores.",
        "one token": "One token gives one tile.",
        "an odd stride": "Nothing depends on S being even.",
        "one tile for all": "Fewer tokens than S: one tile, of the pairs that exist.",
    },
    tolerance=Tolerance(
        2e-5, 2e-5, "sums of up to 64 float32 products of numbers of size 2, in another order."
    ),
    probes=(Probe(_ONCE, _few_products, _ALL, Trial(_long_inputs, _long_judge, memory_bytes=_SPARE)),),
    mutants=mutants(
        _antidiagonal_mutant,
        {
            "diagonals": "The sums run along diagonals: queries and keys both downwards. A diagonal runs beside the "
            "slashes of its tile and meets one of them. Turn the queries of each tile round.",
            "channels turned too": "The whole wide row is turned round, its D channels with it. Flip the axis of "
            "length S before you flatten.",
            "all pairs of a tile": "All S x S pairs of a tile are summed. Only the S of its antidiagonal are meant.",
            "one pair a tile": "One pair a tile is taken. The antidiagonal has S.",
            "every n-th row": "A tile holds every n-th row. It holds S neighbours: unflatten to (n, S), not (S, n).",
            "no division by S": "The sum is not divided by S. The softmax that follows would be S times too sharp.",
            "no root of D": "The scores are not divided by the root of D.",
            "root of S D": "The division is by the root of S D, as if the wide row were a head. It is by S times the "
            "root of D: a mean over S pairs.",
            "last tile dropped": "Tiles that stick out over the end are left 0. They count with what they have.",
            "last row repeated": "Beyond the end the last row is repeated. There is nothing: fill with zeros.",
            "all scores first": _ALL,
        },
    ),
    hints=(
        "S rows laid side by side are one row of length S D. If queries are laid in reverse order, one dot product "
        "of such rows is the sum along an antidiagonal.",
        "Pad to a multiple of S with zeros; x.unflatten(2, (-1, S)) is [B, H, n, S, D]; flip axis 3 of the queries; "
        "flatten(3) both.",
        "q, k = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % stride)) for x in (q, k))\n"
        "wide_q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)\nwide_k = k.unflatten(2, (-1, stride)).flatten(3)\n"
        "return wide_q @ wide_k.transpose(-1, -2) / (stride * q.shape[3] ** 0.5)",
    ),
)

# ---- weight of blocks --------------------------------------------------------------------------------------


def block_weight(tiles: torch.Tensor, per: int) -> torch.Tensor:
    """Causal softmax over the tiles of a row, summed by blocks."""
    n = tiles.shape[-1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    p = torch.softmax(tiles.masked_fill(future, NEG_INF), dim=-1)
    p = torch.nn.functional.pad(p, (0, -n % per, 0, -n % per))
    return p.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum(dim=(3, 5))


def _weight_reference(tiles: torch.Tensor, per: int) -> tuple[torch.Tensor, ...]:
    n = tiles.shape[-1]
    blocks = -(-n // per)
    past = torch.ones(n, n, dtype=torch.bool).tril()
    s = tiles.masked_fill(~past, NEG_INF)
    p = torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True))
    own = torch.zeros(n, blocks, dtype=tiles.dtype)
    own[torch.arange(n), torch.arange(n) // per] = 1
    return (own.T @ p @ own,)


def _weight_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, per: int, size: float = 2.0) -> Case:
        return Case(name, {"tiles": normal(rng, 2, 2, n, n, size=size), "per": per})

    return [
        case("softmax, then blocks", 24, 4),
        case("a last block that is not full", 22, 4),
        case("one tile", 1, 4),
        case("blocks of one tile", 9, 1),
        case("one block", 5, 8),
        case("huge scores", 16, 4, 80.0),
    ]


def _weight_mutant(fault: str, tiles: torch.Tensor, per: int) -> torch.Tensor:
    n, rest = tiles.shape[-1], -tiles.shape[-1] % per
    future = torch.ones(n, n, dtype=torch.bool).triu(1)

    def blocks(p: torch.Tensor, fold: str = "sum") -> torch.Tensor:
        p = torch.nn.functional.pad(p, (0, rest, 0, rest))
        p = p.unflatten(3, (-1, per)).unflatten(2, (-1, per))
        return p.mean(dim=(3, 5)) if fold == "mean" else p.sum(dim=(3, 5))

    if fault == "softmax of block sums":
        s = blocks(tiles.masked_fill(future, 0.0))
        ahead = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
        return torch.softmax(s.masked_fill(ahead, NEG_INF), dim=-1)
    if fault == "no maximum":
        e = torch.exp(tiles).masked_fill(future, 0.0)
        return blocks(e / e.sum(dim=-1, keepdim=True))
    if fault == "the future seen":
        return blocks(torch.softmax(tiles, dim=-1))
    if fault == "future masked with 0":
        return blocks(torch.softmax(tiles.masked_fill(future, 0.0), dim=-1))
    if fault == "masked after the softmax":
        return blocks(torch.softmax(tiles, dim=-1).masked_fill(future, 0.0))
    if fault == "own tile hidden":
        ahead = torch.ones(n, n, dtype=torch.bool).triu(0)
        ahead[0, 0] = False
        return blocks(torch.softmax(tiles.masked_fill(ahead, NEG_INF), dim=-1))
    p = torch.softmax(tiles.masked_fill(future, NEG_INF), dim=-2 if fault == "softmax down" else -1)
    if fault == "softmax down":
        p = p.nan_to_num(0.0)
    if fault == "last block dropped" and n > per:
        whole = block_weight(tiles[..., : n - n % per, : n - n % per], per)
        return torch.nn.functional.pad(whole, (0, rest > 0, 0, rest > 0))
    out = blocks(p, "mean" if fault == "means of blocks" else "sum")
    if fault == "rows sum to one":
        return out / out.sum(dim=-1, keepdim=True)
    return out


WEIGHT = Exercise(
    id="sparse/block_sparse/block_weight",
    title="the weight of a block",
    signature="block_weight(tiles [B, H, n, n], per) -> A [B, H, m, m], m = ceil(n / per)",
    outputs=(Output("A", "tiles"),),
    make_inputs=_weight_inputs,
    reference=_weight_reference,
    solution=block_weight,
    from_scratch=FROM_SCRATCH,
    properties={
        "softmax, then blocks": "Softmax over the tiles of a row that are not in the future (m <= n); then the sum "
        "over the per x per tiles of each block.",
        "a last block that is not full": "The last block has fewer tiles, and counts with those that it has.",
        "one tile": "One tile has weight 1.",
        "blocks of one tile": "With one tile a block the weights are the softmax itself.",
        "one block": "One block holds all rows: its weight is the number of rows.",
        "huge scores": "torch.softmax subtracts the maximum by itself.",
    },
    tolerance=Tolerance(2e-5, 2e-5, "softmax of up to 24 float32 scores and a sum of 16 weights."),
    loose={
        "huge scores": Tolerance(1e-3, 1e-3, "scores of some hundreds in float32: e^s is off by 1e-5 each.")
    },
    mutants=mutants(
        _weight_mutant,
        {
            "the future seen": "Tiles of the future are in the softmax: keep m <= n alone.",
            "future masked with 0": "Tiles of the future get score 0, not -inf: e^0 = 1 counts in the denominator.",
            "masked after the softmax": "The future is set to 0 after the softmax: it is still in the denominator.",
            "own tile hidden": "A row of tiles does not see its own tile: m = n belongs to the past here.",
            "softmax down": "The softmax runs down the columns. Each row of tiles, the queries, shares out 1.",
            "softmax of block sums": "The scores are summed by blocks and the softmax comes last. The other way: a "
            "single strong tile must show.",
            "no maximum": "e^s overflows for large scores: subtract the row's maximum first.",
            "means of blocks": "The mean of a block is taken. Sums: a row of blocks holds the weight of per rows.",
            "rows sum to one": "The rows are normalised again. They sum to the number of rows of tiles in the block.",
            "last block dropped": "The last block, which is not full, is left 0. It has fewer tiles, and they count.",
        },
    ),
    hints=(
        "Two steps: a causal softmax on the map of tiles, then sums over per x per squares.",
        "masked_fill with -inf above the diagonal, torch.softmax(..., dim=-1), pad with zeros to a multiple of per, "
        "unflatten both axes.",
        "future = torch.ones(n, n, dtype=torch.bool).triu(1)\n"
        "p = torch.softmax(tiles.masked_fill(future, float('-inf')), dim=-1)\n"
        "p = torch.nn.functional.pad(p, (0, -n % per, 0, -n % per))\n"
        "return p.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum(dim=(3, 5))",
    ),
)
