"""Exercises on codes: the Hadamard transform, three thresholds, packing."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

#: What the lab asks to write.
FROM_SCRATCH = ("effattn_lab.sparse.adamas", "effattn_lab.sparse.codes", "effattn_lab.sparse.cache")

EXACT = Tolerance(0.0, 0.0, "integers are right or wrong.")

# ---- the transform -----------------------------------------------------------------------------------------


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x H along the last axis: log2 D rounds of sums and differences, then 1 / sqrt(D)."""
    dim, half = x.shape[-1], 1
    y = x
    while half < dim:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return y * dim**-0.5


def sylvester(dim: int) -> torch.Tensor:
    """The orthonormal matrix, float64: the sign of entry (i, j) is the parity of the common bits of i and j."""
    i = torch.arange(dim)
    common = i[:, None] & i
    parity = sum((common >> bit & 1 for bit in range(max(1, dim.bit_length()))), torch.zeros_like(common)) % 2
    return (1 - 2 * parity).double() * dim**-0.5


def _hadamard_reference(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x @ sylvester(x.shape[-1]),)


def _hadamard_inputs(rng: np.random.Generator) -> list[Case]:
    outlier = normal(rng, 2, 5, 16)
    outlier[..., 3] = 50.0
    return [
        Case("four channels", {"x": normal(rng, 2, 3, 4)}),
        Case("sixty-four channels", {"x": normal(rng, 2, 3, 5, 64)}),
        Case("one channel", {"x": normal(rng, 3, 1)}),
        Case("two channels", {"x": normal(rng, 3, 2)}),
        Case("one large channel", {"x": outlier}),
        Case("a single vector", {"x": normal(rng, 32)}),
    ]


def _hadamard_mutant(fault: str, x: torch.Tensor) -> torch.Tensor:
    dim, half, y = x.shape[-1], 1, x
    if fault == "random signs":
        y = x * (1.0 - 2.0 * (torch.arange(dim) % 3 == 1))
    stop = min(2, dim) if fault == "one round" else dim // 2 if fault == "last round missed" else dim
    while half < stop:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        difference = b - a if fault == "difference turned around" else a - b
        if fault == "only sums go on" and half > 1:
            difference = b
        y = torch.stack([a + b, difference], dim=-2).flatten(-3)
        half *= 2
    if fault == "bits reversed":
        bits = max(1, dim.bit_length() - 1)
        order = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(dim)] if dim > 1 else [0]
        y = y[..., order]
    power = {"not normalised": 0.0, "divided by D": -1.0}.get(fault, -0.5)
    scale = dim**power
    if fault == "divided by the rounds":
        scale = 1 / max(1, dim.bit_length() - 1)
    return y * scale


HADAMARD = Exercise(
    id="sparse/adamas/hadamard",
    title="the orthonormal Hadamard transform",
    signature="hadamard(x [..., D]) -> y [..., D]",
    outputs=(Output("y", "x"),),
    make_inputs=_hadamard_inputs,
    reference=_hadamard_reference,
    solution=hadamard,
    from_scratch=FROM_SCRATCH,
    properties={
        "four channels": "(a, b, c, d) becomes (a+b+c+d, a-b+c-d, a+b-c-d, a-b-c+d) / 2.",
        "sixty-four channels": "Six rounds: partners are 1, 2, 4, ... channels apart.",
        "one channel": "H_1 = [1]: nothing happens.",
        "two channels": "(a + b, a - b) / sqrt(2).",
        "one large channel": "One large channel goes into all of them, with either sign.",
        "a single vector": "Only the last axis is transformed; there may be no other.",
    },
    tolerance=Tolerance(
        1e-5, 1e-5, "six rounds of sums of numbers of size 1, at most 50, in float32: a few 1e-6."
    ),
    mutants=mutants(
        _hadamard_mutant,
        {
            "not normalised": "The result is sqrt(D) times too large: lengths grow, and fixed thresholds mean "
            "nothing. "
            "Divide by sqrt(D).",
            "divided by D": "Divided by D. The orthonormal transform divides by its root.",
            "divided by the rounds": "Divided by the number of rounds. Each round divides by sqrt(2): sqrt(D) in "
            "all.",
            "one round": "Only neighbours are combined: log2 D rounds, with partners 1, 2, 4, ... apart.",
            "last round missed": "The last round is missing: the two halves never meet.",
            "difference turned around": "b - a where a - b belongs: half of the rows have the wrong sign.",
            "only sums go on": "After the first round differences are passed on as they are; they too go through "
            "each round.",
            "bits reversed": "The right numbers in another order: entry i stands at i with its bits reversed.",
            "random signs": "Signs are flipped before the transform, as quantisers often do. Here they are not.",
        },
    ),
    hints=(
        "In each round split the channels into pairs of blocks of length 1, then 2, then 4.",
        "y.unflatten(-1, (-1, 2, half)) puts partners on an axis of their own: a = [..., 0, :], b = [..., 1, :].",
        "half = 1\nwhile half < dim:\n    pairs = y.unflatten(-1, (-1, 2, half))\n"
        "    a, b = pairs[..., 0, :], pairs[..., 1, :]\n"
        "    y = torch.stack([a + b, a - b], dim=-2).flatten(-3)\n    half *= 2\nreturn y * dim**-0.5",
    ),
)

