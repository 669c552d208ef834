"""The model of the router study before any router: two layers that learn both tasks with full attention.

Source of the tasks: :mod:`effattn_lab.sparse.elastic_tasks`.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from effattn_lab._atomic import write_atomic
from effattn_lab.models.softmax_layer import SoftmaxAttention
from effattn_lab.models.tiny import TinyDecoder
from effattn_lab.sparse.elastic_tasks import VOCABULARY, mixed

#: Weights of the recorded run's backbone of seed 0, rounded to float16: routers can be trained around it in seconds.
BACKBONE = Path(__file__).with_suffix(".npz")
#: Step whose losses a run records: a test runs the first steps again, so results belong to the code.
EARLY = 10


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on besides its seed."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    sinks: int = 1
    window: int = 8
    boundary: int = 6
    batch: int = 48
    steps: int = 1500
    rate: float = 4e-3
    router_steps: int = 300
    router_rate: float = 3e-3
    multiplier_rate: float = 5e-3
    multiplier_start: float = 0.25
    warmest: float = 1.5
    choose: int = 128
    test: int = 256


def new_backbone(recipe: Recipe, head_dim: int | None = None) -> TinyDecoder:
    """The model before training; ``head_dim`` of queries, keys and values, default ``width / heads``."""
    layers = [
        SoftmaxAttention(recipe.width, recipe.heads, head_dim=head_dim, value_dim=head_dim)
        for _ in range(recipe.layers)
    ]
    return TinyDecoder(VOCABULARY.size, recipe.width, layers)


def train_backbone(
    recipe: Recipe, seed: int, stop: int | None = None, head_dim: int | None = None
) -> tuple[TinyDecoder, float]:
    """The model with full attention, and the loss at step :data:`EARLY`.

    ``stop``: end after that many steps of the same schedule. ``head_dim``: see :func:`new_backbone`.
    """
    torch.manual_seed(seed)
    model = new_backbone(recipe, head_dim)
    generator = torch.Generator().manual_seed(1_000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=0.01)
    early = math.nan
    for step in range(recipe.steps if stop is None else stop):
        warm = min(1.0, (step + 1) / (0.05 * recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.rate * warm * cosine(step / recipe.steps)
        batch, _ = mixed(recipe.batch, generator)
        loss = model.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == EARLY:
            early = loss.item()
    return model, early


def save_backbone(model: TinyDecoder, path: Path) -> None:
    """Write the weights, rounded to float16."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: v.detach().half().numpy() for k, v in model.state_dict().items()})
    write_atomic(path, buffer.getvalue())


def load_backbone(
    recipe: Recipe | None = None, path: Path = BACKBONE, head_dim: int | None = None
) -> TinyDecoder:
    """A stored backbone: a trained model with full attention, in float32."""
    model = new_backbone(Recipe() if recipe is None else recipe, head_dim)
    with np.load(path) as stored:
        model.load_state_dict({name: torch.from_numpy(stored[name]).float() for name in stored.files})
    return model


def cosine(share: float) -> float:
    """From 1 down to 0 as ``share`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
