"""Exercises on patterns as masks: strided, window and global tokens."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.sparse.static_patterns",
    "effattn_lab.sparse.static_patterns_cost",
    "effattn_lab.sparse.block_list",
    "effattn_lab.sparse.streaming",
    "effattn_lab.sparse.cache.captured_mass",
)
EXACT = Tolerance(0.0, 0.0, "whole numbers and truth values are right or wrong.")


def positions(rng: np.random.Generator, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``queries`` and ``keys`` consecutive positions; the queries are the last. Where they begin is random."""
    begin = int(rng.integers(0, 50))
    j = torch.arange(begin, begin + keys)
    return j[keys - queries :, None], j


# ---- strided -----------------------------------------------------------------------------------------------


def strided(i: torch.Tensor, j: torch.Tensor, stride: int) -> torch.Tensor:
    """Union head of the Sparse Transformer."""
    gap = i - j
    return (gap >= 0) & ((gap <= stride) | (gap % stride == 0))


def _strided_reference(i: torch.Tensor, j: torch.Tensor, stride: int) -> tuple[torch.Tensor, ...]:
    keep = torch.zeros(i.shape[0], j.shape[0], dtype=torch.bool)
    for a, x in enumerate(i[:, 0].tolist()):
        seen = set(range(x - stride, x + 1)) | set(range(x, -1, -stride))
        for b, y in enumerate(j.tolist()):
            keep[a, b] = y in seen
    return (keep,)


def _strided_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, queries: int, keys: int, stride: int) -> Case:
        i, j = positions(rng, queries, keys)
        return Case(name, {"i": i, "j": j, "stride": stride})

    return [
        case("the last keys and every stride-th", 24, 24, 5),
        case("one token", 1, 1, 4),
        case("stride 1", 6, 6, 1),
        case("last queries of a longer text", 7, 40, 6),
        case("longer stride than text", 9, 9, 20),
    ]


def _strided_mutant(fault: str, i: torch.Tensor, j: torch.Tensor, stride: int) -> torch.Tensor:
    gap = i - j
    local, column, past = gap <= stride, gap % stride == 0, gap >= 0
    if fault == "window one long":
        local = gap <= stride + 1
    if fault == "columns of the text":
        column = (j % stride == 0).expand_as(gap)
    if fault == "local part alone":
        column = torch.zeros_like(past)
    if fault == "columns alone":
        local = torch.zeros_like(past)
    if fault == "both at once":
        return past & local & column
    if fault == "the future seen":
        return local | column
    if fault == "columns of the future":
        return (past & local) | column
    if fault == "the fixed pattern":
        return past & (local | (j % stride == stride - 1))
    if fault == "the token itself hidden":
        past = gap > 0
    if fault == "positions from 0":
        gap = torch.arange(len(i))[:, None] - torch.arange(len(j))
        local, column, past = gap <= stride, gap % stride == 0, gap >= 0
    return past & (local | column)


STRIDED = Exercise(
    id="sparse/static_patterns/strided",
    title="the strided pattern",
    signature="strided(i [Nq, 1], j [Nk], stride) -> keep [Nq, Nk], bool",
    outputs=(Output("keep", "bool"),),
    make_inputs=_strided_inputs,
    reference=_strided_reference,
    solution=strided,
    from_scratch=FROM_SCRATCH,
    properties={
        "the last keys and every stride-th": "True where 0 <= i - j <= stride, or where i - j is a multiple of "
        "stride and not negative.",
        "one token": "A token sees itself: i - j = 0.",
        "stride 1": "With stride 1 every past key is a column: plain causal attention.",
        "last queries of a longer text": "i and j hold positions in the text: use them, not the index of the row.",
        "longer stride than text": "A stride longer than the text hides nothing but the future.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _strided_mutant,
        {
            "window one long": "The local part reaches back l + 1 keys. It ends at i - l, which is a column too.",
            "columns of the text": "The columns stand at multiples of the stride in the text. In the strided "
            "pattern they are counted back from the query: (i - j) mod l = 0.",
            "local part alone": "Only the local part is there: the columns, (i - j) mod l = 0, are missing.",
            "columns alone": "Only the columns are there: the last l keys are missing.",
            "both at once": "A key must pass one of the two rules, not both: combine them with |.",
            "columns of the future": "The columns go on into the future: i - j >= 0 must hold for both parts. & "
            "binds tighter than |.",
            "the fixed pattern": "The columns are the last cells of blocks of the text, which is the paper's other "
            "pattern. Here they are counted back from the query: (i - j) mod l = 0.",
            "the future seen": "Keys after the query are visible: keep only i - j >= 0.",
            "the token itself hidden": "The token does not see itself: i - j = 0 belongs to the past here.",
            "positions from 0": "Rows are counted from 0, but the queries are the last positions of a longer "
            "text. The arguments i and j are the positions.",
        },
    ),
    hints=(
        "Everything depends on the gap i - j, which broadcasts to [Nq, Nk].",
        "Three conditions: not in the future, and (near or a whole number of strides away). Every comparison needs "
        "brackets of its own, since & and | bind tighter than <=.",
        "gap = i - j\nreturn (gap >= 0) & ((gap <= stride) | (gap % stride == 0))",
    ),
)

