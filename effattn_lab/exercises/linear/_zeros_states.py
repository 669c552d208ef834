"""Exercises on the linear form of ZeroS: the angle, and one token with three states."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._zeros_weights import FROM_SCRATCH, gates
from effattn_lab.exercises.making import mutants, normal

# ---- the angle ---------------------------------------------------------------------------------------------


def angle(r: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """sum_i r_ti cos(q_t, k_i) v_i."""
    q = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (r * (q @ k.transpose(-1, -2))) @ v


def _angle_reference(
    r: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (angle(r, q, k, v),)


def _angle_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int = 9, d: int = 8, *, size: float = 1.0) -> Case:
        shape = (2, 3, n, d)
        r = torch.tril(normal(rng, 2, 3, n, n) / n)
        k = normal(rng, *shape) * size * torch.exp(normal(rng, 2, 3, n, 1))
        return Case(name, {"r": r, "q": normal(rng, *shape, size=3.0), "k": k, "v": normal(rng, 2, 3, n, 6)})

    zero = case("a vector without direction")
    zero.kwargs["k"][:, :, 2] = 0.0  # type: ignore[index]
    zero.kwargs["q"][:, :, 4] = 0.0  # type: ignore[index]
    return [
        case("only directions count"),
        case("one token", 1),
        case("as many tokens as dimensions", 8),
        case("long vectors", size=1e4),
        zero,
    ]


def _angle_mutant(
    fault: str, r: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    qn = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    kn = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if fault == "not normalised":
        qn, kn = q, k
    if fault == "scaled instead":
        qn, kn = q / q.shape[-1] ** 0.5, k
    if fault == "only the queries":
        kn = k
    if fault == "only the keys":
        qn = q
    if fault == "over the tokens":
        qn, kn = (x / x.norm(dim=-2, keepdim=True).clamp(min=1e-12) for x in (q, k))
    if fault == "squared length":
        kn = k / k.square().sum(dim=-1, keepdim=True).clamp(min=1e-24)
    if fault == "no floor":
        kn = k / k.norm(dim=-1, keepdim=True)
    cosine = qn @ kn.transpose(-1, -2)
    if fault == "cosine softmaxed":
        cosine = torch.softmax(cosine, dim=-1)
    if fault == "angle cut at 90 degrees":
        cosine = cosine.clamp(min=0)
    w = r + cosine if fault == "added" else r * cosine
    if fault == "divided by the cosines":
        w = w / cosine.sum(dim=-1, keepdim=True)
    return w @ v


ANGLE = Exercise(
    id="linear/zeros/angle",
    title="the angle between query and key",
    signature="angle(r [B, H, N, N], q [B, H, N, D], k [B, H, N, D], v [B, H, N, Dv]) -> out [B, H, N, Dv]",
    outputs=(Output("out", "q"),),
    make_inputs=_angle_inputs,
    reference=_angle_reference,
    solution=angle,
    from_scratch=FROM_SCRATCH,
    properties={
        "only directions count": "q and k are divided by their lengths first; then r times q k^T, times v.",
        "one token": "One token, one cosine.",
        "as many tokens as dimensions": "With N = D no shape stops you from a wrong axis.",
        "long vectors": "A key ten thousand times as long has the same cosine.",
        "a vector without direction": "0 / 0 is NaN: keep the length from being 0, with clamp(min=1e-12).",
    },
    tolerance=Tolerance(
        1e-5, 1e-5, "inner products of 8 numbers and sums of 9 in float32: 1e-6 of numbers of size 1."
    ),
    mutants=mutants(
        _angle_mutant,
        {
            "not normalised": "The inner product is taken of q and k as they came: long keys weigh more. Divide "
            "both by their lengths.",
            "scaled instead": "q . k / sqrt(D) is softmax attention's score. Here it is the cosine: divide by "
            "the lengths.",
            "only the queries": "Only the queries have length 1: the keys' lengths are still in it.",
            "only the keys": "Only the keys have length 1: the queries' lengths are still in it.",
            "over the tokens": "The length is taken over the tokens. It is over the last axis, D.",
            "squared length": "The keys are divided by the square of their length: take the root.",
            "no floor": "A key of zeros has length 0, and 0 / 0 is NaN: clamp the length.",
            "cosine softmaxed": "The cosine goes through a softmax: it may be negative here, and must stay so.",
            "angle cut at 90 degrees": "Negative cosines are cut off. They turn a value's sign around.",
            "added": "r and the cosine are added. They are multiplied.",
            "divided by the cosines": "The row is divided by the sum of its cosines, which may be 0. There is no "
            "denominator.",
        },
    ),
    hints=(
        "A cosine is an inner product of vectors of length 1.",
        "x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) has length 1, and 0 stays 0.",
        "q, k = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k))\n"
        "return (r * (q @ k.transpose(-1, -2))) @ v",
    ),
)

# ---- one token ---------------------------------------------------------------------------------------------

State = tuple[torch.Tensor, ...]


def step(
    F: torch.Tensor, G: torch.Tensor, H: torch.Tensor, E: torch.Tensor, P: torch.Tensor, before: int,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor,
    gate_1: torch.Tensor, gate_h: torch.Tensor,
) -> State:  # fmt: skip
    """Write the token into the three sums, then read them with the step's coefficients."""
    t = before + 1
    kv = k[..., :, None] * v[..., None, :]
    e = torch.exp(s)
    F, G, H = F + e[..., None, None] * kv, G + s[..., None, None] * kv, H + kv
    E, P = E + e, P + s
    alpha, beta = gate_h / E, (gate_1 - gate_h) / t
    gamma = -(beta * P + gate_h) / t
    mix = alpha[..., None, None] * F + beta[..., None, None] * G + gamma[..., None, None] * H
    return (q[..., None, :] @ mix)[..., 0, :], F, G, H, E, P


