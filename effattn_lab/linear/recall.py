"""What a fixed state can recall: tiny models with each mixer, trained on MQAR at several state sizes.

``python -m effattn_lab.linear.recall --out FILE`` trains them all and keeps every run in FILE as it ends; called
again with the same file it goes on where it stopped. ``--task`` chooses another recipe: five times the steps, a task
that overwrites, or real text.

The models follow the recall study of Based (Arora et al. 2024): a gated short convolution first, then one layer of
the mixer under test, no positions. All have the same number of parameters (the MLP after the mixer absorbs the
difference), the same data in the same order, and the same steps. Three learning rates are tried for each mixer, at
its middle size and on a seed of their own; the best is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effattn_lab._atomic import write_atomic
from effattn_lab._command import bad_values, file_to_write, positive
from effattn_lab._validate import check_positive_int
from effattn_lab.linear.mixers import MIXERS, available, build_mixer
from effattn_lab.linear.recall_tasks import LEFT_OUT, RECIPES, Recipe, batches, byte_text, held_out, replaced
from effattn_lab.models.conv_mixer import GatedConvolution
from effattn_lab.models.tiny import TinyDecoder, count_parameters, match_parameters, state_elements

RECORD = Path(__file__).with_name("recall.json")

#: Seed of the runs that choose a learning rate; no result is taken from them.
TUNING_SEED = 1000
#: Step whose training loss each run records: a test runs the first steps again, so results belong to the code.
EARLY = 25


def model(mixer: str, size: int, recipe: Recipe) -> TinyDecoder:
    """The model of one run. Weights come from torch's global generator."""

    def build(mlp_width: int) -> TinyDecoder:
        # MQAR asks for no order; in a text, and where the last value counts, layers get the positions they have.
        positions = recipe.data != "mqar"
        mixers = [
            build_mixer(mixer, recipe.width, size, recipe.heads, positions=positions)
            for _ in range(recipe.layers)
        ]
        if recipe.data != "language":
            # The convolution's block has no MLP, as in Based.
            mixers = [GatedConvolution(recipe.width), *mixers]
            widths = [0] + [mlp_width] * recipe.layers
            return TinyDecoder(recipe.vocab_size, recipe.width, mixers, mlp_width=widths)
        return TinyDecoder(recipe.vocab_size, recipe.width, mixers, mlp_width=mlp_width, conv=4)

    with torch.random.fork_rng():
        mlp_width = match_parameters(build, recipe.parameters)
    return build(mlp_width)


def train(mixer: str, size: int, rate: float, seed: int, recipe: Recipe) -> dict[str, Any]:
    """One run from the first weight to the result.

    Args:
        mixer: a name of :func:`effattn_lab.linear.mixers.available`.
        size: dimension of one head's keys.
        rate: highest learning rate: linear warm-up, then a cosine down to zero.
        seed: of the weights and of the data.
        recipe: see :class:`Recipe`.

    Returns:
        a row of the record: what was run, ``state`` (numbers kept a sequence by one mixer, at the recipe's length),
        ``parameters``, ``early`` (training loss at step 25), ``steps``, what :func:`result` gives, ``seconds`` of
        this process.
    """
    check_positive_int("size", size)
    torch.manual_seed(seed)
    net = model(mixer, size, recipe)
    groups = {decay: [p for p in net.parameters() if decays(p) == decay] for decay in (True, False)}
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": recipe.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    begun, early, step = time.process_time(), math.nan, 0
    data, stop = batches(recipe, seed), held_out(recipe, "stop")
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, recipe)
        loss = net.loss(*next(data))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimizer.step()
        if step == EARLY:
            early = loss.item()
        if step % 50 == 0 and recipe.stop_at < 1 and net.accuracy(*stop) >= recipe.stop_at:
            break
    row = {
        "task": recipe.task,
        "mixer": mixer,
        "size": size,
        "rate": rate,
        "seed": seed,
        "state": state_elements(net.mixers[-1], recipe.width, recipe.length),
        "parameters": count_parameters(net),
        "early": round(early, 5),
        "steps": step,
    }
    row.update(result(net, recipe))
    row["seconds"] = round(time.process_time() - begun, 1)
    return row


def decays(parameter: torch.nn.Parameter) -> bool:
    """Matrices decay; norms, biases and what a layer marks (Mamba's A, steps) do not."""
    return parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False)


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the highest learning rate at a step: up in a line, then down half a cosine to 0."""
    if step <= recipe.warmup:
        return step / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def result(net: TinyDecoder, recipe: Recipe) -> dict[str, float]:
    """What a trained model is judged by, on data it has not seen.

    ``accuracy``, or on text ``loss`` (nats a byte). Overwriting also: ``stale``, the share of answers that name the
    value before the last, and ``once``, the accuracy where each key was written only once.
    """
    test = held_out(recipe, "test")
    if recipe.data != "language":
        found = {"accuracy": net.accuracy(*test)}
        if recipe.data == "overwrite":
            found["stale"] = net.accuracy(test.inputs, replaced(test, recipe.pairs[-1]))
            found["once"] = net.accuracy(*held_out(recipe, "test", writes=1))
        return {k: round(v, 5) for k, v in found.items()}
    losses = [net.loss(x, y).item() for x, y in zip(test.inputs.split(16), test.targets.split(16))]
    return {"loss": round(float(np.mean(losses)), 5)}


def better(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether row a ended better than row b; of two that recall all, the one that took fewer steps."""
    if "loss" in a:
        return bool(a["loss"] < b["loss"])
    ranks = [(r["accuracy"] >= 0.99, -r["steps"] if r["accuracy"] >= 0.99 else r["accuracy"]) for r in (a, b)]
    return bool(ranks[0] > ranks[1])


