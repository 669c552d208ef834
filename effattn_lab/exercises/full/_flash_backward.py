"""Exercise: the backward products of one tile, probabilities recomputed."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.full._flash_rows import FROM_SCRATCH, INF, finite
from effattn_lab.exercises.making import mutants, normal


def backward_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one tile adds to dq, dk, dv, with its probabilities recomputed from lse."""
    s = (scale * (q @ k.T)).masked_fill(~keep, float("-inf"))
    p = torch.exp(
        s - torch.where(torch.isneginf(lse), 0.0, lse)[:, None]
    )  # lse is -inf where nothing was seen
    delta = (do * o).sum(dim=-1)
    dv = p.T @ do
    dp = do @ v.T
    ds = p * (dp - delta[:, None])
    return scale * (ds @ k), scale * (ds.T @ q), dv


def _backward_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """From the quotient rule, entry by entry: d o_ic / d s_ij = P_ij (v_jc - o_ic)."""
    s = scale * torch.einsum("ic,jc->ij", q, k)
    p = torch.where(keep, torch.exp(s - lse[:, None]), torch.zeros_like(s))
    ds = torch.einsum("ij,ic,ijc->ij", p, do, v[None] - o[:, None])
    return (
        scale * torch.einsum("ij,jc->ic", ds, k),
        scale * torch.einsum("ij,ic->jc", ds, q),
        torch.einsum("ij,ic->jc", p, do),
    )


def _backward_case(
    name: str,
    rng: np.random.Generator,
    *,
    rows: int = 12,
    cols: int = 16,
    before: int = 20,
    size: float = 1.0,
    causal: bool = False,
    integers: bool = False,
) -> Case:
    """A tile of ``cols`` keys that follows ``before`` keys; o and lse belong to all of them."""
    width, scale = 16, 0.25
    if integers:  # scores in the thousands that float32 holds exactly
        q = torch.from_numpy(rng.integers(-60, 61, (rows, width))).float()
        keys = torch.from_numpy(rng.integers(-60, 61, (before + cols, width))).float()
    else:
        q, keys = normal(rng, rows, width, size=size), normal(rng, before + cols, width, size=size)
    values, do = normal(rng, before + cols, width), normal(rng, rows, width)
    position = torch.arange(rows)[:, None] + before
    keep = (
        position >= torch.arange(before + cols)
        if causal
        else torch.ones(rows, before + cols, dtype=torch.bool)
    )
    s = (scale * (q.double() @ keys.double().T)).masked_fill(~keep, -INF)
    lse = torch.logsumexp(s, dim=-1)
    o = torch.exp(s - lse[:, None]) @ values.double()
    return Case(
        name,
        {
            "q": q, "k": keys[before:].clone(), "v": values[before:].clone(), "o": o.float(), "do": do,
            "lse": lse.float(), "keep": keep[:, before:].clone(), "scale": scale,
        },
    )  # fmt: skip


def _backward_inputs(rng: np.random.Generator) -> list[Case]:
    hidden = _backward_case("a wholly hidden tile", rng)
    keep = hidden.kwargs["keep"]
    assert isinstance(keep, torch.Tensor)
    # Four queries that see no key at all, as with more queries than keys: lse -inf, o 0.
    blind = dict(_backward_case("", rng, causal=True, rows=16).kwargs)
    for name, value in (("lse", -INF), ("o", 0.0), ("keep", False)):
        x = blind[name]
        assert isinstance(x, torch.Tensor)
        x[:4] = value
    return [
        _backward_case("one tile among others", rng),
        _backward_case("the only tile", rng, before=0, rows=16),
        _backward_case("a ragged tile", rng, rows=7, cols=5),
        _backward_case("one query, one key", rng, rows=1, cols=1, before=3),
        _backward_case("the diagonal tile", rng, causal=True, rows=16),
        _backward_case("spread-out scores", rng, size=2.5),
        _backward_case("large scores", rng, integers=True),
        Case("a wholly hidden tile", {**hidden.kwargs, "keep": torch.zeros_like(keep)}),
        Case("queries that see nothing", blind),
    ]


