"""Exercises on chunks: outputs and next state from what the chunk writes, and the pass over all chunks."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._delta_rule_solve import decay_matrix, solve, system
from effattn_lab.exercises.linear._delta_rule_token import FROM_SCRATCH, rates, unit
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.foundations.attention import repeat_kv

# ---- one chunk ---------------------------------------------------------------------------------------------


def chunk(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, X: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read and hand on: what the tokens of a chunk see, and the state after it."""
    c = g.cumsum(dim=-1)
    gamma = decay_matrix(g)
    out = c.exp()[..., None] * (q @ S) + (gamma * (q @ k.mT)) @ X
    kept = (c[..., -1:] - c).exp()[..., None] * k
    return out, c[..., -1].exp()[..., None, None] * S + kept.mT @ X


def _chunk_reference(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, X: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    outs = []
    for t in range(g.shape[-1]):
        S = g[..., t].exp()[..., None, None] * S
        S = S + k[..., t, :, None] * X[..., t, None, :]
        outs.append((q[..., t, None, :] @ S)[..., 0, :])
    return torch.stack(outs, dim=-2), S


def _chunk_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str,
        c: int,
        *,
        decay: float = 0.7,
        empty: bool = False,
        written: bool = True,
        length: float = 1.0,
    ) -> Case:
        shape, d, dv = (2,), 6, 4
        S, X = normal(rng, *shape, d, dv), normal(rng, *shape, c, dv)
        g = -torch.from_numpy(rng.uniform(0.5, 1.5, (*shape, c))).float() * decay
        return Case(name, {
            "S": 0 * S if empty else S, "q": normal(rng, *shape, c, d), "k": length * unit(rng, *shape, c, d),
            "X": X if written else 0 * X, "g": g,
        })  # fmt: skip

    return [
        case("equals token by token", 7),
        case("no decay", 7, decay=0.0),
        case("the first chunk", 5, empty=True),
        case("nothing written", 5, written=False),
        case("one token", 1),
        case("strong decay", 12, decay=60.0),
        case("q and k as they come", 6, length=0.6),
    ]


def _chunk_mutant(
    fault: str, S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, X: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if fault == "queries normalised":
        q = q / q.norm(dim=-1, keepdim=True)
    elif fault == "keys normalised":
        k = k / k.norm(dim=-1, keepdim=True)
    c = g.cumsum(dim=-1)
    if fault == "masked too late":
        gamma = (c[..., :, None] - c[..., None, :]).exp()
        gamma = gamma * torch.ones_like(gamma).tril()
    else:
        gamma = decay_matrix(g)
    if fault == "writes do not decay":
        gamma = torch.ones_like(gamma).tril()
    whole = q @ k.mT
    scores = gamma * whole + whole.triu(1) * (fault == "leaky mask")
    if fault == "mask too strict":
        scores = scores.tril(-1)
    start = {"state not decayed": torch.zeros_like(c), "state decayed too late": c - g}.get(fault, c)
    kept = {"kept in full": torch.zeros_like(c), "one decay too many": c[..., -1:] - c + g}.get(
        fault, c[..., -1:] - c
    )
    last = c[..., -1].exp()[..., None, None]
    new = (kept.exp()[..., None] * k).mT @ X
    new = new + (S if fault == "old state kept in full" else last * S)
    if fault == "chunk boundary lost":
        new = (kept.exp()[..., None] * k).mT @ X
    read = new if fault == "read after the chunk" else S
    return start.exp()[..., None] * (q @ read) + scores @ X, new


CHUNK = Exercise(
    id="linear/delta_rule/chunk",
    title="read and hand on",
    signature="chunk(S [..., D, Dv], q, k [..., C, D], X [..., C, Dv], g [..., C]) -> (out [..., C, Dv], S [..., "
    "D, Dv])",
    outputs=(Output("out", "q"), Output("S", "S")),
    make_inputs=_chunk_inputs,
    reference=_chunk_reference,
    solution=chunk,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals token by token": "Token a sees the old state, decayed by e^(c_a), and each write b <= a, decayed by "
        "e^(c_a - c_b).",
        "no decay": "With g = 0 it is linear attention's chunk with X in the place of V.",
        "the first chunk": "An empty state adds nothing.",
        "nothing written": "With X = 0 out is e^(c_a) S^T q_a, and the state only decays.",
        "one token": "One token sees its own write.",
        "strong decay": "e^(c_a - c_b) above the diagonal overflows: mask before you exponentiate.",
        "q and k as they come": "Nothing is scaled to length 1 here: that has been done.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "sums of up to 12 products of size 1 to 4 in float32: 2e-6, and decays as in the step before.",
    ),
    loose={
        "strong decay": Tolerance(
            1e-3,
            1e-4,
            "running sums reach 700: their differences are off by 6e-5, and so are their exponentials.",
        )
    },
    mutants=mutants(
        _chunk_mutant,
        {
            "leaky mask": "A token sees writes of later tokens: mask the square above its diagonal.",
            "mask too strict": "A token does not see its own write. It reads after writing: keep the diagonal.",
            "masked too late": "The mask comes after the exponential: above the diagonal that is inf, and inf * 0 "
            "is NaN.",
            "writes do not decay": "Inside the chunk the writes do not decay: e^(c_a - c_b) is missing.",
            "state not decayed": "The old state is read as the chunk found it. Token a reads e^(c_a) of it.",
            "state decayed too late": "The old state lacks a token's own decay when it is read: decay comes first.",
            "kept in full": "The new state holds every write in full. At the end of the chunk e^(c_C - c_b) of "
            "write b is "
            "left.",
            "one decay too many": "Each write is decayed by its own token's g too: after write b, only later "
            "tokens decay "
            "it.",
            "old state kept in full": "The old state does not decay on its way through the chunk: e^(c_C) of it "
            "is left.",
            "chunk boundary lost": "The old state is gone after the chunk: the new one holds this chunk's writes "
            "only.",
            "read after the chunk": "The tokens read the state after the chunk, which holds what later tokens write.",
            "queries normalised": "q is scaled to length 1 here. Queries come as they are to be used.",
            "keys normalised": "k is scaled to length 1 here. Keys come as they are to be used.",
        },
    ),
    hints=(
        "It is linear attention's chunk, with X instead of V and decays: two terms for out, two for the state.",
        "out = e^c (q S) + (gamma * q k^T) X with the matrix gamma of the step before; S' = e^(c_C) S + (e^(c_C - "
        "c) k)^T X.",
        "c, gamma = g.cumsum(-1), ...as in step 4\nout = c.exp()[..., None] * (q @ S) + (gamma * (q @ k.mT)) @ X\n"
        "kept = (c[..., -1:] - c).exp()[..., None] * k\n"
        "return out, c[..., -1].exp()[..., None, None] * S + kept.mT @ X",
    ),
)

