"""Exercises on sinks and window as a mask and as a kernel's loop bounds, and a softmax that may say nothing."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._static_patterns_masks import EXACT

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.sparse.streaming",
    "effattn_lab.sparse.streaming_experiment",
    "effattn_lab.sparse.static_patterns",
    "effattn_lab.sparse.block_list",
)

# ---- mask --------------------------------------------------------------------------------------------------


def mask(i: torch.Tensor, j: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """The first ``sinks`` tokens and the last ``window``."""
    return (j <= i) & ((j < sinks) | (i - j < window))


def _mask_reference(i: torch.Tensor, j: torch.Tensor, sinks: int, window: int) -> tuple[torch.Tensor, ...]:
    rows = []
    for x in i[:, 0].tolist():
        seen = (set(range(sinks)) | set(range(x - window + 1, x + 1))) & set(range(x + 1))
        rows.append([y in seen for y in j.tolist()])
    return (torch.tensor(rows),)


def _mask_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, queries: int, keys: int, sinks: int, window: int) -> Case:
        picked = np.sort(rng.permutation(keys)[:queries])
        i = torch.from_numpy(picked)[:, None]
        return Case(name, {"i": i, "j": torch.arange(keys), "sinks": sinks, "window": window})

    return [
        case("sinks and window", 20, 30, 4, 6),
        case("no sinks", 12, 20, 0, 5),
        case("one token", 1, 1, 4, 8),
        case("more sinks than tokens", 5, 6, 10, 2),
        case("a window of one", 12, 16, 2, 1),
        case("a window for all", 12, 14, 3, 40),
    ]


def _mask_mutant(fault: str, i: torch.Tensor, j: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    past, sink, near = j <= i, (j < sinks) | (i < -1), i - j < window
    if fault == "sinks dropped":
        sink = torch.zeros_like(past)
    if fault == "one sink too many":
        sink = (j <= sinks) | (i < -1)
    if fault == "window one long":
        near = i - j <= window
    if fault == "window one short":
        near = i - j < window - 1
    if fault == "sinks from the future":
        return (past & near) | sink
    if fault == "window on both sides":
        return sink | (near & (j - i < window))
    if fault == "both at once":
        return past & sink & near
    if fault == "the future seen":
        return sink | near
    if fault == "window counts the sinks":
        near = i - j < window - sinks
    return past & (sink | near)


MASK = Exercise(
    id="sparse/streaming/mask",
    title="sinks and window as a mask",
    signature="mask(i [Nq, 1], j [Nk], sinks, window) -> keep [Nq, Nk], bool",
    outputs=(Output("keep", "bool"),),
    make_inputs=_mask_inputs,
    reference=_mask_reference,
    solution=mask,
    from_scratch=FROM_SCRATCH,
    properties={
        "sinks and window": "Of the keys up to the query's own: the first `sinks` of the text, and the last "
        "`window`.",
        "no sinks": "Without sinks it is a plain causal window.",
        "one token": "A token sees itself.",
        "more sinks than tokens": "A sink that comes after the query is not visible either.",
        "a window of one": "The window counts the query's own token: a window of 1 is the token alone.",
        "a window for all": "With a long window it is causal attention.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _mask_mutant,
        {
            "sinks dropped": "The sinks are missing: this is a plain window, the one that collapses.",
            "one sink too many": "There is one sink too many: the sinks are the positions 0 to sinks - 1.",
            "window one long": "The window is one key too long: the query's own token counts, so i - j < window.",
            "window one short": "The window is one key too short: it holds `window` keys, the query's own among "
            "them.",
            "sinks from the future": "Sinks are visible to queries before them. Causality holds for sinks too.",
            "window on both sides": "The window reaches into the future.",
            "the future seen": "Keys after the query are seen, by the window as by the sinks: j <= i around both.",
            "both at once": "A key must be a sink or in the window, not both.",
            "window counts the sinks": "The sinks are subtracted from the window. Here `window` counts recent "
            "tokens alone.",
        },
    ),
    hints=(
        "Two sets joined by |, and causality around both.",
        "i - j is 0 for the token itself, so a window of w keys is i - j < w.",
        "return (j <= i) & ((j < sinks) | (i - j < window))",
    ),
)

# ---- a softmax that may say nothing ------------------------------------------------------------------------


def softmax_one(s: torch.Tensor) -> torch.Tensor:
    """e^s over 1 plus their sum."""
    top = s.amax(dim=-1, keepdim=True).clamp(min=0.0)
    e = torch.exp(s - top)
    return e / (torch.exp(-top) + e.sum(dim=-1, keepdim=True))


def _softmax_one_reference(s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The softmax with one more score of 0, which is then left out."""
    return (torch.softmax(torch.cat([s, torch.zeros_like(s[..., :1])], dim=-1), dim=-1)[..., :-1],)