# ---- window and global tokens ------------------------------------------------------------------------------


def longformer(
    i: torch.Tensor, j: torch.Tensor, window: int, dilation: int, is_global: torch.Tensor
) -> torch.Tensor:
    """Half a window to either side, and global tokens both ways."""
    gap = i - j
    near = (gap.abs() <= dilation * (window // 2)) & (gap % dilation == 0)
    return near | is_global[i] | is_global[j]


def _longformer_reference(
    i: torch.Tensor, j: torch.Tensor, window: int, dilation: int, is_global: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    keep = torch.zeros(i.shape[0], j.shape[0], dtype=torch.bool)
    for a, x in enumerate(i[:, 0].tolist()):
        seen = {x + dilation * u for u in range(-(window // 2), window // 2 + 1)}
        for b, y in enumerate(j.tolist()):
            keep[a, b] = y in seen or bool(is_global[x]) or bool(is_global[y])
    return (keep,)


def _longformer_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, window: int, dilation: int = 1, tokens: int = 0, rows: int = 0) -> Case:
        marks = torch.zeros(n, dtype=torch.bool)
        marks[torch.from_numpy(rng.permutation(n)[:tokens])] = True
        i = torch.arange(n - (rows or n), n)[:, None]
        numbers = {"window": window, "dilation": dilation}
        return Case(name, {"i": i, "j": torch.arange(n), **numbers, "is_global": marks})

    return [
        case("a window", 20, 6),
        case("global tokens", 20, 4, tokens=3),
        case("dilation", 30, 4, dilation=3),
        case("some of the queries", 25, 6, tokens=4, rows=9),
        case("one token", 1, 2),
        case("a window wider than the text", 9, 40),
    ]


def _longformer_mutant(
    fault: str, i: torch.Tensor, j: torch.Tensor, window: int, dilation: int, is_global: torch.Tensor
) -> torch.Tensor:
    gap = i - j
    near = (gap.abs() <= dilation * (window // 2)) & (gap % dilation == 0)
    rows, columns = is_global[i], is_global[j]
    if fault == "whole window on each side":
        near = (gap.abs() <= dilation * window) & (gap % dilation == 0)
    if fault == "window one short":
        near = (gap.abs() < dilation * (window // 2)) & (gap % dilation == 0)
    if fault == "the past alone":
        near = near & (gap >= 0)
    if fault == "dilated window not stretched":
        near = (gap.abs() <= window // 2) & (gap % dilation == 0)
    if fault == "no holes":
        near = gap.abs() <= dilation * (window // 2)
    if fault == "global tokens see nothing more":
        rows = torch.zeros_like(rows)
    if fault == "global tokens are not seen":
        columns = torch.zeros_like(columns)
    if fault == "global tokens among themselves":
        return near | (rows & columns)
    return near | rows | columns


LONGFORMER = Exercise(
    id="sparse/static_patterns/longformer",
    title="window, dilation and global tokens",
    signature="longformer(i [Nq, 1], j [N], window, dilation, is_global [N] bool) -> keep [Nq, N], bool",
    outputs=(Output("keep", "bool"),),
    make_inputs=_longformer_inputs,
    reference=_longformer_reference,
    solution=longformer,
    from_scratch=FROM_SCRATCH,
    properties={
        "a window": "An encoder looks both ways: |i - j| <= window / 2.",
        "global tokens": "A global token sees all and is seen by all: a row and a column of the mask.",
        "dilation": "Steps of d between the window's keys: i - j a multiple of d, and at most d window / 2.",
        "some of the queries": "is_global belongs to positions: is_global[i] for the rows, is_global[j] for the "
        "columns.",
        "one token": "A token sees itself.",
        "a window wider than the text": "A wide window is full attention, in both directions.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _longformer_mutant,
        {
            "whole window on each side": "The window has its whole width on each side. It is window / 2 to the "
            "left and as much to the right.",
            "window one short": "The window's outermost keys are missing: |i - j| <= d window / 2, with equality.",
            "the past alone": "Only the past is visible. This pattern is an encoder's: the window lies on both "
            "sides.",
            "dilated window not stretched": "With dilation the window keeps its number of keys and reaches d times "
            "as "
            "far: |i - j| <= d window / 2.",
            "no holes": "The dilated window has no holes: i - j must be a multiple of the dilation.",
            "global tokens see nothing more": "A global token does not see all keys: its row is missing.",
            "global tokens are not seen": "A global token is not seen by all queries: its column is missing.",
            "global tokens among themselves": "Global tokens meet only each other. It suffices that one side is "
            "global.",
        },
    ),
    hints=(
        "Three sets joined by |: near, the query is global, the key is global.",
        "near: gap.abs() <= dilation * (window // 2), and gap % dilation == 0. Indexing is_global with i gives [Nq, "
        "1].",
        "gap = i - j\nnear = (gap.abs() <= dilation * (window // 2)) & (gap % dilation == 0)\n"
        "return near | is_global[i] | is_global[j]",
    ),
)
