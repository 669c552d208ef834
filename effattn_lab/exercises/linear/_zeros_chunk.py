"""Exercise on one chunk of ZeroS: a small square of weights, three states read and written."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance, Value
from effattn_lab.exercises.linear._zeros_states import State, step_reference, unit
from effattn_lab.exercises.linear._zeros_weights import FROM_SCRATCH, gates
from effattn_lab.exercises.making import mutants, normal


def chunk(
    F: torch.Tensor, G: torch.Tensor, H: torch.Tensor, E: torch.Tensor, P: torch.Tensor, m: torch.Tensor, t: int,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor,
    gate_1: torch.Tensor, gate_h: torch.Tensor,
) -> State:  # fmt: skip
    """The past through three states, the chunk's own tokens through a small square of weights."""
    size = q.shape[-2]
    s = s - m[..., None]
    n = t + torch.arange(1, size + 1, dtype=s.dtype)
    top = s.cummax(dim=-1).values.clamp(min=0)  # m_a - m
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    x = torch.exp((s[..., None, :] - top[..., None]).masked_fill(hidden, float("-inf")))
    fade = torch.exp(-top)
    total = fade * E[..., None] + x.sum(dim=-1)
    mean = (P[..., None] + s.cumsum(dim=-1)) / n
    alpha, beta = gate_h / total, (gate_1 - gate_h) / n
    gamma = -beta * mean - gate_h / n
    r = alpha[..., None] * x + (beta[..., None] * s[..., None, :] + gamma[..., None]).masked_fill(hidden, 0.0)
    out = ((q @ k.transpose(-1, -2)) * r) @ v
    for c, state in ((alpha * fade, F), (beta, G), (gamma, H)):
        out = out + c[..., None] * (q @ state)
    rise = s.amax(dim=-1).clamp(min=0)
    s = s - rise[..., None]
    w, kt = torch.exp(s), k.transpose(-1, -2)
    F = torch.exp(-rise)[..., None, None] * F + (kt * w[..., None, :]) @ v
    G = G - rise[..., None, None] * H + (kt * s[..., None, :]) @ v
    E, P = torch.exp(-rise) * E + w.sum(dim=-1), P - rise * t + s.sum(dim=-1)
    return out, F, G, H + kt @ v, E, P, m + rise


def _chunk_reference(
    F: torch.Tensor, G: torch.Tensor, H: torch.Tensor, E: torch.Tensor, P: torch.Tensor, m: torch.Tensor, t: int,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor,
    gate_1: torch.Tensor, gate_h: torch.Tensor,
) -> State:  # fmt: skip
    """Token after token, each moving the origin to its own maximum."""
    out = []
    for a in range(q.shape[-2]):
        top = torch.maximum(m, s[..., a])
        fade, rise = torch.exp(m - top), top - m
        F, G = fade[..., None, None] * F, G - rise[..., None, None] * H
        E, P, m = fade * E, P - rise * (t + a), top
        row, *state = step_reference(
            F[None], G[None], H[None], E[None], P[None], t + a, q[None, :, a], k[None, :, a], v[None, :, a],
            (s[..., a] - m)[None], gate_1[None, :, a], gate_h[None, :, a],
        )  # fmt: skip
        F, G, H, E, P = (x[0] for x in state)
        out.append(row[0])
    return torch.stack(out, dim=1), F, G, H, E, P, m


def _chunk_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, size: int, past: int = 20, d: int = 8, dv: int = 6, *, logits: torch.Tensor | None = None
    ) -> Case:
        heads = 2
        kt, v = unit(normal(rng, heads, past, d)).transpose(-1, -2), normal(rng, heads, past, dv)
        s = normal(rng, heads, past, size=1.5)
        m = s.amax(dim=-1) if past else torch.zeros(heads)
        s = s - m[:, None]
        state: dict[str, Value] = {
            "F": (kt * s.exp()[:, None]) @ v, "G": (kt * s[:, None]) @ v, "H": kt @ v,
            "E": s.exp().sum(-1), "P": s.sum(-1), "m": m, "t": past,
        }  # fmt: skip
        new = (
            normal(rng, heads, size, size=1.5) if logits is None else logits.expand(heads, size) + m[:, None]
        )
        if not past:  # the origin of an empty state is the first logit
            state["m"] = new[:, 0].clone()
        token: dict[str, Value] = {
            "q": unit(normal(rng, heads, size, d)), "k": unit(normal(rng, heads, size, d)),
            "v": normal(rng, heads, size, dv), "s": new.clone(),
            "gate_1": gates(rng, heads, size), "gate_h": gates(rng, heads, size),
        }  # fmt: skip
        return Case(name, {**state, **token})

    return [
        case("equals token after token", 16),
        case("the first chunk", 12, past=0),
        case("a chunk of one token", 1),
        case("logits that rise", 10, logits=torch.arange(1.0, 11.0) * 20),
        case("logits that fall", 10, logits=-torch.arange(1.0, 11.0) * 3),
        case("logits that fall", 10, logits=-torch.arange(1.0, 11.0) * 3 - 200),
        case("as many tokens as dimensions", 8, d=8, dv=8),
    ]


