"""Exercises on chunks: one chunk, and the whole causal pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial, Value
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.linear._linear_attention_parts import FROM_SCRATCH, positive
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch
from effattn_lab.foundations.attention import repeat_kv

EPS = 1e-6

# ---- one chunk ---------------------------------------------------------------------------------------------


def chunk(
    S: torch.Tensor, z: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The past through the state, the chunk's own tokens through a small masked square."""
    inside = (q @ k.mT).tril()
    numerator = q @ S + inside @ v
    denominator = (q @ z[..., None])[..., 0] + inside.sum(dim=-1)
    return numerator, denominator, S + k.mT @ v, z + k.sum(dim=-2)


def _chunk_reference(
    S: torch.Tensor, z: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Token after token."""
    num, den = [], []
    for t in range(q.shape[-2]):
        q_t, k_t, v_t = (x[..., t, :] for x in (q, k, v))
        S, z = S + torch.einsum("...f,...d->...fd", k_t, v_t), z + k_t
        num.append(torch.einsum("...f,...fd->...d", q_t, S))
        den.append((q_t * z).sum(dim=-1))
    return torch.stack(num, dim=-2), torch.stack(den, dim=-1), S, z


def _chunk_inputs(rng: np.random.Generator) -> list[Case]:
    def features(n: int, f: int) -> torch.Tensor:
        return positive(rng, 2, 3, n, f, size=0.35)  # so that weights are of size 1

    def case(name: str, c: int, f: int = 8, dv: int = 6, *, past: int = 20) -> Case:
        keys, values = features(past, f), normal(rng, 2, 3, past, dv)
        q, k, v = features(c, f), features(c, f), normal(rng, 2, 3, c, dv)
        return Case(name, {"S": keys.mT @ values, "z": keys.sum(dim=-2), "q": q, "k": k, "v": v})

    return [
        case("equals token after token", 16),
        case("the first chunk", 12, past=0),
        case("a chunk of one token", 1),
        case("a long chunk", 64),
        case("as many tokens as features", 8, f=8, dv=8),
    ]


def _chunk_mutant(
    fault: str, S: torch.Tensor, z: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    square = q @ k.mT
    inside = {
        "leaky mask": square, "mask too strict": square.tril(-1), "mask transposed": square.triu(),
        "inside forgotten": 0 * square,
    }.get(fault, square.tril())  # fmt: skip
    S_new, z_new = S + k.mT @ v, z + k.sum(dim=-2)
    if fault == "state replaced":
        S_new, z_new = k.mT @ v, k.sum(dim=-2)
    if fault == "state not written":
        S_new, z_new = S.clone(), z.clone()
    past_S, past_z = (S_new, z_new) if fault == "written before read" else (S, z)
    before = (q @ past_z[..., None])[..., 0]
    num, den = q @ past_S + inside @ v, before + inside.sum(dim=-1)
    if fault == "past forgotten":
        num, den = inside @ v, inside.sum(dim=-1)
    if fault == "denominator inside only":
        den = inside.sum(dim=-1)
    if fault == "denominator of the past only":
        den = before
    return num, den, S_new, z_new


#: Mistakes that PyTorch and the kernel share.
INSIDE = {
    "leaky mask": "The square inside the chunk is not masked: a token sees later tokens of its chunk.",
    "mask too strict": "A token does not see itself: the diagonal of the square is cut away. Keep it.",
    "written before read": "The chunk's keys are in the state before its queries read it: they count twice, "
    "and the later ones leak. Read the state that the chunk found.",
}

CHUNK = Exercise(
    id="linear/linear_attention/chunk",
    title="one chunk, given what came before it",
    signature="chunk(S [..., F, Dv], z [..., F], q, k [..., C, F], v [..., C, Dv]) "
    "-> (num [..., C, Dv], den [..., C], S, z)",
    outputs=(Output("num", "q"), Output("den", "q"), Output("S", "S"), Output("z", "z")),
    make_inputs=_chunk_inputs,
    reference=_chunk_reference,
    solution=chunk,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals token after token": "num = q S + tril(q k^T) v; den is the same with 1 for v; S + k^T v, z + "
        "sum of k.",
        "the first chunk": "From an empty state only the square inside counts.",
        "a chunk of one token": "One token sees the past and itself.",
        "a long chunk": "The square is C x C, whatever F is.",
        "as many tokens as features": "With C = F no shape stops you from a wrong transpose.",
    },
    tolerance=Tolerance(
        3e-5,
        3e-5,
        "sums of up to 84 terms of size 1 to 5 in float32 in another order: their rounding adds up to a few "
        "1e-6, also where they cancel.",
    ),
    mutants=mutants(
        _chunk_mutant,
        {
            **INSIDE,
            "mask transposed": "The mask keeps the wrong half: queries are the rows, so a token sees what "
            "stands left of the diagonal.",
            "inside forgotten": "The chunk's own tokens are missing: only the past is read.",
            "past forgotten": "The past is missing: nothing is read from the state.",
            "state replaced": "The chunk's own sum replaces the state: what came before is forgotten.",
            "state not written": "The state comes back as it was: the next chunk will not see this one.",
            "denominator inside only": "The denominator lacks the past, q . z.",
            "denominator of the past only": "The denominator lacks the chunk's own weights.",
        },
    ),
    hints=(
        "Every token sees two things: all of the past, and the tokens of its own chunk up to itself. The first "
        "is in (S, z).",
        "Past: q @ S, and q @ z with z as a column. Own chunk: the square q @ k.mT, its upper half cut away, times "
        "v; its row sums for the denominator. Then the state, for the next chunk.",
        "inside = (q @ k.mT).tril()\nnum = q @ S + inside @ v\n"
        "den = (q @ z[..., None])[..., 0] + inside.sum(dim=-1)\nreturn num, den, S + k.mT @ v, z + k.sum(dim=-2)",
    ),
)

# ---- the whole pass ----------------------------------------------------------------------------------------


def linear_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, normalize: bool, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal linear attention of features, chunk after chunk."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    z = torch.zeros_like(k[:, :, 0])
    q = scale * q
    out = []
    for i in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c = (x[:, :, i : i + chunk_size] for x in (q, k, v))
        num, den, S, z = chunk(S, z, q_c, k_c, v_c)
        out.append(num / (den + EPS)[..., None] if normalize else num)
    return torch.cat(out, dim=2), S[:, ::groups], z[:, ::groups]


def _forward_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, normalize: bool, chunk_size: int
) -> tuple[torch.Tensor, ...]:
    """The whole masked square."""
    groups = q.shape[1] // k.shape[1]
    weights = scale * (q @ repeat_kv(k, groups).transpose(-1, -2)).tril()
    out = weights @ repeat_kv(v, groups)
    if normalize:
        out = out / (weights.sum(dim=-1, keepdim=True) + EPS)
    return out, k.transpose(-1, -2) @ v, k.sum(dim=2)


def _forward_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, c: int, *, normalize: bool = True, scale: float = 0.25, hq: int = 2, hkv: int = 2,
        f: int = 8, size: float = 1.0,
    ) -> Case:  # fmt: skip
        return Case(name, {
            "q": positive(rng, 2, hq, n, f, size=size), "k": positive(rng, 2, hkv, n, f, size=size),
            "v": normal(rng, 2, hkv, n, 6), "scale": scale, "normalize": normalize, "chunk_size": c,
        })  # fmt: skip

    return [
        case("equals the masked square", 64, 16),
        case("length not a multiple of the chunk", 37, 16),
        case("length 1", 1, 16),
        case("any chunk size", 30, 7),
        case("any chunk size", 30, 1),
        case("any chunk size", 30, 64),
        case("without the denominator", 40, 16, normalize=False),
        case("scale", 40, 16, scale=0.03, size=1e-2),
        case("grouped heads", 33, 8, hq=6, hkv=2),
    ]


def _forward_mutant(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    normalize: bool,
    chunk_size: int,
) -> tuple[torch.Tensor, ...]:
    groups = q.shape[1] // k.shape[1]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, groups, *[1] * (x.dim() - 2)) if fault == "heads tiled" else repeat_kv(x, groups)

    if fault == "whole matrix":
        return tuple(x.to(q.dtype) for x in _forward_reference(q, k, v, scale, normalize, chunk_size))
    normalize = {"unnormalised": False, "always normalised": True}.get(fault, normalize)
    if fault == "scale in the keys":
        k = scale * k
    elif fault != "scale forgotten":
        q = scale * q
    n = q.shape[2]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    z = torch.zeros_like(k[:, :, 0])
    out = torch.zeros(*q.shape[:3], v.shape[3])
    end = n - n % chunk_size if fault == "last chunk dropped" and n > chunk_size else n
    for i in range(0, end, chunk_size):
        q_c, k_c, v_c = (x[:, :, i : i + chunk_size] for x in (q, k, v))
        square = q_c @ heads(k_c).transpose(-1, -2)
        inside = square if fault == "leaky mask" else square.tril(-1 if fault == "mask too strict" else 0)
        S_new, z_new = S + k_c.transpose(-1, -2) @ v_c, z + k_c.sum(dim=2)
        S_old, z_old = (S_new, z_new) if fault == "written before read" else (S, z)
        num = q_c @ heads(S_old) + inside @ heads(v_c)
        den = inside.sum(dim=-1)
        if fault != "each chunk normalised by itself":
            den = den + (q_c @ heads(z_old)[..., None])[..., 0]
        out[:, :, i : i + chunk_size] = num / (den + EPS)[..., None] if normalize else num
        S, z = S_new, z_new
        if fault == "chunk boundary lost":
            S, z = k_c.transpose(-1, -2) @ v_c, k_c.sum(dim=2)
    return out, S, z


def _square(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(5)
    q, k, v = positive(rng, 1, 1, 192, 8), positive(rng, 1, 1, 192, 8), normal(rng, 1, 1, 192, 8)
    seen = watch(fn, q, k, v, 0.3, True, 16)
    if seen.largest > 4 * 192 * 8:
        return f"a tensor of shape {seen.shape} was made for N = 192 in chunks of 16"
    return None


_LONG, _SPARE = 6144, 32 * 2**20  # one float a pair of 6144 would take 151 MB


def _long_inputs(rng: np.random.Generator) -> list[Case]:
    n = _LONG
    inputs: dict[str, Value] = {
        "q": positive(rng, 1, 1, n, 8), "k": positive(rng, 1, 1, n, 8), "v": normal(rng, 1, 1, n, 8),
        "scale": 0.3, "normalize": True, "chunk_size": 128,
    }  # fmt: skip
    return [Case(_NO_SQUARE, inputs, tuple(rng.integers(0, n, 16).tolist()))]


def _long_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        q, k, v = (outcome.case.kwargs[name].double() for name in "qkv")  # type: ignore[union-attr]
        for row in (0, 129, _LONG - 1, *outcome.case.secret):
            weights = 0.3 * (q[0, 0, row] @ k[0, 0, : row + 1].T)
            want = weights @ v[0, 0, : row + 1] / (weights.sum() + EPS)
            if not near(outcome.values[0][0, 0, row], want, 1e-4):
                return f"with N = {_LONG} in chunks of 128 the results are wrong"
    return None


_NO_SQUARE = "never holds an N x N tensor"
_WHOLE = (
    "The whole masked square is laid out. Only the square inside one chunk is needed at a time; what is left of it "
    "stands in S."
)

FORWARD = Exercise(
    id="linear/linear_attention/forward",
    title="the causal pass, chunk after chunk",
    signature="linear_forward(q, k, v, scale, normalize, chunk_size) -> (out [B, Hq, N, Dv], S [B, Hkv, F, Dv], z)",
    outputs=(Output("out", "q"), Output("S", "k"), Output("z", "k")),
    make_inputs=_forward_inputs,
    reference=_forward_reference,
    solution=linear_forward,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the masked square": "Carry (S, z) from chunk to chunk; divide each token by its own sum of "
        "weights + 1e-6.",
        "length not a multiple of the chunk": "The last chunk is shorter: slices shorten by themselves.",
        "length 1": "One token: out is v.",
        "any chunk size": "The result must not depend on chunk_size, also when it is 1 or more than N.",
        "without the denominator": "With normalize=False out is the numerator, scale included.",
        "scale": "The weights are scale * (q . k). Where they are small, eps = 1e-6 in the denominator shows it.",
        "grouped heads": "Query head h reads the keys, the values and the state of head h // (Hq // Hkv).",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "sums of up to 64 terms of size 1 to 10 in float32 in another order: their rounding adds up to 1e-5, "
        "also where they cancel (without the denominator); normalised outputs are means of numbers of size 1 to 4.",
    ),
    probes=(Probe(_NO_SQUARE, _square, _WHOLE, Trial(_long_inputs, _long_judge, memory_bytes=_SPARE)),),
    mutants=mutants(
        _forward_mutant,
        {
            **INSIDE,
            "chunk boundary lost": "The state starts anew in every chunk: what came before the chunk is "
            "forgotten at its border. Add to the state.",
            "last chunk dropped": "The last, shorter chunk is never computed: the loop must run to N.",
            "unnormalised": "normalize is ignored: the output is never divided by the sum of weights.",
            "always normalised": "normalize=False is ignored: then the numerator alone is asked for.",
            "each chunk normalised by itself": "The denominator lacks the past, q . z: every chunk is "
            "normalised as if it were alone.",
            "scale forgotten": "The weights are not multiplied by scale. Normalised outputs hide that until "
            "eps matters.",
            "scale in the keys": "scale is multiplied into the keys, so the state that comes back is scaled "
            "too. Put it on the queries: the state should not know it.",
            "heads tiled": "The key heads are repeated as a list (h % Hkv). Query head h reads head h // (Hq "
            "// Hkv): use repeat_kv.",
            "whole matrix": _WHOLE,
        },
    ),
    hints=(
        "The body of the loop is one call of your chunk. The state is all that it hands to the next.",
        "Put the scale on q once, before the loop. Slices of q, k and v go in; num and den come out, and the new S "
        "and z. With normalize divide num by den + 1e-6, with an axis more: [..., None].",
        "q = scale * q\nfor i in range(0, q.shape[2], chunk_size):\n"
        "    q_c, k_c, v_c = (x[:, :, i : i + chunk_size] for x in (q, k, v))\n"
        "    num, den, S, z = step4(S, z, q_c, k_c, v_c)\n"
        "    out.append(...)  # num, divided if asked",
    ),
)
