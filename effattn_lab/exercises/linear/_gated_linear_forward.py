"""Exercise: the whole causal pass, with a decay a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial, Value
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.linear._gated_linear_parts import FROM_SCRATCH, decay_mask, decays
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch
from effattn_lab.foundations.attention import repeat_kv


def gated_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunk after chunk, a decay a head."""
    groups = q.shape[1] // k.shape[1]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    out = []
    for i in range(0, q.shape[2], chunk_size):
        q_c, k_c, v_c, g_c = (x[:, :, i : i + chunk_size] for x in (q, k, v, g))
        inside = (scale * q_c @ repeat_kv(k_c, groups).transpose(-1, -2)) * repeat_kv(decay_mask(g_c), groups)
        up = repeat_kv(g_c.cumsum(dim=-1)[..., None].exp(), groups)
        out.append(inside @ repeat_kv(v_c, groups) + (scale * q_c * up) @ repeat_kv(S, groups))
        behind = (
            torch.cat([g_c[..., 1:], torch.zeros_like(g_c[..., :1])], dim=-1).flip(-1).cumsum(dim=-1).flip(-1)
        )
        S = (
            g_c.sum(dim=-1)[..., None, None].exp() * S
            + (k_c * behind[..., None].exp()).transpose(-1, -2) @ v_c
        )
    return torch.cat(out, dim=2), S


def forward_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, **_: Any
) -> tuple[torch.Tensor, ...]:
    """Token after token."""
    groups = q.shape[1] // k.shape[1]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    rows = []
    for t in range(q.shape[2]):
        here = slice(t, t + 1)
        S = g[:, :, t].exp()[..., None, None] * S + k[:, :, here].transpose(-1, -2) @ v[:, :, here]
        rows.append(scale * q[:, :, here] @ repeat_kv(S, groups))
    return torch.cat(rows, dim=2), S


def _forward_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, n: int, c: int, *, scale: float = 0.3, hq: int = 2, hkv: int = 2, low: float = -0.5
    ) -> Case:
        return Case(name, {
            "q": normal(rng, 2, hq, n, 8), "k": normal(rng, 2, hkv, n, 8), "v": normal(rng, 2, hkv, n, 6),
            "g": decays(rng, 2, hkv, n, low=low), "scale": scale, "chunk_size": c,
        })  # fmt: skip

    border = case("-inf forgets everything", 40, 16)
    border.kwargs["g"][:, :, [5, 32]] = -torch.inf  # type: ignore[index]  # inside a chunk, and where one begins

    return [
        case("equals token after token", 64, 16),
        case("length not a multiple of the chunk", 37, 16),
        case("length 1", 1, 16),
        case("any chunk size", 30, 7),
        case("any chunk size", 30, 1),
        case("any chunk size", 30, 64),
        case("strong decay", 80, 40, low=-50.0),
        case("scale", 40, 16, scale=3.0),
        case("grouped heads", 33, 8, hq=6, hkv=2),
        border,
    ]


def _forward_mutant(
    fault: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    n = q.shape[2]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, groups, *[1] * (x.dim() - 2)) if fault == "heads tiled" else repeat_kv(x, groups)

    if fault == "whole matrix":
        mask = heads(decay_mask(g))
        S = (k * decay_mask(g)[..., -1, :, None]).transpose(-1, -2) @ v
        return (scale * q @ heads(k).transpose(-1, -2) * mask) @ heads(v), S
    if fault == "scale in the keys":
        k = scale * k
    elif fault != "scale forgotten":
        q = scale * q
    whole = g.cumsum(dim=-1)
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    out = torch.zeros(*q.shape[:3], v.shape[3])
    end = n - n % chunk_size if fault == "last chunk dropped" and n > chunk_size else n
    for i in range(0, end, chunk_size):
        q_c, k_c, v_c, g_c = (x[:, :, i : i + chunk_size] for x in (q, k, v, g))
        up, total = g_c.cumsum(dim=-1), g_c.sum(dim=-1, keepdim=True)
        mask = decay_mask(g_c)
        if fault == "leaky mask":
            mask = mask + mask.transpose(-1, -2).triu(1)
        if fault == "decay off by one":
            mask = mask * g_c.exp()[..., None, :]
        if fault == "differences of running sums inside":
            apart = up[..., :, None] - up[..., None, :]
            mask = apart.masked_fill(~torch.ones_like(apart).tril().bool(), -torch.inf).exp()
        if fault == "divided by the running product":
            product = up.exp()
            mask = (product[..., :, None] / product[..., None, :]).tril()
        inside = (q_c @ heads(k_c).transpose(-1, -2)) * heads(mask)
        if fault == "sums never restarted":
            up = whole[..., i : i + chunk_size]
        past = (q_c * heads(up[..., None].exp())) @ heads(S)
        behind = torch.cat([g_c[..., 1:], torch.zeros_like(g_c[..., :1])], dim=-1)
        behind = behind.flip(-1).cumsum(dim=-1).flip(-1)
        if fault == "difference of running sums":
            behind = total - g_c.cumsum(dim=-1)
        written = (k_c * behind[..., None].exp()).transpose(-1, -2) @ v_c
        kept = torch.ones_like(total) if fault == "state undecayed" else total.exp()
        S = written if fault == "chunk boundary lost" else kept[..., None] * S + written
        out[:, :, i : i + chunk_size] = inside @ heads(v_c) + past
    return out, S


