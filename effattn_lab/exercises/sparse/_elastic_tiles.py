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
        near = start <= last and end - 1 > first - window
        sink = start < min(sinks, last + 1)
        whole = end - 1 <= first and (max(start, sinks) > last - window or end <= sinks)
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

    def small(name: str, queries: tuple[int, int], full: bool, numbers: tuple[int, int, int, int]) -> Case:
        sinks, window, block, seqlen = numbers
        return Case(
            name,
            {
                "queries": torch.arange(queries[0], queries[1] + 1), "full": full, "sinks": sinks,
                "window": window, "block": block, "seqlen": seqlen,
            },
        )  # fmt: skip

    borders = [
        (8, 11, False, (1, 7, 4, 12)),  # the last query's window begins one key after the tile does
        (8, 11, False, (0, 12, 4, 12)),  # and with the tile
        (4, 7, False, (3, 3, 4, 12)),  # sinks end one key before the tile
        (4, 7, False, (4, 6, 4, 8)),  # and with it
        (4, 7, False, (5, 6, 4, 8)),
        (6, 7, False, (0, 22, 8, 8)),  # the first query stands one key before the tile's last
        (6, 7, True, (0, 1, 8, 8)),
        (3, 3, True, (0, 1, 4, 4)),  # and on it
        (3, 3, False, (4, 8, 4, 4)),
    ]
    random = []
    for _ in range(24):
        block, rows = int(rng.choice([2, 4, 8])), int(rng.integers(1, 12))
        first = int(rng.integers(0, 12))
        seqlen = first + rows + int(rng.integers(0, 6))
        numbers = (int(rng.integers(0, 10)), int(rng.integers(1, seqlen + 1)), block, seqlen)
        random.append((first, first + rows - 1, bool(rng.integers(0, 4) == 0), numbers))
    return [
        case("a full head", 100, True, 3, 40),
        case("a window and sinks", 112, False, 3, 40),
        case("a window that begins on a border", 112, False, 3, 33),
        case("sinks over several tiles", 112, False, 37, 20),
        case("sinks and window meet", 32, False, 40, 20, seqlen=80),
        case("no sinks", 112, False, 0, 1),
        case("a ragged end", 144, True, 0, 9, seqlen=155, rows=11),
        case("sinks in the future", 0, False, 100, 8, seqlen=200),
        *(small("on the border", (a, b), full, numbers) for a, b, full, numbers in borders),
        small("one query", (0, 0), True, (0, 1, 4, 1)),
        small("one query", (9, 9), False, (2, 3, 4, 12)),
        small("more queries than a tile has keys", (0, 7), False, (5, 2, 4, 8)),
        small("more queries than a tile has keys", (5, 18), False, (1, 6, 4, 19)),
        small("sinks and window share a tile", (18, 19), False, (3, 17, 8, 20)),
        *(small("any program", (a, b), full, numbers) for a, b, full, numbers in random),
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
        near = near and end - 1 > oldest - window
        sink = start < min(sinks, last + 1)
        if fault == "sinks of the future":
            sink = start < sinks
        if fault == "one tile of sinks":
            sink = start == 0 and sinks > 0
        newest = first if fault == "whole by the first query" else last
        whole = max(start, sinks) > newest - window or end <= sinks
        if fault == "window of whole one long":
            whole = max(start, sinks) >= newest - window or end <= sinks
        if fault == "a key that is no sink":
            whole = max(start, sinks) > newest - window or end - 1 <= sinks
        if fault == "shared tile":
            whole = start > newest - window or end <= sinks
        whole = whole or fault == "whole without the window"
        whole = whole and end - 1 <= (last if fault == "diagonal not masked" else first)
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
        "a full head": "All tiles up to the diagonal; those before it need no mask. Sinks and window do not "
        "matter.",
        "a window and sinks": "The tiles of the window of every query first .. last, and those that hold a sink.",
        "a window that begins on a border": "A query sees its last `window` keys, itself among them: i - j < "
        "window.",
        "sinks over several tiles": "37 sinks lie in three tiles of 16. Two of them are seen whole.",
        "sinks and window meet": "A tile with sinks and a part of the window is one tile, read once.",
        "no sinks": "Without sinks only the window's tiles are read.",
        "a ragged end": "The last tile may stick out over the text; it counts as well.",
        "sinks in the future": "A sink after the last query is not visible.",
        "on the border": "Whole: its last key stands at or before the first query, and each key is a sink or lies "
        "in the last query's window. Off by one here shows a key that nobody may see.",
        "one query": "A program may have one query: first is last.",
        "more queries than a tile has keys": "The number of queries has nothing to do with the block of keys.",
        "sinks and window share a tile": "The first keys of a tile may be sinks and the rest lie in the window: "
        "whole.",
        "any program": "Numbers drawn anew for each seed, held against the mask itself.",
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
            "whole without the window": "2 needs more than the tile's last key at or before the first query: the "
            "last query's window has to reach the tile's first key, or all keys are sinks.",
            "window of whole one long": "A tile is called whole one key too early: j > last - window for its "
            "first key.",
            "a key that is no sink": "A tile whose last key is no sink is called whole for its sinks: keys 0 to "
            "sinks - 1.",
            "shared tile": "A tile may be whole though no single reason covers it: sinks first, the window from "
            "there on. The first key that is no sink, max(start, sinks), has to lie in the last query's window.",
            "diagonal not masked": "Tiles on the diagonal are called whole: the first query must not see their "
            "last keys.",
        },
    ),
    hints=(
        "For each tile of keys ask twice: does any query see any of its keys? Does every query see all of them?",
        "Any: (start <= last and end - 1 > first - window) or start < min(sinks, last + 1). All: end - 1 <= "
        "first, and all keys are sinks or the first that is none, max(start, sinks), is > last - window.",
        "s, w = (0, seqlen) if full else (sinks, window)\nnear = start <= last and end - 1 > first - w\n"
        "sink = start < min(s, last + 1)\n"
        "whole = end - 1 <= first and (max(start, s) > last - w or end <= s)\n"
        "kind = 2 if whole else int(near or sink)",
    ),
)