def _softmax_one_inputs(rng: np.random.Generator) -> list[Case]:
    masked = normal(rng, 3, 9)
    masked[1], masked[2, 4:] = float("-inf"), float("-inf")
    return [
        Case("one more key with score 0", {"s": normal(rng, 3, 9, size=1.5)}),
        Case("nothing matches", {"s": normal(rng, 3, 9) - 30}),
        Case("far below zero", {"s": normal(rng, 3, 9, size=20.0) - 500}),
        Case("huge scores", {"s": normal(rng, 3, 9, size=20.0) + 500}),
        Case("rows far apart", {"s": normal(rng, 3, 9) + torch.tensor([[-200.0], [0.0], [200.0]])}),
        Case("a masked row", {"s": masked}),
        Case("one key", {"s": normal(rng, 4, 1, size=2.0)}),
        Case("many keys", {"s": normal(rng, 2, 400)}),
    ]


def _softmax_one_mutant(fault: str, s: torch.Tensor) -> torch.Tensor:
    top = s.amax(dim=-1, keepdim=True)
    if fault == "plain softmax":
        return torch.softmax(s, dim=-1)
    if fault == "no maximum":
        e = torch.exp(s)
        return e / (1 + e.sum(dim=-1, keepdim=True))
    if fault == "1 after the shift":
        e = torch.exp(s - top)
        return e / (1 + e.sum(dim=-1, keepdim=True))
    if fault == "1 for every key":
        return torch.softmax(s, dim=-1) * s.shape[-1] / (1 + s.shape[-1])
    if fault == "maximum without the 0":
        e = torch.exp(s - top)
        return e / (torch.exp(-top) + e.sum(dim=-1, keepdim=True))
    if fault == "one maximum for all":
        top = s.amax().clamp(min=0.0)
        e = torch.exp(s - top)
        return e / (torch.exp(-top) + e.sum(dim=-1, keepdim=True))
    if fault == "sigmoids":
        return torch.sigmoid(s)
    top = top.clamp(min=0.0)
    e = torch.exp(s - top)
    return e / (torch.exp(top) + e.sum(dim=-1, keepdim=True))


