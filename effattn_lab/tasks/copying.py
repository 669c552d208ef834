"""Copying and overwriting: two tasks that ask whether a state keeps everything, and whether it keeps the last.

Copy (as the selective copying and copying tasks of the field): say the sequence again. Overwrite-recall: keys get a
new value several times, the last one counts; a state that only adds keeps the old values in the way.
"""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.tasks._draw import IGNORE, distinct, generator
from effattn_lab.tasks.mqar import Batch


def copying(
    examples: int, *, symbols: int = 16, vocab_size: int = 32, seed: int | np.random.Generator = 0
) -> Batch:
    """A word of ``symbols`` letters, the separator 0, and the word again, to be predicted letter by letter.

    ``in: a b c 0 a b``, ``target: - - - a b c``. Letters are uniform in 1..V - 1, so guessing gives 1 / (V - 1).

    Args:
        examples: n, at least 1.
        symbols: letters of the word, at least 1. The length is ``2 * symbols``.
        vocab_size: V with the separator, at least 3.
        seed: an integer or a NumPy generator.
    """
    for name, value in (("examples", examples), ("symbols", symbols), ("vocab_size", vocab_size)):
        check_positive_int(name, value)
    if vocab_size < 3:
        raise ValueError(f"vocab_size: expected at least 3 (two letters and the separator), got {vocab_size}")
    word = generator(seed).integers(1, vocab_size, size=(examples, symbols))
    separator = np.zeros((examples, 1), dtype=np.int64)
    inputs = np.concatenate([word, separator, word[:, :-1]], axis=1)
    targets = np.concatenate([np.full((examples, symbols), IGNORE), word], axis=1)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int64)))


def overwrite_recall(
    examples: int,
    *,
    pairs: int = 8,
    writes: int = 2,
    vocab_size: int = 128,
    seed: int | np.random.Generator = 0,
) -> Batch:
    """Every key is written ``writes`` times with another value each time; then all keys are asked, in random order.

    Round r: k_p(1) v k_p(2) v ... in an order p of its own; then the keys once more, and at each the *last* value
    written to it is the target. Keys from 1..V/2 - 1; values from V/2..V - 1, uniform but never the one just there.

    Args:
        examples: n, at least 1.
        pairs: P keys, at least 1, at most V/2 - 1.
        writes: R rounds, at least 1. With 1, nothing is overwritten. The length is ``2 * P * R + P``.
        vocab_size: V, even.
        seed: an integer or a NumPy generator.
    """
    sizes = {"examples": examples, "pairs": pairs, "writes": writes, "vocab_size": vocab_size}
    for name, size in sizes.items():
        check_positive_int(name, size)
    half = vocab_size // 2
    if vocab_size % 2 or half - 1 < pairs or half < 2:
        raise ValueError(
            f"vocab_size: expected an even number with at least {pairs} keys below its half, got {vocab_size}"
        )
    rng = generator(seed)
    keys = distinct(rng, examples, 1, half, pairs)
    value = np.zeros((examples, pairs), dtype=np.int64)
    parts = []
    for r in range(writes):
        if r == 0:
            value = rng.integers(0, half, size=value.shape)
        else:  # 1..half - 1 further round the circle: any value but the old one, all equally likely
            value = (value + rng.integers(1, half, size=value.shape)) % half
        order = distinct(rng, examples, 0, pairs, pairs)
        shown = np.stack([np.take_along_axis(a, order, axis=1) for a in (keys, value + half)], axis=2)
        parts.append(shown.reshape(examples, 2 * pairs))
    order = distinct(rng, examples, 0, pairs, pairs)
    asked, answers = (np.take_along_axis(a, order, axis=1) for a in (keys, value + half))
    inputs = np.concatenate([*parts, asked], axis=1)
    targets = np.concatenate([np.full((examples, 2 * pairs * writes), IGNORE), answers], axis=1)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int64)))
