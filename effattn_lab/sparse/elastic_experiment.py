"""Does a router learn which task needs full heads? A small model, trained and frozen; routers trained around it.

``python -m effattn_lab.sparse.elastic_experiment --out FILE`` (minutes for each of three seeds, one thread) goes on
with what FILE holds; the run that the book shows is kept beside this module.

For each seed: two layers of four heads learn both tasks of :mod:`effattn_lab.sparse.elastic_tasks` with full
attention and are frozen. Then a router a layer is trained three times: signed and absolute multipliers with a
target for each task, and signed ones with the same target for both. Beside them stand all heads full, all sparse, and
*every* static mask of the eight heads. A router has two honest rivals: the best fixed choice of as many sparse heads,
and a table with one fixed choice a task. The masks are chosen on prompts of their own and judged, as all the rest, on
others.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from effattn_lab._atomic import write_atomic
from effattn_lab._command import bad_values, file_to_write, natural
from effattn_lab.models.tiny import TinyDecoder
from effattn_lab.sparse.elastic import SparsityMultipliers, model_sparsity
from effattn_lab.sparse.elastic_backbone import (
    EARLY,
    Recipe,
    cosine,
    load_backbone,
    save_backbone,
    train_backbone,
)
from effattn_lab.sparse.elastic_layer import ElasticAttention
from effattn_lab.sparse.elastic_tasks import ASKED, TASKS, mixed, prompts
from effattn_lab.tasks._draw import IGNORE

__all__ = [
    "EARLY",
    "Recipe",
    "best_mask",
    "bits",
    "correct",
    "flat",
    "load_backbone",
    "make_elastic",
    "recorded",
    "run_seed",
    "save_backbone",
    "static_table",
    "summary",
    "train_backbone",
    "train_routers",
]
RECORD = Path(__file__).with_suffix(".json")
#: Router variants: targets of (recall, local), and whether the linear term is signed.
VARIANTS: dict[str, tuple[tuple[float, float], bool]] = {
    "signed": ((0.5, 1.0), True),
    "absolute": ((0.5, 1.0), False),
    "one target": ((0.75, 0.75), True),
}


def make_elastic(model: TinyDecoder, recipe: Recipe, seed: int) -> list[ElasticAttention]:
    """Freeze the model and put a fresh router around each attention layer (in the place of an earlier one)."""
    model.requires_grad_(False)
    torch.manual_seed(2_000 + seed)
    found = []
    for module in model.blocks:
        block = cast(Any, module)
        inner = block.mixer.attention if isinstance(block.mixer, ElasticAttention) else block.mixer
        block.mixer = ElasticAttention(
            inner, boundary=recipe.boundary, sinks=recipe.sinks, window=recipe.window
        )
        found.append(block.mixer)
    return found


def train_routers(
    model: TinyDecoder,
    recipe: Recipe,
    seed: int,
    variant: str,
    stop: int | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a router a layer by the Lagrangian; the model stays as it is. ``watch`` gets every entry of the trace.

    Returns:
        early_loss (language-model loss), and every tenth step ``sparsity`` (recall, local), ``linear`` and
        ``square`` multipliers.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    layers = make_elastic(model, recipe, seed)
    targets, signed = VARIANTS[variant]
    prices = SparsityMultipliers(list(targets), signed=signed, start=recipe.multiplier_start)
    routers = [p for layer in layers for p in layer.router.parameters()]
    for p in routers:
        p.requires_grad_(True)
    down = torch.optim.AdamW(routers, recipe.router_rate, betas=(0.9, 0.95), weight_decay=0.1)
    # No decay for multipliers: it would be a force of its own towards 0.
    up = torch.optim.Adam(prices.parameters(), recipe.multiplier_rate, betas=(0.9, 0.95), maximize=True)
    data, noise = (torch.Generator().manual_seed(n + seed) for n in (3_000, 4_000))
    trace: list[dict[str, Any]] = []
    early = math.nan
    for step in range(recipe.router_steps if stop is None else stop):
        warmth = min(1.0, step / (0.6 * recipe.router_steps))
        down.param_groups[0]["lr"] = recipe.router_rate * min(1.0, (step + 1) / (0.2 * recipe.router_steps))
        for layer in layers:
            layer.train()
            layer.temperature, layer.generator = 1 + (recipe.warmest - 1) * cosine(warmth), noise
        batch, task = mixed(recipe.batch, data)
        lm = model.loss(*batch)
        omega = model_sparsity(torch.stack([cast(Any, layer.route).full for layer in layers]))
        loss = lm + prices(omega, task)
        for optimizer in (down, up):
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(routers, 5.0)
        down.step()
        up.step()
        if step == EARLY:
            early = lm.item()
        if (step + 1) % 10 == 0:
            means = [omega[task == t].mean().item() for t in range(len(TASKS))]
            trace.append(
                {"step": step + 1, "sparsity": _short(means), "linear": _short(prices.linear.tolist()),
                 "square": _short(prices.square.tolist())}
            )  # fmt: skip
            if watch is not None:
                watch(trace[-1])
    return {"early_loss": round(early, 4), "trace": trace}


@torch.inference_mode()
def correct(model: TinyDecoder, task: str, examples: int, seed: int) -> tuple[int, list[list[float]] | None]:
    """Right answers of ``8 examples``; if routed, each head's share of prompts in full mode ``[layers][heads]``."""
    model.eval()
    ids, targets = prompts(task, examples, torch.Generator().manual_seed(seed))
    logits = cast(torch.Tensor, model(ids))[:, -ASKED:]
    asked = targets[:, -ASKED:]
    assert bool((asked != IGNORE).all())
    routes = [getattr(mixer, "route", None) for mixer in model.mixers]
    full = None if None in routes else [_short(cast(Any, r).full.mean(0).tolist()) for r in routes]
    return int((logits.argmax(-1) == asked).sum()), full