# ---- buckets -----------------------------------------------------------------------------------------------


def buckets(x: torch.Tensor, t: float) -> torch.Tensor:
    """How many of -t, 0 and t a number exceeds: 0 .. 3."""
    return (x > -t).to(torch.uint8) + (x > 0).to(torch.uint8) + (x > t).to(torch.uint8)


def _buckets_reference(x: torch.Tensor, t: float) -> tuple[torch.Tensor, ...]:
    return (torch.bucketize(x, torch.tensor([-t, 0.0, t], dtype=x.dtype)).to(torch.uint8),)


def _buckets_inputs(rng: np.random.Generator) -> list[Case]:
    on = torch.tensor([[-2.0, 0.0, 2.0, -2.5, -0.5, 0.5, 2.5, 0.0]])
    return [
        Case("four buckets", {"x": normal(rng, 3, 40, size=2.0), "t": 2.0}),
        Case("on a threshold", {"x": on, "t": 2.0}),
        Case("small numbers: signs alone", {"x": normal(rng, 3, 20), "t": 10.0}),
        Case("large numbers", {"x": normal(rng, 3, 20, size=100.0), "t": 1.0}),
    ]


def _buckets_mutant(fault: str, x: torch.Tensor, t: float) -> torch.Tensor:
    if fault == "on a threshold counts as above":
        c = (x >= -t).long() + (x >= 0).long() + (x >= t).long()
    elif fault == "0 counts as above":
        c = (x > -t).long() + (x >= 0).long() + (x > t).long()
    elif fault == "signs alone":
        c = (x > 0).long()
    elif fault == "signs at the outer codes":
        c = 3 * (x > 0).long()
    elif fault == "by size":
        c = (x.abs() > t).long() + 2 * (x > 0).long()
    elif fault == "rounded":
        c = (x / t).round().clamp(-2, 1).long() + 2
    elif fault == "scaled to the largest":
        c = ((x / x.abs().max() + 1) * 2).clamp(0, 3.99).long()
    elif fault == "thresholds of equal width":
        c = (x > -t).long() + (x > -t / 3).long() + (x > t / 3).long()
    else:
        c = (x > -t).long() + (x > 0).long() + (x > t).long()
    if fault == "turned around":
        c = 3 - c
    if fault == "counted from 1":
        c = c + 1
    return c.to(torch.uint8)


BUCKETS = Exercise(
    id="sparse/adamas/buckets",
    title="two bits a coordinate",
    signature="buckets(x [...], t) -> codes uint8 [...], 0 to 3",
    outputs=(Output("codes", "uint8"),),
    make_inputs=_buckets_inputs,
    reference=_buckets_reference,
    solution=buckets,
    from_scratch=FROM_SCRATCH,
    properties={
        "four buckets": "Count how many of -t, 0 and t the number exceeds.",
        "on a threshold": "What lies exactly on a threshold belongs below it: strictly greater.",
        "small numbers: signs alone": "With all numbers inside (-t, t) the codes are 1 and 2.",
        "large numbers": "Nearly all codes are 0 and 3.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _buckets_mutant,
        {
            "on a threshold counts as above": "A number on a threshold is put above it: > and not >=.",
            "0 counts as above": "A number of exactly 0 is put above the middle threshold: > there, too.",
            "signs alone": "Only the sign is coded: one bit. Two more thresholds, -t and t.",
            "signs at the outer codes": "Signs become 0 and 3; what lies inside (-t, t) is 1 or 2.",
            "by size": "The low bit says |x| > t: then -5 and -1 are in the wrong order. Codes must rise with x.",
            "rounded": "x / t is rounded: the borders then lie at halves of t, and none lies at 0.",
            "scaled to the largest": "The range is stretched to the largest number: the thresholds are fixed.",
            "thresholds of equal width": "The thresholds are -t, -t/3 and t/3; they are -t, 0 and t.",
            "turned around": "Codes fall as x rises: 3 - c.",
            "counted from 1": "Codes run from 1 to 4: four does not fit into two bits. Begin at 0.",
        },
    ),
    hints=(
        "Three comparisons, added up.",
        "(x > 0) is a tensor of bools; .to(torch.uint8) makes it count.",
        "return sum((x > b).to(torch.uint8) for b in (-t, 0.0, t))",
    ),
)

