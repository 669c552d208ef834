"""Exercises on patterns as a kernel meets them: kinds of tiles, attention over them."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._static_patterns_masks import EXACT, FROM_SCRATCH


def window_mask(rng: np.random.Generator, n: int, m: int | None = None) -> torch.Tensor:
    """A causal window with some columns that all see; the queries are the last ``m``."""
    width = int(rng.integers(3, max(4, n // 3)))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    keep = (j <= i) & ((i - j < width) | (j < int(rng.integers(1, 3))))
    return keep[n - (m or n) :]


# ---- kinds of tiles ----------------------------------------------------------------------------------------


def kinds(keep: torch.Tensor, block: int) -> torch.Tensor:
    """0: nothing is seen, 1: some, 2: all that is there."""
    rows = []
    for r in keep.split(block, dim=0):
        rows.append([int(t.any()) + int(t.all()) for t in r.split(block, dim=1)])
    return torch.tensor(rows)


def _kinds_reference(keep: torch.Tensor, block: int) -> tuple[torch.Tensor, ...]:
    m, n = keep.shape
    out = torch.zeros(-(-m // block), -(-n // block), dtype=torch.int64)
    for a in range(out.shape[0]):
        for b in range(out.shape[1]):
            tile = keep[a * block : (a + 1) * block, b * block : (b + 1) * block]
            seen = int(tile.sum())
            out[a, b] = 0 if seen == 0 else 2 if seen == tile.numel() else 1
    return (out,)


def _kinds_inputs(rng: np.random.Generator) -> list[Case]:
    holes = torch.from_numpy(rng.random((16, 16)) < 0.1)
    full = torch.ones(13, 13, dtype=torch.bool)
    full[int(rng.integers(0, 4)), int(rng.integers(0, 4))] = False
    return [
        Case("empty, partial, whole", {"keep": window_mask(rng, 32), "block": 4}),
        Case("no multiple of the tile", {"keep": window_mask(rng, 27), "block": 8}),
        Case("a whole tile at the end", {"keep": full, "block": 4}),
        Case("fewer queries than keys", {"keep": window_mask(rng, 40, 9), "block": 4}),
        Case("single entries", {"keep": holes, "block": 4}),
        Case("tiles of one", {"keep": window_mask(rng, 12), "block": 1}),
    ]


def _kinds_mutant(fault: str, keep: torch.Tensor, block: int) -> torch.Tensor:
    m, n = keep.shape
    if fault in ("filled with False", "filled with True"):
        wide = torch.full((-(-m // block) * block, -(-n // block) * block), fault.endswith("True"))
        wide[:m, :n] = keep
        return kinds(wide, block)
    out = kinds(keep, block)
    if fault == "short tiles left out":
        out[m // block :], out[:, n // block :] = 0, 0
        return out
    if fault == "never whole":
        return out.clamp(max=1)
    if fault == "any is whole":
        return torch.where(out > 0, 2, 0)
    if fault == "1 and 2 swapped":
        return torch.where(out > 0, 3 - out, 0)
    if fault == "partial tiles skipped":
        return torch.where(out == 1, 0, out)
    if fault == "the corner decides":
        return torch.stack([2 * r[0, ::block].long() for r in keep.split(block, dim=0)])
    return out


KINDS = Exercise(
    id="sparse/static_patterns/kinds",
    title="empty, partial and whole tiles",
    signature="kinds(keep [Nq, Nk] bool, block) -> kind [ceil(Nq / block), ceil(Nk / block)], int64",
    outputs=(Output("kind", "int64"),),
    make_inputs=_kinds_inputs,
    reference=_kinds_reference,
    solution=kinds,
    from_scratch=FROM_SCRATCH,
    properties={
        "empty, partial, whole": "0 where no entry of the tile is True, 2 where all are, else 1.",
        "no multiple of the tile": "The last tiles are smaller. What lies over the end is neither seen nor hidden.",
        "a whole tile at the end": "A smaller last tile whose entries are all True is whole.",
        "fewer queries than keys": "Rows are queries, columns are keys; the mask need not be square.",
        "single entries": "One True in a tile is enough: the tile has to be read.",
        "tiles of one": "With tiles of one there is no partial tile.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _kinds_mutant,
        {
            "short tiles left out": "The last tiles, which are smaller, are called empty. They are read like any "
            "other.",
            "filled with False": "A tile that sticks out over the end is filled up with False, so it is never "
            "whole. Judge "
            "the entries that exist.",
            "filled with True": "A tile that sticks out over the end is filled up with True, so it is never empty. "
            "Judge "
            "the entries that exist.",
            "never whole": "Whole tiles are called partial: they would pay for a mask that hides nothing.",
            "any is whole": "Partial tiles are called whole: their hidden keys would be seen.",
            "1 and 2 swapped": "1 and 2 are swapped: 2 is a tile in which every entry is True.",
            "partial tiles skipped": "Partial tiles are skipped: their visible keys would be lost.",
            "the corner decides": "Only the first entry of each tile is looked at.",
        },
    ),
    hints=(
        "tensor.split(block, dim) cuts into tiles and leaves the last one smaller.",
        "any() + all() of a tile is 0, 1 or 2.",
        "rows = []\nfor r in keep.split(block, dim=0):\n"
        "    rows.append([int(t.any()) + int(t.all()) for t in r.split(block, dim=1)])\nreturn torch.tensor(rows)",
    ),
)

# ---- attention over tiles ----------------------------------------------------------------------------------


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, kind: torch.Tensor, block: int
) -> torch.Tensor:
    """Running softmax over the tiles that are not empty."""
    out = torch.zeros_like(q)
    for a in range(kind.shape[0]):
        rows = slice(a * block, (a + 1) * block)
        top = torch.full_like(q[:, :, rows, :1], float("-inf"))
        total, acc = torch.zeros_like(top), torch.zeros_like(q[:, :, rows])
        for b in kind[a].nonzero()[:, 0].tolist():
            cols = slice(b * block, (b + 1) * block)
            s = q[:, :, rows] @ k[:, :, cols].transpose(-1, -2) / q.shape[3] ** 0.5
            if kind[a, b] == 1:
                s = s.masked_fill(~keep[rows, cols], float("-inf"))
            new = torch.maximum(top, s.amax(dim=-1, keepdim=True))
            safe = new.masked_fill(new.isneginf(), 0.0)
            p, old = torch.exp(s - safe), torch.exp(top - safe)
            total, acc, top = old * total + p.sum(-1, keepdim=True), old * acc + p @ v[:, :, cols], new
        out[:, :, rows] = acc / total.masked_fill(total == 0, 1.0)
    return out


def _tiled_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, kind: torch.Tensor, block: int
) -> tuple[torch.Tensor, ...]:
    k, v = (x.nan_to_num(posinf=0.0) for x in (k, v))
    s = (q @ k.transpose(-1, -2) / q.shape[3] ** 0.5).masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(s, dim=-1, keepdim=True)
    return (torch.exp(s - lse.masked_fill(lse.isneginf(), 0.0)) @ v,)


def _tiled_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str,
        keep: torch.Tensor,
        block: int,
        *,
        size: float = 1.5,
        unread: bool = False,
        grow: bool = False,
    ) -> Case:
        m, n = keep.shape
        q, k, v = (
            normal(rng, 1, 2, m, 8, size=size),
            normal(rng, 1, 2, n, 8, size=size),
            normal(rng, 1, 2, n, 8),
        )
        kind = kinds(keep, block)
        if grow:  # scores rise along the keys, so that the maximum moves in every tile
            k = k + torch.linspace(-6, 6, n)[:, None]
            q = q.abs()
        if unread:
            for b in (kind.sum(dim=0) == 0).nonzero()[:, 0].tolist():
                k[:, :, b * block : (b + 1) * block] = v[:, :, b * block : (b + 1) * block] = float("inf")
        return Case(name, {"q": q, "k": k, "v": v, "keep": keep, "kind": kind, "block": block})

    hidden = window_mask(rng, 12)
    hidden[int(rng.integers(0, 12))] = False
    return [
        case("equals masked attention", window_mask(rng, 24), 4),
        case("no multiple of the tile", window_mask(rng, 27), 8),
        case("tiles outside the pattern are not read", window_mask(rng, 64, 8), 4, unread=True),
        case("rising scores", window_mask(rng, 32), 4, grow=True),
        case("huge scores", window_mask(rng, 20), 4, size=12.0),
        case("a query that sees no key", hidden, 4),
        case("whole tiles", torch.ones(9, 9, dtype=torch.bool), 3),
    ]


def _tiled_mutant(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    kind: torch.Tensor,
    block: int,
) -> torch.Tensor:
    if fault == "everything read":
        s = (q @ k.transpose(-1, -2) / q.shape[3] ** 0.5).masked_fill(~keep, float("-inf"))
        lse = torch.logsumexp(s, dim=-1, keepdim=True)
        return torch.exp(s - lse.masked_fill(lse.isneginf(), 0.0)) @ v
    out = torch.zeros_like(q)
    for a in range(kind.shape[0]):
        rows = slice(a * block, (a + 1) * block)
        top = torch.full_like(q[:, :, rows, :1], float("-inf"))
        total, acc = torch.zeros_like(top), torch.zeros_like(q[:, :, rows])
        listed = kind[a].nonzero()[:, 0].tolist()
        if fault == "last tile dropped":
            listed = listed[:-1] if len(listed) > 1 else listed
        if fault == "whole tiles alone":
            listed = [b for b in listed if kind[a, b] == 2]
        for b in listed:
            cols = slice(b * block, (b + 1) * block)
            s = q[:, :, rows] @ k[:, :, cols].transpose(-1, -2)
            s = s if fault == "no scale" else s / q.shape[3] ** 0.5
            if kind[a, b] == 1 and fault != "no mask inside a tile":
                hidden = keep[rows, cols] if fault == "mask the wrong way round" else ~keep[rows, cols]
                s = s.masked_fill(hidden, float("-inf"))
            new = torch.maximum(top, s.amax(dim=-1, keepdim=True))
            if fault == "no maximum":
                new = torch.zeros_like(new)
            safe = new if fault == "NaN rows" else new.masked_fill(new.isneginf(), 0.0)
            p, old = torch.exp(s - safe), torch.exp(top - safe)
            if fault == "no maximum":
                old = torch.ones_like(old)
            one = torch.ones_like(old)
            kept = one if fault in ("accumulator not rescaled", "neither rescaled") else old
            shrunk = one if fault in ("sum not rescaled", "neither rescaled") else old
            total, acc = shrunk * total + p.sum(-1, keepdim=True), kept * acc + p @ v[:, :, cols]
            top = top if fault == "maximum not kept" else new
            if fault == "each tile its own softmax":
                total, acc = torch.ones_like(total), acc / p.sum(-1, keepdim=True).clamp(min=1e-30)
        out[:, :, rows] = acc / total.masked_fill(total == 0, 1.0)
    return out


TILED = Exercise(
    id="sparse/static_patterns/tiled",
    title="attention over a list of tiles",
    signature="tiled(q [B, H, Nq, D], k, v [B, H, Nk, D], keep [Nq, Nk] bool, kind [Mq, Mk], block) -> out [B, H, "
    "Nq, D]",
    outputs=(Output("out", "q"),),
    make_inputs=_tiled_inputs,
    reference=_tiled_reference,
    solution=tiled,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals masked attention": "For each tile of queries: a running maximum, sum and output over the tiles "
        "whose kind is "
        "not 0.",
        "no multiple of the tile": "Slices past the end are shorter by themselves; nothing needs to be filled up.",
        "tiles outside the pattern are not read": "Keys of tiles that no query sees hold infinities here. Reading "
        "them at "
        "all, even "
        "to mask them, spoils the result.",
        "rising scores": "When the maximum rises, sum and output so far shrink by e^(old - new).",
        "huge scores": "Subtract the running maximum before the exponential.",
        "a query that sees no key": "A query without a key returns 0: its maximum stays -inf and its sum 0.",
        "whole tiles": "Tiles of kind 2 need no mask.",
    },
    tolerance=Tolerance(
        3e-5,
        3e-5,
        "softmax of up to 64 float32 scores in another order, weighted means of numbers of size 3.",
    ),
    loose={
        "huge scores": Tolerance(
            2e-3, 2e-3, "scores of some hundreds in float32: rounding moves a weight by 1e-4 of itself."
        )
    },
    mutants=mutants(
        _tiled_mutant,
        {
            "everything read": "All keys are read and masked afterwards: 0 times infinity is NaN. Skipping means not "
            "loading.",
            "last tile dropped": "The last tile of each row's list is missing, which holds the query's own key.",
            "whole tiles alone": "Partial tiles are skipped: most queries see their nearest keys through one.",
            "no scale": "The scores are not divided by the root of D.",
            "no mask inside a tile": "Partial tiles are used without their mask: hidden keys are seen.",
            "no maximum": "No maximum is subtracted: e^s overflows for large scores.",
            "NaN rows": "A row without a key gives -inf - -inf = NaN. Replace a maximum of -inf before you subtract "
            "it.",
            "accumulator not rescaled": "The output so far is not multiplied by e^(old maximum - new maximum), as "
            "the sum is.",
            "sum not rescaled": "The sum so far is not multiplied by e^(old maximum - new maximum), as the output "
            "is.",
            "neither rescaled": "Sum and output so far are measured from the old maximum: multiply both by e^(old "
            "maximum - new maximum) before they grow.",
            "maximum not kept": "The new maximum is not kept for the next tile: top = new at the end of the loop.",
            "mask the wrong way round": "masked_fill hides where its mask is True, and keep is True where a key is "
            "seen: ~keep.",
            "each tile its own softmax": "Each tile is normalised by itself and the results are added. All tiles of "
            "a row "
            "share one denominator.",
        },
    ),
    hints=(
        "It is flash attention whose inner loop runs over kind[a].nonzero() in place of all tiles.",
        "Per tile: s, new = max(top, max s), p = exp(s - new), old = exp(top - new); total and acc are multiplied "
        "by old "
        "before they grow. Guard new = -inf.",
        "s = q[:, :, rows] @ k[:, :, cols].transpose(-1, -2) / q.shape[3] ** 0.5\nif kind[a, b] == 1:\n"
        "    s = s.masked_fill(~keep[rows, cols], float('-inf'))\n"
        "new = torch.maximum(top, s.amax(-1, keepdim=True))\nsafe = new.masked_fill(new.isneginf(), 0.0)\n"
        "p, old = torch.exp(s - safe), torch.exp(top - safe)\ntotal = old * total + p.sum(-1, keepdim=True)\n"
        "acc = old * acc + p @ v[:, :, cols]\ntop = new",
    ),
)
