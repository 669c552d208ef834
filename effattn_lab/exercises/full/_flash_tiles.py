"""Exercise: one tile absorbed into the running state (m, l, acc)."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.full._flash_rows import FROM_SCRATCH, INF, finite
from effattn_lab.exercises.making import mutants, normal


def tile_step(
    m: torch.Tensor, l: torch.Tensor, acc: torch.Tensor, s: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absorb one tile of scores into the running state of a query tile."""
    m_new = torch.maximum(m, s.amax(dim=-1))
    origin = torch.where(torch.isneginf(m_new), torch.zeros_like(m_new), m_new)  # nothing visible yet
    alpha = torch.exp(m - origin)
    p = torch.exp(s - origin[:, None])
    return m_new, alpha * l + p.sum(dim=-1), alpha[:, None] * acc + p @ v


def _step_reference(
    m: torch.Tensor, l: torch.Tensor, acc: torch.Tensor, s: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return tile_step(m, l, acc, s, v)


def _step_case(
    name: str,
    rng: np.random.Generator,
    *,
    seen: int = 24,
    new: int = 16,
    rows: int = 8,
    size: float = 1.0,
    old_shift: float = 0.0,
    shift: float = 0.0,
) -> Case:
    """A state that has really seen ``seen`` keys, and a tile of ``new`` keys."""
    width = 12
    s_old = (normal(rng, rows, seen, size=size) + old_shift).double()
    v_old = normal(rng, seen, width).double()
    m = s_old.amax(dim=-1) if seen else torch.full((rows,), -INF, dtype=torch.float64)
    p = torch.exp(s_old - m[:, None])
    return Case(
        name,
        {
            "m": m.float(),
            "l": p.sum(dim=-1).float(),
            "acc": (p @ v_old).float(),
            "s": normal(rng, rows, new, size=size) + shift,
            "v": normal(rng, new, width),
        },
    )


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    diagonal = _step_case("the diagonal tile", rng, rows=16)
    blind = _step_case("a wholly hidden tile", rng)
    first_blind = _step_case("nothing visible yet", rng, seen=0)
    s = diagonal.kwargs["s"]
    assert isinstance(s, torch.Tensor)
    lower = s.masked_fill(torch.ones(16, 16).triu(1).bool(), -INF)
    hidden = torch.full((8, 16), -INF)
    partly = hidden.clone()
    partly[4:] = normal(rng, 4, 16)
    return [
        _step_case("the first tile", rng, seen=0),
        _step_case("the maximum moves up", rng, shift=3.0),
        _step_case("the maximum stays", rng, old_shift=9.0),
        _step_case("a ragged tile", rng, new=5, size=2.0),
        _step_case("one query, one key", rng, rows=1, new=1, shift=0.5),
        _step_case("spread-out scores", rng, size=10.0),
        _step_case("large scores", rng, seen=0, shift=1e4),
        _step_case("large scores", rng, old_shift=-1e4, shift=1e4),
        _step_case("large scores", rng, old_shift=-1e4, shift=-1e4),
        Case("the diagonal tile", {**diagonal.kwargs, "s": lower}),
        Case("a wholly hidden tile", {**blind.kwargs, "s": hidden}),
        Case("nothing visible yet", {**first_blind.kwargs, "s": hidden.clone()}),
        Case("nothing visible yet", {**first_blind.kwargs, "s": partly}),
    ]


def _step_mutant(
    fault: str,
    m: torch.Tensor,
    l: torch.Tensor,
    acc: torch.Tensor,
    s: torch.Tensor,
    v: torch.Tensor,
    guard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m_new = torch.maximum(m, s.amax(dim=-1))
    if fault == "tile max only":
        m_new = s.amax(dim=-1)
    if fault == "old max":
        m_new = torch.where(torch.isneginf(m), s.amax(dim=-1), m)
    if fault == "one max for all rows":
        m_new = torch.maximum(m, s.max())
    origin = finite(m_new) if guard and fault != "no guard" else m_new
    exp = torch.exp2 if fault == "base 2" else torch.exp
    alpha = exp(m - origin)
    if fault == "inverse factor":
        alpha = torch.where(torch.isneginf(m), torch.zeros_like(m), exp(origin - m))
    p = torch.exp(s) if fault == "no max" else exp(s - origin[:, None])
    if fault == "half":
        p = p.half().float()
    l_new = (l if fault == "l not rescaled" else alpha * l) + p.sum(dim=-1)
    kept = acc if fault == "acc not rescaled" else alpha[:, None] * acc
    acc_new = kept + p @ v
    if fault == "rescaled after adding":
        l_new, acc_new = alpha * (l + p.sum(dim=-1)), alpha[:, None] * (acc + p @ v)
    if fault == "divided inside":
        acc_new = acc_new / torch.where(l_new == 0, torch.ones_like(l_new), l_new)[:, None]
    if fault == "state replaced":
        l_new, acc_new = p.sum(dim=-1), p @ v
    if fault == "l counts keys":
        l_new = alpha * l + s.shape[-1]
    if fault == "nothing absorbed":
        return m.clone(), l.clone(), acc.clone()
    return m.clone() if fault == "m not returned" else m_new, l_new, acc_new


TILE_STEP = Exercise(
    id="full/flash/tile_step",
    title="absorb one tile into (m, l, acc)",
    signature="tile_step(m [Bq], l [Bq], acc [Bq, D], s [Bq, Bk], v [Bk, D]) -> (m [Bq], l [Bq], acc [Bq, D])",
    outputs=(Output("m", "m"), Output("l", "l"), Output("acc", "acc")),
    make_inputs=_step_inputs,
    reference=_step_reference,
    solution=tile_step,
    from_scratch=FROM_SCRATCH,
    properties={
        "the first tile": "The state before the first tile is m = -inf, l = 0, acc = 0: nothing of it may remain.",
        "the maximum moves up": "When m grows, all that was summed so far is measured from the wrong origin: l *and* "
        "acc shrink by alpha = exp(m_old - m_new).",
        "the maximum stays": "If the tile holds no new maximum, m stays, alpha is 1, and the tile's weights are "
        "measured from the old m.",
        "a ragged tile": "The last tile may hold fewer keys than the others: take sizes from s and v.",
        "one query, one key": "Keep the axes: reductions run over the keys, dim=-1.",
        "spread-out scores": "acc = sum of exp(s - m) v with the *new* m for the old part and the new part alike.",
        "large scores": "Every exponent must be at most 0: subtract the new running maximum before exp.",
        "the diagonal tile": "Scores of -inf must add nothing to l and acc.",
        "a wholly hidden tile": "A tile of -inf leaves the state as it was.",
        "nothing visible yet": "If m_new is still -inf, then -inf - -inf is NaN. Use 0 as the origin in such rows; "
        "the returned m stays -inf.",
    },
    tolerance=Tolerance(
        2e-5,
        2e-5,
        "sums of at most 40 exponentials of size up to 1, each with a relative rounding of 1e-6 from exponents up "
        "to 40 (float32: 6e-8 relative), times values of size up to 4.",
    ),
    loose={
        "large scores": Tolerance(
            2e-5, 4e-3, "scores near 10000 are spaced 1e-3 in float32; m - s in another order moves by that."
        ),
    },
    mutants=mutants(
        _step_mutant,
        {
            "acc not rescaled": "acc is not multiplied by alpha = exp(m_old - m_new): the old part of the output is "
            "still measured from the old maximum.",
            "l not rescaled": "l is not multiplied by alpha = exp(m_old - m_new): the old part of the sum is still "
            "measured from the old maximum.",
            "inverse factor": "The old state is multiplied by exp(m_new - m_old), the inverse of the factor: it must "
            "shrink when the maximum grows.",
            "tile max only": "m is the maximum of this tile alone. It is a running maximum: max(m_old, max of "
            "the tile).",
            "old max": "The new weights are measured from the old maximum, and m does not move: exponents above "
            "0 can "
            "overflow.",
            "no max": "exp(s) is taken without subtracting the running maximum: large scores overflow, and the new "
            "part is on another scale than the old.",
            "one max for all rows": "One maximum serves the whole tile. Each query row has its own: amax(dim=-1).",
            "rescaled after adding": "alpha multiplies the new part too. Only what was there before needs the "
            "factor: "
            "alpha * acc + p @ v.",
            "divided inside": "acc is divided by l inside the step. Keep it unnormalised; divide once, after "
            "the last "
            "tile.",
            "state replaced": "The state is replaced by this tile's sums instead of added to: the keys seen "
            "before are "
            "lost.",
            "l counts keys": "l adds the number of keys instead of the sum of the tile's weights p.",
            "base 2": "Powers of two are taken of natural scores. Use exp, or multiply the scores by log2(e) first.",
            "no guard": "A row that has seen nothing becomes NaN: its m_new is -inf, and -inf - -inf is NaN.",
            "nothing absorbed": "The state comes back as it was: the tile adds nothing to it.",
            "m not returned": "l and acc are measured from the new maximum, but the m returned is the old one.",
            "half": "The weights p are rounded to half precision: three digits are left. Stay in float32.",
        },
        unguarded=True,
    ),
    hints=(
        "The invariant to keep: l = sum of exp(s - m) and acc = sum of exp(s - m) v over all keys seen so far, with "
        "the current m. Which factor turns a sum measured from m_old into one measured from m_new?",
        "In order: the new maximum; alpha = exp(m_old - m_new) for what was there; p = exp(s - m_new) for what is "
        "new; then both sums. Then ask what -inf - -inf is.",
        "m_new = torch.maximum(m, s.amax(dim=-1))\norigin = torch.where(torch.isneginf(m_new), 0.0, m_new)\n"
        "alpha = torch.exp(m - origin)\np = torch.exp(s - origin[:, None])\n"
        "l: alpha * l + the row sums of p; acc: the same factor, and p @ v.",
    ),
)
