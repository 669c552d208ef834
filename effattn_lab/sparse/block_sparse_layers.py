"""Which estimate finds the blocks that a real model looks at? Captured mass and output error in SmolLM2, by layer.

``python -m effattn_lab.sparse.block_sparse_layers --write`` (two minutes on one core) reads 2,048 tokens of
Python's documentation with full attention. For the last 1,024 queries of every layer and query head it asks each rule
for a number of key blocks of 64 tokens, and keeps how much of the true softmax lies in them and how far the output
moves; ``block_sparse_layers.json`` beside this module.

All rules are given the query's own block and the first one; they compete for the rest. Where a block of queries
chooses together (XAttention and its relatives) they compete against the blocks that are truly best for it; where each
query chooses for itself (MoBA's gate), against those that are truly best for the query.

``taus`` has XAttention's threshold: how much of the softmax it holds when its own estimate says ``tau``.
``sizes`` has the gate at equal tokens in smaller and larger blocks, and ``effective`` how many keys of the best block
between the first and the own one share its weight: what tells a layer whose blocks a mean can find from one whose
blocks it cannot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.models import hf, smollm2
from effattn_lab.sparse.block_sparse import antidiagonal_scores, select_by_mass, xattention_scores
from effattn_lab.tasks.text import passages_once, topics

RECORD = Path(__file__).with_name("block_sparse_layers.json")
TOKENS, QUERIES, BLOCK = 2048, 1024, 64
#: Blocks that a query reads, its own and the first among them, of 16 to 32 that there are.
BUDGETS = (2, 3, 4, 6, 8, 12)
TAUS = (0.5, 0.7, 0.8, 0.9, 0.95)

#: Rules by label: who chooses, a block of queries or each query.
RULES = {
    "random": "block",
    "pooled, mean q · mean k": "block",
    "diagonal, S = 8": "block",
    "antidiagonal, S = 16": "block",
    "antidiagonal, S = 8": "block",
    "oracle, by block": "block",
    "mean key (MoBA's gate)": "query",
    "bound (Quest's)": "query",
    "oracle, by query": "query",
}
#: Block sizes of the gate's second table, and tokens that a query reads there.
SIZES, TOKENS_READ = (16, 32, 64, 128), 512
UNION = 6


class Truth(NamedTuple):
    """Full attention of the last queries, block of keys by block of keys.

    ``p [Hq, queries, N]``: the softmax. ``mass [Hq, queries, n]``: its sums over blocks.
    ``parts [Hq, queries, n, D]``: what each block adds to the output.
    """

    p: torch.Tensor
    mass: torch.Tensor
    parts: torch.Tensor


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    queries: int = QUERIES,
    block: int = BLOCK,
) -> Truth:
    """What :class:`Truth` holds.

    Args:
        q: ``[1, Hq, N, D]``.
        k, v: ``[1, Hkv, N, D]``.
        scale: of the scores.
        queries, block: ``block`` divides ``queries`` and N.
    """
    groups, n = q.shape[1] // k.shape[1], k.shape[2]
    s = scale * q[0, :, -queries:] @ repeat_kv(k, groups)[0].transpose(-1, -2)
    past = torch.ones(queries, n, dtype=torch.bool, device=q.device).tril(n - queries)
    p = torch.softmax(s.masked_fill(~past, float("-inf")), dim=-1)
    tiles = p.unflatten(-1, (-1, block))
    parts = torch.einsum("hqnb,hnbd->hqnd", tiles, repeat_kv(v, groups)[0].unflatten(1, (-1, block)))
    return Truth(p, tiles.sum(-1), parts)


def scores(
    q: torch.Tensor, k: torch.Tensor, mass: torch.Tensor, *, block: int = BLOCK
) -> dict[str, torch.Tensor]:
    """What each rule thinks of each block of keys, by label: ``[Hq, queries / block, n]``, or by query.

    Only the order of a row matters. ``mass`` is :func:`truth`'s: the oracles use it, the others must not.
    """
    lines = mass.shape[1] // block
    groups = q.shape[1] // k.shape[1]
    tiles = repeat_kv(k.unflatten(2, (-1, block)).flatten(3), groups).unflatten(3, (block, -1))
    mean_k, high, low = (x.transpose(-1, -2) for x in (tiles.mean(3), tiles.amax(3), tiles.amin(3)))
    pooled = q.unflatten(2, (-1, block)).mean(3) @ mean_k
    draw = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(0))
    # Queries in the opposite order inside their tiles: sums along diagonals, the same number of products.
    turned = q.unflatten(2, (-1, 8)).flip(3).flatten(2, 3)
    by_block = {
        "random": draw,
        "pooled, mean q · mean k": pooled,
        "diagonal, S = 8": _block_weight(antidiagonal_scores(turned, k, stride=8), block // 8),
        "antidiagonal, S = 16": xattention_scores(q, k, block_size=block, stride=16),
        "antidiagonal, S = 8": xattention_scores(q, k, block_size=block, stride=8),
    }
    found = {name: x[0, :, -lines:] for name, x in by_block.items()}
    found["oracle, by block"] = mass.unflatten(1, (-1, block)).sum(2)
    late = q[:, :, -mass.shape[1] :]
    found["mean key (MoBA's gate)"] = (late @ mean_k)[0]
    found["bound (Quest's)"] = (late.clamp_min(0) @ high + late.clamp_max(0) @ low)[0]
    found["oracle, by query"] = mass
    return found


def _block_weight(tiles: torch.Tensor, per: int) -> torch.Tensor:
    """XAttention's second half: softmax over the tiles of a row that are not in the future, summed by blocks."""
    future = torch.ones(tiles.shape[-2:], dtype=torch.bool, device=tiles.device).triu(1)
    p = torch.softmax(tiles.masked_fill(future, float("-inf")), dim=-1)
    return p.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum(dim=(3, 5))


