"""Exercises on the cache: positions inside it, and one whole step of decoding."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._streaming_masks import FROM_SCRATCH
from effattn_lab.linear.rotary import rotate

BASE = 1000.0
_ANGLES = Tolerance(
    1e-4,
    1e-4,
    "turns and scores in float32, each good to 1e-6 of numbers of size 5; the softmax multiplies it.",
)

# ---- positions inside the cache ----------------------------------------------------------------------------


def place(
    k: torch.Tensor, q: torch.Tensor, at: torch.Tensor, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn kept keys and the newest query from their positions in the text to their places in the cache."""
    m = k.shape[2]
    move = torch.arange(m) - at
    return rotate(k, move, base=base), rotate(q, move[-1:], base=base)


def _angle(x: torch.Tensor, by: torch.Tensor, base: float) -> torch.Tensor:
    """The turn as a product of complex numbers."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.exp(1j * by.double()[..., None] * rates)
    return torch.cat([z.real, z.imag], dim=-1)


def _place_reference(
    k: torch.Tensor, q: torch.Tensor, at: torch.Tensor, base: float
) -> tuple[torch.Tensor, ...]:
    m = k.shape[2]
    return _angle(k, torch.arange(m) - at, base), _angle(q, (m - 1) - at[-1:], base)


def _kept(rng: np.random.Generator, sinks: int, recent: int, far: int) -> torch.Tensor:
    gone = sinks + int(rng.integers(far // 2, far + 1))
    return torch.cat([torch.arange(sinks), torch.arange(gone, gone + recent)])


def _place_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, sinks: int, recent: int, far: int, heads: int = 2) -> Case:
        at = _kept(rng, sinks, recent, far)
        k, q = normal(rng, 1, 2, len(at), 16), normal(rng, 1, 2 * heads, 1, 16)
        return Case(name, {"k": k, "q": q, "at": at, "base": BASE})

    return [
        case("places in the cache", 4, 8, 40),
        case("no sinks", 0, 8, 60),
        case("nothing was evicted", 4, 6, 0),
        case("one token", 0, 1, 30),
        case("a long stream", 4, 12, 5000),
    ]


def _place_mutant(
    fault: str, k: torch.Tensor, q: torch.Tensor, at: torch.Tensor, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    m = k.shape[2]
    to = torch.arange(m)
    if fault == "positions not re-indexed":
        return k.clone(), q.clone()
    if fault == "turned again":  # cached keys are rotated already
        return rotate(k, to, base=base), rotate(q, to[-1:], base=base)
    if fault == "turned the wrong way":
        return rotate(k, at - to, base=base), rotate(q, (at - to)[-1:], base=base)
    if fault == "turned back and left so":
        return rotate(k, -at, base=base), rotate(q, -at[-1:], base=base)
    if fault == "query left alone":
        return rotate(k, to - at, base=base), q.clone()
    if fault == "query behind the cache":
        return rotate(k, to - at, base=base), rotate(q, m - at[-1:], base=base)
    if fault == "query at 0":
        return rotate(k, to - at, base=base), rotate(q, -at[-1:], base=base)
    return rotate(k, to + 1 - at, base=base), rotate(q, (to - at)[-1:], base=base)


PLACE = Exercise(
    id="sparse/streaming/place",
    title="positions inside the cache",
    signature="place(k [B, Hkv, m, D], q [B, Hq, 1, D], at [m], base) -> (keys [B, Hkv, m, D], query [B, Hq, 1, D])",
    outputs=(Output("keys", "k"), Output("query", "q")),
    make_inputs=_place_inputs,
    reference=_place_reference,
    solution=place,
    from_scratch=FROM_SCRATCH,
    properties={
        "places in the cache": "Key number c stands at position at[c] and should stand at c: turn it by c - at[c].",
        "no sinks": "Without sinks all turn by the same amount.",
        "nothing was evicted": "If nothing was evicted, at is 0, 1, 2, ... and nothing turns.",
        "one token": "A single token stands at 0.",
        "a long stream": "Turns of thousands of positions are ordinary turns.",
    },
    tolerance=Tolerance(1e-4, 1e-4, "angles in float64, the turn itself in float32."),
    mutants=mutants(
        _place_mutant,
        {
            "positions not re-indexed": "Keys and query keep their positions in the text: the distance to the sinks "
            "grows "
            "for ever.",
            "turned again": "The keys are turned to their places on top of the turn that they have. They come "
            "rotated: turn "
            "them by c - at[c].",
            "turned the wrong way": "The turn goes the wrong way: by c - at[c], which is negative for moved tokens.",
            "turned back and left so": "Keys and query are turned back to position 0 and left there: order is lost.",
            "query left alone": "The query keeps its position in the text: it would look back at the cache from "
            "afar.",
            "query behind the cache": "The query stands at m. Its own key is the last of the cache, so both stand "
            "at m - 1.",
            "query at 0": "The query stands at position 0, before all keys but the first.",
            "keys one place late": "The keys stand one place too late: number c of the cache belongs at c, counted "
            "from 0.",
        },
    ),
    hints=(
        "A turn by a and then by b is a turn by a + b. The keys are turned by at[c] already.",
        "move = torch.arange(m) - at, one entry a key; the query is the newest token, the last entry of at.",
        "m = k.shape[2]\nmove = torch.arange(m) - at\nreturn rotate(k, move, base=base), rotate(q, move[-1:], "
        "base=base)",
    ),
)

# ---- a step ------------------------------------------------------------------------------------------------


def step(
    keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    t: int, sinks: int, budget: int, base: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Append, evict, place, attend."""
    keys = torch.cat([keys, rotate(k, torch.tensor([-t]), base=base)], dim=2)
    values = torch.cat([values, v], dim=2)
    if keys.shape[2] > budget:
        recent = keys.shape[2] - (budget - sinks)
        keys = torch.cat([keys[:, :, :sinks], keys[:, :, recent:]], dim=2)
        values = torch.cat([values[:, :, :sinks], values[:, :, recent:]], dim=2)
    m = keys.shape[2]
    turned = rotate(keys, torch.arange(m), base=base)
    query = rotate(q, torch.tensor([m - 1 - t]), base=base)
    s = query @ turned.transpose(-1, -2) / q.shape[3] ** 0.5
    return torch.softmax(s, dim=-1) @ values, keys, values


