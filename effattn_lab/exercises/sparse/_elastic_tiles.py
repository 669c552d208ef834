"""The exercise on the kernel's tiles: which tiles of keys a program reads, and which of them need a mask."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants
from effattn_lab.exercises.sparse._elastic_router import FROM_SCRATCH

# ---- tiles -------------------------------------------------------------------------------------------------


def tiles(
    queries: torch.Tensor, full: bool, sinks: int, window: int, block: int, seqlen: int
) -> torch.Tensor:
    """For each tile of keys: 0 not read, 1 read with a mask, 2 seen whole by every query."""
    first, last = int(queries[0]), int(queries[-1])
    if full:
        sinks, window = 0, seqlen  # a full head is a window as long as the text
    kinds = []
    for start in range(0, seqlen, block):
        end = start + block  # one past its last key
        near = start <= last and min(end, seqlen) - 1 > first - window
        sink = start < min(sinks, last + 1)
        whole = end <= min(seqlen, first + 1) and (start > last - window or end <= sinks)
        kinds.append(2 if whole else int(near or sink))
    return torch.tensor(kinds)


def _tiles_reference(
    queries: torch.Tensor, full: bool, sinks: int, window: int, block: int, seqlen: int
) -> tuple[torch.Tensor, ...]:
    """By the mask itself."""
    count = -(-seqlen // block)
    i, j = queries[:, None], torch.arange(count * block)
    see = (j <= i) & (j < seqlen)
    if not full:
        see &= (j < sinks) | (j > i - window)
    by_tile = see.unflatten(1, (count, block))
    return (by_tile.any(dim=2).any(dim=0).long() + by_tile.all(dim=2).all(dim=0).long(),)


def _tiles_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, first: int, full: bool, sinks: int, window: int, seqlen: int = 160, rows: int = 16
    ) -> Case:
        shift = int(rng.integers(0, 3)) * 16  # whole tiles: every seed asks the same question elsewhere
        return Case(
            name,
            {
                "queries": torch.arange(rows) + first + shift, "full": full, "sinks": sinks, "window": window,
                "block": 16, "seqlen": seqlen + shift,
            },
        )  # fmt: skip

    return [
        case("a full head", 100, True, 3, 40),
        case("a window and sinks", 112, False, 3, 40),
        case("a window that begins on a border", 112, False, 3, 33),
        case("sinks over several tiles", 112, False, 37, 20),
        case("sinks and window meet", 32, False, 40, 20, seqlen=80),
        case("no sinks", 112, False, 0, 1),
        case("a ragged end", 144, True, 0, 9, seqlen=155, rows=11),
        case("sinks in the future", 0, False, 100, 8, seqlen=200),
    ]


def _tiles_mutant(
    fault: str, queries: torch.Tensor, full: bool, sinks: int, window: int, block: int, seqlen: int
) -> torch.Tensor:
    first, last = int(queries[0]), int(queries[-1])
    if fault == "head modes swapped":
        full = not full
    if full:
        sinks, window = (sinks, window) if fault == "mode ignored" else (0, seqlen)
    if fault == "window one short":
        window -= 1
    if fault == "window one long":
        window += 1
    if fault == "sinks dropped":
        sinks = 0
    kinds = []
    for start in range(0, seqlen, block):
        end = start + block
        oldest = last if fault == "window of the last query" else first
        near = start <= (first if fault == "causal by the first query" else last)
        near = near and min(end, seqlen) - 1 > oldest - window
        sink = start < min(sinks, last + 1)
        if fault == "sinks of the future":
            sink = start < sinks
        if fault == "one tile of sinks":
            sink = start == 0 and sinks > 0
        newest = first if fault == "whole by the first query" else last
        inside = min(seqlen, (last if fault == "diagonal not masked" else first) + 1)
        whole = end <= inside and (start > newest - window or end <= sinks)
        kinds.append(2 if whole else int(near or sink))
    return torch.tensor(kinds)


TILES = Exercise(
    id="sparse/elastic/tiles",
    title="the tiles of keys that a program reads",
    signature="tiles(queries [R], full, sinks, window, block, seqlen) -> kinds [ceil(seqlen / block)], int64",
    outputs=(Output("kinds", "int64"),),
    make_inputs=_tiles_inputs,
    reference=_tiles_reference,
    solution=tiles,
    from_scratch=FROM_SCRATCH,
    properties={
        "a full head": "All tiles up to the diagonal; those before it need no mask. Sinks and window do not matter.",
        "a window and sinks": "The tiles of the window of every query first .. last, and those that hold a sink.",
        "a window that begins on a border": "A query sees its last `window` keys, itself among them: i - j < window.",
        "sinks over several tiles": "37 sinks lie in three tiles of 16. Two of them are seen whole.",
        "sinks and window meet": "A tile with sinks and a part of the window is one tile, read once.",
        "no sinks": "Without sinks only the window's tiles are read.",
        "a ragged end": "The last tile sticks out over the text: it is read with a mask.",
        "sinks in the future": "A sink after the last query is not visible.",
    },
    tolerance=Tolerance(0.0, 0.0, "integers."),
    mutants=mutants(
        _tiles_mutant,
        {
            "head modes swapped": "Head modes swapped: full heads got the window, sparse ones everything.",
            "mode ignored": "The mode is not used: a full head reads every key of its past.",
            "window one short": "The window is off by one: i - j < window, the query's own token among them.",
            "window one long": "The window has one key too many: i - j < window.",
            "sinks dropped": "The sinks are missing.",
            "sinks of the future": "Sinks that come after the last query are read: nobody sees them.",
            "one tile of sinks": "Only the first tile is read for the sinks; there may be more of them than a "
            "tile has keys.",
            "window of the last query": "The window begins where that of the last query does. The first query "
            "looks further back.",
            "causal by the first query": "Tiles after the first query are left out, but later queries of the tile "
            "see them.",
            "whole by the first query": "A tile is called whole because the first query sees it. The last query's "
            "window begins later.",
            "diagonal not masked": "Tiles on the diagonal are called whole: the first query must not see their "
            "last keys.",
        },
    ),
    hints=(
        "For each tile of keys ask twice: does any query see any of its keys? Does every query see all of them?",
        "Any: start <= last and the tile's last key > first - window, or a sink. All: end - 1 <= first, and start "
        "> last - window or the tile holds sinks only; and it must not stick out over seqlen.",
        "near = start <= last and min(end, seqlen) - 1 > first - window\nsink = start < min(sinks, last + 1)\n"
        "whole = end <= min(seqlen, first + 1) and (start > last - window or end <= sinks)\n"
        "kind = 2 if whole else int(near or sink)",
    ),
)