def take(score: torch.Tensor, budget: int, own: torch.Tensor) -> torch.Tensor:
    """The first block, the own one and the ``budget - 2`` best of those between.

    Args:
        score: ``[Hq, rows, n]``.
        budget: at least 2.
        own: ``[rows]``, each row's own block.

    Returns:
        bool, shape of ``score``.
    """
    if budget < 2:
        raise ValueError(f"budget: expected at least 2 blocks, the first and the own, got {budget}")
    column = torch.arange(score.shape[-1], device=score.device)
    given = (column == 0) | (column == own[:, None])
    rank = score.masked_fill((column >= own[:, None]) | given, float("-inf"))
    best = torch.topk(rank, min(budget - 2, score.shape[-1]), dim=-1)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter(-1, best.indices, ~best.values.isneginf()) | given


def judge(mass: torch.Tensor, parts: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Captured mass and relative error of the output when only ``keep [Hq, queries, n]`` is read, ``[Hq]`` each."""
    held = (mass * keep).sum(-1)
    out = (keep.to(parts.dtype)[:, :, None] @ parts)[:, :, 0] / held[..., None]
    full = parts.sum(2)
    error = (out - full).norm(dim=-1) / full.norm(dim=-1)
    return held.mean(-1), error.mean(-1)


def effective_keys(p: torch.Tensor, own: torch.Tensor, block: int = BLOCK) -> float:
    """``(sum p)^2 / sum p^2`` inside the best block between the first and the own one; median over queries and heads.

    1 if a single key holds all of that block's weight, ``block`` if all hold the same.
    """
    tiles = p.unflatten(-1, (-1, block))
    mass, squares = tiles.sum(-1), tiles.square().sum(-1)
    column = torch.arange(mass.shape[-1], device=p.device)
    best = mass.masked_fill((column == 0) | (column >= own[:, None]), -1.0).argmax(-1, keepdim=True)
    return (mass.gather(-1, best).square() / squares.gather(-1, best)).median().item()


def size_rows(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> dict[str, list[float]]:
    """Captured mass of MoBA's gate and of the best blocks, by query, at ``TOKENS_READ`` tokens, by block size."""
    found = {}
    queries, n = p.shape[1:]
    for size in SIZES:
        mass = p.unflatten(-1, (-1, size)).sum(-1)
        own = torch.arange(n - queries, n) // size
        mean_k = repeat_kv(k.unflatten(2, (-1, size)).mean(3), q.shape[1] // k.shape[1])
        gate = (q[:, :, -queries:] @ mean_k.transpose(-1, -2))[0]
        kept = [take(score, TOKENS_READ // size, own) for score in (gate, mass)]
        found[str(size)] = [round((mass * keep).sum(-1).mean().item(), 4) for keep in kept]
    return found


def layer_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    queries: int = QUERIES,
    block: int = BLOCK,
) -> dict[str, Any]:
    """One layer of the study.

    Returns:
        ``rules``: by label a ``[mass, error]`` for each budget, means over heads. ``taus``: by threshold a triple for
        every head: share of causal blocks read, mass, error. ``sizes``: :func:`size_rows`. ``effective``:
        :func:`effective_keys`. ``union``: blocks that ``block`` neighbouring queries name together where each reads
        ``UNION`` by its gate. ``columns``: the four heaviest keys,
        ``[position, share of all weight, length of its value over the median]``.
    """
    p, mass, parts = truth(q, k, v, scale, queries=queries, block=block)
    n = mass.shape[-1]
    lines = queries // block
    rows = {
        "block": torch.arange(n - lines, n),
        "query": torch.arange(n * block - queries, n * block) // block,
    }
    judged = scores(q, k, mass, block=block)
    asked = take(judged["mean key (MoBA's gate)"], UNION, rows["query"]).unflatten(1, (-1, block))
    share, column = p.mean(dim=(0, 1)).topk(4)
    length = v[0].norm(dim=-1)
    value = (length / length.median(dim=-1, keepdim=True).values).mean(dim=0)[column]
    found: dict[str, Any] = {
        "columns": [
            [j, round(x, 4), round(y, 3)] for j, x, y in zip(column.tolist(), share.tolist(), value.tolist())
        ],
        "union": round(asked.any(dim=2).sum(-1).double().mean().item(), 2),
        "effective": round(effective_keys(p, rows["query"], block), 2), "sizes": size_rows(q, k, p),
        "rules": {}, "taus": {},
    }  # fmt: skip
    for name, score in judged.items():
        found["rules"][name] = []
        for budget in BUDGETS:
            keep = take(score, budget, rows[RULES[name]])
            keep = keep if RULES[name] == "query" else keep.repeat_interleave(block, dim=1)
            held, error = judge(mass, parts, keep)
            found["rules"][name].append([round(held.mean().item(), 4), round(error.mean().item(), 4)])
    estimate = xattention_scores(q, k, block_size=block, stride=8, scale=scale)
    for tau in TAUS:
        keep = select_by_mass(estimate, tau)[0, :, -lines:]
        density = keep.sum(dim=(1, 2)) / (rows["block"] + 1).sum()
        held, error = judge(mass, parts, keep.repeat_interleave(block, dim=1))
        triples = torch.stack([density, held, error], dim=1).tolist()
        found["taus"][str(tau)] = [[round(x, 3) for x in triple] for triple in triples]
    return found


@torch.no_grad()
def study(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """:func:`layer_rows` of every layer, for a text ``[1, TOKENS]``."""
    found: list[dict[str, Any]] = []

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        found.append(layer_rows(q, k, v, q.shape[3] ** -0.5 if scale is None else scale))
        print(f"layer {len(found) - 1}", end=" ", flush=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with hf.use(model, attend, "effattn_blocks"):
        model(ids, use_cache=False)
    return found


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a rule and budget, over all layers: mean ``mass`` and ``error``, and the ``worst_layer``'s mass."""
    table = []
    for name, by in RULES.items():
        layers = torch.tensor([layer["rules"][name] for layer in record["layers"]])  # [layers, budgets, 2]
        for i, budget in enumerate(BUDGETS):
            mass, error = layers[:, i].mean(0).tolist()
            table.append(
                {
                    "rule": name, "by": by, "budget": budget, "mass": mass, "error": error,
                    "worst_layer": layers[:, i, 0].min().item(),
                }
            )  # fmt: skip
    return table


def thresholds(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a threshold, over all heads: mean ``density``, its least and greatest head, ``mass``, ``below``."""
    table = []
    for tau in TAUS:
        heads = torch.tensor([layer["taus"][str(tau)] for layer in record["layers"]]).flatten(0, 1)
        density, mass, error = heads.unbind(1)
        table.append(
            {
                "tau": tau, "density": density.mean().item(), "least": density.min().item(),
                "greatest": density.max().item(), "mass": mass.mean().item(), "worst": mass.min().item(),
                "error": error.mean().item(), "below": (mass < tau).double().mean().item(),
            }
        )  # fmt: skip
    return table


def sizes(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a block size, over all layers: mass of the ``gate`` and of the ``oracle`` at equal tokens."""
    table = []
    for size in SIZES:
        gate, oracle = (
            torch.tensor([layer["sizes"][str(size)] for layer in record["layers"]]).mean(0).tolist()
        )
        table.append({"size": size, "gate": gate, "oracle": oracle})
    return table


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
    head: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct", "text": "pydoc_data.topics, each passage once",
        "tokens": TOKENS, "queries": QUERIES,
        "block": BLOCK, "budgets": BUDGETS, "torch": torch.__version__.split("+")[0],
    }  # fmt: skip
    ids = lm.ids(passages_once(topics())[: 8 * TOKENS], TOKENS)
    layers = study(lm.model, ids)
    heavy = sorted({j for layer in layers for j, *_ in layer["columns"]})
    head["words"] = {str(j): lm.tokenizer.decode([int(ids[0, j])]) for j in heavy}
    record = {**head, "layers": layers}
    for row in (*summary(record), *thresholds(record), *sizes(record)):
        print(row)
    if chosen.write:
        lines = ",\n".join(f"    {json.dumps(layer)}" for layer in layers)
        text = f'{{\n  {json.dumps(head)[1:-1]},\n  "layers": [\n{lines}\n  ]\n}}\n'
        RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
