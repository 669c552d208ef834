"""State tracking, trained: which mixers learn to count modulo two, or to follow three things being exchanged?

``python -m effattn_lab.linear.delta_rule_tracking`` trains every mixer on both tasks with six seeds, at length 32,
and asks them at lengths 32, 64 and 256; ``--write`` keeps the result where the book reads it. About six seconds of
one core a model.

The model is one block of :class:`~effattn_lab.models.tiny.TinyDecoder`: one mixer of width 32 with two heads, no
convolutions, one MLP; nothing but the mixer differs. The claim is of Grazzi et al. 2025: a linear recurrence whose
transitions have no negative eigenvalue cannot solve parity at every length, one with eigenvalues down to -1 can.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effattn_lab._command import positive
from effattn_lab._validate import check_positive_int
from effattn_lab.linear.delta_rule_layer import DeltaRule
from effattn_lab.linear.linear_attention_layer import LinearAttention
from effattn_lab.models.softmax_layer import SoftmaxAttention
from effattn_lab.models.tiny import TinyDecoder
from effattn_lab.tasks.mqar import Batch
from effattn_lab.tasks.state_tracking import parity, permutation_composition

WIDTH, HEADS = 32, 2
TRAINED, ASKED = 32, (32, 64, 256)
TASKS = ("parity", "three things exchanged")
RECORDED = Path(__file__).with_suffix(".json")
_TEST_SEED = 10**9  # no training batch has it

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: SoftmaxAttention(WIDTH, HEADS),
    "linear attention": lambda: LinearAttention(WIDTH, HEADS),
    "delta, beta < 1": lambda: DeltaRule(WIDTH, HEADS, conv_width=0),
    "delta, beta < 2": lambda: DeltaRule(WIDTH, HEADS, conv_width=0, allow_neg_eigval=True),
    "gated delta, beta < 2": lambda: DeltaRule(WIDTH, HEADS, conv_width=0, allow_neg_eigval=True, gated=True),
}


def draw(task: str, examples: int, length: int, seed: int) -> Batch:
    """Words of a task: bits and their parity, or exchanges of two of three things and the order they end in."""
    if task == "parity":
        return parity(examples, length=length, seed=seed)
    return permutation_composition(examples, length=length, n=3, swaps_only=True, seed=seed)


def build(mixer: str, task: str, seed: int = 0) -> TinyDecoder:
    """The untrained model."""
    for name, value, known in (("mixer", mixer, tuple(MIXERS)), ("task", task, TASKS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    torch.manual_seed(seed)
    return TinyDecoder(2 if task == "parity" else 6, WIDTH, [MIXERS[mixer]()], tie_embeddings=False)


def train(
    model: TinyDecoder, task: str, *, steps: int = 300, batch: int = 64, lr: float = 1e-2, seed: int = 0
) -> list[float]:
    """Fit the model in place, fresh words in every step; returns the losses.

    AdamW (weight decay 0.01), 20 steps of warm-up, then a straight line down to 2 % of ``lr``; gradients cut at
    norm 1.
    """
    check_positive_int("steps", steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 20) * max(0.02, 1 - i / steps)
    )
    losses = []
    for i in range(steps):
        loss = model.loss(*draw(task, batch, TRAINED, 100_003 * seed + i))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def last_answers(model: TinyDecoder, task: str, length: int, examples: int = 256) -> float:
    """Share of words whose *last* answer is right: all letters count for it. Chance: 1/2, 1/6."""
    ids, answers = draw(task, examples, length, _TEST_SEED)
    with torch.no_grad():
        logits = model(ids)
        assert isinstance(logits, torch.Tensor)
        return (logits[:, -1].argmax(-1) == answers[:, -1]).double().mean().item()


def rows(
    tasks: Sequence[str] = TASKS,
    mixers: Sequence[str] = tuple(MIXERS),
    seeds: int = 6,
    steps: int = 300,
) -> list[dict[str, Any]]:
    """One dict a task, mixer and seed: the loss at the end and the share of right last answers by length."""
    table = []
    for task in tasks:
        for mixer in mixers:
            for seed in range(seeds):
                model = build(mixer, task, seed)
                losses = train(model, task, steps=steps, seed=seed)
                answers = {str(n): round(last_answers(model, task, n), 4) for n in ASKED}
                row = {
                    "task": task,
                    "mixer": mixer,
                    "seed": seed,
                    "steps": steps,
                    "loss": round(losses[-1], 4),
                }
                table.append({**row, "answers": answers})
                if sys.stderr.isatty():
                    print(f"{task}: {mixer}, seed {seed}", file=sys.stderr)
    return table


def summary(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over seeds, one dict a task and mixer: ``at 32``, ... as "1.00 (0.99 to 1.00)"."""
    out = []
    for task, mixer in dict.fromkeys((row["task"], row["mixer"]) for row in table):
        found = [row["answers"] for row in table if (row["task"], row["mixer"]) == (task, mixer)]
        line: dict[str, Any] = {"task": task, "mixer": mixer, "seeds": len(found)}
        for length in found[0]:
            values = [answers[length] for answers in found]
            mean = sum(values) / len(values)
            line[f"at {length}"] = f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"
        out.append(line)
    return out


def recorded() -> list[dict[str, Any]]:
    """The rows of the last run with ``--write``."""
    found: list[dict[str, Any]] = json.loads(RECORDED.read_text())["rows"]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the summary, keep the rows if asked."""
    from effattn_lab.measure.xray import show

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=6)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {RECORDED.name}")
    chosen = parser.parse_args(arguments)
    table = rows(seeds=chosen.seeds, steps=chosen.steps)
    show(summary(table))
    if chosen.write:
        command = f"python -m {__spec__.name} --seeds {chosen.seeds} --steps {chosen.steps} --write"
        RECORDED.write_text(json.dumps({"command": command, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
