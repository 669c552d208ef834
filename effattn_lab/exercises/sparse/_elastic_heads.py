"""Exercises on the heads: two modes and a decision's gradient, the multipliers' step."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.sparse._elastic_router import FROM_SCRATCH

# ---- mix ---------------------------------------------------------------------------------------------------


def mix(
    o_full: torch.Tensor, o_sparse: torch.Tensor, full: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query head in the mode of its KV head; to first order, the loss with a KV head full minus sparse."""
    groups = o_full.shape[1] // full.shape[1]
    r = full.repeat_interleave(groups, dim=1)[..., None, None]
    gain = (do * (o_full - o_sparse)).sum(dim=(2, 3))
    return r * o_full + (1 - r) * o_sparse, gain.unflatten(1, (full.shape[1], groups)).sum(dim=2)


def _mix_reference(
    o_full: torch.Tensor, o_sparse: torch.Tensor, full: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    out, gain = torch.zeros_like(o_full), torch.zeros_like(full)
    groups = o_full.shape[1] // full.shape[1]
    for b in range(o_full.shape[0]):
        for h in range(o_full.shape[1]):
            out[b, h] = o_full[b, h] if full[b, h // groups] == 1 else o_sparse[b, h]
            gain[b, h // groups] += (do[b, h] * (o_full[b, h] - o_sparse[b, h])).sum()
    return out, gain


def _mix_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, heads: int, full: list[list[float]]) -> Case:
        o = [normal(rng, len(full), heads, 7, 4) for _ in range(3)]
        return Case(name, {"o_full": o[0], "o_sparse": o[1], "full": torch.tensor(full), "do": o[2]})

    return [
        case("one mode a head", 3, [[1.0, 0.0, 0.0]]),
        case("prompts differ", 3, [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
        case("query heads share a KV head's mode", 6, [[1.0, 0.0], [0.0, 1.0]]),
        case("all sparse", 4, [[0.0, 0.0]]),
        case("all full", 4, [[1.0, 1.0]]),
    ]


def _mix_mutant(
    fault: str, o_full: torch.Tensor, o_sparse: torch.Tensor, full: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, kv = o_full.shape[1], full.shape[1]
    groups = heads // kv
    modes = full[:1].expand_as(full) if fault == "modes of the first prompt" else full
    tiled = fault == "groups tiled"
    r = modes.repeat(1, groups) if tiled else modes.repeat_interleave(groups, dim=1)
    r = r[..., None, None]
    if fault == "modes swapped":
        r = 1 - r
    gain = (do * (o_full - o_sparse)).sum(dim=(2, 3))
    if fault == "gradient of the full output":
        gain = (do * o_full).sum(dim=(2, 3))
    if fault == "gradient's sign":
        gain = -gain
    if fault == "gradient of full heads only":
        gain = gain * r[..., 0, 0]
    groups_of = gain.unflatten(1, (groups, kv)).transpose(1, 2) if tiled else gain.unflatten(1, (kv, groups))
    d = groups_of.mean(dim=2) if fault == "mean over the group" else groups_of.sum(dim=2)
    if fault == "mean over tokens":
        d = d / o_full.shape[2]
    return r * o_full + (1 - r) * o_sparse, d


MIX = Exercise(
    id="sparse/elastic/mix",
    title="each head in its mode, and a decision's gradient",
    signature="mix(o_full [B, Hq, N, D], o_sparse [B, Hq, N, D], full [B, H], do [B, Hq, N, D]) -> (out [B, Hq, "
    "N, D], d_full [B, H])",
    outputs=(Output("out", "o_full"), Output("d_full", "o_full")),
    make_inputs=_mix_inputs,
    reference=_mix_reference,
    solution=mix,
    from_scratch=FROM_SCRATCH,
    properties={
        "one mode a head": "out is o_full where full is 1, o_sparse where it is 0.",
        "prompts differ": "Each prompt of a batch has its own modes.",
        "query heads share a KV head's mode": "Query heads h G to h G + G - 1 belong to KV head h; their gains "
        "add up.",
        "all sparse": "A sparse head has a gradient as well: what it would gain if it were full.",
        "all full": "With all heads full the output is o_full.",
    },
    tolerance=Tolerance(1e-5, 1e-5, "a sum of 28 float32 products for each head, up to three heads a group."),
    mutants=mutants(
        _mix_mutant,
        {
            "modes swapped": "Head modes swapped: 1 is full here. (The paper's text has it the other way round.)",
            "groups tiled": "repeat pairs query head 1 with KV head 1. Neighbours share: repeat_interleave.",
            "modes of the first prompt": "All prompts follow the modes of the first. (The released kernel does "
            "this.)",
            "gradient of the full output": "Only o_full is in the gradient; switching on one mode switches the "
            "other off: o_full - o_sparse.",
            "gradient's sign": "The gradient has the wrong sign: out = r o_full + (1 - r) o_sparse.",
            "gradient of full heads only": "Sparse heads get no gradient, so none of them can ever become full. "
            "The derivative does not depend on r.",
            "mean over the group": "The gradient is averaged over the group's query heads. Each depends on r: add.",
            "mean over tokens": "The gradient is averaged over tokens. Every token's output depends on r: add.",
        },
    ),
    hints=(
        "Bring full to the query heads, [B, Hq, 1, 1], then blend. For the gradient, differentiate the blend.",
        "d out / d r = o_full - o_sparse. Sum do times that over tokens and channels, then over each group.",
        "r = full.repeat_interleave(groups, 1)[..., None, None]\nout = r * o_full + (1 - r) * o_sparse\n"
        "gain = (do * (o_full - o_sparse)).sum((2, 3))\n"
        "return out, gain.unflatten(1, (full.shape[1], groups)).sum(2)",
    ),
)

# ---- prices ------------------------------------------------------------------------------------------------


def prices(
    lam: torch.Tensor,
    mu: torch.Tensor,
    omega: torch.Tensor,
    task: torch.Tensor,
    target: torch.Tensor,
    rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of gradient ascent on the multipliers of every task."""
    d = omega - target[task]
    zero = torch.zeros_like(lam)
    count = zero.index_add(0, task, torch.ones_like(omega))
    share = 1 / (count.clamp(min=1) * (count > 0).sum())
    up = [share * zero.index_add(0, task, x) for x in (d, d * d)]
    return lam + rate * up[0], mu + rate * up[1]


def _prices_reference(
    lam: torch.Tensor,
    mu: torch.Tensor,
    omega: torch.Tensor,
    task: torch.Tensor,
    target: torch.Tensor,
    rate: float,
) -> tuple[torch.Tensor, ...]:
    """By autograd, from the term of the loss."""
    with torch.enable_grad():
        a, b = (x.detach().requires_grad_(True) for x in (lam, mu))
        terms = []
        for k in task.unique().tolist():
            d = omega[task == k] - target[k]
            terms.append((a[k] * d + b[k] * d * d).mean())
        da, db = torch.autograd.grad(torch.stack(terms).mean(), (a, b))
    return lam + rate * da, mu + rate * db


def _prices_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, omega: list[float], task: list[int], target: list[float], rate: float = 0.5) -> Case:
        k = len(target)
        jitter = 0.02 * torch.from_numpy(rng.uniform(-1, 1, len(omega))).float()
        return Case(
            name,
            {
                "lam": normal(rng, k), "mu": normal(rng, k).abs(), "omega": torch.tensor(omega) + jitter,
                "task": torch.tensor(task), "target": torch.tensor(target), "rate": rate,
            },
        )  # fmt: skip

    return [
        case("too sparse", [0.9, 0.8], [0, 0], [0.5]),
        case("not sparse enough", [0.2, 0.3, 0.4], [0, 0, 0], [0.8], rate=0.3),
        case("a target for each task", [0.9, 0.3, 0.2], [0, 1, 1], [0.4, 0.9], rate=0.3),
        case("tasks in any order", [0.9, 0.2, 0.6, 0.7], [1, 0, 1, 0], [0.4, 0.8], rate=0.05),
        case(
            "tasks count alike, whatever their prompts",
            [0.9, 0.7, 0.8, 0.6, 0.1],
            [0, 0, 0, 0, 1],
            [0.3, 0.5],
        ),
        case("a task that does not occur", [0.6, 0.9], [0, 2], [0.3, 0.5, 0.7]),
    ]


def _prices_mutant(
    fault: str,
    lam: torch.Tensor,
    mu: torch.Tensor,
    omega: torch.Tensor,
    task: torch.Tensor,
    target: torch.Tensor,
    rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    d = omega - target[task]
    if fault == "violation's sign":
        d = -d
    if fault == "first task's target":
        d = omega - target[0]
    zero = torch.zeros_like(lam)
    count = zero.index_add(0, task, torch.ones_like(omega))
    present = (count > 0).sum()
    share = 1 / (count.clamp(min=1) * present)
    if fault == "mean over prompts":
        share = torch.full_like(lam, 1 / len(omega))
    if fault == "sum over tasks":
        share = 1 / count.clamp(min=1)
    if fault == "all tasks counted":
        share = 1 / (count.clamp(min=1) * len(lam))
    if fault == "absent tasks divide by zero":
        share = 1 / (count * present)
    linear = d.abs() if fault == "absolute value" else d
    up = [share * zero.index_add(0, task, x) for x in (linear, d if fault == "not squared" else d * d)]
    if fault == "mu by |d|":
        up[1] = share * zero.index_add(0, task, d.abs())
    if fault == "rate ignored":
        rate = 0.5
    if fault == "squared mean":
        up[1] = up[0] ** 2 * present
    if fault == "multiplied by itself":
        up = [up[0] * lam, up[1] * mu]
    sign = -1 if fault == "descends" else 1
    return lam + sign * rate * up[0], mu + sign * rate * up[1]


PRICES = Exercise(
    id="sparse/elastic/prices",
    title="one step of the multipliers",
    signature="prices(lam [K], mu [K], omega [n], task [n], target [K], rate) -> (lam [K], mu [K])",
    outputs=(Output("lam", "lam"), Output("mu", "mu")),
    make_inputs=_prices_inputs,
    reference=_prices_reference,
    solution=prices,
    from_scratch=FROM_SCRATCH,
    properties={
        "too sparse": "d = omega - target is positive: both multipliers rise, lam by rate d, mu by rate d squared.",
        "not sparse enough": "d is negative: lam falls, mu, whose gradient is d squared, rises.",
        "a target for each task": "Each prompt is measured against the target of its own task.",
        "tasks in any order": "Prompts of one task need not stand together; the rate is an argument.",
        "tasks count alike, whatever their prompts": "First the mean over the prompts of a task, then over the "
        "tasks that occur.",
        "a task that does not occur": "Its multipliers stay as they are, and it does not count among the tasks.",
    },
    tolerance=Tolerance(1e-5, 2e-6, "means of a few float32 numbers below 1, times 0.5."),
    mutants=mutants(
        _prices_mutant,
        {
            "descends": "Lambda steps the wrong way: the model descends, multipliers ascend, or a task that is "
            "too sparse gets cheaper and cheaper.",
            "violation's sign": "d = target - omega: lam then rises where the task is not sparse enough.",
            "absolute value": "|d| in the linear term: lam can only grow. (The released code does this.)",
            "not squared": "The gradient of mu is d squared.",
            "mu by |d|": "The gradient of mu is d squared, not |d|.",
            "rate ignored": "The step does not depend on rate.",
            "squared mean": "The mean of d is squared; what is wanted is the mean of the squares.",
            "mean over prompts": "The mean is over all prompts: a task with many of them outweighs the others.",
            "sum over tasks": "The tasks are added up; the loss takes their mean.",
            "all tasks counted": "Tasks that do not occur are counted in the mean.",
            "absent tasks divide by zero": "A task without prompts divides by zero: NaN or inf goes into its "
            "price.",
            "first task's target": "All prompts are measured against the target of task 0.",
            "multiplied by itself": "The gradient of lam d with respect to lam is d, without lam.",
        },
    ),
    hints=(
        "The term is linear in lam and mu: their gradients are means of d and of d squared.",
        "Sum d by task (index_add), divide by the task's prompts and by the number of tasks that occur; add rate "
        "times it.",
        "d = omega - target[task]\nzero = torch.zeros_like(lam)\ncount = zero.index_add(0, task, "
        "torch.ones_like(omega))\n"
        "share = 1 / (count.clamp(min=1) * (count > 0).sum())\n"
        "return (lam + rate * share * zero.index_add(0, task, d),\n"
        "        mu + rate * share * zero.index_add(0, task, d * d))",
    ),
)
