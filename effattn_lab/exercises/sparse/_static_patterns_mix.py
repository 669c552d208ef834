"""Exercise on LongNet's mixing of several patterns."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._static_patterns_masks import FROM_SCRATCH


def mix(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """LongNet: outputs of several patterns, weighted by their softmax denominators."""
    top = lses.amax(dim=0)
    w = torch.exp(lses - top.masked_fill(top.isneginf(), 0.0))
    total = w.sum(dim=0)
    return (w[..., None] * outs).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]


def _mix_reference(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, ...]:
    w = torch.exp(lses - torch.logsumexp(lses, dim=0).nan_to_num(neginf=0.0))
    return ((w[..., None] * outs).sum(dim=0),)


def _mix_inputs(rng: np.random.Generator) -> list[Case]:
    def draw(
        patterns: int, *, size: float = 2.0, lost: float = 0.0, shift: float = 0.0
    ) -> dict[str, torch.Tensor]:
        outs, lses = normal(rng, patterns, 2, 3, 11, 5), normal(rng, patterns, 2, 3, 11, size=size) + shift
        gone = torch.from_numpy(rng.random(lses.shape) < lost)
        lses[gone], outs[gone] = float("-inf"), 0.0
        return {"outs": outs, "lses": lses}

    nobody = draw(3, lost=0.3)
    nobody["lses"][..., 4], nobody["outs"][:, :, :, 4] = float("-inf"), 0.0
    apart = draw(3)
    apart["lses"][..., ::2] -= 250.0
    return [
        Case("weights by the denominators", draw(3)),
        Case("rows far apart", apart),
        Case("one pattern", draw(1)),
        Case("rows that some patterns skip", draw(3, lost=0.4)),
        Case("rows that nobody owns", nobody),
        Case("huge denominators", draw(3, size=3.0, shift=300.0)),
        Case("tiny denominators", draw(2, size=3.0, shift=-300.0)),
    ]


def _mix_mutant(fault: str, outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    top = lses.amax(dim=0)
    safe = top.masked_fill(top.isneginf(), 0.0)
    w = torch.exp(lses - safe)
    if fault == "plain mean":
        return outs.mean(dim=0)
    if fault == "logarithms as weights":
        w = lses.masked_fill(lses.isneginf(), 0.0)
    if fault == "plain sum":
        return outs.sum(dim=0)
    if fault == "no maximum":
        w = torch.exp(lses)
    if fault == "one maximum for all":
        w = torch.exp(lses - lses.max())
    if fault == "NaN rows":
        w = torch.exp(lses - top)
    if fault == "largest pattern wins":
        w = (lses == top).to(outs.dtype) * (~top.isneginf())
    if fault == "not normalised":
        return (w[..., None] * outs).sum(dim=0)
    total = w.sum(dim=0)
    return (w[..., None] * outs).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]


MIX = Exercise(
    id="sparse/static_patterns/mix",
    title="mixing patterns by their denominators",
    signature="mix(outs [P, B, H, N, D], lses [P, B, H, N]) -> out [B, H, N, D]",
    outputs=(Output("out", "outs"),),
    make_inputs=_mix_inputs,
    reference=_mix_reference,
    solution=mix,
    from_scratch=FROM_SCRATCH,
    properties={
        "weights by the denominators": "Pattern p weighs Z_p over the sum of all Z, with Z_p = e^lse.",
        "one pattern": "One pattern has weight 1.",
        "rows that some patterns skip": "A pattern that skips a row has lse = -inf there, and weight 0.",
        "rows that nobody owns": "Where all lses are -inf the output is 0, not NaN.",
        "rows far apart": "Some rows lie far below others: every row needs a maximum of its own.",
        "huge denominators": "e^300 does not fit into float32: subtract each row's largest lse.",
        "tiny denominators": "e^-300 is 0 in float32: subtract each row's largest lse.",
    },
    tolerance=Tolerance(
        1e-4, 1e-4, "lses of 300 are rounded to 3e-5 in float32, which moves a weight by as much."
    ),
    mutants=mutants(
        _mix_mutant,
        {
            "plain mean": "All patterns weigh the same. One that saw more, or better matching, keys should weigh "
            "more.",
            "logarithms as weights": "The lses themselves are the weights. They are logarithms: e^lse is the "
            "denominator.",
            "plain sum": "The outputs are added up, so their weights sum to the number of patterns.",
            "no maximum": "e^lse overflows or vanishes: subtract the largest lse of each row first.",
            "one maximum for all": "One maximum is subtracted from all rows: rows far below it vanish. Take each "
            "row's own.",
            "NaN rows": "Where all lses are -inf, -inf - -inf is NaN: replace that maximum.",
            "largest pattern wins": "Only the pattern with the largest lse counts. The others weigh less, not "
            "nothing.",
            "not normalised": "The weights are not divided by their sum.",
        },
    ),
    hints=(
        "It is a softmax over the patterns, whose scores are the lses.",
        "top = lses.amax(dim=0); rows that are -inf everywhere need a guard twice: in the difference and in the "
        "division.",
        "top = lses.amax(dim=0)\nw = torch.exp(lses - top.masked_fill(top.isneginf(), 0.0))\ntotal = w.sum(dim=0)\n"
        "return (w[..., None] * outs).sum(dim=0) / total.masked_fill(total == 0, 1.0)[..., None]",
    ),
)