def _step_reference(
    keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    t: int, sinks: int, budget: int, base: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    keys = torch.cat([keys, _angle(k, torch.tensor([-t]), base)], dim=2)
    values = torch.cat([values, v], dim=2)
    n = keys.shape[2]
    kept = [c for c in range(n) if c < sinks or n - c <= budget - sinks] if n > budget else list(range(n))
    keys, values, m = keys[:, :, kept], values[:, :, kept], len(kept)
    query = _angle(q, torch.tensor([m - 1 - t]), base)
    s = torch.einsum("bhqd,bhmd->bhqm", query, _angle(keys, torch.arange(m), base)) / q.shape[3] ** 0.5
    return torch.softmax(s, dim=-1) @ values, keys, values


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, cached: int, sinks: int, budget: int, *, t: int | None = None, size: float = 1.5
    ) -> Case:
        def draw(n: int, size: float = 1.0) -> torch.Tensor:
            return normal(rng, 1, 2, n, 16, size=size)

        tensors = {
            "keys": draw(cached, size), "values": draw(cached), "q": draw(1, size), "k": draw(1, size), "v": draw(1)
        }  # fmt: skip
        rest = {"t": cached if t is None else t, "sinks": sinks, "budget": budget, "base": BASE}
        return Case(name, {**tensors, **rest})

    far = int(rng.integers(100, 400))
    return [
        case("a full cache", 12, 4, 12, t=far),
        case("the first token", 0, 4, 12),
        case("room left", 6, 4, 12),
        case("the last free place", 11, 4, 12),
        case("no sinks", 12, 0, 12, t=far),
        case("a smaller budget than before", 20, 2, 7, t=far),
    ]


