"""Exercises on the weights of ZeroS: the expansion of softmax, the zero-sum weights, the logits without a query."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

FROM_SCRATCH = (
    "effattn_lab.linear.zeros",
    "effattn_lab.linear.zeros_weights",
    "effattn_lab.linear.zeros_state",
    "effattn_lab.linear.zeros_layer",
    "effattn_kernels.zeros",
)


def gates(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Sigmoids of spread-out numbers."""
    return torch.sigmoid(normal(rng, *shape, size=2.0))


# ---- expansion ---------------------------------------------------------------------------------------------


def expand(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(s) as 1/t, delta / t and the rest."""
    t = s.shape[-1]
    zeroth = torch.full_like(s, 1 / t)
    first = (s - s.mean(dim=-1, keepdim=True)) / t
    return zeroth, first, torch.softmax(s, dim=-1) - zeroth - first


def _expand_inputs(rng: np.random.Generator) -> list[Case]:
    return [
        Case("parts of softmax", {"s": normal(rng, 3, 12, size=1.5)}),
        Case("far from zero", {"s": normal(rng, 3, 12) + 20}),
        Case("one key", {"s": normal(rng, 4, 1)}),
        Case("equal scores", {"s": torch.full((2, 8), float(rng.uniform(1, 3)))}),
        Case("huge scores", {"s": normal(rng, 2, 10, size=100.0)}),
        Case("many keys", {"s": normal(rng, 1, 500)}),
    ]


def _expand_mutant(fault: str, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t, p = s.shape[-1], torch.softmax(s, dim=-1)
    delta = s - s.mean(dim=-1, keepdim=True)
    zeroth, first = torch.full_like(s, 1 / t), delta / t
    if fault == "mean not subtracted":
        first = s / t
    if fault == "not divided by t":
        first = delta
    if fault == "from the probabilities":
        first = (p - p.mean(dim=-1, keepdim=True)) / t
    if fault == "largest subtracted":
        first = (s - s.amax(dim=-1, keepdim=True)) / t
    rest = p - zeroth - first
    if fault == "second order only":
        rest = (delta**2 - (delta**2).mean(dim=-1, keepdim=True)) / (2 * t)
    if fault == "first order left in":
        rest = p - zeroth
    if fault == "constant left in":
        rest = p - first
    if fault == "no max subtraction":
        e = torch.exp(s)
        rest = e / e.sum(dim=-1, keepdim=True) - zeroth - first
    return zeroth, first, rest


EXPAND = Exercise(
    id="linear/zeros/expand",
    title="softmax around equal scores",
    signature="expand(s [..., t]) -> (zeroth [..., t], first [..., t], rest [..., t])",
    outputs=(Output("zeroth", "s"), Output("first", "s"), Output("rest", "s")),
    make_inputs=_expand_inputs,
    reference=expand,
    solution=expand,
    from_scratch=FROM_SCRATCH,
    properties={
        "parts of softmax": "1/t, then (s - mean) / t, then whatever is left of softmax(s).",
        "far from zero": "Softmax knows differences only; so must each part. What is subtracted from s?",
        "one key": "softmax of one score is 1, all of it constant: the other two parts are 0.",
        "equal scores": "Equal scores leave nothing but the constant.",
        "huge scores": "torch.softmax subtracts the largest score for you; e^100 does not fit into float32.",
        "many keys": "Every part is of size 1/t.",
    },
    tolerance=Tolerance(
        1e-5,
        2e-6,
        "softmax and a mean of up to 500 numbers in float32, 1e-6 of their size; scores of 100 and 20 are "
        "rounded to 1e-5 and divided by t.",
    ),
    mutants=mutants(
        _expand_mutant,
        {
            "mean not subtracted": "The first order is s / t: the mean of the scores is still in it, so it "
            "does not sum to zero. Subtract it.",
            "not divided by t": "delta is not divided by t: the first order of softmax is delta / t.",
            "from the probabilities": "The first order is taken from the softmax, (p - mean p) / t. It is "
            "(s - mean s) / t, of the scores themselves.",
            "largest subtracted": "The largest score is subtracted, as for a safe softmax. The expansion is "
            "around the mean.",
            "second order only": "The rest is the next Taylor term. All higher orders together are "
            "softmax - 1/t - delta/t, exactly.",
            "first order left in": "The first order is still in the rest: subtract both parts.",
            "constant left in": "The constant 1/t is still in the rest.",
            "no max subtraction": "e^s overflows for scores of 100, and inf / inf is NaN. Use torch.softmax.",
        },
    ),
    hints=(
        "Three lines: a constant, the scores without their mean, and softmax minus both.",
        "The mean is over the last axis, with keepdim=True. Nothing is expanded in the third part.",
        "t = s.shape[-1]\nzeroth = torch.full_like(s, 1 / t)\nfirst = (s - s.mean(-1, keepdim=True)) / t\n"
        "return zeroth, first, torch.softmax(s, -1) - zeroth - first",
    ),
)

# ---- weights -----------------------------------------------------------------------------------------------


def weights(s: torch.Tensor, gate_1: torch.Tensor, gate_h: torch.Tensor) -> torch.Tensor:
    """r_ti of every step t over its keys i <= t."""
    n = s.shape[-1]
    keep = torch.ones(n, n, dtype=torch.bool, device=s.device).tril()
    t = torch.arange(1, n + 1, dtype=s.dtype, device=s.device)[:, None]
    mean = s.cumsum(dim=-1)[..., None] / t  # [B, H, N, 1]
    first = (s[..., None, :] - mean) / t
    p = torch.softmax(s[..., None, :].masked_fill(~keep, float("-inf")), dim=-1)
    r = gate_1[..., None] * first + gate_h[..., None] * (p - 1 / t - first)
    return r.masked_fill(~keep, 0.0)


def _weights_reference(
    s: torch.Tensor, gate_1: torch.Tensor, gate_h: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Row after row."""
    r = torch.zeros(*s.shape, s.shape[-1], dtype=s.dtype)
    for t in range(1, s.shape[-1] + 1):
        _, first, rest = expand(s[..., :t])
        r[..., t - 1, :t] = gate_1[..., t - 1, None] * first + gate_h[..., t - 1, None] * rest
    return (r,)


def _weights_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, *, size: float = 1.5, shift: float = 0.0, one: int | None = None) -> Case:
        shape = (2, 3, n)
        g1, gh = gates(rng, *shape), gates(rng, *shape)
        if one is not None:
            g1, gh = (torch.full(shape, float(one == i)) for i in range(2))
        return Case(name, {"s": normal(rng, *shape, size=size) + shift, "gate_1": g1, "gate_h": gh})

    return [
        case("each row sums to zero", 13),
        case("the first token", 1),
        case("first order alone", 9, one=0),
        case("higher orders alone", 9, one=1),
        case("far from zero", 13, shift=5.0),
        case("huge logits", 9, size=60.0),
    ]


