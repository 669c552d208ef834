"""Exercises on one sum and one token: regrouping, the step of the recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Outcome, Output, Probe, Tolerance, Trial, Value
from effattn_lab.exercises.kernels import near
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.linear.linear_attention",
    "effattn_lab.linear.feature_maps",
    "effattn_kernels.linear_attention",
)


def positive(rng: np.random.Generator, *shape: int, size: float = 1.0) -> torch.Tensor:
    """Features as a positive map makes them: e to a normal number of deviation 1/2, times ``size``."""
    return normal(rng, *shape, size=0.5).exp() * size


# ---- regrouping --------------------------------------------------------------------------------------------

_LONG, _SPARE = 6144, 32 * 2**20  # one float a pair of 6144 would take 151 MB


def regroup(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """sum_j (q . k_j) v_j / (sum_j q . k_j + eps), keys and values summed first."""
    state = k.transpose(-1, -2) @ v  # [B, H, F, Dv]
    total = q @ k.sum(dim=-2)[..., None]  # [B, H, Nq, 1]
    return (q @ state) / (total + eps)


def _regroup_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    weights = q @ k.transpose(-1, -2)
    return ((weights @ v) / (weights.sum(dim=-1, keepdim=True) + eps),)


def _regroup_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, nq: int, nk: int, f: int = 12, dv: int = 8, *, size: float = 1.0, eps: float = 1e-6
    ) -> Case:
        shape = (2, 3)
        return Case(name, {
            "q": positive(rng, *shape, nq, f, size=size), "k": positive(rng, *shape, nk, f, size=size),
            "v": normal(rng, *shape, nk, dv), "eps": eps,
        })  # fmt: skip

    return [
        case("equals the square", 20, 33),
        case("one key", 5, 1),
        case("more keys than features", 4, 200, f=4, dv=6),
        case("as many values as features", 9, 17, f=8, dv=8),
        case("eps", 6, 9, size=1e-2, eps=1e-2),
    ]


def _regroup_mutant(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> torch.Tensor:
    state, z = k.transpose(-1, -2) @ v, k.sum(dim=-2)
    num, den = q @ state, q @ z[..., None]
    if fault == "unnormalised":
        return num
    if fault == "divided by N":
        return num / k.shape[-2]
    if fault == "sums multiplied":
        return num / (q.sum(dim=-1, keepdim=True) * z.sum(dim=-1)[..., None, None] + eps)
    if fault == "one denominator":
        return num / (den.mean(dim=-2, keepdim=True) + eps)
    if fault == "no eps":
        return num / den
    if fault == "last key only":
        return num / (q @ k[..., -1, :, None] + eps)
    if fault == "half":
        return (q.half() @ state.half()).float() / (den + eps)
    weights = q @ k.transpose(-1, -2)
    return (weights @ v) / (weights.sum(dim=-1, keepdim=True) + eps)


def _no_square(fn: Callable[..., Any]) -> str | None:
    rng = np.random.default_rng(5)
    q, k, v = positive(rng, 1, 1, 160, 8), positive(rng, 1, 1, 160, 8), normal(rng, 1, 1, 160, 8)
    seen = watch(fn, q, k, v, 1e-6)
    return (
        f"a tensor of shape {seen.shape} was made for 160 queries and keys"
        if seen.largest > 4 * 160 * 8
        else None
    )


def _long_inputs(rng: np.random.Generator) -> list[Case]:
    n = _LONG
    rows = tuple(rng.integers(0, n, 16).tolist())
    inputs: dict[str, Value] = {
        "q": positive(rng, 1, 1, n, 8),
        "k": positive(rng, 1, 1, n, 8),
        "v": normal(rng, 1, 1, n, 8),
        "eps": 1e-6,
    }
    return [Case(_NO_SQUARE, inputs, rows)]


def _long_judge(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        q, k, v = (outcome.case.kwargs[name].double() for name in "qkv")  # type: ignore[union-attr]
        for row in (0, _LONG - 1, *outcome.case.secret):
            want = _regroup_reference(q[:, :, row : row + 1], k, v, 1e-6)[0]
            if not near(outcome.values[0][:, :, row : row + 1], want, 1e-4):
                return f"with N = {_LONG} the results are wrong"
    return None


_NO_SQUARE = "never holds an Nq x Nk tensor"
_WHOLE = (
    "The weights are laid out, Nq x Nk of them: q @ k^T comes first. Matrix products are associative: multiply "
    "k^T and v first, and no pair is ever visited."
)

REGROUP = Exercise(
    id="linear/linear_attention/regroup",
    title="attention without visiting pairs",
    signature="regroup(q [B, H, Nq, F], k [B, H, Nk, F], v [B, H, Nk, Dv], eps) -> out [B, H, Nq, Dv]",
    outputs=(Output("out", "q"),),
    make_inputs=_regroup_inputs,
    reference=_regroup_reference,
    solution=regroup,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the square": "Numerator: q times the matrix k^T v. Denominator: q times the sum of all keys, "
        "plus eps.",
        "one key": "With one key out is nearly v, whatever the weight: it cancels.",
        "more keys than features": "The sum over keys has to run over all of them.",
        "as many values as features": "With F = Dv no shape stops you from a wrong transpose.",
        "eps": "eps is added to each query's sum of weights.",
    },
    tolerance=Tolerance(
        2e-5,
        2e-5,
        "sums of up to 200 positive products in float32, in another order: 1e-6 of their size; outputs are "
        "weighted means of numbers of size 1 to 4.",
    ),
    probes=(Probe(_NO_SQUARE, _no_square, _WHOLE, Trial(_long_inputs, _long_judge, memory_bytes=_SPARE)),),
    mutants=mutants(
        _regroup_mutant,
        {
            "unnormalised": "The sum of weights is never divided out: outputs grow with the number of keys.",
            "divided by N": "The sum is divided by the number of keys, not by the sum of their weights.",
            "sums multiplied": "The denominator is the product of two sums, (sum of q) (sum of k). It is the "
            "inner product of q with the summed keys.",
            "one denominator": "All queries share one denominator. Each has a sum of weights of its own.",
            "last key only": "The denominator holds one key's weight, not the sum over all keys.",
            "no eps": "eps is missing in the denominator.",
            "half": "Something is rounded to half precision: three digits are left. Stay in float32.",
            "whole matrix": _WHOLE,
        },
    ),
    hints=(
        "q_i . k_j is a scalar, so (q_i . k_j) v_j = q_i^T (k_j v_j^T). What does not depend on i can be "
        "summed first.",
        "Sum over keys: k^T v is [F, Dv]. The denominator is the same with a column of ones for v: the sum of "
        "the keys, [F].",
        "state = k.transpose(-1, -2) @ v\ntotal = q @ k.sum(dim=-2)[..., None]\nreturn (q @ state) / (total + eps)",
    ),
)

# ---- one token ---------------------------------------------------------------------------------------------


def step(
    S: torch.Tensor, z: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write (k, v) into the state, then read it with q."""
    S = S + k[..., :, None] * v[..., None, :]
    z = z + k
    numerator = (q[..., None, :] @ S)[..., 0, :]
    denominator = (q * z).sum(dim=-1, keepdim=True)
    return numerator / (denominator + eps), S, z