def _backward_mutant(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor,
    scale: float,
    guard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = (1.0 if fault == "scores unscaled" else scale) * (q @ k.T)
    if fault != "mask forgotten":
        s = s.masked_fill(~keep, -INF)
    if guard and fault != "no guard":
        lse = finite(lse)
    p = torch.exp(s - lse[:, None])
    if fault == "softmax of the tile":
        m = finite(s.amax(dim=-1, keepdim=True))
        p = torch.exp(s - m)
        l = p.sum(dim=-1, keepdim=True)
        p = p / torch.where(l == 0, torch.ones_like(l), l)
    if fault == "lse forgotten":
        p = torch.exp(s)
    if fault == "base 2":
        p = torch.exp2(s - lse[:, None])
    if fault == "half":
        p = p.half().float()
    delta = (do * o).sum(dim=-1, keepdim=True)
    dp = do @ v.T
    if fault == "delta missing":
        delta = torch.zeros_like(delta)
    if fault == "delta from the tile":
        delta = (p * dp).sum(dim=-1, keepdim=True)
    if fault == "delta over rows":
        delta = (do * o).sum(dim=0).mean() * torch.ones_like(delta)
    ds = p * (dp - delta)
    if fault == "delta added":
        ds = p * (dp + delta)
    if fault == "p outside":
        ds = p * dp - delta
    dq, dk, dv = scale * (ds @ k), scale * (ds.T @ q), p.T @ do
    if fault == "dq unscaled":
        dq = ds @ k
    if fault == "dk unscaled":
        dk = ds.T @ q
    if fault == "both unscaled":
        dq, dk = ds @ k, ds.T @ q
    if fault == "scale twice":
        dq, dk = scale * dq, scale * dk
    if fault == "dv from ds":
        dv = ds.T @ do
    if fault == "dv from o":
        dv = p.T @ o
    return dq, dk, dv


BACKWARD_TILE = Exercise(
    id="full/flash/backward_tile",
    title="gradients of one tile, P recomputed",
    signature="backward_tile(q, k, v, o, do, lse, keep, scale) -> (dq [Bq, D], dk [Bk, D], dv [Bk, D])",
    outputs=(Output("dq", "q"), Output("dk", "k"), Output("dv", "v")),
    make_inputs=_backward_inputs,
    reference=_backward_reference,
    solution=backward_tile,
    from_scratch=FROM_SCRATCH,
    properties={
        "one tile among others": "lse and o belong to the whole row, of which this tile holds a part: P = exp(s "
        "- lse) "
        "does not add up to 1 here, and delta = sum(do * o) over the head dimension.",
        "the only tile": "dV = P^T dO, dP = dO V^T, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.",
        "a ragged tile": "Tiles need not be square: check which side each product is transposed on.",
        "one query, one key": "Keep the axes: delta is one number per query.",
        "the diagonal tile": "Where keep is False P must be 0, so that nothing flows to hidden keys.",
        "spread-out scores": "The scores need the scale before exp, and dQ and dK need it once more.",
        "large scores": "exp(s) overflows; exp(s - lse) is at most 1.",
        "a wholly hidden tile": "A hidden tile adds exactly 0 to all three gradients.",
        "queries that see nothing": "Step 4 gives such a query lse = -inf. It adds 0 to all three.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "P has a relative rounding of about 1e-6 times the size of the exponent (up to 20), and each gradient is a "
        "sum of at most 16 products of numbers of size up to 10.",
    ),
    loose={
        "large scores": Tolerance(
            2e-3,
            0.25,
            "lse near 5000 is rounded to 2e-4, so P is off by 2e-4, times keys of size 60 and 16 terms.",
        ),
    },
    mutants=mutants(
        _backward_mutant,
        {
            "delta missing": "delta is missing: dS = P * (dP - delta). Without it a common shift of all scores in a "
            "row would change the output.",
            "delta added": "delta is added; softmax's derivative subtracts it: dS = P * (dP - delta).",
            "delta from the tile": "delta is computed from this tile's P and dP alone. It is a sum over the "
            "whole row, "
            "and equals sum(do * o): that is why o is among the arguments.",
            "delta over rows": "delta is one number for the whole tile. Each query has its own: sum over the head "
            "dimension, dim=-1.",
            "p outside": "delta is subtracted after the multiplication: the parentheses are P * (dP - delta).",
            "lse forgotten": "P is recomputed as exp(s), without subtracting lse: that is not normalised, and "
            "overflows.",
            "softmax of the tile": "P is a softmax over this tile's keys alone. The row has keys elsewhere too: "
            "their "
            "share is in lse, so P = exp(s - lse).",
            "mask forgotten": "The mask is not applied to P: keys that the query could not see receive gradients.",
            "scores unscaled": "The recomputed scores lack the scale, so P differs from the forward pass's.",
            "dq unscaled": "dQ lacks the factor scale (s = scale q k, so d s / d q = scale k).",
            "dk unscaled": "dK lacks the factor scale (s = scale q k, so d s / d k = scale q).",
            "both unscaled": "dQ and dK both lack the factor scale from s = scale q k.",
            "scale twice": "The scale is applied twice in dQ and dK.",
            "dv from ds": "dV uses dS. Values meet P directly: dV = P^T dO.",
            "dv from o": "dV uses the output o instead of its gradient do: dV = P^T dO.",
            "base 2": "P is recomputed with exp2 from a natural lse: use exp.",
            "no guard": "A query that sees no key has lse = -inf, and its scores are all -inf: -inf - -inf is NaN, "
            "and the product with q spreads the NaN over all of dk and dv.",
            "half": "P is rounded to half precision: three digits are left. Stay in float32.",
        },
        unguarded=True,
    ),
    hints=(
        "Start from O = P V as if P were given: that yields dV and dP, two products. Then one row of softmax: which "
        "gradient of s gives a gradient of p?",
        "P needs the scale, the mask and lse, in that order, and care where lse is -inf. dv and dp need "
        "P and do alone. dq and dk come from s = scale q k^T by the same rule that gave dv and dp from o = P v.",
        "s = (scale * (q @ k.T)).masked_fill(~keep, float('-inf'))\n"
        "p = torch.exp(s - lse[:, None]), with lse = -inf replaced by 0\n"
        "delta = (do * o).sum(dim=-1)\ndp = do @ v.T\nds = p * (dp - delta[:, None])\n"
        "dv is p.T @ do; dq and dk are scale times ds @ k and ds.T @ q.",
    ),
)