def step_reference(
    F: torch.Tensor, G: torch.Tensor, H: torch.Tensor, E: torch.Tensor, P: torch.Tensor, before: int,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor,
    gate_1: torch.Tensor, gate_h: torch.Tensor,
) -> State:  # fmt: skip
    kv = torch.einsum("bhd,bhe->bhde", k, v)
    F, G, H = F + torch.einsum("bh,bhde->bhde", s.exp(), kv), G + torch.einsum("bh,bhde->bhde", s, kv), H + kv
    E, P, n = E + s.exp(), P + s, before + 1
    f, g, h = (torch.einsum("bhd,bhde->bhe", q, x) for x in (F, G, H))
    higher = f / E[..., None] - h / n - (g - (P / n)[..., None] * h) / n
    first = (g - (P / n)[..., None] * h) / n
    return gate_1[..., None] * first + gate_h[..., None] * higher, F, G, H, E, P


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _past(rng: np.random.Generator, n: int, d: int, dv: int, shift: float = 0.0) -> dict[str, torch.Tensor]:
    k, v = unit(normal(rng, 2, 3, n, d)), normal(rng, 2, 3, n, dv)
    s = normal(rng, 2, 3, n) + shift
    kt = k.transpose(-1, -2)
    return {
        "F": (kt * s.exp()[..., None, :]) @ v, "G": (kt * s[..., None, :]) @ v, "H": kt @ v,
        "E": s.exp().sum(-1), "P": s.sum(-1),
    }  # fmt: skip


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, past: int, d: int = 8, dv: int = 6, *, shift: float = 0.0, one: int | None = None
    ) -> Case:
        g1, gh = gates(rng, 2, 3), gates(rng, 2, 3)
        if one is not None:
            g1, gh = (torch.full((2, 3), float(one == i)) for i in range(2))
        token = {
            "q": unit(normal(rng, 2, 3, d)), "k": unit(normal(rng, 2, 3, d)), "v": normal(rng, 2, 3, dv),
            "s": normal(rng, 2, 3) + shift, "gate_1": g1, "gate_h": gh,
        }  # fmt: skip
        return Case(name, {**_past(rng, past, d, dv, shift), "before": past, **token})

    return [
        case("equals the sum over the past", 5),
        case("the first token", 0),
        case("the second token", 1),
        case("first order alone", 7, one=0),
        case("higher orders alone", 7, one=1),
        case("only differences of logits count", 9, shift=2.0),
        case("as many values as dimensions", 6, d=8, dv=8),
    ]