def _weights_mutant(fault: str, s: torch.Tensor, gate_1: torch.Tensor, gate_h: torch.Tensor) -> torch.Tensor:
    n = s.shape[-1]
    keep = torch.ones(n, n, dtype=torch.bool).tril(-1 if fault == "mask too strict" else 0)
    if fault == "leaky mask":
        keep = torch.ones(n, n, dtype=torch.bool)
    t = torch.arange(1, n + 1, dtype=s.dtype)[:, None]
    t = {
        "divided by N": torch.full_like(t, n),
        "leaky mask": torch.full_like(t, n),
        "counted from 0": t - 1,
    }.get(fault, t)
    rows = s[..., None, :]
    p = torch.softmax(rows.masked_fill(~keep, float("-inf")), dim=-1)
    if fault == "mask too strict":
        p = p.nan_to_num()
    mean = (
        s.mean(dim=-1)[..., None, None]
        if fault in ("mean of the whole sequence", "leaky mask")
        else s.cumsum(-1)[..., None] / t
    )
    first = (rows - (0.0 if fault == "mean not subtracted" else mean)) / t
    if fault == "first order from the probabilities":
        first = (p - 1 / t) / t
    rest = p - 1 / t - first
    if fault == "constant left in":
        rest = p - first
    if fault == "gates swapped":
        gate_1, gate_h = gate_h, gate_1
    g1, gh = (g[..., None, :] if fault == "gates of the key" else g[..., None] for g in (gate_1, gate_h))
    if fault == "first order left in":
        rest = p - 1 / t
    r = g1 * first + gh * rest
    if fault != "not zeroed after the query":
        r = r.masked_fill(~keep, 0.0)
    if fault == "popular formula":
        e = torch.exp(rows).masked_fill(~keep, 0.0)
        centred = (e - e.sum(-1, keepdim=True) / t).masked_fill(~keep, 0.0)
        return centred / centred.sum(-1, keepdim=True)
    if fault == "normalised afterwards":
        return r / r.sum(-1, keepdim=True)
    return r


