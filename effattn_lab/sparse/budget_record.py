"""Tables from the recorded runs of :mod:`effattn_lab.sparse.budget_study`, for chapters, labs and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effattn_lab.sparse.budget_methods import BEST
from effattn_lab.tasks.ruler import TASKS

RECORD = Path(__file__).with_name("budget_study.json")


def recorded() -> dict[str, Any]:
    """The runs that the book shows, kept beside this module."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def _groups(
    record: dict[str, Any], kind: str, of: Sequence[str], over: Sequence[str]
) -> dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]]:
    """Rows of a kind by the values of ``of``, each by those of ``over``: only such as every group has."""
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["kind"] == kind:
            found.setdefault(tuple(row[k] for k in of), {})[tuple(row[k] for k in over)] = row
    if not found:
        raise ValueError(f"record: expected rows of kind {kind!r}, got none")
    shared = set.intersection(*(set(rows) for rows in found.values()))
    return {key: {k: rows[k] for k in rows if k in shared} for key, rows in found.items()}


def perplexities(record: dict[str, Any]) -> list[dict[str, Any]]:
    """For each method and budget, and for the best variant of Adamas, over the texts that all have run on.

    Returns:
        ``method``, ``budget``, ``perplexity`` (``exp`` of the mean loss), ``worse`` (over full attention's, minus
        1), ``read`` (tokens a head and step), ``by_text``, ``tokens`` judged; ``far`` and ``other``, mean losses in
        nats of tokens that can be looked up far back and of all others, and ``far_tokens``.
    """
    table = []
    best = [r for r in record["rows"] if r["kind"] == "codes_loss" and r["method"] == BEST]
    if {r["text"] for r in best} >= {r["text"] for r in record["rows"] if r["kind"] == "loss"}:
        record = {"rows": [*record["rows"], *({**r, "kind": "loss"} for r in best)]}
    for (method, budget), rows in _groups(record, "loss", ("method", "budget"), ("text",)).items():
        nats = {text: row["nats"] for (text,), row in rows.items()}
        every, far = (sum(row[n] for row in rows.values()) for n in ("tokens", "far_tokens"))
        far_sum = sum(row["far_nats"] * row["far_tokens"] for row in rows.values())
        every_sum = sum(row["nats"] * row["tokens"] for row in rows.values())
        table.append(
            {
                "method": method,
                "budget": budget,
                "perplexity": math.exp(sum(nats.values()) / len(nats)),
                "read": sum(row["read"] for row in rows.values()) / len(rows),
                "by_text": {text: math.exp(x) for text, x in nats.items()},
                "tokens": every,
                "far": far_sum / max(far, 1),
                "other": (every_sum - far_sum) / max(every - far, 1),
                "far_tokens": far,
            }
        )
    full = next(row["perplexity"] for row in table if row["method"] == "full")
    return [{**row, "worse": row["perplexity"] / full - 1} for row in table]


def needles(record: dict[str, Any]) -> list[dict[str, Any]]:
    """For each method, budget and way of asking: ``score`` in percent, ``samples``, ``by_task`` in percent."""
    table = []
    for late in (True, False):
        asked = {"rows": [r for r in record["rows"] if r["kind"] == "needle" and r["late"] == late]}
        if not asked["rows"]:
            continue
        for (method, budget), rows in _groups(
            asked, "needle", ("method", "budget"), ("task", "seed")
        ).items():
            by_task: dict[str, list[float]] = {}
            for (task, _), row in rows.items():
                by_task.setdefault(task, []).append(100 * row["score"])
            scores = [x for values in by_task.values() for x in values]
            table.append(
                {
                    "method": method,
                    "budget": budget,
                    "late": late,
                    "score": sum(scores) / len(scores),
                    "samples": len(scores),
                    "by_task": {task: sum(values) / len(values) for task, values in by_task.items()},
                }
            )
    return table


def masses(record: dict[str, Any], kind: str = "mass") -> list[dict[str, Any]]:
    """For each method and budget, means over texts: ``mass``, ``recall``, ``error`` ``[layers][heads]``, ``read``.

    Args:
        record: see :func:`recorded`.
        kind: "mass", or "codes" for the variants of Adamas, whose rows have ``first`` ``[layers]`` too.
    """
    table = []
    for (method, budget), rows in _groups(record, kind, ("method", "budget"), ("text",)).items():
        names = ["mass", "recall", "error", "read", *(["first"] if kind == "codes" else [])]
        found = {k: np.mean([row[k] for row in rows.values()], axis=0) for k in names}
        table.append({"method": method, "budget": budget, **{k: v.tolist() for k, v in found.items()}})
    return table


def sinks(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """For each text a row a layer, see :func:`effattn_lab.sparse.budget_methods.sinks`; with its ``token``."""
    return {row["text"]: row["layers"] for row in record["rows"] if row["kind"] == "sinks"}


#: Variants that are methods of the study: their loss is among its rows.
_SAME = {"adamas": "hadamard_one", "adamas_raw": "raw_one"}


def variants(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Variants of Adamas at the smallest budget.

    Returns:
        for each: ``method``; means over layers with a budget, heads and texts of ``mass``, ``recall``, ``error`` and
        ``first`` (how often the first token was read); ``perplexity`` over the texts that all have run on, None
        where no loss was asked for.
    """
    recipe = record["recipe"]
    dense, budget = recipe["dense_layers"], recipe["budgets"][0]
    as_variants = [
        {**row, "kind": "codes_loss", "method": _SAME.get(row["method"], row["method"])}
        for row in record["rows"]
        if row.get("budget") == budget
        and (row["kind"] == "codes_loss" or (row["kind"] == "loss" and row["method"] in _SAME))
    ]
    nats = {
        method: [row["nats"] for row in rows.values()]
        for (method,), rows in _groups({"rows": as_variants}, "codes_loss", ("method",), ("text",)).items()
    }
    return [
        {
            "method": row["method"],
            **{k: float(np.mean(row[k][dense:])) for k in ("mass", "recall", "error", "first")},
            "perplexity": math.exp(np.mean(nats[row["method"]])) if row["method"] in nats else None,
        }
        for row in masses(record, "codes")
    ]


def tasks(record: dict[str, Any]) -> list[dict[str, Any]]:
    """RULER's tasks, question late, full attention and each method at the recipe's ``task_budget``.

    Returns:
        for each task that was asked, in RULER's order: ``task``, ``samples``, ``scores`` by method in percent.
    """
    budget = record["recipe"]["task_budget"]
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in record["rows"]:
        if row["kind"] in ("needle", "tasks") and row["late"] and row["budget"] in (None, budget):
            of_task = found.setdefault(row["task"], {})
            of_task.setdefault(row["method"], {})[row["seed"]] = 100 * row["score"]
    table = []
    for task in (name for name in TASKS if name in found):
        methods = found[task]
        seeds = set.intersection(*(set(scores) for scores in methods.values()))
        mean = {m: sum(scores[s] for s in seeds) / len(seeds) for m, scores in methods.items()}
        table.append({"task": task, "samples": len(seeds), "scores": mean})
    return table
