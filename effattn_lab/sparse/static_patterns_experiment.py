"""How much of a real model's attention would a fixed pattern keep? Captured mass in SmolLM2, head by head.

``python -m effattn_lab.sparse.static_patterns_experiment --write`` (half a minute on one core) reads 512 tokens of
Python's documentation with full attention and keeps, for every layer and query head, the mass that each pattern would
have captured of the last 256 queries; ``static_patterns_experiment.json`` beside this module.

All patterns of the study show a query of that text about 68 keys, so that they compete on where, not on how many. For
comparison: as many keys drawn at random, and the query's own 68 largest weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.models import hf, smollm2
from effattn_lab.sparse import static_patterns as patterns
from effattn_lab.tasks.text import topics

RECORD = Path(__file__).with_name("static_patterns_experiment.json")
TOKENS, QUERIES, KEYS = 512, 256, 68

#: Patterns by label. With 512 tokens each shows one of the last 256 queries about 68 keys (see `mean_keys`).
PATTERNS: dict[str, patterns.MaskMod] = {
    "window 68": patterns.sinks_and_window(0, 68),
    "4 sinks + window 64": patterns.sinks_and_window(4, 64),
    "strided, l = 60": patterns.strided(60),
    "fixed, l = 64, c = 6": patterns.fixed(64, 6),
    "dilated, every 6th": lambda b, h, i, j: (j <= i) & ((i - j) % 6 == 0),
}


def mean_keys(mask: patterns.MaskMod) -> float:
    """Keys that one of the study's queries sees, on average."""
    return patterns.dense_mask(mask, QUERIES, TOKENS).double().sum(-1).mean().item()


@torch.no_grad()
def study(model: Any, ids: torch.Tensor) -> dict[str, list[list[float]]]:
    """Captured mass by label, layer and query head, for a text ``[1, TOKENS]``."""
    found: dict[str, list[list[float]]] = {
        name: [] for name in (*PATTERNS, "random 68", "largest 68 (oracle)")
    }
    masks = {name: patterns.dense_mask(mask, QUERIES, TOKENS)[0] for name, mask in PATTERNS.items()}
    past = torch.ones(QUERIES, TOKENS, dtype=torch.bool).tril(TOKENS - QUERIES)
    draw = torch.rand(QUERIES, TOKENS, generator=torch.Generator().manual_seed(0)).masked_fill(~past, -1)
    masks["random 68"] = torch.zeros_like(past).scatter(1, draw.topk(KEYS).indices, True)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        factor = q.shape[3] ** -0.5 if scale is None else scale
        s = factor * q[:, :, -QUERIES:] @ repeat_kv(k, q.shape[1] // k.shape[1]).transpose(-1, -2)
        p = torch.softmax(s.masked_fill(~past, float("-inf")), dim=-1)[0]
        for name, keep in masks.items():
            found[name].append([round(x, 4) for x in (p * keep).sum(-1).mean(-1).tolist()])
        top = p.topk(KEYS).values.sum(-1).mean(-1)
        found["largest 68 (oracle)"].append([round(x, 4) for x in top.tolist()])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with hf.use(model, attend, "effattn_patterns"):
        model(ids, use_cache=False)
    return found


def summary(mass: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row a pattern: mean over all heads, the worst head's mass, and heads (of all) that keep 95 % and more."""
    rows = []
    for name, layers in mass.items():
        heads = torch.tensor(layers).flatten()
        rows.append(
            {
                "pattern": name,
                "mean": heads.mean().item(),
                "worst": heads.min().item(),
                "kept": int((heads >= 0.95).sum()),
                "heads": len(heads),
            }
        )
    return rows


def recorded() -> dict[str, Any]:
    """The study that the book shows, kept beside this module."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print it; ``--write`` keeps the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"keep the record in {RECORD.name}")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lm = smollm2.load()
    mass = study(lm.model, lm.ids(topics(8 * TOKENS), TOKENS))
    for row in summary(mass):
        print(row)
    if chosen.write:
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(layers)}" for name, layers in mass.items())
        head = {
            "model": "SmolLM2-135M-Instruct",
            "text": "pydoc_data.topics",
            "tokens": TOKENS,
            "queries": QUERIES,
        }
        text = f'{{\n  {json.dumps(head)[1:-1]},\n  "mass": {{\n{lines}\n  }}\n}}\n'
        RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