@torch.inference_mode()
def static_table(model: TinyDecoder, recipe: Recipe, seed: int) -> dict[str, list[list[int]]]:
    """Right answers (recall, local) of every mask, on the prompts to "choose" by and on those to "test" with.

    Mask ``m``: head ``h`` of layer ``l`` is full where bit ``l * heads + h`` is set. 0 is all sparse, the last all
    full. Both modes of a layer are computed once for each mask of the layers before it, then mixed.
    """
    layers = make_elastic(model, recipe, seed)
    table: dict[str, list[list[int]]] = {}
    for part in ("choose", "test"):
        columns = []
        for task in TASKS:
            ids, targets = prompts(task, getattr(recipe, part), torch.Generator().manual_seed(PARTS[part]))
            right = [0] * 2 ** (recipe.layers * recipe.heads)

            def visit(n: int, x: torch.Tensor, mask: int, asked: torch.Tensor, right: list[int]) -> None:
                if n == recipe.layers:
                    right[mask] = int((model.head(model.norm(x)).argmax(-1) == asked).sum())
                    return
                block = cast(Any, model.blocks[n])
                modes = layers[n].both(block.norm(x))
                if n + 1 == recipe.layers:  # nobody reads what stands before the last positions
                    x, modes = x[:, -ASKED:], (modes[0][:, :, -ASKED:], modes[1][:, :, -ASKED:])
                for own in range(2**recipe.heads):
                    full = bits(own, recipe)[0, :, None, None] > 0
                    y = block.feed(x + layers[n].output(torch.where(full, *modes)))
                    visit(n + 1, y, mask | own << n * recipe.heads, asked, right)

            visit(0, model.embed(ids), 0, targets[:, -ASKED:], right)
            columns.append(right)
        table[part] = [list(pair) for pair in zip(*columns)]
    return table


#: Seeds of the prompts, the same for every model.
PARTS = {"choose": 90_001, "test": 90_002}


def bits(mask: int, recipe: Recipe) -> torch.Tensor:
    """``[layers, heads]``, 1 for full."""
    flat = [mask >> i & 1 for i in range(recipe.layers * recipe.heads)]
    return torch.tensor(flat, dtype=torch.float32).view(recipe.layers, recipe.heads)


def run_seed(recipe: Recipe, seed: int, backbone: Path | None = None) -> dict[str, Any]:
    """Everything for one seed: the row of the record. ``backbone``: where to keep the trained model."""
    begin = time.perf_counter()
    model, early = train_backbone(recipe, seed)
    if backbone is not None:
        save_backbone(model, backbone)
    row: dict[str, Any] = {"seed": seed, "early_loss": round(early, 4), "static": {}, "routed": {}}
    row["full"] = [correct(model, task, recipe.test, PARTS["test"])[0] for task in TASKS]
    row["static"] = static_table(model, recipe, seed)
    for variant in VARIANTS:
        result = train_routers(model, recipe, seed, variant)
        for task in TASKS:
            right, heads = correct(model, task, recipe.test, PARTS["test"])
            sparsity = 1 - sum(map(sum, cast(Any, heads))) / (recipe.layers * recipe.heads)
            result[task] = {"right": right, "sparsity": round(sparsity, 4), "full": heads}
        row["routed"][variant] = result
    row["seconds"] = round(time.perf_counter() - begin)
    return row


