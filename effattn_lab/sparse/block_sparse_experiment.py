"""Which blocks would a real model have wanted, and which do cheap scores choose? SmolLM2 on real text, head by head.

``python -m effattn_lab.sparse.block_sparse_experiment --write`` (some fifteen minutes on one core) reads 2,048 tokens
of Python's documentation; the record lies beside this module. Blocks hold 64 tokens, 32 of them; the queries that
count are those of the last 16 blocks.

1. **Mass.** With full attention throughout, every layer's softmax is summed by blocks. Each method then takes its k
   best blocks; `curves` holds the mass that they hold, mean over queries, heads and layers, for k = 1..32. Blocks of
   queries that choose together are given their own block and the first; MoBA's queries are given their own.
2. **Threshold.** XAttention's rule, the same rule on the true mass, and a fixed count of the same scores: blocks read
   and mass held by layer and head.
3. **Loss.** The same choices inside the model, in all layers: nats a token on the last 1,024.
4. **Again.** The same, but the last 512 tokens repeat the first 512 word for word, with 1,024 others in between: who
   finds the passage again copies it. Nats a token on the last 448.

MoBA here is its gate on a model trained without it. The paper trains with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.models import hf, smollm2
from effattn_lab.sparse.block_sparse import moba_selection, select_by_mass, xattention_scores
from effattn_lab.tasks.text import passages_once, topics

RECORD = Path(__file__).with_name("block_sparse_experiment.json")
TOKENS, BLOCK, STRIDE = 2048, 64, 8
ROWS = TOKENS // BLOCK // 2  # blocks of queries that count: the last half
TAUS = (0.5, 0.7, 0.8, 0.9, 0.95)
TOP_K = (2, 4, 8, 16)
REPEATED, SCORED = 512, 448
AGAIN = ("XAttention, tau = 0.7", "XAttention, tau = 0.9", "best by antidiagonals, 8 blocks", "MoBA, 8 blocks",
         "MoBA with block 0, 8 blocks", "first and nearest, 8 blocks")  # fmt: skip
NEG_INF = float("-inf")

Choice = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def block_mass(p: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """``[..., N, N]`` weights to ``[..., N, N / block]``: what each query gives each block of keys."""
    return p.unflatten(-1, (-1, block)).sum(dim=-1)


def by_rows(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """``[..., N, n] -> [..., N / block, n]``: mean over the queries of a block."""
    return x.unflatten(-2, (-1, block)).mean(dim=-2)


def block_scores(q: torch.Tensor, k: torch.Tensor, true: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores ``[Hq, n, n]`` by method, larger for blocks to take first; ``true`` is the mass itself."""
    n = true.shape[-1]
    flipped = q.unflatten(2, (-1, STRIDE)).flip(3).flatten(2, 3)  # turns antidiagonals into diagonals
    pooled_q, pooled_k = (x.unflatten(2, (-1, BLOCK)).mean(dim=3) for x in (q, k))
    pooled_k = repeat_kv(pooled_k, q.shape[1] // k.shape[1])
    row, column = torch.arange(n)[:, None], torch.arange(n)
    antidiagonal = {
        f"antidiagonals, S = {s}": xattention_scores(q, k, block_size=BLOCK, stride=s)[0]
        for s in (STRIDE, 2 * STRIDE, BLOCK)
    }
    return antidiagonal | {
        "diagonals, S = 8": xattention_scores(flipped, k, block_size=BLOCK, stride=STRIDE)[0],
        "mean query, mean key": (pooled_q @ pooled_k.transpose(-1, -2))[0],
        "nearest": (column - row).expand(true.shape).to(true),
        "random": torch.rand(true.shape, generator=torch.Generator().manual_seed(0)),
        "the true mass": true,
    }


def curve(order_by: torch.Tensor, true: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Mass held by the first k blocks in descending order of a score, for k = 1..n, mean over the last half of rows.

    Args:
        order_by: ``[H, rows, n]``.
        true: the mass, same shape.
        given: bool ``[rows, n]``, blocks that come before all others; blocks of the future hold no mass.

    Returns:
        ``[H, n]``.
    """
    rows, n = order_by.shape[-2:]
    own = torch.arange(rows)[:, None] * n // rows
    rank = order_by.masked_fill(given, float("inf")).masked_fill(torch.arange(n) > own, NEG_INF)
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices
    return torch.gather(true, -1, order).cumsum(dim=-1)[:, rows // 2 :].mean(dim=1)


def best_blocks(score: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[..., n, n]``: the own block, the first and the best of the past, ``count`` in all."""
    n = score.shape[-1]
    given = torch.eye(n, dtype=torch.bool) | (torch.arange(n) == 0)
    top = score.masked_fill(given, float("inf")).topk(count, dim=-1).indices
    past = torch.ones(n, n, dtype=torch.bool).tril()
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, top, True) & past


def take_from(keep: torch.Tensor, true: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean blocks a row and mean mass held, by head, of bool ``[H, n, n]``, over the last half of rows."""
    keep, true = keep[:, -ROWS:], true[:, -ROWS:]
    return (
        _short(keep.sum(dim=-1).double().mean(dim=-1)),
        _short((true * keep).sum(dim=-1).double().mean(dim=-1)),
    )


def _short(x: torch.Tensor) -> list[float]:
    return [round(y, 4) for y in x.tolist()]


@torch.no_grad()
def masses(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Parts 1 and 2 for a text ``[1, TOKENS]``: curves by method; blocks and mass by threshold, layer and head."""
    n = TOKENS // BLOCK
    curves: dict[str, list[torch.Tensor]] = {}
    unions: dict[int, list[float]] = {k: [] for k in TOP_K}
    taken: dict[str, dict[str, list[list[float]]]] = {}
    past = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    blocks, queries = torch.arange(n), torch.arange(TOKENS)
    given = (blocks[:, None] == blocks) | (blocks == 0)
    own = queries[:, None] // BLOCK == blocks

    def note(label: str, keep: torch.Tensor, true: torch.Tensor) -> None:
        into = taken.setdefault(label, {"blocks": [], "mass": []})
        for kind, values in zip(("blocks", "mass"), take_from(keep, true)):
            into[kind].append(values)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        factor = q.shape[3] ** -0.5 if scale is None else scale
        s = factor * q[0] @ repeat_kv(k, q.shape[1] // k.shape[1])[0].transpose(-1, -2)
        each = block_mass(torch.softmax(s.masked_fill_(~past, NEG_INF), dim=-1))
        true = by_rows(each)
        scores = block_scores(q, k, true)
        for name, score in scores.items():
            curves.setdefault(name, []).append(curve(score, true, given))
        means = repeat_kv(k.unflatten(2, (-1, BLOCK)).mean(dim=3), q.shape[1] // k.shape[1])
        gate = (q @ means.transpose(-1, -2))[0]
        curves.setdefault("MoBA, each query", []).append(curve(gate, each, own))
        first = own | (blocks == 0)
        curves.setdefault("MoBA, first block given too", []).append(curve(gate, each, first))
        curves.setdefault("the true mass, each query", []).append(curve(each, each, own))
        for top_k in TOP_K:
            chosen = moba_selection(q, k, block_size=BLOCK, top_k=top_k)[0, :, TOKENS // 2 :]
            unions[top_k].append(
                chosen.unflatten(1, (-1, BLOCK)).any(dim=2).sum(dim=-1).double().mean().item()
            )
        for tau in TAUS:
            note(f"tau {tau}", select_by_mass(scores[f"antidiagonals, S = {STRIDE}"][None], tau)[0], true)
            note(f"true {tau}", select_by_mass(true[None], tau)[0], true)
        for count in TOP_K[1:]:
            note(f"count {count}", best_blocks(scores[f"antidiagonals, S = {STRIDE}"], count), true)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with hf.use(model, attend, "effattn_block_mass"):
        model(ids, use_cache=False)
    return {
        "curves": {name: _short(torch.cat(layers).double().mean(dim=0)) for name, layers in curves.items()},
        "unions": {str(k): round(sum(x) / len(x), 2) for k, x in unions.items()},
        "taken": taken,
    }


def choices() -> dict[str, Choice]:
    """Part 3: what each query sees, bool ``[B, Hq, N, N]`` before the causal mask, from q and k."""

    def tokens(keep: torch.Tensor) -> torch.Tensor:
        return keep.repeat_interleave(BLOCK, dim=-1)

    def threshold(tau: float) -> Choice:
        def choose(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            keep = select_by_mass(xattention_scores(q, k, block_size=BLOCK, stride=STRIDE), tau)
            return tokens(keep.repeat_interleave(BLOCK, dim=2))

        return choose

    def best(count: int) -> Choice:
        def choose(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            keep = best_blocks(xattention_scores(q, k, block_size=BLOCK, stride=STRIDE), count)
            return tokens(keep.repeat_interleave(BLOCK, dim=2))

        return choose

    def moba(top_k: int, first: bool) -> Choice:
        def choose(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            keep = moba_selection(q, k, block_size=BLOCK, top_k=top_k - first)
            keep[..., 0] |= first
            return tokens(keep)

        return choose

    def static(count: int) -> Choice:
        def choose(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            n = q.shape[2] // BLOCK
            gap = torch.arange(n)[:, None] - torch.arange(n)
            near = ((gap < count - 1) | (torch.arange(n) == 0)).expand(*q.shape[:2], n, n)
            return tokens(near.repeat_interleave(BLOCK, dim=2))

        return choose

    return (
        {f"XAttention, tau = {tau}": threshold(tau) for tau in TAUS}
        | {f"best by antidiagonals, {k} blocks": best(k) for k in TOP_K[1:]}
        | {f"MoBA, {k} blocks": moba(k, first=False) for k in TOP_K}
        | {f"MoBA with block 0, {k} blocks": moba(k, first=True) for k in TOP_K[1:]}
        | {f"first and nearest, {k} blocks": static(k) for k in TOP_K}
    )


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor, choose: Choice | None, last: int = TOKENS // 2) -> dict[str, float]:
    """Nats a token on the ``last`` with all layers sparse; share of the last half's causal pairs that were seen."""
    past = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    half = TOKENS // 2
    seen: list[float] = []

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        if choose is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        keep = choose(q, k) & past
        seen.append(keep[:, :, half:].double().mean().item() / past[half:].double().mean().item())
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale, enable_gqa=True)

    with hf.use(model, attend, "effattn_block_loss"):
        logits = model(ids, use_cache=False).logits[0, -last:-1].float()
    nats = F.cross_entropy(logits, ids[0, 1 - last :]).item()
    return {"nats": round(nats, 4), "density": round(sum(seen) / len(seen), 4) if seen else 1.0}


def recorded() -> dict[str, Any]:
    """The study that the book shows, kept beside this module."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def text_ids(lm: smollm2.SmolLM2) -> torch.Tensor:
    """The study's text, ``[1, TOKENS]``, no passage twice."""
    return lm.ids(passages_once(topics())[: 8 * TOKENS], TOKENS)


def repeated(ids: torch.Tensor) -> torch.Tensor:
    """The text of part 4, ``[1, TOKENS]``: its first tokens stand at its end once more."""
    return torch.cat([ids[:, : TOKENS - REPEATED], ids[:, :REPEATED]], dim=1)


def write(found: dict[str, Any], losses: dict[str, dict[str, float]]) -> None:
    """Keep the record, a line for each row of a table."""
    head = {
        "model": "SmolLM2-135M-Instruct", "text": "pydoc_data.topics, each passage once",
        "tokens": TOKENS, "block": BLOCK, "stride": STRIDE,
    }  # fmt: skip
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, table in {**found, "loss": losses}.items():
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(x)}" for k, x in table.items())
        parts.append(f'  "{key}": {{\n{lines}\n  }}')
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print it; ``--write`` keeps the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"keep the record in {RECORD.name}")
    chosen = parser.parse_args(arguments)
    lm = smollm2.load()
    ids = text_ids(lm)
    print("mass ...", flush=True)
    found = masses(lm.model, ids)
    for name, values in found["curves"].items():
        print(f"{name:28s}", [values[k - 1] for k in TOP_K], flush=True)
    losses = {"full": loss(lm.model, ids, None)}
    print("full", losses["full"], flush=True)
    for name, choose in choices().items():
        losses[name] = loss(lm.model, ids, choose)
        print(name, losses[name], flush=True)
    twice, table = repeated(ids), choices()
    found["again"] = {"full": loss(lm.model, twice, None, SCORED)}
    for name in AGAIN:
        found["again"][name] = loss(lm.model, twice, table[name], SCORED)
        print("again:", name, found["again"][name], flush=True)
    if chosen.write:
        write(found, losses)


if __name__ == "__main__":
    main()