# ---- packing -----------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Sixteen codes a word, coordinate i in bits 2 i and 2 i + 1; the top pair's high bit is the sign."""
    shift = 2 * torch.arange(16)
    wide = (codes.long().unflatten(-1, (-1, 16)) << shift).sum(dim=-1)
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)


def _pack_reference(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    groups = codes.long().unflatten(-1, (-1, 16))
    wide = torch.zeros_like(groups[..., 0])
    for i in reversed(range(16)):
        wide = wide * 4 + groups[..., i]
    return (((wide + 2**31) % 2**32 - 2**31).to(torch.int32),)


def draw_codes(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Codes 0 .. 3, uint8."""
    return torch.from_numpy(rng.integers(0, 4, shape)).to(torch.uint8)


def _pack_inputs(rng: np.random.Generator) -> list[Case]:
    top = draw_codes(rng, 3, 16)
    top[:, 15] = 3
    first = torch.zeros(2, 32, dtype=torch.uint8)
    first[:, 1], first[:, 17] = 2, 3
    return [
        Case("one word", {"codes": draw_codes(rng, 3, 16) % 3}),
        Case("four words", {"codes": draw_codes(rng, 2, 5, 64)}),
        Case("the top pair", {"codes": top}),
        Case("where a coordinate goes", {"codes": first}),
    ]


def _pack_mutant(fault: str, codes: torch.Tensor) -> torch.Tensor:
    shift = 2 * torch.arange(16)
    groups = codes.long().unflatten(-1, (-1, 16))
    if fault == "first coordinate on top":
        shift = shift.flip(0)
    if fault == "one bit each":
        shift = torch.arange(16)
    if fault == "four bits each":
        shift = (4 * torch.arange(16)) % 32
    if fault == "every so many coordinates":
        groups = codes.long().unflatten(-1, (16, -1)).transpose(-1, -2)
    if fault == "low bits, then high bits":
        wide = ((groups & 1) << torch.arange(16)).sum(-1) + ((groups >> 1) << torch.arange(16, 32)).sum(-1)
    else:
        wide = (groups << shift).sum(dim=-1)
    if fault == "last coordinate lost":
        wide = (groups << shift)[..., :15].sum(dim=-1)
    if fault == "cut at the largest integer":
        wide = wide.clamp(max=2**31 - 1)
    if fault == "sign bit dropped":
        wide = wide & 0x7FFFFFFF
    wide = wide & 0xFFFFFFFF
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)


PACK = Exercise(
    id="sparse/adamas/pack",
    title="sixteen codes in a word",
    signature="pack(codes uint8 [..., D]) -> words int32 [..., D / 16]",
    outputs=(Output("words", "int32"),),
    make_inputs=_pack_inputs,
    reference=_pack_reference,
    solution=pack,
    from_scratch=FROM_SCRATCH,
    properties={
        "one word": "Coordinate i is shifted left by 2 i bits; then they are added.",
        "four words": "Neighbouring coordinates share a word: 0 to 15, 16 to 31, and so on.",
        "the top pair": "A word of 2^31 and more is a negative int32: subtract 2^32.",
        "where a coordinate goes": "Coordinate 0 is in the lowest bits.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _pack_mutant,
        {
            "first coordinate on top": "The first coordinate is in the highest bits; it belongs in the lowest.",
            "one bit each": "Each code is shifted by one bit more than the one before: they overlap. Two bits each.",
            "four bits each": "Each code is shifted by four bits more: two bits are enough, and sixteen must fit.",
            "every so many coordinates": "A word holds every n-th coordinate; it holds 16 neighbours.",
            "low bits, then high bits": "Low bits and high bits are in halves of their own: the two bits of a code "
            "are "
            "neighbours.",
            "last coordinate lost": "The sixteenth coordinate is missing.",
            "cut at the largest integer": "Words of 2^31 and more are cut off at the largest int32. Subtract 2^32.",
            "sign bit dropped": "The highest bit is lost: code 3 on top becomes 1.",
        },
    ),
    hints=(
        "Work in int64, where nothing overflows, and turn to int32 at the end.",
        "codes.long().unflatten(-1, (-1, 16)) << 2 * torch.arange(16), summed over the last axis.",
        "wide = (codes.long().unflatten(-1, (-1, 16)) << 2 * torch.arange(16)).sum(dim=-1)\n"
        "return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)",
    ),
)
