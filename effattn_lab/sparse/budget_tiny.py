"""Budgets where a model is sure of its answers: the two-layer model of the router study, asked for all it was told.

SmolLM2 can't look up one pair among many (:mod:`effattn_lab.sparse.budget_study`); a model of 36,000 weights that was
trained to do it can. Of a prompt of 64 tokens (:mod:`effattn_lab.sparse.elastic_tasks`) the first 56 are read with
full attention; the 8 questions then come one by one, through a cache with a budget.

``python -m effattn_lab.sparse.budget_tiny`` prints the rows (seconds); ``--train FILE`` trains the model again (two
minutes) and writes its weights, which lie beside this module, rounded to float16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effattn_lab._command import file_to_write, positive
from effattn_lab._validate import check_positive_int
from effattn_lab.models.softmax_layer import SoftmaxAttention, rope
from effattn_lab.models.tiny import TinyDecoder
from effattn_lab.sparse.adamas import AdamasCache
from effattn_lab.sparse.cache import DecodeCache, FullCache
from effattn_lab.sparse.elastic_backbone import Recipe, load_backbone, save_backbone, train_backbone
from effattn_lab.sparse.elastic_tasks import ASKED, TASKS, prompts
from effattn_lab.sparse.eviction import H2OCache, SnapKVCache
from effattn_lab.sparse.quest import OracleCache, QuestCache
from effattn_lab.sparse.streaming import StreamingCache

WEIGHTS = Path(__file__).with_suffix(".npz")
SEED, HEAD_DIM = 0, 16  # sixteen codes fill a word
BUDGETS = (8, 16, 32)
#: Sized for 56 tokens where a default is for thousands: one sink, pages of 4, an observation window of 4.
CACHES: dict[str, Callable[[tuple[float, float, float], float], DecodeCache]] = {
    "full": lambda thresholds, base: FullCache(),
    "oracle": lambda thresholds, base: OracleCache(),
    "adamas": lambda thresholds, base: AdamasCache(thresholds=thresholds),
    "adamas_raw": lambda thresholds, base: AdamasCache(thresholds=thresholds, transform=False),
    "quest": lambda thresholds, base: QuestCache(page_size=4),
    "snapkv": lambda thresholds, base: SnapKVCache(window=4, pool=1),
    "h2o": lambda thresholds, base: H2OCache(),
    "streaming": lambda thresholds, base: StreamingCache(1, rope_base=base),
}


class CachedAttention(nn.Module):
    """A trained layer that reads a prompt with full attention, and what follows through a cache with a budget.

    Args:
        attention: the layer; with rotary positions.
        method: one of :data:`CACHES`.
        budget: tokens a query head may read in a step; None: all that are kept.
    """

    def __init__(self, attention: SoftmaxAttention, method: str, budget: int | None) -> None:
        super().__init__()
        if method not in CACHES:
            raise ValueError(f"method: expected one of {', '.join(CACHES)}, got {method!r}")
        if budget is not None:
            check_positive_int("budget", budget)
        self.attention, self.method, self.budget = attention, method, budget

    def forward(
        self, x: torch.Tensor, state: DecodeCache | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, DecodeCache]:
        """A prompt ``x [B, N, M]``; what follows one goes through :meth:`step`."""
        if state is not None:
            raise ValueError("state: expected none, tokens after the prompt go through step, got one")
        y = self.attention(x)
        if not return_state:
            return y
        q, k, v = self._project(x, 0)
        # Median of |k|: four buckets equally full, of codes and of raw keys alike.
        middle = float(k.abs().median())
        cache = CACHES[self.method]((-middle, 0.0, middle), self.attention.base)
        cache.prefill(q, k, v)
        return y, cache

    def step(self, state: DecodeCache | None, x: torch.Tensor) -> tuple[torch.Tensor, DecodeCache]:
        """One token ``x [B, 1, M]``; the cache is copied, not changed."""
        if state is None:
            raise ValueError("state: expected the cache of a prompt, got none")
        cache = copy.copy(state)
        q, k, v = self._project(x, cache.length)
        cache.append(k, v)
        return self.attention.o_proj(cache.attend(q, self.budget).transpose(1, 2).flatten(2)), cache

    def _project(self, x: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.attention
        q, k, v = (
            make(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for make, heads in (
                (layer.q_proj, layer.num_heads),
                (layer.k_proj, layer.num_kv_heads),
                (layer.v_proj, layer.num_kv_heads),
            )
        )
        return rope(q, at, layer.base), rope(k, at, layer.base), v


@torch.no_grad()
def accuracy(
    model: TinyDecoder, task: str, method: str, budget: int | None, examples: int, seed: int
) -> float:
    """Share of the 8 questions of each prompt that are answered rightly."""
    batch = prompts(task, examples, torch.Generator().manual_seed(seed))
    model = copy.deepcopy(model)
    for module in model.blocks:
        block: Any = module
        block.mixer = CachedAttention(block.mixer, method, budget)
    _, state = model(batch.inputs[:, :-ASKED], return_state=True)
    right = torch.empty(examples, ASKED)
    for i in range(ASKED):
        place = batch.inputs.shape[1] - ASKED + i
        logits, state = model.step(state, batch.inputs[:, place : place + 1])
        right[:, i] = logits[:, 0].argmax(-1) == batch.targets[:, place]
    return right.mean().item()


def rows(budgets: Sequence[int] = BUDGETS, examples: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """One dict a task, method and budget: ``task``, ``method``, ``budget`` (None: full), ``accuracy``.

    Args:
        budgets: tokens a query head reads in each of the two layers, the current one included; 64 is everything.
        examples: prompts of each task, 8 questions each.
        seed: of the prompts.
    """
    check_positive_int("examples", examples)
    model = load_backbone(path=WEIGHTS, head_dim=HEAD_DIM)
    return [
        {
            "task": task,
            "method": method,
            "budget": budget,
            "accuracy": accuracy(model, task, method, budget, examples, seed),
        }
        for task in TASKS
        for method in CACHES
        for budget in ((None,) if method == "full" else budgets)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows, or train the model again."""
    from effattn_lab.measure.xray import show

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=positive, default=256, help="prompts of each task")
    parser.add_argument(
        "--train", type=file_to_write, metavar="FILE", help="train again and write the weights"
    )
    chosen = parser.parse_args(arguments)
    if chosen.train:
        save_backbone(train_backbone(Recipe(), SEED, head_dim=HEAD_DIM)[0], chosen.train)
    else:
        show(rows(examples=chosen.examples))


if __name__ == "__main__":
    main()
