"""Exercise: L1 distance of packed codes by three counts of bits."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output
from effattn_lab.exercises.making import mutants
from effattn_lab.exercises.sparse._adamas_codes import EXACT, FROM_SCRATCH, draw_codes, pack

LOW = 0x55555555


def popcount(x: torch.Tensor) -> torch.Tensor:
    """Set bits of int32 words of which only even bits are set."""
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum_i |a_i - b_i| of packed codes, by three counts of bits a word."""
    x = a ^ b
    lo, hi = x & LOW, (x >> 1) & LOW
    central = lo & hi & (a ^ (a >> 1))
    return (popcount(lo) + 2 * popcount(hi) - 2 * popcount(central)).sum(dim=-1, dtype=torch.int32)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    return ((words.long()[..., None] >> 2 * torch.arange(16)) & 3).flatten(-2)


def _distance_reference(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((unpacked(a) - unpacked(b)).abs().sum(dim=-1).to(torch.int32),)


def _distance_inputs(rng: np.random.Generator) -> list[Case]:
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4)).to(torch.uint8)
    shifted = [torch.zeros(16, 16, dtype=torch.uint8) for _ in range(2)]
    for place in (0, 7, 15):  # each pair at three places of the word
        for x, column in zip(shifted, pairs.T):
            x[:, place] = column
    central = 1 + draw_codes(rng, 6, 64) % 2, 1 + draw_codes(rng, 6, 64) % 2
    return [
        Case("all pairs of codes", {"a": pack(shifted[0]), "b": pack(shifted[1])}),
        Case("random codes", {"a": pack(draw_codes(rng, 3, 20, 64)), "b": pack(draw_codes(rng, 3, 20, 64))}),
        Case("the two codes in the middle", {"a": pack(central[0]), "b": pack(central[1])}),
        Case(
            "one query, many keys",
            {"a": pack(draw_codes(rng, 2, 1, 128)), "b": pack(draw_codes(rng, 2, 9, 128))},
        ),
        Case("equal codes", {"a": (same := pack(draw_codes(rng, 5, 32))), "b": same.clone()}),
    ]


def _distance_mutant(fault: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x = a ^ b
    lo, hi = x & LOW, (x >> 1) & LOW
    g = (a ^ (a >> 1)) & LOW
    low, high, both = popcount(lo), popcount(hi), popcount(lo & hi & g)
    words = low + 2 * high - 2 * both
    if fault == "{1, 2} counted 3":
        words = low + 2 * high
    if fault == "bits that differ":
        words = low + high
    if fault == "high bits count once":
        words = low + high - 2 * both
    if fault == "weights exchanged":
        words = 2 * low + high - 2 * both
    if fault == "shifted after the sum":
        words = 2 * (low + high)
    if fault == "mended by half":
        words = low + 2 * high - both
    if fault == "mended for {0, 3} too":
        words = low + 2 * high - 2 * popcount(lo & hi)
    if fault == "mended for the outer pair":
        words = low + 2 * high - 2 * popcount(lo & hi & ~g)
    if fault == "coordinates that differ":
        words = popcount(lo | hi)
    if fault == "first word alone":
        words = words[..., :1]
    if fault == "similarity":
        words = 48 - words
    if fault == "squares":
        codes = (unpacked(a) - unpacked(b)).square()
        return codes.sum(dim=-1).to(torch.int32)
    return words.sum(dim=-1, dtype=torch.int32)


DISTANCE = Exercise(
    id="sparse/adamas/distance",
    title="L1 distance from bits",
    signature="distance(a int32 [..., W], b int32 [..., W]) -> d int32 [...]",
    outputs=(Output("d", "int32"),),
    make_inputs=_distance_inputs,
    reference=_distance_reference,
    solution=distance,
    from_scratch=FROM_SCRATCH,
    properties={
        "all pairs of codes": "|a - b| for each of the sixteen pairs of codes, at three places of a word.",
        "random codes": "Low bits that differ count 1, high bits 2, and the pair {1, 2} two less.",
        "the two codes in the middle": "01 and 10 differ in both bits and are neighbours: distance 1, not 3.",
        "one query, many keys": "The words broadcast; the sum is over the last axis.",
        "equal codes": "A distance of 0.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _distance_mutant,
        {
            "{1, 2} counted 3": "The pair {1, 2} counts 3: 01 and 10 differ in both bits. Take 2 off where "
            "they meet.",
            "bits that differ": "The bits that differ are counted, each once: Hamming distance. High bits weigh 2.",
            "high bits count once": "High bits weigh 1; they weigh 2.",
            "weights exchanged": "Low bits weigh 2 and high bits 1. It is the other way round.",
            "shifted after the sum": "All bits count two: + binds tighter than <<, so the sum is shifted.",
            "mended by half": "{1, 2} counts 2: subtract 2 for it, not 1.",
            "mended for {0, 3} too": "{0, 3} counts 1 now, since it differs in both bits as well. Only {1, 2} is to "
            "be mended: a ^ (a >> 1) tells them apart.",
            "mended for the outer pair": "{0, 3} is mended instead of {1, 2}: a ^ (a >> 1) marks codes 1 and 2.",
            "coordinates that differ": "Coordinates that differ are counted, not by how much.",
            "first word alone": "Only the first word is counted: sum over the last axis.",
            "similarity": "This is 3 a coordinate minus the distance.",
            "squares": "The differences are squared: L2 where L1 is asked for.",
        },
    ),
    hints=(
        "x = a ^ b has a bit where the codes differ. Write down x for {0, 1}, {0, 2}, {1, 2}, {0, 3}: which one is "
        "counted wrong by low + 2 high?",
        "lo & hi marks {1, 2} and {0, 3}. a ^ (a >> 1) has the low bit of a pair set for codes 1 and 2.",
        "lo, hi = x & LOW, (x >> 1) & LOW\ncentral = lo & hi & (a ^ (a >> 1))\n"
        "return (popcount(lo) + 2 * popcount(hi) - 2 * popcount(central)).sum(dim=-1, dtype=torch.int32)",
    ),
)