WEIGHTS = Exercise(
    id="linear/zeros/weights",
    title="weights that sum to zero",
    signature="weights(s [B, H, N], gate_1 [B, H, N], gate_h [B, H, N]) -> r [B, H, N, N]",
    outputs=(Output("r", "s"),),
    make_inputs=_weights_inputs,
    reference=_weights_reference,
    solution=weights,
    from_scratch=FROM_SCRATCH,
    properties={
        "each row sums to zero": "Row t: gate_1[t] times the first order and gate_h[t] times the rest, of the "
        "keys up to t.",
        "the first token": "One key: softmax is 1, 1/t is 1, delta is 0. The weight is 0, and not NaN.",
        "first order alone": "gate_h = 0 leaves gate_1 delta / t.",
        "higher orders alone": "gate_1 = 0 leaves softmax - 1/t - delta / t.",
        "far from zero": "The mean of row t is that of s_1 .. s_t.",
        "huge logits": "Mask with -inf before torch.softmax, which subtracts the largest.",
    },
    tolerance=Tolerance(
        1e-5,
        3e-6,
        "a softmax, a running mean and a difference in float32; logits of 60 times a few make first-order "
        "weights of 100, whose rounding the relative part covers.",
    ),
    loose={
        "huge logits": Tolerance(
            1e-5, 5e-5, "a mean of numbers of size 200 is off by 1e-5, and some differences are near 0."
        )
    },
    mutants=mutants(
        _weights_mutant,
        {
            "leaky mask": "Rows see later tokens: row t counts and weighs keys 1 .. t only.",
            "mask too strict": "A token does not see itself: keep the diagonal.",
            "mean not subtracted": "The first order is s / t. Without its mean off, the row does not sum to zero.",
            "mean of the whole sequence": "The mean is over all N tokens, later ones included: row t needs that "
            "of s_1 .. s_t.",
            "divided by N": "1/N stands where 1/t belongs: row t has t keys.",
            "counted from 0": "t counts from 0: the first row divides by zero. Row t, the first being 1, has t "
            "keys.",
            "first order from the probabilities": "The first order is taken from the softmax, not from the "
            "logits. (The published fallback code does this, and is another function.)",
            "constant left in": "The constant 1/t is still in the higher orders: rows sum to gate_h.",
            "first order left in": "The first order is still in the higher orders: softmax - 1/t - delta / t.",
            "not zeroed after the query": "Entries after the query are not 0: softmax gives them 0, but 1/t and "
            "delta / t do not. Zero them at the end.",
            "gates swapped": "gate_1 and gate_h have changed places.",
            "gates of the key": "The gates are taken along the keys. They belong to the query: the row.",
            "popular formula": "(e - mean) divided by its own sum: that sum is 0. Normalise first (softmax), "
            "then subtract; nothing is divided by the sum of the final weights.",
            "normalised afterwards": "The rows are divided by their sum, which is zero: what is left is rounding "
            "noise. Nothing has to be normalised.",
        },
    ),
    hints=(
        "Step 1 for every row t at once: keys up to t, the mean of the first t logits, 1/t.",
        "keep = tril of ones. Softmax of s with -inf where not kept. Means: s.cumsum(-1) / t, as a column. "
        "Zero what is not kept at the end.",
        "first = (s[..., None, :] - (s.cumsum(-1)[..., None] / t)) / t\n"
        "p = torch.softmax(s[..., None, :].masked_fill(~keep, float('-inf')), -1)\n"
        "r = gate_1[..., None] * first + gate_h[..., None] * (p - 1 / t - first)\nreturn r.masked_fill(~keep, 0.0)",
    ),
)

# ---- logits ------------------------------------------------------------------------------------------------


