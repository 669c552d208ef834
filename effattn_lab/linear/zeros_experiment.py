"""What zero-sum weights buy and what they cost, on tasks that one layer can or cannot do.

``python -m effattn_lab.linear.zeros_experiment --write`` (a quarter of an hour on one core) runs every mixer on every
task with three seeds and keeps the record beside this module, ``zeros_experiment.json``.

A sequence has 16 tokens: a vector ``c_i`` of 8 random numbers each, and three flags. One token is marked A, another
B, the last asks.

* ``contrast``: the target is ``c_A - c_B``. A head whose weights are a distribution can blend the two, or pick one:
  if its weights do not look at the numbers, the best is to attend to A, which leaves the variance of ``c_B``, 1.
* ``contrast_1``: only the first number of that vector. Here weights *can* look: with a score of ``flag + small * c``
  the weight of A is a sigmoid of ``c_A - c_B``, and a value "I am A" reads it out. One number, not eight.
* ``mean``: the target is ``4 * mean_i c_i``. A distribution does it by listening to all alike. Weights that sum to
  zero cannot see what all tokens have in common; ZeroS's cosine can break the sum, if training finds out how.

Targets have known variances, 2, 2 and 1: the error of always answering 0. One layer of width 32, a linear map in
front and one behind, no MLP, no residual, no norm in the layer, no positions. Recall is another study:
:mod:`effattn_lab.linear.recall`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from effattn_lab._command import positive
from effattn_lab._validate import check_positive_int

RECORD = Path(__file__).with_name("zeros_experiment.json")
WIDTH, TOKENS, NUMBERS = 32, 16, 8
#: Step whose training loss each run records: a test runs the first steps again, so results belong to the code.
EARLY = 20


class Entry(NamedTuple):
    """A mixer of the study: how pictures call it, and what builds it."""

    label: str
    build: Callable[[], nn.Module]


def _softmax(heads: int) -> nn.Module:
    from effattn_lab.models.softmax_layer import SoftmaxAttention

    return SoftmaxAttention(WIDTH, heads, positions=False)


def _linear(**options: Any) -> nn.Module:
    from effattn_lab.linear.linear_attention_layer import LinearAttention

    return LinearAttention(WIDTH, 1, chunk_size=TOKENS, **options)


def _zeros(**options: Any) -> nn.Module:
    from effattn_lab.linear.zeros_layer import ZeroS

    return ZeroS(WIDTH, 1, rope=False, norm=False, length_scale="linear", chunk_size=TOKENS, **options)


def _zeros_sm() -> nn.Module:
    from effattn_lab.linear.zeros_layer import ZeroSSoftmax

    return ZeroSSoftmax(WIDTH, 1, rope=False, norm=False)


MIXERS: dict[str, Entry] = {
    "softmax": Entry("softmax, 1 head", lambda: _softmax(1)),
    "softmax_2": Entry("softmax, 2 heads", lambda: _softmax(2)),
    "linear": Entry("linear, elu + 1, 1 head", lambda: _linear()),
    "signed": Entry(
        "linear, signed, no denominator, 1 head", lambda: _linear(normalize=False, feature_map="identity")
    ),
    "zeros": Entry("ZeroS, 1 head", lambda: _zeros()),
    "zeros_kept": Entry("ZeroS, 1/t kept, 1 head", lambda: _zeros(zero_order=True)),
    "zeros_sm": Entry("ZeroS-SM, 1 head", lambda: _zeros_sm()),
}
TASKS = ("contrast", "contrast_1", "mean")


class Reader(nn.Module):
    """``[B, 16, 11] -> [B, numbers]``: a linear map, one mixer, a linear map; the last token answers."""

    def __init__(self, mixer: nn.Module, numbers: int) -> None:
        super().__init__()
        self.into = nn.Linear(NUMBERS + 3, WIDTH)
        self.mixer = mixer
        self.out = nn.Linear(WIDTH, numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.out(self.mixer(self.into(x))[:, -1])
        return answer


def draw(task: str, examples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [n, 16, 11]`` and targets ``[n, 8]``, or ``[n, 1]`` for contrast_1; see the head of this module."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    check_positive_int("examples", examples)
    x = torch.zeros(examples, TOKENS, NUMBERS + 3)
    x[..., :NUMBERS] = torch.randn(examples, TOKENS, NUMBERS, generator=generator)
    places = torch.rand(examples, TOKENS - 1, generator=generator).argsort(-1)[
        :, :2
    ]  # two places, not the last
    rows = torch.arange(examples)
    x[rows, places[:, 0], NUMBERS] = 1
    x[rows, places[:, 1], NUMBERS + 1] = 1
    x[:, -1, NUMBERS + 2] = 1
    if task == "mean":
        return x, 4 * x[..., :NUMBERS].mean(1)
    target = (x[rows, places[:, 0]] - x[rows, places[:, 1]])[:, :NUMBERS]
    return x, target[:, :1] if task == "contrast_1" else target


def train(task: str, mixer: str, seed: int, steps: int = 1500, batch: int = 64) -> dict[str, Any]:
    """One run: Adam, 3e-3 and for the last third 5e-4; mean squared error on 4,096 examples never seen.

    Args:
        task: a name in `TASKS`.
        mixer: a name in `MIXERS`.
        seed: of weights and data.
        steps: of training. Default 1,500.
        batch: fresh examples a step. Default 64.

    Returns:
        task, mixer, seed, steps, error (a number), early_loss.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {mixer!r}")
    check_positive_int("steps", steps)
    torch.manual_seed(seed)
    model = Reader(MIXERS[mixer].build(), 1 if task == "contrast_1" else NUMBERS)
    generator = torch.Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    early = float("nan")
    for step in range(steps):
        if step == 2 * steps // 3:
            optimizer.param_groups[0]["lr"] = 5e-4
        x, target = draw(task, batch, generator)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == EARLY:
            early = loss.item()
    with torch.no_grad():
        x, target = draw(task, 4096, torch.Generator().manual_seed(99))
        error = (model(x) - target).square().mean().item()
    return {
        "task": task, "mixer": mixer, "seed": seed, "steps": steps, "error": round(error, 4),
        "early_loss": round(early, 4),
    }  # fmt: skip


def recorded() -> list[dict[str, Any]]:
    """The runs that the book shows, kept beside this module."""
    found: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a mixer: its label, and for each task the median error, the least and the largest over the seeds."""
    table = []
    for name, entry in MIXERS.items():
        row: dict[str, Any] = {"mixer": name, "label": entry.label}
        for task in TASKS:
            errors = [r["error"] for r in runs if r["mixer"] == name and r["task"] == task]
            if errors:
                row[task] = (statistics.median(errors), min(errors), max(errors))
        table.append(row)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print it; ``--write`` keeps the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--write", action="store_true", help=f"keep the record in {RECORD.name}")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = []
    for task in TASKS:
        for mixer in MIXERS:
            for seed in range(chosen.seeds):
                runs.append(train(task, mixer, seed, chosen.steps))
                print(runs[-1], flush=True)
    for row in summary(runs):
        print(row)
    if chosen.write:
        lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
        RECORD.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