def _step_mutant(
    fault: str, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    t: int, sinks: int, budget: int, base: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    new = k if fault == "rotated keys cached" else rotate(k, torch.tensor([-t]), base=base)
    keys, values = torch.cat([keys, new], dim=2), torch.cat([values, v], dim=2)
    n, room, first = keys.shape[2], budget, sinks
    if fault == "budget without the current token":
        room = budget + 1
    if fault == "one token too few":
        room = budget - 1
    if fault == "sinks dropped":
        first = 0
    kept = torch.arange(n)
    if n > room and fault != "nothing evicted":
        kept = torch.cat([torch.arange(first), torch.arange(n - (room - first), n)])
        if fault == "newest evicted":
            kept = torch.arange(room)
        if fault == "sinks beside the budget":
            kept = torch.cat([torch.arange(first), torch.arange(max(first, n - room), n)])
    keys, values = keys[:, :, kept], values[:, :, kept]
    m = keys.shape[2]
    at = torch.arange(m)
    if fault == "positions not re-indexed":
        at = kept + (t - (n - 1)) * (kept >= sinks)
    turned = keys if fault == "keys not turned" else rotate(keys, at, base=base)
    query = rotate(q, at[-1:] - t, base=base)
    if fault == "query left alone":
        query = q
    if fault == "query turned again":
        query = rotate(q, at[-1:], base=base)
    if fault == "nothing placed":
        turned, query = keys, q
    s = query @ turned.transpose(-1, -2)
    s = s if fault == "no scale" else s / q.shape[3] ** 0.5
    return torch.softmax(s, dim=-1) @ values, turned if fault == "placed keys kept" else keys, values


STEP = Exercise(
    id="sparse/streaming/step",
    title="one token through the cache",
    signature="step(keys, values [B, H, n, D], q, k, v [B, H, 1, D], t, sinks, budget, base) -> (out, keys, values)",
    outputs=(Output("out", "q"), Output("keys", "keys"), Output("values", "values")),
    make_inputs=_step_inputs,
    reference=_step_reference,
    solution=step,
    from_scratch=FROM_SCRATCH,
    properties={
        "a full cache": "Turn the new key back by t, append, drop the oldest token that is no sink, turn all by "
        "their "
        "places, attend.",
        "the first token": "From an empty cache out is v.",
        "room left": "As long as the budget holds all, nothing is dropped: full attention.",
        "the last free place": "The new token counts: with budget - 1 in the cache nothing is dropped yet.",
        "no sinks": "Without sinks the oldest token goes.",
        "a smaller budget than before": "Whatever the cache holds, afterwards it holds `budget` tokens at most.",
    },
    tolerance=_ANGLES,
    mutants=mutants(
        _step_mutant,
        {
            "rotated keys cached": "The key is cached as it came, rotated by t, and turned again at every step. "
            "Turn it back "
            "first.",
            "budget without the current token": "The cache holds one token too many: the budget counts the current "
            "token.",
            "one token too few": "The cache holds one token too few.",
            "sinks dropped": "The sinks are evicted like any other token.",
            "nothing evicted": "Nothing is ever evicted: the cache grows with the text.",
            "newest evicted": "The newest tokens go in place of the oldest. The window slides.",
            "sinks beside the budget": "The sinks are kept beside a full window: the budget counts them.",
            "positions not re-indexed": "Keys are turned to their positions in the text. They belong at their "
            "places 0 .. "
            "m - 1 in the cache.",
            "query turned again": "The query is turned to m - 1 on top of its turn by t: turn it by m - 1 - t.",
            "nothing placed": "Neither keys nor query are turned to their places in the cache.",
            "placed keys kept": "The keys are handed back turned to this step's places. At the next step their "
            "places are others: hand them back without a turn.",
            "no scale": "The scores are not divided by the root of D.",
            "keys not turned": "The cached keys are used without positions.",
            "query left alone": "The query keeps its position t in the text. It stands at m - 1, the place of its "
            "own key.",
        },
    ),
    hints=(
        "Four steps: append (the key without its turn), evict, place, attend. What is returned as keys has no turn.",
        "Evict: keep [:sinks] and the last budget - sinks. Place: keys turn by arange(m), the query by m - 1 - t.",
        "keys = torch.cat([keys, rotate(k, torch.tensor([-t]), base=base)], dim=2)\n"
        "if keys.shape[2] > budget:\n    recent = keys.shape[2] - (budget - sinks)\n"
        "    keys = torch.cat([keys[:, :, :sinks], keys[:, :, recent:]], dim=2)\n    # and values likewise\n"
        "turned = rotate(keys, torch.arange(keys.shape[2]), base=base)\n"
        "query = rotate(q, torch.tensor([keys.shape[2] - 1 - t]), base=base)\n"
        "p = torch.softmax(query @ turned.transpose(-1, -2) / q.shape[3] ** 0.5, dim=-1)\n"
        "return p @ values, keys, values",
    ),
)