def logits(u: torch.Tensor, mu: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """-u_i . mean_i / sqrt(D), the mean being that of u_1 .. u_i and e^tau imaginary tokens at mu."""
    prior = torch.exp(tau)[:, None, None]  # [H, 1, 1]
    count = prior + torch.arange(1, u.shape[2] + 1, device=u.device, dtype=u.dtype)[:, None]
    mean = (prior * mu[:, None] + u.cumsum(dim=2)) / count
    return -(u * mean).sum(dim=-1) / u.shape[-1] ** 0.5


def _logits_reference(u: torch.Tensor, mu: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = torch.zeros(u.shape[:3], dtype=u.dtype)
    for i in range(u.shape[2]):
        total = torch.exp(tau)[:, None] * mu + u[:, :, : i + 1].sum(dim=2)
        mean = total / (torch.exp(tau) + i + 1)[:, None]
        out[:, :, i] = -torch.einsum("bhd,bhd->bh", u[:, :, i], mean) / u.shape[-1] ** 0.5
    return (out,)


def _logits_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, d: int = 8, *, mu: float = 1.0, tau: float | None = None) -> Case:
        t = normal(rng, 3) if tau is None else torch.full((3,), tau)
        return Case(name, {"u": normal(rng, 2, 3, n, d), "mu": normal(rng, 3, d, size=mu), "tau": t})

    return [
        case("against the running mean", 12),
        case("the first token", 1),
        case("a strong prior", 12, tau=4.0),
        case("hardly a prior", 12, tau=-20.0, mu=30.0),
        case("many dimensions", 6, d=64),
        case("a long sequence", 300),
    ]


def _logits_mutant(fault: str, u: torch.Tensor, mu: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    n, d = u.shape[2:]
    prior = tau[:, None, None] if fault == "tau not exponentiated" else torch.exp(tau)[:, None, None]
    steps = torch.arange(1, n + 1, dtype=u.dtype)[:, None]
    total, count = u.cumsum(dim=2), steps
    if fault == "token left out":
        total, count = total - u, steps - 1
    if fault == "mean of the whole sequence":
        total, count = u.sum(dim=2, keepdim=True), torch.full_like(steps, n)
    if fault == "prior left out of the count":
        mean = (prior * mu[:, None] + total) / count
    elif fault == "no prior":
        mean = total / count
    elif fault == "not divided":
        mean = prior * mu[:, None] + total
    elif fault == "mu not weighted":
        mean = (mu[:, None] + total) / (prior + count)
    else:
        mean = (prior * mu[:, None] + total) / (prior + count)
    s = -(u * mean).sum(dim=-1)
    if fault == "sign":
        s = -s
    return s if fault == "not scaled" else s / (d if fault == "divided by D" else d**0.5)


LOGITS = Exercise(
    id="linear/zeros/logits",
    title="logits that need no query",
    signature="logits(u [B, H, N, D], mu [H, D], tau [H]) -> s [B, H, N]",
    outputs=(Output("s", "u"),),
    make_inputs=_logits_inputs,
    reference=_logits_reference,
    solution=logits,
    from_scratch=FROM_SCRATCH,
    properties={
        "against the running mean": "mean_i = (e^tau mu + u_1 + .. + u_i) / (e^tau + i); s_i = -u_i . mean_i / "
        "sqrt(D).",
        "the first token": "The mean of the first token: e^tau parts of mu, one part of u_1.",
        "a strong prior": "With e^4 = 55 imaginary tokens at mu the mean hardly moves.",
        "hardly a prior": "With e^-20 imaginary tokens mu has no weight, however large it is.",
        "many dimensions": "The inner product is divided by the root of D.",
        "a long sequence": "The mean of token i is over i tokens, whatever comes later.",
    },
    tolerance=Tolerance(
        2e-5,
        2e-5,
        "a running sum of up to 300 float32 numbers and an inner product of 64: 1e-6 of their size.",
    ),
    mutants=mutants(
        _logits_mutant,
        {
            "token left out": "The mean ends before the token. It includes it: the mean of u_1 .. u_i.",
            "mean of the whole sequence": "The mean is over the whole sequence: a logit knows what comes later, "
            "and so does everything made of it.",
            "prior left out of the count": "mu is added with weight e^tau, but the sum is divided by i alone. "
            "Divide by e^tau + i.",
            "no prior": "The e^tau imaginary tokens at mu are missing.",
            "mu not weighted": "mu counts as one token. It has the weight e^tau.",
            "tau not exponentiated": "The weight of mu is e^tau, not tau.",
            "not divided": "The running sum is not divided: a mean is needed.",
            "sign": "The sign is missing: a token that points away from the mean should get the larger logit.",
            "not scaled": "The inner product is not divided by the root of D.",
            "divided by D": "The inner product is divided by D, not by its root.",
        },
    ),
    hints=(
        "A running mean is a running sum over a count; here both begin with e^tau.",
        "u.cumsum(dim=2) is the sum, torch.arange(1, N + 1)[:, None] the count; prior = torch.exp(tau)[:, None, "
        "None] has the shape to be added.",
        "prior = torch.exp(tau)[:, None, None]\ncount = prior + torch.arange(1, u.shape[2] + 1)[:, None]\n"
        "mean = (prior * mu[:, None] + u.cumsum(2)) / count\nreturn -(u * mean).sum(-1) / u.shape[-1] ** 0.5",
    ),
)
