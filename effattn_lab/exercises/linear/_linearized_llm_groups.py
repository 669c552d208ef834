"""Exercise: grouped linear attention of a whole text, group after group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial, Value
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.linear._linearized_llm_parts import FROM_SCRATCH, unit
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch
from effattn_lab.foundations.attention import repeat_kv


def grouped_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, group_size: int
) -> torch.Tensor:
    """ReLU^2 inside each group, the state of the groups before it, then the group is added to the state."""
    repeat = q.shape[1] // k.shape[1]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    out = []
    for i in range(0, q.shape[2], group_size):
        q_g, k_g, v_g = (x[:, :, i : i + group_size] for x in (q, k, v))
        inside = torch.relu(q_g @ repeat_kv(k_g, repeat).transpose(-1, -2)).square().tril()
        out.append(inside @ repeat_kv(v_g, repeat) + alpha * (q_g @ repeat_kv(S, repeat)))
        S = S + k_g.transpose(-1, -2) @ v_g
    return torch.cat(out, dim=2)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, group_size: int
) -> tuple[torch.Tensor, ...]:
    """One matrix of weights: which of the two functions a pair gets depends on its groups."""
    repeat = q.shape[1] // k.shape[1]
    scores = q @ repeat_kv(k, repeat).transpose(-1, -2)
    t = torch.arange(q.shape[2])
    group, own = t // group_size, t[:, None] // group_size
    weights = torch.where((group == own) & (t <= t[:, None]), scores.relu() ** 2, 0.0)
    weights = weights + alpha * torch.where(group < own, scores, 0.0)
    return (weights @ repeat_kv(v, repeat),)


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, group: int, *, alpha: float = 0.3, hq: int = 2, hkv: int = 2) -> Case:
        return Case(name, {
            "q": unit(rng, 1, hq, n, 8), "k": unit(rng, 1, hkv, n, 8), "v": normal(rng, 1, hkv, n, 6),
            "alpha": alpha, "group_size": group,
        })  # fmt: skip

    return [
        case("equals the matrix of weights", 64, 16),
        case("length not a multiple of the group", 37, 16),
        case("one group", 16, 64),
        case("groups of one", 12, 1),
        case("length 1", 1, 8),
        case("alpha", 40, 8, alpha=-2.0),
        case("local alone", 40, 8, alpha=0.0),
        case("grouped heads", 33, 8, hq=6),
    ]


def _mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float, group_size: int
) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, repeat, 1, 1) if fault == "heads tiled" else repeat_kv(x, repeat)

    if fault == "whole matrix":
        return _reference(q, k, v, alpha, group_size)[0]
    S = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    out = torch.zeros(*q.shape[:3], v.shape[3])
    n = q.shape[2]
    end = n - n % group_size if fault == "last group dropped" and n > group_size else n
    for i in range(0, end, group_size):
        q_g, k_g, v_g = (x[:, :, i : i + group_size] for x in (q, k, v))
        scores = q_g @ heads(k_g).transpose(-1, -2)
        weights = {
            "relu not squared": scores.relu(), "squared without relu": scores.square(), "one weight for both": scores,
        }.get(fault, scores.relu().square())  # fmt: skip
        if fault != "leaky mask":
            weights = weights.tril(-1 if fault == "mask too strict" else 0)
        after = S + k_g.transpose(-1, -2) @ v_g
        past = after if fault == "inclusive prefix" else S
        if fault == "group border lost":
            past = torch.zeros_like(S)
        out[:, :, i : i + group_size] = weights @ heads(v_g) + alpha * (q_g @ heads(past))
        if fault == "alpha on both":
            out[:, :, i : i + group_size] = alpha * (weights @ heads(v_g) + q_g @ heads(past))
        if fault == "alpha forgotten":
            out[:, :, i : i + group_size] = weights @ heads(v_g) + q_g @ heads(past)
        S = k_g.transpose(-1, -2) @ v_g if fault == "only the group before" else after
    return out


def _square(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(5)
    seen = watch(fn, unit(rng, 1, 1, 192, 8), unit(rng, 1, 1, 192, 8), normal(rng, 1, 1, 192, 8), 0.3, 16)
    if seen.largest > 4 * 192 * 16:  # all groups at once are 192 x 16 weights
        return f"a tensor of shape {seen.shape} was made for N = 192 in groups of 16"
    return None


_LONG, _SPARE = 6144, 32 * 2**20  # one float a pair of 6144 would take 151 MB


def _long_inputs(rng: np.random.Generator) -> list[Case]:
    inputs: dict[str, Value] = {
        "q": unit(rng, 1, 1, _LONG, 8), "k": unit(rng, 1, 1, _LONG, 8), "v": normal(rng, 1, 1, _LONG, 8),
        "alpha": 0.01, "group_size": 128,
    }  # fmt: skip
    return [Case(_NO_SQUARE, inputs, tuple(rng.integers(0, _LONG, 16).tolist()))]


def _long_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        q, k, v = (outcome.case.kwargs[name].double() for name in "qkv")  # type: ignore[union-attr]
        for row in (0, 129, _LONG - 1, *outcome.case.secret):
            scores, start = k[0, 0, : row + 1] @ q[0, 0, row], row // 128 * 128
            want = scores[start:].relu().square() @ v[0, 0, start : row + 1]
            want = want + 0.01 * scores[:start] @ v[0, 0, :start]
            if not near(outcome.values[0][0, 0, row], want, 1e-4):
                return f"with N = {_LONG} in groups of 128 the results are wrong"
    return None


_NO_SQUARE = "never holds an N x N tensor"
_WHOLE = (
    "All pairs are laid out. Only the square inside a group is needed; everything before it is in the state."
)

GROUPED_FORWARD = Exercise(
    id="linear/linearized_llm/grouped_forward",
    title="grouped linear attention of a whole text",
    signature="grouped_forward(q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], alpha, group_size) -> out",
    outputs=(Output("out", "q"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=grouped_forward,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the matrix of weights": "Inside a group relu(q . k)^2, to earlier groups alpha (q . k), to later "
        "tokens nothing.",
        "length not a multiple of the group": "The last group is shorter: slices shorten by themselves.",
        "one group": "With group_size above N only the local weights are left.",
        "groups of one": "A token alone in its group: its own value, relu(q . k)^2 times, and the state.",
        "length 1": "One token.",
        "alpha": "alpha multiplies what comes from the state, and nothing else; it may be negative.",
        "local alone": "With alpha = 0 the groups know nothing of each other.",
        "grouped heads": "Query head h reads the keys, the values and the state of head h // (Hq // Hkv).",
    },
    tolerance=Tolerance(
        2e-5, 3e-5, "sums of up to 64 products of numbers of size 1 in float32, in another order."
    ),
    probes=(Probe(_NO_SQUARE, _square, _WHOLE, Trial(_long_inputs, _long_judge, memory_bytes=_SPARE)),),
    mutants=mutants(
        _mutant,
        {
            "inclusive prefix": "The group's own keys are in the state that its queries read: they count twice, and "
            "later tokens of the group leak. The prefix is exclusive.",
            "leaky mask": "The square inside the group is not masked: a token sees later tokens of its group.",
            "mask too strict": "A token does not see itself: the diagonal of the square is cut away. Keep it.",
            "group border lost": "Nothing is read from the state: a group knows nothing of those before it.",
            "only the group before": "The state starts anew in every group: only the group just before is seen. Add.",
            "last group dropped": "The last, shorter group is never computed: the loop must run to N.",
            "relu not squared": "The local weight is relu(q . k), squared.",
            "squared without relu": "Squared without ReLU, keys that point away count too.",
            "one weight for both": "The local weight is q . k like the global one. Here the two differ, and that is "
            "why the group size is part of the model.",
            "alpha on both": "alpha multiplies the local part too; it belongs to the state alone.",
            "alpha forgotten": "What comes from the state is not multiplied by alpha.",
            "heads tiled": "The key heads are repeated as a list (h % Hkv). Query head h reads head h // (Hq // "
            "Hkv): use repeat_kv.",
            "whole matrix": _WHOLE,
        },
    ),
    hints=(
        "A loop over groups that carries S [B, Hkv, D, Dv]. What may a group's queries read from S: the groups "
        "before "
        "theirs, or theirs as well?",
        "Inside: relu(q_g @ k_g^T) squared, the upper half cut away. Then alpha * (q_g @ S). Only then S grows. "
        "Queries have Hq heads: repeat_kv(x, repeat) for k_g, v_g and S where a query reads them.",
        "for i in range(0, N, group_size):\n"
        "    q_g, k_g, v_g = (x[:, :, i : i + group_size] for x in (q, k, v))\n"
        "    inside = torch.relu(q_g @ repeat_kv(k_g, repeat).transpose(-1, -2)).square().tril()\n"
        "    out.append(inside @ repeat_kv(v_g, repeat) + alpha * (q_g @ repeat_kv(S, repeat)))\n"
        "    S = S + k_g.transpose(-1, -2) @ v_g",
    ),
)