def _step_mutant(
    fault: str, F: torch.Tensor, G: torch.Tensor, H: torch.Tensor, E: torch.Tensor, P: torch.Tensor, before: int,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor,
    gate_1: torch.Tensor, gate_h: torch.Tensor,
) -> State:  # fmt: skip
    kv = k[..., :, None] * v[..., None, :]
    e, n = torch.exp(s), before + 1
    old = (F, G, H, E, P)
    F, G, H = F + e[..., None, None] * kv, G + s[..., None, None] * kv, H + kv
    E, P = E + e, P + s
    if fault == "F without the exponential":
        F = old[0] + s[..., None, None] * kv
    if fault == "G without its logit":
        G = old[1] + kv
    if fault == "states replaced":
        F, G, H = e[..., None, None] * kv, s[..., None, None] * kv, kv
    if fault == "E not added up":
        E = e
    if fault == "gates swapped":
        gate_1, gate_h = gate_h, gate_1
    rF, rG, rH, rE, rP = old if fault == "read before write" else (F, G, H, E, P)
    if fault in ("read before write", "first token divides by zero"):
        n = before
    alpha = gate_h if fault == "alpha without E" else gate_h / rE
    beta = (gate_1 - gate_h) / n
    if fault == "beta without the difference":
        beta = gate_1 / n
    gamma = -(beta * rP + gate_h) / n
    if fault == "mean not subtracted":
        gamma = -gate_h / n
    if fault == "constant left in":
        gamma = -beta * rP / n
    mix = alpha[..., None, None] * rF + beta[..., None, None] * rG + gamma[..., None, None] * rH
    out = (q[..., None, :] @ mix)[..., 0, :]
    if fault == "divided by its own sum":
        out = out / (alpha * rE + beta * rP + gamma * n)[..., None]
    return out, F, G, H, E, P


STEP = Exercise(
    id="linear/zeros/step",
    title="one token, three states",
    signature=(
        "step(F, G, H [B, Hn, D, Dv], E, P [B, Hn], before, q, k [B, Hn, D], v [B, Hn, Dv], s, gate_1, gate_h "
        "[B, Hn]) -> (out [B, Hn, Dv], F, G, H, E, P)"
    ),
    outputs=(
        Output("out", "q"),
        Output("F", "F"),
        Output("G", "G"),
        Output("H", "H"),
        Output("E", "E"),
        Output("P", "P"),
    ),
    make_inputs=_step_inputs,
    reference=step_reference,
    solution=step,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the sum over the past": "Add e^s k v^T, s k v^T and k v^T; add e^s and s. Then q times alpha F + "
        "beta G + gamma H.",
        "the first token": "Write first, and count the token: t = before + 1. The three parts cancel to 0.",
        "the second token": "Two tokens: the weights are r and -r.",
        "first order alone": "With gate_h = 0: beta = gate_1 / t, gamma = -beta P / t.",
        "higher orders alone": "With gate_1 = 0: alpha = gate_h / E, and beta is negative.",
        "only differences of logits count": "gamma takes the mean of the logits off again.",
        "as many values as dimensions": "k v^T has the dimensions of k as its rows.",
    },
    tolerance=Tolerance(
        2e-5,
        1e-5,
        "sums of ten products and the difference of three terms of size 1 in float32: a few 1e-7 each; at a "
        "logit of 4 the sums with e^s are of size 50, which the relative part covers.",
    ),
    mutants=mutants(
        _step_mutant,
        {
            "read before write": "The sums are read before the token is written: it does not see itself, and "
            "the first one divides by zero.",
            "first token divides by zero": "`before` counts the tokens before this one. The step t, over which "
            "means are taken, is before + 1: the first token would divide by zero.",
            "gates swapped": "gate_1 and gate_h have changed places.",
            "mean not subtracted": "gamma lacks -beta P / t, the mean of the logits.",
            "constant left in": "gamma lacks -gate_h / t: softmax's constant is still there.",
            "beta without the difference": "beta is gate_1 / t. The higher orders contain -delta / t too: "
            "(gate_1 - gate_h) / t.",
            "alpha without E": "alpha is not divided by E: e^s alone is no softmax.",
            "F without the exponential": "F is the sum of e^s k v^T; s itself is added.",
            "G without its logit": "G is the sum of s k v^T; the logit is missing.",
            "states replaced": "The new products replace the sums: all earlier tokens are forgotten.",
            "E not added up": "E is the last e^s. It is the sum over all tokens.",
            "divided by its own sum": "The weights are divided by their sum, which is 0.",
        },
    ),
    hints=(
        "Write five sums, count the token, compute three coefficients, read once.",
        "r_i = alpha e^(s_i) + beta s_i + gamma: collect from gate_1 (s_i - P/t) / t + gate_h (e^(s_i) / E - 1/t - "
        "(s_i - P/t) / t) what stands with e^(s_i), with s_i, and alone.",
        "t = before + 1\nalpha, beta = gate_h / E, (gate_1 - gate_h) / t\ngamma = -(beta * P + gate_h) / t\n"
        "mix = alpha[..., None, None] * F + beta[..., None, None] * G + gamma[..., None, None] * H\n"
        "out = (q[..., None, :] @ mix)[..., 0, :]",
    ),
)
