"""Exercises on the router: the mean key of both ends, the decision, the hard choice with a soft gradient."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

FROM_SCRATCH = (
    "effattn_lab.sparse.elastic",
    "effattn_lab.sparse.elastic_layer",
    "effattn_lab.sparse.elastic_experiment",
    "effattn_kernels.elastic",
)

# ---- pool --------------------------------------------------------------------------------------------------


def pool(k: torch.Tensor, c: int) -> torch.Tensor:
    """Mean of the first c and the last c keys; a key that is in both counts twice."""
    return torch.cat([k[:, :, :c], k[:, :, -c:]], dim=2).mean(dim=2)


def _pool_reference(k: torch.Tensor, c: int) -> tuple[torch.Tensor, ...]:
    n = k.shape[2]
    tokens = [*range(min(c, n)), *range(max(0, n - c), n)]
    total = torch.zeros_like(k[:, :, 0])
    for t in tokens:
        total = total + k[:, :, t]
    return (total / len(tokens),)


def _pool_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, c: int) -> Case:
        return Case(name, {"k": normal(rng, 2, 3, n, 8) + normal(rng, 2, 1, n, 1), "c": c})

    return [
        case("both ends", 40, 5),
        case("a long middle", 400, 3),
        case("the ends overlap", 7, 5),
        case("shorter than one end", 3, 5),
        case("one token", 1, 5),
    ]


def _pool_mutant(fault: str, k: torch.Tensor, c: int) -> torch.Tensor:
    n = k.shape[2]
    first, last = k[:, :, :c], k[:, :, -c:]
    if fault == "first tokens only":
        return first.mean(dim=2)
    if fault == "last tokens only":
        return last.mean(dim=2)
    if fault == "whole prompt":
        return k.mean(dim=2)
    if fault == "overlap once":
        return k[:, :, [t for t in range(n) if t < c or t >= n - c]].mean(dim=2)
    if fault == "divided by 2c":
        return (first.sum(dim=2) + last.sum(dim=2)) / (2 * c)
    if fault == "heads pooled":
        return (
            torch.cat([first, last], dim=2).mean(dim=(1, 2), keepdim=True)[:, :, 0].expand(*k.shape[:2], -1)
        )
    return torch.cat([first, last], dim=2).sum(dim=2)  # not divided


POOL = Exercise(
    id="sparse/elastic/pool",
    title="the mean key of both ends",
    signature="pool(k [B, H, N, D], c) -> [B, H, D]",
    outputs=(Output("mean", "k"),),
    make_inputs=_pool_inputs,
    reference=_pool_reference,
    solution=pool,
    from_scratch=FROM_SCRATCH,
    properties={
        "both ends": "The mean of the first c keys and the last c, for each head.",
        "a long middle": "What lies between the ends is not in the mean.",
        "the ends overlap": "With N below 2c some keys lie in both ends; they count twice.",
        "shorter than one end": "With N below c both ends are the whole prompt. k[:, :, :c] may be longer than N "
        "asks.",
        "one token": "One token is both ends.",
    },
    tolerance=Tolerance(1e-5, 2e-6, "a mean of at most ten float32 numbers of size 1."),
    mutants=mutants(
        _pool_mutant,
        {
            "first tokens only": "Only the first c keys are in the mean; the question stands at the other end.",
            "last tokens only": "Only the last c keys are in the mean; the instruction stands at the beginning.",
            "whole prompt": "All keys are in the mean: the middle of a long prompt drowns its ends.",
            "overlap once": "A key that lies in both ends counts once here. Join the two ends, then take the mean.",
            "divided by 2c": "The sum is divided by 2c, but a short prompt has fewer keys at its ends.",
            "heads pooled": "The heads are averaged too: each needs a vector of its own, or all decide alike.",
            "not divided": "This is the sum of the keys, not their mean.",
        },
    ),
    hints=(
        "Two slices along the axis of tokens, joined, then a mean over that axis.",
        "Negative slices stop at the beginning by themselves: k[:, :, -c:] of a shorter prompt is all of it.",
        "return torch.cat([k[:, :, :c], k[:, :, -c:]], dim=2).mean(dim=2)",
    ),
)

# ---- decide ------------------------------------------------------------------------------------------------


def decide(
    k: torch.Tensor,
    k_rope: torch.Tensor,
    c: int,
    w1: torch.Tensor,
    w2: torch.Tensor,
    noise: torch.Tensor,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 1 of two logits is full; noise in training only."""
    mean = torch.cat([k[:, :, :c], k[:, :, -c:]], dim=2).mean(dim=2)
    logits = torch.nn.functional.silu(mean @ w1) @ w2
    asked = logits + noise if training else logits
    return (asked[..., 1] > asked[..., 0]).to(k.dtype), logits