def best_mask(row: dict[str, Any], recipe: Recipe, sparse_heads: int, task: str | None = None) -> int:
    """The mask of that many sparse heads with the most right answers on the prompts to choose by.

    Args:
        task: count the answers of this task alone. Default: of both.
    """
    heads = recipe.layers * recipe.heads
    if not 0 <= sparse_heads <= heads:
        raise ValueError(f"sparse_heads: expected 0 to {heads}, got {sparse_heads}")
    rows = row["static"]["choose"]
    score = (lambda m: sum(rows[m])) if task is None else (lambda m: rows[m][TASKS.index(task)])
    fit = [m for m in range(2**heads) if heads - m.bit_count() == sparse_heads]
    return max(fit, key=score)


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a seed and variant: accuracies, sparsities, and the static rivals.

    ``rival`` is the best static mask that is *not sparser* than the router's mean over both tasks, with its accuracy
    in either. ``own`` has for each task the best mask for that task alone, with the whole number of sparse heads that
    is nearest to the router's mean there.
    """
    recipe = Recipe(**record["recipe"])
    of, heads = ASKED * recipe.test, recipe.layers * recipe.heads
    found = []
    for row in sorted(record["rows"], key=lambda r: r["seed"]):
        test = row["static"]["test"]
        for variant, routed in row["routed"].items():
            omega = [routed[t]["sparsity"] for t in TASKS]
            k = math.floor(heads * sum(omega) / 2 + 1e-6)
            mask = best_mask(row, recipe, k)
            entry = {
                "seed": row["seed"],
                "variant": variant,
                "sparsity": omega,
                "mean_sparsity": sum(omega) / 2,
                "accuracy": [routed[t]["right"] / of for t in TASKS],
                "full": [n / of for n in row["full"]],
                "sparse": [n / of for n in test[0]],
                "rival": {"sparsity": k / heads, "mask": mask, "accuracy": [n / of for n in test[mask]]},
                "own": [],
            }
            for i, task in enumerate(TASKS):
                k = round(heads * omega[i])
                mask = best_mask(row, recipe, k, task)
                entry["own"].append({"sparsity": k / heads, "mask": mask, "accuracy": test[mask][i] / of})
            found.append(entry)
    return found


def flat(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same in single numbers, for tables and the page of claims."""
    rows = []
    for e in entries:
        row = {"seed": e["seed"], "variant": e["variant"], "mean_sparsity": round(e["mean_sparsity"], 4)}
        for i, task in enumerate(TASKS):
            row[f"sparsity_{task}"] = e["sparsity"][i]
            for name in ("full", "sparse"):
                row[f"{name}_{task}"] = round(e[name][i], 4)
            row[f"routed_{task}"] = round(e["accuracy"][i], 4)
            row[f"rival_{task}"] = round(e["rival"]["accuracy"][i], 4)
            row[f"own_{task}"] = round(e["own"][i]["accuracy"], 4)
            row[f"own_sparsity_{task}"] = e["own"][i]["sparsity"]
        row["rival_sparsity"] = e["rival"]["sparsity"]
        rows.append(row)
    return rows


def recorded() -> dict[str, Any]:
    """The run that the book shows, kept beside this module."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on besides recipe and seed."""
    import effattn_lab

    return {
        "effattn_lab": effattn_lab.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _short(values: Sequence[float]) -> list[float]:
    return [round(v, 4) for v in values]


def _read(path: Path, recipe: Recipe) -> dict[str, Any]:
    """The record to go on with, or a new one."""
    fresh = {"recipe": asdict(recipe), "versions": versions(), "rows": []}
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        return fresh
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--out: expected a record of this study in {path}, got no JSON: {error}") from None
    if not isinstance(found, dict) or not {"recipe", "rows"} <= found.keys():
        raise ValueError(f"--out: expected a record of this study in {path}, got other JSON")
    if found["recipe"] != fresh["recipe"]:
        raise ValueError(f"--out: {path} holds runs of another recipe; give another file")
    return cast(dict[str, Any], found)


def _write(record: dict[str, Any], path: Path) -> None:
    """With results computed from the rows; one line a row."""
    record["results"] = flat(summary(record))
    lists = ("results", "rows")
    text = json.dumps({k: v for k, v in record.items() if k not in lists}, indent=1)[:-2]
    for name in lists:
        lines = ",\n  ".join(json.dumps(r) for r in record[name])
        text += f',\n "{name}": [\n  {lines}\n ]'
    write_atomic(path, f"{text}\n}}\n".encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds that the record lacks; each is saved as it ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=file_to_write, required=True, metavar="FILE", help="the record, JSON")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--backbone", type=file_to_write, metavar="FILE", help="keep the model of seed 0, NPZ"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = Recipe()
    with bad_values(parser):
        record = _read(chosen.out, recipe)
    for seed in chosen.seeds:
        if any(row["seed"] == seed for row in record["rows"]):
            continue
        record["versions"] = versions()
        record["rows"].append(run_seed(recipe, seed, chosen.backbone if seed == 0 else None))
        _write(record, chosen.out)
        print(f"seed {seed}: {record['rows'][-1]['seconds']} s", flush=True)
    if record.get("results") != flat(summary(record)):  # the runs are there, what is made of them has changed
        _write(record, chosen.out)
    for row in record["results"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