SOFTMAX_ONE = Exercise(
    id="sparse/streaming/softmax_one",
    title="a softmax that may say nothing",
    signature="softmax_one(s [..., n]) -> p [..., n]",
    outputs=(Output("p", "s"),),
    make_inputs=_softmax_one_inputs,
    reference=_softmax_one_reference,
    solution=softmax_one,
    from_scratch=FROM_SCRATCH,
    properties={
        "one more key with score 0": "e^s over (1 + the sum of all e^s): as if there were one more key with score 0 "
        "and value 0.",
        "nothing matches": "If all scores are far below 0 all weights are near 0, and so is their sum.",
        "far below zero": "The largest exponent is that of the 1, e^0, if all scores are negative.",
        "rows far apart": "Each row has a maximum and a sum of its own.",
        "a masked row": "A row whose scores are all -inf has no key: its weights are 0, not NaN.",
        "huge scores": "Subtract a maximum, and do the same to the 1: it becomes e^-max.",
        "one key": "One key has weight e^s / (1 + e^s), not 1.",
        "many keys": "The 1 is added once, not once a key.",
    },
    tolerance=Tolerance(
        1e-4, 1e-6, "scores of 500 are rounded to 3e-5 in float32, which moves a weight by as much."
    ),
    mutants=mutants(
        _softmax_one_mutant,
        {
            "plain softmax": "This is softmax itself: its weights sum to 1 whatever the scores are.",
            "no maximum": "e^s overflows at scores of 89: subtract a maximum first.",
            "1 after the shift": "After the maximum was subtracted the 1 is still a 1. It has to shrink with the "
            "rest, "
            "to e^-max.",
            "1 for every key": "The denominator grew by a share of the keys, whatever the scores are.",
            "maximum without the 0": "Where all scores of a row are -inf, -inf - -inf is NaN: the maximum is at "
            "least 0, the score of the 1.",
            "one maximum for all": "The whole tensor has one maximum: in rows far below it the 1 and all e^s vanish "
            "together. Each row needs its own.",
            "sigmoids": "Each key has a sigmoid of its own. All keys share one denominator.",
            "wrong sign": "The 1 becomes e^+max. Whatever is divided by e^max becomes e^-max.",
        },
    ),
    hints=(
        "Think of one more key with score 0 and value 0; then it is a softmax whose last weight is thrown away.",
        "top = max(0, largest s). Numerator e^(s - top); what becomes of the 1?",
        "top = s.amax(dim=-1, keepdim=True).clamp(min=0)\ne = torch.exp(s - top)\n"
        "return e / (torch.exp(-top) + e.sum(dim=-1, keepdim=True))",
    ),
)

# ---- loop bounds -------------------------------------------------------------------------------------------