# ---- the pass ----------------------------------------------------------------------------------------------


def delta_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunk after chunk: set up, solve, read, hand on."""
    groups = q.shape[1] // k.shape[1]
    q, k, v, beta, g = (
        scale * q,
        *(repeat_kv(x, groups) for x in (k, v)),
        *(x.repeat_interleave(groups, dim=1) for x in (beta, g)),
    )
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    outs = []
    for i in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c, b_c, g_c = (x[:, :, i : i + chunk_size] for x in (q, k, v, beta, g))
        L, R = system(S, k_c, v_c, b_c, g_c)
        out, S = chunk(S, q_c, k_c, solve(L, R), g_c)
        outs.append(out)
    return torch.cat(outs, dim=2), S[:, ::groups]


def _forward_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[torch.Tensor, ...]:
    groups, outs = q.shape[1] // k.shape[1], []
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype, device=q.device)
    for t in range(q.shape[2]):
        S = g[:, :, t, None, None].exp() * S
        error = v[:, :, t] - (k[:, :, t, None] @ S)[:, :, 0]
        S = S + beta[:, :, t, None, None] * k[:, :, t, :, None] * error[:, :, None]
        outs.append(scale * q[:, :, t, None] @ repeat_kv(S, groups))
    return torch.cat(outs, dim=2), S


def _forward_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, size: int, *, hq: int = 2, hkv: int = 2, scale: float = 0.4, decay: float = 0.2,
        length: float = 1.0,
    ) -> Case:  # fmt: skip
        d, dv = 6, 4
        return Case(name, {
            "q": normal(rng, 1, hq, n, d), "k": length * unit(rng, 1, hkv, n, d), "v": normal(rng, 1, hkv, n, dv),
            "beta": rates(rng, 1, hkv, n), "g": -torch.from_numpy(rng.uniform(0, 2, (1, hkv, n))).float() * decay,
            "scale": scale, "chunk_size": size,
        })  # fmt: skip

    return [
        case("equals token by token", 24, 8),
        case("length not a multiple of the chunk", 21, 8),
        case("length 1", 1, 8),
        case("chunks of one token", 9, 1),
        case("one chunk", 9, 64),
        case("no decay", 20, 8, decay=0.0),
        case("scale", 10, 4, scale=1.9),
        case("grouped heads", 20, 8, hq=6, hkv=3),
        case("q and k as they come", 20, 8, length=0.6),
    ]


def _forward_mutant(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, heads, n = q.shape[1] // k.shape[1], k.shape[1], q.shape[2]
    order = torch.arange(q.shape[1]) % heads if fault == "heads tiled" else torch.arange(q.shape[1]) // groups
    if fault == "queries normalised":
        q = q / q.norm(dim=-1, keepdim=True)
    elif fault == "keys normalised":
        k = k / k.norm(dim=-1, keepdim=True)
    q = q if fault == "scale forgotten" else scale * q
    k, v, beta, g = (x[:, order] for x in (k, v, beta, g))
    v = scale * v if fault == "scale on the values too" else v
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for i in range(
        0, n - n % chunk_size if fault == "last chunk dropped" and n > chunk_size else n, chunk_size
    ):
        q_c, k_c, v_c, b_c, g_c = (x[:, :, i : i + chunk_size] for x in (q, k, v, beta, g))
        asked = torch.zeros_like(S) if fault == "state not asked" else S
        L, R = system(asked, k_c, v_c, b_c, g_c)
        X = {"not solved": R, "values written": v_c, "errors unscaled": solve(L, R / b_c[..., None])}.get(
            fault
        )
        X = solve(L, R) if X is None else X
        start = torch.zeros_like(S) if fault == "chunk boundary lost" else S
        out[:, :, i : i + chunk_size], S = chunk(start, q_c, k_c, X, g_c)
    return out, S[:, :heads] if fault == "heads tiled" else S[:, ::groups]


FORWARD = Exercise(
    id="linear/delta_rule/forward",
    title="the pass, chunk after chunk",
    signature="delta_forward(q [B, Hq, N, D], k, v, beta, g, scale, chunk_size) -> (out [B, Hq, N, Dv], S)",
    outputs=(Output("out", "q"), Output("S", "k")),
    make_inputs=_forward_inputs,
    reference=_forward_reference,
    solution=delta_forward,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals token by token": "For each chunk: your system with the state so far, your solve, your chunk.",
        "length not a multiple of the chunk": "The last chunk is shorter: slices shorten by themselves.",
        "length 1": "One token.",
        "chunks of one token": "Chunks of one are the recurrence.",
        "one chunk": "A chunk longer than the sequence: no recurrence is left, only a triangular system.",
        "no decay": "g = 0 is DeltaNet.",
        "scale": "Multiply the queries by scale once.",
        "grouped heads": "Query head h reads the keys, values, beta, g and state of head h // (Hq // Hkv).",
        "q and k as they come": "Nothing is scaled to length 1 here: that has been done.",
    },
    tolerance=Tolerance(
        1e-4,
        1e-4,
        "24 tokens of steps that are off by 1e-6 each, and mirrored states keep errors: 1e-5 in all.",
    ),
    mutants=mutants(
        _forward_mutant,
        {
            "chunk boundary lost": "The state starts anew in every chunk: what came before is forgotten at its "
            "border.",
            "last chunk dropped": "The last, shorter chunk is never computed: the loop must run to N.",
            "state not asked": "The system is set up with an empty state: the writes do not correct what earlier "
            "chunks "
            "left. Pass S.",
            "not solved": "R is written as it is: the tokens of a chunk do not see each other's writes. Solve.",
            "values written": "v is written as it is: that is linear attention. The solution X of the system "
            "stands in its place.",
            "queries normalised": "q is scaled to length 1 here. Queries come as they are to be used.",
            "keys normalised": "k is scaled to length 1 here. Keys come as they are to be used.",
            "errors unscaled": "The errors are solved for, not the writes: beta is missing.",
            "scale forgotten": "scale is not used.",
            "scale on the values too": "The values are multiplied by scale as well; the state should not know it.",
            "heads tiled": "The key heads are repeated as a list (h % Hkv). Query head h reads head h // (Hq // "
            "Hkv): "
            "use repeat_kv.",
        },
    ),
    hints=(
        "A loop of three calls. The state is the only thing that one chunk hands to the next.",
        "scale multiplies q, once, before the loop. For each chunk: step4 gives L and R, step3 solves for X, step5 "
        "reads and returns the next state.",
        "q = scale * q\nfor i in range(0, q.shape[2], chunk_size):\n"
        "    q_c, k_c, v_c, b_c, g_c = (x[:, :, i : i + chunk_size] for x in (q, k, v, beta, g))\n"
        "    L, R = step4(S, k_c, v_c, b_c, g_c)\n    o_c, S = step5(S, q_c, k_c, step3(L, R), g_c)\n"
        "    out.append(o_c)",
    ),
)