def _chunk_mutant(
    fault: str, F: torch.Tensor, G: torch.Tensor, H: torch.Tensor, E: torch.Tensor, P: torch.Tensor,
    m: torch.Tensor, t: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor,
    gate_1: torch.Tensor, gate_h: torch.Tensor,
) -> State:  # fmt: skip
    size = q.shape[-2]
    s = s - m[..., None]
    n = t + torch.arange(1, size + 1, dtype=s.dtype)
    if fault == "steps counted from the chunk":
        n = n - t
    top = s.cummax(dim=-1).values.clamp(min=0)
    if fault == "maximum of the chunk alone":
        top = s.cummax(dim=-1).values
    if fault == "maximum of the whole chunk":
        top = s.amax(dim=-1, keepdim=True).clamp(min=0).expand_as(s)
    if fault == "no maximum":
        top = torch.zeros_like(s)
    hidden = torch.ones(size, size, dtype=torch.bool).triu(0 if fault == "mask too strict" else 1)
    if fault == "leaky mask":
        hidden = torch.zeros_like(hidden)
    x = torch.exp((s[..., None, :] - top[..., None]).masked_fill(hidden, float("-inf")))
    fade = torch.exp(-top)
    total = fade * E[..., None] + x.sum(dim=-1)
    if fault == "E not faded":
        total = E[..., None] + x.sum(dim=-1)
    if fault == "E forgotten":
        total = x.sum(dim=-1)
    mean = (P[..., None] + s.cumsum(dim=-1)) / n
    if fault == "P forgotten":
        mean = s.cumsum(dim=-1) / n
    if fault == "gates swapped":
        gate_1, gate_h = gate_h, gate_1
    alpha, beta = gate_h / total, (gate_1 - gate_h) / n
    gamma = -gate_h / n if fault == "mean not subtracted" else -beta * mean - gate_h / n
    r = alpha[..., None] * x + (beta[..., None] * s[..., None, :] + gamma[..., None]).masked_fill(hidden, 0.0)
    out = ((q @ k.transpose(-1, -2)) * r) @ v
    rise = s.amax(dim=-1).clamp(min=0)
    move = rise if fault != "no maximum" else torch.zeros_like(rise)
    later = s - move[..., None]
    w, kt = torch.exp(later), k.transpose(-1, -2)
    out_fade = torch.ones_like(fade) if fault == "past not faded" else fade
    state_fade = torch.exp(-move)
    if fault == "F not faded":
        state_fade = torch.ones_like(state_fade)
    F_new = state_fade[..., None, None] * F + (kt * w[..., None, :]) @ v
    G_new = G - move[..., None, None] * H + (kt * later[..., None, :]) @ v
    if fault == "G not moved":
        G_new = G + (kt * later[..., None, :]) @ v
    H_new = H + kt @ v
    if fault == "chunk boundary lost":
        F_new, G_new, H_new = (kt * w[..., None, :]) @ v, (kt * later[..., None, :]) @ v, kt @ v
    if fault != "past forgotten":
        past = (F_new, G_new, H_new) if fault == "written before read" else (F, G, H)
        for c, state in zip((alpha * out_fade, beta, gamma), past):
            out = out + c[..., None] * (q @ state)
    return (
        out, F_new, G_new, H_new, torch.exp(-move) * E + w.sum(dim=-1), P - move * t + later.sum(dim=-1), m + move,
    )  # fmt: skip