def _step_reference(
    S: torch.Tensor, z: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    S, z = S + torch.einsum("bhf,bhd->bhfd", k, v), z + k
    den = torch.einsum("bhf,bhf->bh", q, z) + eps
    return torch.einsum("bhf,bhfd->bhd", q, S) / den[..., None], S, z


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, f: int = 8, dv: int = 6, *, past: int = 5, hit: bool = True, big: float = 1.0
    ) -> Case:
        keys, values = positive(rng, 2, 3, past, f), normal(rng, 2, 3, past, dv)
        q, k, v = positive(rng, 2, 3, f), positive(rng, 2, 3, f, size=big), normal(rng, 2, 3, dv)
        if not hit:  # as a ReLU map makes them
            q = torch.zeros_like(q)
        return Case(
            name,
            {"S": keys.transpose(-1, -2) @ values, "z": keys.sum(dim=2), "q": q, "k": k, "v": v, "eps": 1e-6},
        )

    return [
        case("equals the sum over the past"),
        case("first token", past=0),
        case("a token sees itself", big=30.0),
        case("a long past", past=300),
        case("as many values as features", f=8, dv=8),
        case("a query that matches nothing", hit=False),
    ]


def _step_mutant(
    fault: str,
    S: torch.Tensor,
    z: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outer = k[..., :, None] * v[..., None, :]
    S_new = {"state replaced": outer.clone(), "state not written": S.clone(), "written twice": S + 2 * outer,
             "values alone": S + v[..., None, :]}.get(fault, S + outer)  # fmt: skip
    z_new = {"key sum replaced": k.clone(), "key sum not written": z.clone(), "tokens counted": z + 1}.get(
        fault, z + k
    )
    S_read, z_read = (S, z) if fault == "read before write" else (S_new, z_new)
    num = (q[..., None, :] @ S_read)[..., 0, :]
    den = (q * z_read).sum(dim=-1, keepdim=True)
    out = num if fault == "unnormalised" else num / (den + (0.0 if fault == "no eps" else eps))
    return out, S_new, z_new


STEP = Exercise(
    id="linear/linear_attention/step",
    title="one token of the recurrence",
    signature="step(S [B, H, F, Dv], z [B, H, F], q [B, H, F], k [B, H, F], v [B, H, Dv], eps) -> (out, S, z)",
    outputs=(Output("out", "q"), Output("S", "S"), Output("z", "z")),
    make_inputs=_step_inputs,
    reference=_step_reference,
    solution=step,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the sum over the past": "S + k v^T, z + k, then out = S^T q / (z . q + eps).",
        "first token": "From an empty state out is v: the weight cancels.",
        "a token sees itself": "Write first, then read: causal attention includes the token's own key.",
        "a long past": "The old state is kept as it is and added to.",
        "as many values as features": "k v^T has the features as rows, S[f, d] = k[f] v[d].",
        "a query that matches nothing": "0 / (0 + eps) is 0.",
    },
    tolerance=Tolerance(
        2e-5,
        2e-5,
        "products and sums of a few hundred float32 numbers, each rounded to 6e-8 of its size; the state holds "
        "numbers of some hundreds, which the relative part covers.",
    ),
    mutants=mutants(
        _step_mutant,
        {
            "read before write": "The state is read before the token is written: the token does not see "
            "itself, and the first one sees nothing.",
            "state replaced": "The new outer product replaces the state: all earlier tokens are forgotten.",
            "state not written": "S comes back as it was: the token is never written.",
            "written twice": "The token is written into S twice.",
            "values alone": "v alone is added to every row of S. Row f gets k[f] times v.",
            "key sum replaced": "z is the last key alone. It is the sum of all keys so far.",
            "key sum not written": "z comes back as it was: the denominator never grows.",
            "tokens counted": "z counts tokens. It is the sum of their keys.",
            "unnormalised": "The output is not divided by the sum of weights, z . q + eps.",
            "no eps": "0 / 0 is NaN where no key matches: add eps to the denominator.",
        },
    ),
    hints=(
        "Two lines write, one reads, one divides. Which comes first, if a token sees itself?",
        "k v^T for a batch: k[..., :, None] * v[..., None, :] is [B, H, F, Dv]. Reading: q as a row, times S.",
        "S = S + k[..., :, None] * v[..., None, :]\nz = z + k\nnum = (q[..., None, :] @ S)[..., 0, :]\n"
        "den = (q * z).sum(dim=-1, keepdim=True)\nreturn num / (den + eps), S, z",
    ),
)