def _decide_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, n: int, training: bool, noise: float) -> Case:
        k = normal(rng, 3, 6, n, 8) + normal(rng, 3, 6, 1, 8)
        turn = torch.linspace(0, 6, n)[:, None]
        a, b = k[..., :4], k[..., 4:]
        rope = torch.cat([a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()], dim=-1)
        gumbel = -torch.log(-torch.log(torch.from_numpy(rng.uniform(1e-4, 1 - 1e-4, (3, 6, 2))).float()))
        return Case(
            name,
            {
                "k": k, "k_rope": rope, "c": 4, "w1": normal(rng, 8, 16), "w2": normal(rng, 16, 2, size=0.2),
                "noise": noise * gumbel, "training": training,
            },
        )  # fmt: skip

    return [
        case("one decision a head and prompt", 30, False, 0.0),
        case("no noise at inference", 30, False, 6.0),
        case("noise in training", 30, True, 6.0),
        case("a short prompt", 5, True, 1.0),
    ]


def _decide_mutant(
    fault: str,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    c: int,
    w1: torch.Tensor,
    w2: torch.Tensor,
    noise: torch.Tensor,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = k_rope if fault == "keys after RoPE" else k
    mean = torch.cat([keys[:, :, :c], keys[:, :, -c:]], dim=2).mean(dim=2)
    if fault == "whole prompt":
        mean = keys.mean(dim=2)
    if fault == "heads averaged":
        mean = mean.mean(dim=1, keepdim=True).expand_as(mean)
    if fault == "prompts averaged":
        mean = mean.mean(dim=0, keepdim=True).expand_as(mean)
    act = torch.relu if fault == "relu" else torch.nn.functional.silu
    logits = act(mean @ w1) @ w2
    noisy = {"noise at inference": True, "no noise in training": False}.get(fault, training)
    asked = logits + noise if noisy else logits
    if fault == "noise subtracted" and training:
        asked = logits - noise
    if fault == "noise in the logits" and training:
        logits = asked
    full = asked[..., 1] > asked[..., 0]
    return (~full if fault == "modes swapped" else full).to(k.dtype), logits


DECIDE = Exercise(
    id="sparse/elastic/decide",
    title="the router's decision",
    signature="decide(k [B, H, N, D], k_rope [B, H, N, D], c, w1 [D, F], w2 [F, 2], noise [B, H, 2], training) -> "
    "(full [B, H], logits [B, H, 2])",
    outputs=(Output("full", "k"), Output("logits", "k")),
    make_inputs=_decide_inputs,
    reference=decide,
    solution=decide,
    from_scratch=FROM_SCRATCH,
    properties={
        "one decision a head and prompt": "Mean key of each head of each prompt, silu(mean W1) W2; class 1 is "
        "full. A comparison gives bool: bring it to k's dtype.",
        "no noise at inference": "With training=False the larger logit wins, whatever the noise says.",
        "noise in training": "With training=True the noise is added to the logits before they are compared; the "
        "logits that are returned are without it.",
        "a short prompt": "The ends may overlap.",
    },
    tolerance=Tolerance(1e-5, 1e-5, "two small float32 products; decisions are 0 or 1 and have no rounding."),
    mutants=mutants(
        _decide_mutant,
        {
            "keys after RoPE": "The keys are those after RoPE: their mean tells where the tokens stand, not what "
            "they are. Use k.",
            "noise at inference": "Noise at inference: the same prompt would get other modes at each call. Only "
            "training draws.",
            "no noise in training": "No noise in training: without it the choice is no sample of softmax(logits), "
            "and the other mode is never tried.",
            "modes swapped": "The modes are swapped: class 1 is full, so full is 1 where the second logit is "
            "larger.",
            "heads averaged": "The heads are averaged before the MLP: they all get one decision.",
            "prompts averaged": "The prompts of the batch are averaged: each has a decision of its own.",
            "whole prompt": "The mean is over the whole prompt; the router reads both ends only.",
            "noise subtracted": "The noise is subtracted. Gumbel noise is not symmetric: it has to be added.",
            "noise in the logits": "The returned logits contain the noise. They are what the router thinks, "
            "without it.",
            "relu": "The activation is a ReLU here; the router has SiLU, x sigmoid(x).",
        },
    ),
    hints=(
        "pool, a product, silu, a product; then compare two numbers.",
        "asked = logits + noise if training else logits. full is 1 where asked[..., 1] is the larger.",
        "logits = F.silu(pool(k, c) @ w1) @ w2\nasked = logits + noise if training else logits\n"
        "return (asked[..., 1] > asked[..., 0]).to(k.dtype), logits",
    ),
)

# ---- choose ------------------------------------------------------------------------------------------------


def choose(
    z: torch.Tensor, noise: torch.Tensor, tau: float, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hard choice, and the straight-through gradient of sum(w r) with respect to z."""
    soft = torch.softmax((z + noise) / tau, dim=-1)
    hard = torch.nn.functional.one_hot(soft.argmax(dim=-1), z.shape[-1]).to(z.dtype)
    return hard, soft * (w - (soft * w).sum(dim=-1, keepdim=True)) / tau


def _choose_reference(
    z: torch.Tensor, noise: torch.Tensor, tau: float, w: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """By autograd."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        soft = torch.softmax((z + noise) / tau, dim=-1)
        hard = torch.nn.functional.one_hot((z + noise).argmax(dim=-1), z.shape[-1]).to(z.dtype)
        r = hard + soft - soft.detach()
        (dz,) = torch.autograd.grad((r * w).sum(), z)
    return hard, dz


def _choose_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, tau: float, *, size: float = 1.0, noise: float = 1.0, equal: bool = False) -> Case:
        w = normal(rng, 4, 5, 2)
        return Case(
            name,
            {
                "z": normal(rng, 4, 5, 2, size=size), "noise": normal(rng, 4, 5, 2, size=noise), "tau": tau,
                "w": w[..., :1].expand(4, 5, 2).clone() if equal else w,
            },
        )  # fmt: skip

    return [
        case("a hard choice", 1.0),
        case("a soft gradient", 0.5),
        case("temperature", 3.0),
        case("both classes worth the same", 1.0, equal=True),
        case("strong noise", 1.0, noise=5.0),
        case("a sure router", 0.7, size=200.0),
        case("a tie", 0.7, size=0.0, noise=0.0),
    ]


def _choose_mutant(
    fault: str, z: torch.Tensor, noise: torch.Tensor, tau: float, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    seen = z if fault in ("no noise", "noise left out of the gradient") else z + noise
    if fault == "exp by hand":
        e = torch.exp(seen / tau)
        soft = e / e.sum(dim=-1, keepdim=True)
    else:
        soft = torch.softmax(seen if fault == "no temperature" else seen / tau, dim=-1)
    chosen = z if fault == "no noise" else z + noise
    hard = torch.nn.functional.one_hot(chosen.argmax(dim=-1), z.shape[-1]).to(z.dtype)
    by = hard if fault == "gradient at the corner" else soft
    dz = by * (w - (by * w).sum(dim=-1, keepdim=True))
    if fault == "gradient of a copy":
        dz = w.clone()
        return hard, dz
    if fault == "mean not subtracted":
        dz = soft * w
    if fault not in ("temperature left out of the gradient", "no temperature"):
        dz = dz / tau
    if fault == "gradient's sign":
        dz = -dz
    if fault == "two at a tie":
        hard = (chosen == chosen.amax(dim=-1, keepdim=True)).to(z.dtype)
    return (soft if fault == "soft forward" else hard), dz


CHOOSE = Exercise(
    id="sparse/elastic/choose",
    title="hard forward, soft backward",
    signature="choose(z [..., 2], noise [..., 2], tau, w [..., 2]) -> (r [..., 2], dz [..., 2])",
    outputs=(Output("r", "z"), Output("dz", "z")),
    make_inputs=_choose_inputs,
    reference=_choose_reference,
    solution=choose,
    from_scratch=FROM_SCRATCH,
    properties={
        "a hard choice": "r is one-hot: 1 where z + noise is largest, 0 elsewhere.",
        "a soft gradient": "dz is the gradient of sum(w soft), soft = softmax((z + noise) / tau).",
        "temperature": "tau divides inside the softmax, and once more in its derivative. It moves no choice.",
        "both classes worth the same": "If both classes are worth the same, nothing is to be gained: dz is 0.",
        "strong noise": "The noise is in the choice and in the soft twin.",
        "a tie": "Equal logits: one class is chosen all the same, the first.",
        "a sure router": "Large logits: torch.softmax subtracts the largest for you.",
    },
    tolerance=Tolerance(1e-4, 2e-6, "a softmax of two numbers in float32, and one cancellation w - mean."),
    mutants=mutants(
        _choose_mutant,
        {
            "soft forward": "The forward value is the softmax itself: a blend of two modes that no inference will "
            "ever compute. It has to be 0 or 1.",
            "no noise": "The noise is left out: this is always the same choice, not a draw from softmax(z).",
            "noise left out of the gradient": "The choice is noisy, its soft twin is not: use z + noise in both.",
            "no temperature": "The temperature is missing everywhere.",
            "temperature left out of the gradient": "The derivative of (z + noise) / tau with respect to z is 1 / "
            "tau.",
            "gradient at the corner": "The derivative is taken at the one-hot vector, where softmax has none: it "
            "is 0 everywhere. Take it at soft.",
            "gradient of a copy": "w goes through unchanged, as if r were z. The softmax's derivative is missing.",
            "mean not subtracted": "soft w / tau lacks the second term of softmax's derivative: subtract the "
            "weighted mean of w.",
            "gradient's sign": "dz has the wrong sign: it is the gradient, not the step of descent.",
            "two at a tie": "At a tie both classes are 1: the choice has to be one-hot.",
            "exp by hand": "e^200 does not fit into float32: inf / inf is NaN. Use torch.softmax.",
        },
    ),
    hints=(
        "Two parts that share (z + noise) / tau: its argmax, and the derivative of its softmax.",
        "For s = softmax(x) the gradient of sum(w s) is s (w - sum(w s)); x is (z + noise) / tau.",
        "soft = torch.softmax((z + noise) / tau, -1)\nr = F.one_hot(soft.argmax(-1), 2).to(z.dtype)\n"
        "dz = soft * (w - (soft * w).sum(-1, keepdim=True)) / tau\nreturn r, dz",
    ),
)