def chosen_rate(record: dict[str, Any], task: str, mixer: str) -> float:
    """The rate whose tuning run ended best, of equal ones the first; a recipe's only one; without any, MQAR's."""
    rates = record["recipes"][task]["rates"]
    if not rates:
        return chosen_rate(record, "mqar", mixer)
    if len(rates) == 1:
        return float(rates[0])
    best: dict[str, Any] | None = None
    for row in record["rows"]:
        if (row["task"], row["mixer"], row["seed"]) == (task, mixer, TUNING_SEED):
            best = row if best is None or better(row, best) else best
    if best is None:
        raise ValueError(f"record: expected a tuning run of {mixer} for {task}, got none")
    return float(best["rate"])


class Study:
    """All runs of a task, in an order that gives a whole (if thinner) picture early; each is saved as it ends."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self.record: dict[str, Any] = {"recipes": {}, "versions": {}, "rows": []}
        if path.is_file():
            self.record = _read(path)
        kept = self.record["recipes"].setdefault(recipe.task, asdict(recipe))
        if json.loads(json.dumps(asdict(recipe))) != json.loads(json.dumps(kept)):
            raise ValueError(
                f"--out: {path} holds runs of another recipe for {recipe.task}; give another file"
            )
        self.record["versions"] = versions()

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rows of this task with these values."""
        wanted["task"] = self.recipe.task
        return [r for r in self.record["rows"] if all(r[k] == v for k, v in wanted.items())]

    def row(self, mixer: str, size: int, rate: float, seed: int) -> dict[str, Any]:
        """The row of one run: the one recorded, or a new one."""
        for row in self.find(mixer=mixer, size=size, rate=rate, seed=seed):
            return row
        row = train(mixer, size, rate, seed, self.recipe)
        self.record["rows"].append(row)
        rows = ",\n  ".join(json.dumps(r) for r in self.record["rows"])
        head = {k: v for k, v in self.record.items() if k != "rows"}
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
        write_atomic(self.path, text.encode())
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        return row

    def rate(self, mixer: str) -> float:
        """The learning rate of a mixer: the better of those tried at its middle size on the tuning seed."""
        for rate in self.recipe.rates if len(self.recipe.rates) > 1 else ():
            self.row(mixer, MIXERS[mixer].sizes[0], rate, TUNING_SEED)
        return chosen_rate(self.record, self.recipe.task, mixer)

    def run(self, mixers: list[str], sizes: list[int] | None = None) -> None:
        """Every mixer, seed by seed: in the recipe "mqar" at every size, in the others at its middle size."""
        for seed in range(self.recipe.seeds):
            for mixer in mixers:
                own = MIXERS[mixer].sizes
                for size in sizes or (own if self.recipe.task == "mqar" else own[:1]):
                    self.row(mixer, size, self.rate(mixer), seed)


def _read(path: Path) -> dict[str, Any]:
    """The record that a study goes on with."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--out: expected a record of this study in {path}, got no JSON: {error}") from None
    if not isinstance(found, dict) or not {"recipes", "rows"} <= found.keys():
        raise ValueError(
            f"--out: expected a record of this study in {path}, got other JSON; give another file"
        )
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on besides the recipe."""
    import effattn_lab

    return {
        "effattn_lab": effattn_lab.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "text": byte_text().sha256[:16],
    }


def recorded() -> dict[str, Any]:
    """The runs that the book shows, kept beside this module."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def summary(record: dict[str, Any], task: str = "mqar") -> list[dict[str, Any]]:
    """One entry for each mixer and size, in the table's order and by state size; only runs at the chosen rate.

    Returns:
        ``mixer``, ``size``, ``state``, ``parameters``, ``rate``, ``values`` (accuracies or losses, one a seed, in the
        order of the seeds), ``mean``, ``low``, ``high``; of overwriting also the means ``stale`` and ``once``.
    """
    value = "loss" if task.startswith("language") else "accuracy"
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["task"] != task or row["seed"] == TUNING_SEED:
            continue
        if row["rate"] == chosen_rate(record, task, row["mixer"]):
            groups.setdefault((row["mixer"], row["size"]), []).append(row)
    order = {name: i for i, name in enumerate(MIXERS)}
    found = []
    for (mixer, size), rows in sorted(groups.items(), key=lambda g: (order[g[0][0]], g[1][0]["state"])):
        values = [r[value] for r in sorted(rows, key=lambda r: r["seed"])]
        entry = {"mixer": mixer, "size": size, "values": values}
        entry.update({k: rows[0][k] for k in ("state", "parameters", "rate")})
        entry.update(mean=float(np.mean(values)), low=min(values), high=max(values))
        entry.update({k: float(np.mean([r[k] for r in rows])) for k in ("stale", "once") if k in rows[0]})
        found.append(entry)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the record lacks."""
    parser = argparse.ArgumentParser(prog="python -m effattn_lab.linear.recall", description=__doc__)
    parser.add_argument(
        "--out", type=file_to_write, required=True, metavar="FILE", help="the record, JSON; kept up to date"
    )
    parser.add_argument("--task", choices=list(RECIPES), default="mqar")
    parser.add_argument(
        "--mixers", nargs="+", choices=available(), default=None, help="instead of the task's own"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=positive, default=None, help="instead of each mixer's own list"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with bad_values(parser):
        study = Study(args.out, RECIPES[args.task])
    own = [name for name in available() if name not in LEFT_OUT.get(args.task, ())]
    study.run(args.mixers or own, args.sizes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
