"""Exercises on chunks with decay: the pieces of a chunk, one chunk."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance, Value
from effattn_lab.exercises.linear._gated_linear_parts import FROM_SCRATCH, decays
from effattn_lab.exercises.making import mutants, normal


def _after(g: torch.Tensor) -> torch.Tensor:
    """Sum of the log decays behind each token, along the rows."""
    behind = torch.cat([g[1:], torch.zeros_like(g[:1])])
    return behind.flip(0).cumsum(dim=0).flip(0)


# ---- a decay a channel, at a border ------------------------------------------------------------------------


def across(q: torch.Tensor, k: torch.Tensor, g_q: torch.Tensor, g_k: torch.Tensor) -> torch.Tensor:
    """Scores of a piece's queries with the keys of the piece before it: both factors are at most 1."""
    behind = torch.cat([g_k[1:], torch.zeros_like(g_k[:1])])  # key j's own decay came before it
    keys = k * behind.flip(0).cumsum(dim=0).flip(0).exp()
    return (q * g_q.cumsum(dim=0).exp()) @ keys.T


def _across_reference(
    q: torch.Tensor, k: torch.Tensor, g_q: torch.Tensor, g_k: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Pair by pair, channel by channel."""
    out = torch.zeros(q.shape[0], k.shape[0], dtype=q.dtype)
    for i in range(q.shape[0]):
        for j in range(k.shape[0]):
            between = g_k[j + 1 :].sum(dim=0) + g_q[: i + 1].sum(dim=0)
            out[i, j] = (q[i] * k[j] * between.exp()).sum()
    return (out,)


def _across_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int = 8, m: int = 8, *, dim: int = 6, low: float = -1.0) -> Case:
        return Case(name, {
            "q": normal(rng, n, dim), "k": normal(rng, m, dim), "g_q": decays(rng, n, dim, low=low),
            "g_k": decays(rng, m, dim, low=low),
        })  # fmt: skip

    no_decay, border = case("no decay"), case("-inf forgets everything")
    kwargs: dict[str, Value] = {**no_decay.kwargs, "g_q": torch.zeros(8, 6), "g_k": torch.zeros(8, 6)}
    border.kwargs["g_k"][3] = -torch.inf  # type: ignore[index]
    return [
        case("equals pair by pair"),
        case("pieces of one token", 1, 1),
        case("pieces of different lengths", 5, 9),
        Case("no decay", kwargs),
        case("strong decay", 20, 20, low=-50.0),
        border,
    ]


def _across_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, g_q: torch.Tensor, g_k: torch.Tensor
) -> torch.Tensor:
    if fault == "one decay for all channels":
        g_q, g_k = (g.mean(dim=-1, keepdim=True).expand_as(g) for g in (g_q, g_k))
    up, behind = g_q.cumsum(dim=0), _after(g_k)
    if fault == "divided by the running product":
        total = torch.cat([g_k, g_q]).cumsum(dim=0)
        return (q * total[len(g_k) :].exp()) @ (k * (-total[: len(g_k)]).exp()).T
    if fault == "difference of running sums":
        behind = g_k.sum(dim=0) - g_k.cumsum(dim=0)
    if fault == "key's own decay counted":
        behind = behind + g_k
    if fault == "query's own decay forgotten":
        up = up - g_q
    if fault == "keys summed from the front":
        behind = g_k.cumsum(dim=0)
    if fault == "keys undecayed":
        behind = 0 * _after(g_k.clamp(min=-1.0))
    if fault == "queries undecayed":
        up = torch.zeros_like(up)
    return (q * up.exp()) @ (k * behind.exp()).T


ACROSS = Exercise(
    id="linear/gated_linear/across",
    title="scores across a border, with a decay a channel",
    signature="across(q [N, K], k [M, K], g_q [N, K], g_k [M, K]) -> scores [N, M]",
    outputs=(Output("scores", "q"),),
    make_inputs=_across_inputs,
    reference=_across_reference,
    solution=across,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals pair by pair": "Key j decays by g_k[j+1] + ... up to the border, query i by g_q[0] + ... + g_q[i].",
        "pieces of one token": "The key stands at the border: only the query's own decay lies between them.",
        "pieces of different lengths": "Queries and keys may be of different number.",
        "no decay": "Then the scores are q k^T.",
        "strong decay": "Both exponents must be sums of negative numbers: no exp(-g), no division.",
        "-inf forgets everything": "A difference of running sums is NaN behind a border; a sum is not.",
    },
    tolerance=Tolerance(
        1e-5,
        1e-5,
        "sums of 6 float32 products of size 1 to 5, decays with them: a few 1e-6 also where they cancel.",
    ),
    mutants=mutants(
        _across_mutant,
        {
            "divided by the running product": "exp(-G) is in one of the factors: it overflows, and inf * 0 is "
            "NaN. Measure "
            "both sums from the border between the pieces.",
            "difference of running sums": "total - cumsum is the right sum until one of them is -inf: then it is "
            "NaN. Sum "
            "from behind instead.",
            "key's own decay counted": "Off by one: g_k[j] itself is counted. It acted before key j was written.",
            "query's own decay forgotten": "Off by one: g_q[i] itself is missing. The state decays before i reads.",
            "keys summed from the front": "A key decays from its place to the border behind it: sum what comes "
            "after it.",
            "keys undecayed": "The keys reach the border undecayed.",
            "queries undecayed": "The queries read the border's keys undecayed.",
            "one decay for all channels": "All channels decay alike: the factor belongs on q and k, before the "
            "product.",
        },
    ),
    hints=(
        "Stand at the border. How much has key j lost when it gets there, and how much more until query i?",
        "Queries: cumsum of g_q along the tokens. Keys: the sum of what comes after each, so leave out its own "
        "and sum "
        "from behind (flip, cumsum, flip).",
        "behind = torch.cat([g_k[1:], torch.zeros_like(g_k[:1])])\n"
        "keys = k * behind.flip(0).cumsum(dim=0).flip(0).exp()\nreturn (q * g_q.cumsum(dim=0).exp()) @ keys.T",
    ),
)

# ---- one chunk ---------------------------------------------------------------------------------------------


def chunk(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The past through the decayed state, the chunk's own tokens through their scores."""
    out = inside @ v + (q * g.cumsum(dim=0).exp()) @ S
    behind = torch.cat([g[1:], torch.zeros_like(g[:1])]).flip(0).cumsum(dim=0).flip(0)
    return out, g.sum(dim=0).exp()[:, None] * S + (k * behind.exp()).T @ v


def _chunk_reference(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Token after token; the scores that were given count as they are."""
    past, rows = S, []
    for t in range(q.shape[0]):
        past = g[t].exp()[:, None] * past
        S = g[t].exp()[:, None] * S + torch.outer(k[t], v[t])
        rows.append(q[t] @ past)
    return torch.stack(rows) + inside @ v, S


def _chunk_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str,
        c: int = 12,
        *,
        past: float = 1.0,
        low: float = -0.5,
        dim: int = 6,
        value_dim: int = 5,
        border: bool = False,
    ) -> Case:
        g = decays(rng, c, dim, low=low)
        if border:
            g[5] = -torch.inf
        q, k, v = normal(rng, c, dim), normal(rng, c, dim), normal(rng, c, value_dim)
        inside = torch.zeros(c, c)
        for i in range(c):
            for j in range(i + 1):
                inside[i, j] = (q[i] * k[j] * g[j + 1 : i + 1].sum(dim=0).exp()).sum()
        state = normal(rng, dim, value_dim, size=past)
        return Case(name, {"S": state, "q": q, "k": k, "v": v, "g": g, "inside": inside})

    return [
        case("equals token after token"),
        case("the first chunk", past=0.0),
        case("a chunk of one token", 1),
        case("as many values as channels", 5, dim=5, value_dim=5),
        case("strong decay", 30, low=-50.0),
        case("a long chunk", 64, low=-0.1),
        case("-inf forgets everything", border=True),
    ]


def _chunk_mutant(
    fault: str,
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    inside: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    up, behind, total = g.cumsum(dim=0), _after(g), g.sum(dim=0)
    if fault == "read off by one":
        up = torch.cat([torch.zeros_like(g[:1]), up[:-1]])
    elif fault == "read undecayed":
        up = torch.zeros_like(up)
    elif fault == "keys undecayed":
        behind = torch.zeros_like(behind)
    elif fault == "keys off by one":
        behind = behind + g
    elif fault == "keys summed from the front":
        behind = up
    elif fault == "difference of running sums":
        behind = total - up
    elif fault == "last decay alone":
        total = g[-1]
    elif fault == "state undecayed":
        total = torch.zeros_like(total)
    written = (k * behind.exp()).T @ v
    kept = total.exp()[:, None]
    new = kept * (S + written) if fault == "decay after the write" else kept * S + written
    if fault == "chunk boundary lost":
        new = written
    past = (q * up.exp()) @ (new if fault == "written before read" else S)
    if fault == "divided by the running product":
        new = kept * (S + (k * (-up).exp()).T @ v)
    return (past if fault == "inside forgotten" else inside @ v + past), new


CHUNK = Exercise(
    id="linear/gated_linear/chunk",
    title="one chunk, given what came before it",
    signature="chunk(S [K, V], q [C, K], k [C, K], v [C, V], g [C, K], inside [C, C]) -> (out [C, V], S)",
    outputs=(Output("out", "q"), Output("S", "S")),
    make_inputs=_chunk_inputs,
    reference=_chunk_reference,
    solution=chunk,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals token after token": "out: the scores times v, and q, decayed from the border to itself, times S. The "
        "state: S decayed by the whole chunk, and each key decayed from its place to the end.",
        "the first chunk": "From an empty state only the scores count.",
        "a chunk of one token": "The state decays by g[0]; the token itself does not.",
        "as many values as channels": "The decay belongs to the rows of S, one a key channel.",
        "strong decay": "No exponent may be positive.",
        "a long chunk": "64 tokens, weak decay: every key still counts at the end.",
        "-inf forgets everything": "A g of -inf in the middle: what came before is gone, what comes after is "
        "whole. total - cumsum is -inf minus -inf there, and NaN.",
    },
    tolerance=Tolerance(
        3e-5,
        3e-5,
        "sums of up to 70 float32 terms of size 1 to 5 in another order: their rounding adds up to a few 1e-6, also "
        "where they cancel.",
    ),
    mutants=mutants(
        _chunk_mutant,
        {
            "read off by one": "Off by one: query i reads the state as token i - 1 left it. It has decayed by "
            "g[i] too.",
            "read undecayed": "The queries read the state that the chunk found, undecayed.",
            "written before read": "The chunk's keys are in the state before its queries read it: they count "
            "twice, and "
            "later ones leak.",
            "keys undecayed": "Each key is written as if it were the last: it decays until the end of the chunk.",
            "keys off by one": "Off by one: key j's own decay g[j] is counted. It acted before j was written.",
            "keys summed from the front": "A key decays from its place to the end of the chunk: sum what comes "
            "after it.",
            "difference of running sums": "total - cumsum is the right sum until a g is -inf: then it is NaN, and "
            "the state with it. Sum what comes after each key, from behind.",
            "last decay alone": "The old state has decayed by all of the chunk's tokens, not by the last alone.",
            "state undecayed": "The old state is handed on undecayed.",
            "decay after the write": "The chunk's whole decay hits its own keys too. Decay the old state alone.",
            "chunk boundary lost": "What came before the chunk is dropped: add to the decayed state.",
            "divided by the running product": "Keys are divided by the running product of decays, which "
            "overflows. Sum "
            "what comes after each key instead.",
            "inside forgotten": "The chunk's own tokens are missing: add inside @ v.",
        },
    ),
    hints=(
        "Stand at the chunk's two borders: q looks back to the first, k is carried on to the last.",
        "g.cumsum(dim=0) leads from the first border to each token; the sum of what comes after a token leads to "
        "the last "
        "border; g.sum(dim=0) leads from border to border.",
        "behind = torch.cat([g[1:], torch.zeros_like(g[:1])]).flip(0).cumsum(dim=0).flip(0)\n"
        "out = inside @ v + (q * g.cumsum(dim=0).exp()) @ S\n"
        "return out, g.sum(dim=0).exp()[:, None] * S + (k * behind.exp()).T @ v",
    ),
)