def _square(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(5)
    q, k, v = (normal(rng, 1, 1, 192, 8) for _ in range(3))
    seen = watch(fn, q, k, v, decays(rng, 1, 1, 192), 0.3, 16)
    if seen.largest > 4 * 192 * 8:
        return f"a tensor of shape {seen.shape} was made for N = 192 in chunks of 16"
    return None


_LONG, _SPARE = 6144, 32 * 2**20  # one float a pair of 6144 would take 151 MB
_NO_SQUARE = "never holds an N x N tensor"
_WHOLE = "The whole square of scores and decays is laid out. Only one chunk's is needed at a time; the rest is in S."


def _long_inputs(rng: np.random.Generator) -> list[Case]:
    inputs: dict[str, Value] = {name: normal(rng, 1, 1, _LONG, 8) for name in "qkv"}
    inputs |= {"g": decays(rng, 1, 1, _LONG, low=-0.1), "scale": 0.3, "chunk_size": 128}
    return [Case(_NO_SQUARE, inputs, tuple(rng.integers(0, _LONG, 16).tolist()))]


def _long_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        q, k, v, g = (outcome.case.kwargs[name].double() for name in "qkvg")  # type: ignore[union-attr]
        total = g[0, 0].cumsum(dim=0)
        for row in (0, 129, _LONG - 1, *outcome.case.secret):
            lags = (total[row] - total[: row + 1]).exp()
            want = (0.3 * (q[0, 0, row] @ k[0, 0, : row + 1].T) * lags) @ v[0, 0, : row + 1]
            if not near(outcome.values[0][0, 0, row], want, 1e-3):
                return f"with N = {_LONG} in chunks of 128 the results are wrong"
    return None


FORWARD = Exercise(
    id="linear/gated_linear/forward",
    title="the causal pass, chunk after chunk",
    signature="gated_forward(q, k, v, g [B, Hkv, N], scale, chunk_size) -> (out [B, Hq, N, V], S [B, Hkv, K, V])",
    outputs=(Output("out", "q"), Output("S", "k")),
    make_inputs=_forward_inputs,
    reference=forward_reference,
    solution=gated_forward,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals token after token": "Your chunk, with your mask times q k^T inside, and S carried from chunk to "
        "chunk.",
        "length not a multiple of the chunk": "The last chunk is shorter: slices shorten by themselves.",
        "length 1": "One token: out is scale (q . k) v.",
        "any chunk size": "The result must not depend on chunk_size, also when it is 1 or more than N.",
        "strong decay": "Only sums of log decays: no division by a decay.",
        "scale": "The outputs are multiplied by scale; the state is not.",
        "-inf forgets everything": "A log decay of -inf: what came before is gone, what comes after is whole. A "
        "difference of running sums is -inf minus -inf there, and NaN.",
        "grouped heads": "Query head h reads the keys, values, decays and state of head h // (Hq // Hkv).",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "sums of up to 64 float32 terms of size 1 to 10 in another order: their rounding adds up to 1e-5, also where "
        "they cancel.",
    ),
    probes=(Probe(_NO_SQUARE, _square, _WHOLE, Trial(_long_inputs, _long_judge, memory_bytes=_SPARE)),),
    mutants=mutants(
        _forward_mutant,
        {
            "leaky mask": "The square inside a chunk is not masked: a token sees later tokens of its chunk.",
            "decay off by one": "Off by one: key j's own decay counts inside the chunk. It acted before j was "
            "written.",
            "divided by the running product": "Inside the chunk one running product is divided by another: 0 / 0 "
            "is NaN "
            "under strong decay. Use your mask.",
            "difference of running sums": "total - cumsum, for the keys, is the right sum until a log decay is "
            "-inf: then it is NaN, and the state with it. Sum what comes after each key, from behind.",
            "differences of running sums inside": "Inside the chunk a running sum is taken from another: -inf "
            "minus -inf is NaN. Your mask adds up between two tokens.",
            "sums never restarted": "The sums of decays run on over the whole sequence: the state has decayed up "
            "to its "
            "border already, so begin anew in every chunk.",
            "state undecayed": "The state is handed on undecayed: each chunk takes its whole decay from it.",
            "chunk boundary lost": "The state starts anew in every chunk: what came before is forgotten at its "
            "border.",
            "last chunk dropped": "The last, shorter chunk is never computed: the loop must run to N.",
            "scale forgotten": "The outputs are not multiplied by scale.",
            "scale in the keys": "scale is multiplied into the keys, so the state is scaled too. Put it on the "
            "queries.",
            "heads tiled": "The key heads are repeated as a list (h % Hkv). Query head h reads head h // (Hq // "
            "Hkv).",
            "whole matrix": _WHOLE,
        },
    ),
    hints=(
        "The loop of linear attention, three decays added: in the square inside, on what q reads, on what S keeps.",
        "inside = (q k^T) * decay_mask(g_c); the past is (q * exp(cumsum)) @ S; S' = exp(sum) S + (k * exp(what "
        "comes "
        "after))^T v. For grouped heads repeat_kv on k, v, S and the decays.",
        "inside = (scale * q_c @ repeat_kv(k_c, groups).transpose(-1, -2)) * repeat_kv(decay_mask(g_c), groups)\n"
        "up = repeat_kv(g_c.cumsum(dim=-1)[..., None].exp(), groups)\n"
        "out.append(inside @ repeat_kv(v_c, groups) + (scale * q_c * up) @ repeat_kv(S, groups))\n"
        "... then S, with g_c summed from behind",
    ),
)