def bounds(
    begin: torch.Tensor, block_m: int, block_n: int, sinks: int, window: int
) -> tuple[torch.Tensor, ...]:
    """Tiles of keys that tiles of queries read: the first ``sink_tiles``, and ``first`` up to ``end``."""
    first = (begin - window + 1).clamp(min=0) // block_n
    end = (begin + block_m - 1) // block_n + 1
    sink_tiles = torch.full_like(first, -(-sinks // block_n)).minimum(first)
    return sink_tiles, first, end


def _bounds_reference(
    begin: torch.Tensor, block_m: int, block_n: int, sinks: int, window: int
) -> tuple[torch.Tensor, ...]:
    """By looking at every pair."""
    found = []
    for b in begin.tolist():
        rows = range(b, b + block_m)
        near = {j // block_n for i in rows for j in range(max(0, i - window + 1), i + 1)}
        far = {j // block_n for j in range(min(sinks, b + block_m))} - near
        found.append((len(far), min(near), max(near) + 1))
    return tuple(torch.tensor(x) for x in zip(*found))


def _bounds_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, block_m: int, block_n: int, sinks: int, window: int, *, tiles: int = 9) -> Case:
        begin = torch.from_numpy(np.sort(rng.permutation(40)[:tiles])) * block_m
        begin[0] = 0
        options = {"block_m": block_m, "block_n": block_n, "sinks": sinks, "window": window}
        return Case(name, {"begin": begin, **options})

    return [
        case("tiles with a visible key", 16, 16, 4, 40),
        case("no sinks", 16, 16, 0, 32),
        case("sinks over several tiles", 8, 8, 20, 30),
        case("tall tiles of queries", 32, 8, 4, 17),
        case("wide tiles of keys", 8, 32, 4, 33),
        case("tiles of one", 1, 1, 3, 5),
        case("a long window", 16, 16, 4, 5000),
    ]


def _bounds_mutant(
    fault: str, begin: torch.Tensor, block_m: int, block_n: int, sinks: int, window: int
) -> tuple[torch.Tensor, ...]:
    first = (begin - window + 1).clamp(min=0) // block_n
    end = (begin + block_m - 1) // block_n + 1
    count = -(-sinks // block_n)
    if fault == "window of the last query":
        first = (begin + block_m - window).clamp(min=0) // block_n
    if fault == "window one long":
        first = (begin - window).clamp(min=0) // block_n
    if fault == "not clamped":
        first = torch.div(begin - window + 1, block_n, rounding_mode="floor")
    if fault == "last tile dropped":
        end = (begin + block_m - 1) // block_n
    if fault == "end rounded down":
        end = (begin + block_m) // block_n
    if fault == "one tile too many":
        end = end + 1
    if fault == "end of the first query":
        end = begin // block_n + 1
    if fault == "sinks rounded down":
        count = sinks // block_n
    if fault == "sinks in tokens":
        count = sinks
    if fault == "sinks dropped":
        count = 0
    sink_tiles = torch.full_like(first, count)
    return (sink_tiles if fault == "tiles read twice" else sink_tiles.minimum(first)), first, end


BOUNDS = Exercise(
    id="sparse/streaming/bounds",
    title="the loop bounds of a kernel",
    signature="bounds(begin [M], block_m, block_n, sinks, window) -> (sink_tiles [M], first [M], end [M]), int64",
    outputs=(Output("sink_tiles", "int64"), Output("first", "int64"), Output("end", "int64")),
    make_inputs=_bounds_inputs,
    reference=_bounds_reference,
    solution=bounds,
    from_scratch=FROM_SCRATCH,
    properties={
        "tiles with a visible key": "A tile of queries begin .. begin + block_m - 1 reads the tiles first .. end - "
        "1 for "
        "its windows, and the tiles 0 .. sink_tiles - 1 before them.",
        "no sinks": "Without sinks there is no tile before the window.",
        "sinks over several tiles": "Sinks fill ceil(sinks / block_n) tiles; those that the window reads anyway are "
        "not "
        "counted.",
        "tall tiles of queries": "The window of the first query begins furthest left, that of the last ends "
        "furthest right.",
        "wide tiles of keys": "Positions are divided by block_n, rounded down.",
        "tiles of one": "With tiles of one the bounds are those of single tokens.",
        "a long window": "No tile lies before tile 0.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _bounds_mutant,
        {
            "window of the last query": "The loop begins where the last query's window begins. The first query of "
            "the "
            "tile looks further back.",
            "window one long": "The window begins at begin - window. It holds the query's own token, so it begins "
            "at begin "
            "- window + 1.",
            "not clamped": "The first tile is negative: a window that is longer than the past begins at 0.",
            "last tile dropped": "end is one tile short: it is exclusive, and the tile of the last query belongs to "
            "the loop.",
            "end rounded down": "end is rounded down: (begin + block_m) / block_n has to be rounded up, or the "
            "tile of the last query is missing where block_n is no divisor.",
            "one tile too many": "end is one tile too far: it is one more than the tile of the last query, begin + "
            "block_m - 1.",
            "end of the first query": "The loop ends with the first query's own tile. It must reach the last "
            "query's.",
            "sinks rounded down": "The tiles of the sinks are rounded down: four sinks need a whole tile.",
            "sinks in tokens": "sink_tiles counts tokens. Divide by block_n and round up.",
            "sinks dropped": "No tile is read for the sinks.",
            "tiles read twice": "Sink tiles that the window reads too are counted again: their keys would enter the "
            "softmax twice.",
        },
    ),
    hints=(
        "Which query of the tile looks furthest back, and which furthest forward?",
        "first = (begin - window + 1).clamp(min=0) // block_n; end is one more than the tile of begin + block_m - 1.",
        "first = (begin - window + 1).clamp(min=0) // block_n\nend = (begin + block_m - 1) // block_n + 1\n"
        "sink_tiles = torch.full_like(first, -(-sinks // block_n)).minimum(first)\nreturn sink_tiles, first, end",
    ),
)