CHUNK = Exercise(
    id="linear/zeros/chunk",
    title="one chunk, given what came before it",
    signature=(
        "chunk(F, G, H [Hn, D, Dv], E, P, m [Hn], t, q, k [Hn, C, D], v [Hn, C, Dv], s, gate_1, gate_h [Hn, C]) -> "
        "(out [Hn, C, Dv], F, G, H, E, P, m)"
    ),
    outputs=(
        Output("out", "q"),
        Output("F", "F"),
        Output("G", "G"),
        Output("H", "H"),
        Output("E", "E"),
        Output("P", "P"),
        Output("m", "m"),
    ),
    make_inputs=_chunk_inputs,
    reference=_chunk_reference,
    solution=chunk,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals token after token": "The weights inside, R, as a square; what each state adds; the states for "
        "the next chunk.",
        "the first chunk": "From an empty state only the square inside counts, and its first row is 0.",
        "a chunk of one token": "One token sees the past and itself.",
        "logits that rise": "They rise by 200 in one chunk: measured from the last one, the first e^s are 0 in "
        "float32, and 0 / 0 is NaN. Row a has a maximum of its own, over the tokens up to a.",
        "logits that fall": "They are up to 230 below m: the maximum stays where it was, m_a is never below m.",
        "as many tokens as dimensions": "With C = D no shape stops you from a wrong transpose.",
    },
    tolerance=Tolerance(
        3e-5,
        3e-5,
        "sums of up to 36 terms of size 1 and the difference of three of them in float32: a few 1e-6; G and P "
        "hold numbers of some hundreds where logits rise, which the relative part covers.",
    ),
    loose={
        "logits that rise": Tolerance(
            3e-5,
            2e-3,
            "logits of 200 are rounded to 1e-5, and G holds differences of sums of some thousands.",
        )
    },
    mutants=mutants(
        _chunk_mutant,
        {
            "leaky mask": "The square inside the chunk is not masked: a token sees later tokens of its chunk.",
            "mask too strict": "A token does not see itself: the diagonal of the square is cut away. Keep it.",
            "written before read": "The chunk's tokens are in the states before its queries read them: they "
            "count twice, and the later ones leak. Read what the chunk found.",
            "chunk boundary lost": "The states start anew in every chunk: what came before is forgotten at its "
            "border.",
            "past forgotten": "The past is missing: F, G and H are never read.",
            "maximum of the whole chunk": "All rows are measured from the maximum of the whole chunk: later "
            "tokens reach the earlier rows, at least by their rounding, and here by 0 / 0. Use a running maximum.",
            "no maximum": "Without a maximum e^s overflows: logits above 88 give inf.",
            "maximum of the chunk alone": "m_a is the maximum of the chunk's own logits. It must not fall below the "
            "old m: e^-m_a, by which F and E are multiplied, overflows. Clamp at 0, since s is measured from m.",
            "E not faded": "The sum E that the chunk found is measured from m, row a from m_a: its softmax is over "
            "e^-m_a E plus the row sum of X.",
            "E forgotten": "The softmax is over the chunk alone: e^-m_a E, the past's part of the sum, is missing.",
            "P forgotten": "The mean of the logits is over the chunk alone: P, the sum over the past, is missing.",
            "past not faded": "What F holds is measured from m, the row from m_a: F is read with alpha times "
            "e^(m - m_a).",
            "F not faded": "When the maximum moves by d, the F that is handed on is multiplied by e^-d.",
            "G not moved": "When the maximum moves by d, every old logit shrinks by d: G loses d times H.",
            "steps counted from the chunk": "t counts from the beginning of the text, not of the chunk.",
            "gates swapped": "gate_1 and gate_h have changed places.",
            "mean not subtracted": "gamma lacks -beta times the mean of the logits so far.",
        },
    ),
    hints=(
        "Measure s from m first. Then: row maxima, X, its row sums, means, three coefficients a row, R; read; "
        "write.",
        "top = s.cummax(-1).values.clamp(min=0); X_ab = e^(s_b - top_a), 0 above the diagonal; E_a = e^-top_a E + "
        "sum of X's row a; mean_a = (P + cumsum of s) / (t + a).",
        "r = alpha[..., None] * x + (beta[..., None] * s[..., None, :] + gamma[..., None]).masked_fill(hidden, 0.0)\n"
        "out = ((q @ k.mT) * r) @ v + (alpha * fade)[..., None] * (q @ F) + beta[..., None] * (q @ G) + ...\n"
        "rise = s.amax(-1).clamp(min=0); s = s - rise[..., None]; F = e^-rise F + (k.mT * e^s) @ v; G = G - rise H + "
        "...",
    ),
)
