"""What the recall study trains on: a recipe for each task, the batches of a seed, and the data held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from effattn_lab.tasks.copying import overwrite_recall
from effattn_lab.tasks.language import ByteText
from effattn_lab.tasks.mqar import Batch, mqar
from effattn_lab.tasks.text import passages_once, topics

#: Values that each key gets, one after the other, when overwriting is tested.
WRITES = 2


@dataclass(frozen=True)
class Recipe:
    """How every model of one task is trained.

    MQAR asks ``pairs[-1]`` pairs, but for the first ``easy`` steps, where each batch draws one of ``pairs``: without
    such a beginning even softmax attention stays at chance for most of so short a training. Overwriting begins in the
    same way; there half of the batches write each key once, half :data:`WRITES` times.
    """

    task: str = "mqar"
    vocab_size: int = 64
    length: int = 32
    pairs: tuple[int, ...] = (2, 4, 8)
    width: int = 64
    layers: int = 1
    heads: int = 1
    easy: int = 200
    parameters: int = 46_000
    batch: int = 32
    steps: int = 600
    warmup: int = 60
    rates: tuple[float, ...] = (0.01, 0.003, 0.03)
    weight_decay: float = 0.1
    clip: float = 1.0
    test: int = 512
    stop_at: float = 0.999
    seeds: int = 3

    @property
    def data(self) -> str:
        """What the batches are: the first word of the name."""
        return self.task.partition("_")[0]


RECIPES: dict[str, Recipe] = {
    "mqar": Recipe(),
    # No rates of its own: those that "mqar" chose. Longer training changes nothing but the number of steps.
    "mqar_long": Recipe(task="mqar_long", steps=3000, rates=()),
    "overwrite": Recipe(task="overwrite", pairs=(1, 2, 4), length=4 * (2 * WRITES + 1), rates=()),
    "language": Recipe(
        task="language",
        vocab_size=256,
        length=128,
        pairs=(),
        layers=2,
        heads=4,
        parameters=130_000,
        batch=8,
        steps=200,
        warmup=30,
        rates=(0.006,),
        test=128,
        stop_at=math.inf,
    ),
}

#: Mixers that a recipe leaves out, for time: longer training asks about those that stayed low, overwriting about
#: the ways to write a state.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "mqar_long": ("linear_taylor",),
    "overwrite": ("linear_taylor", "delta_no_conv", "zeros", "zeros_eps", "selective_ssm"),
}


def byte_text() -> ByteText:
    """The text of "language": each passage once, so that what is held out was not read in training."""
    return ByteText(passages_once(topics()))


def batches(recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Training data without end; the same seed, the same batches for every mixer."""
    rng = np.random.default_rng([seed, 1])
    text = byte_text() if recipe.data == "language" else None
    for step in count():
        if text is not None:
            yield text.batch(recipe.batch, recipe.length, rng)
        else:
            pairs = int(rng.choice(recipe.pairs)) if step < recipe.easy else recipe.pairs[-1]
            writes = int(rng.integers(1, WRITES + 1)) if recipe.data == "overwrite" else 1
            yield questions(recipe, recipe.batch, pairs, writes, rng)


def questions(recipe: Recipe, examples: int, pairs: int, writes: int, rng: np.random.Generator) -> Batch:
    """Examples of a synthetic task; ``writes`` is for overwriting alone."""
    if recipe.data == "overwrite":
        return overwrite_recall(examples, pairs=pairs, writes=writes, vocab_size=recipe.vocab_size, seed=rng)
    return mqar(examples, length=recipe.length, pairs=pairs, vocab_size=recipe.vocab_size, seed=rng)


def held_out(recipe: Recipe, part: str, writes: int = WRITES) -> Batch:
    """Data of no training run: part "stop" decides when to stop, part "test" gives the result."""
    if recipe.data == "language":
        return byte_text().validation(recipe.length, recipe.test)
    rng = np.random.default_rng([2**32, {"stop": 0, "test": 1}[part]])
    return questions(recipe, recipe.test, recipe.pairs[-1], writes, rng)


def replaced(asked: Batch, pairs: int) -> torch.Tensor:
    """Targets of the answer that is out of date: what each key asked held before its last value, ``[n, N]``."""
    begin = 2 * pairs * (WRITES - 2)
    keys, old = (asked.inputs[:, i : begin + 2 * pairs : 2] for i in (begin, begin + 1))
    same = asked.inputs[:, -pairs:, None] == keys[:, None]
    targets = torch.full_like(asked.targets, -100)
    targets[:, -pairs:] = old.gather(1, same.int().argmax(2))
    return targets
