"""MQAR, multi-query associative recall: many pairs are shown, later some keys come back, and their values are asked.

    in       k1 v1 k2 v2 | .  .  k2 .  .  .  k1 .
    target   -  -  -  -  | -  -  v2 -  -  -  v1 -        (- : nothing asked, . : filler)

Defined as in the generator of Zoology (Arora, Eyuboglu et al., ICLR 2024): vocabulary, slots, gaps and labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.tasks._draw import IGNORE, distinct, generator


class Batch(NamedTuple):
    """``inputs [n, N]`` and ``targets [n, N]``, int64; a target is :data:`IGNORE` (-100) where nothing is asked."""

    inputs: torch.Tensor
    targets: torch.Tensor


def gap_probabilities(slots: int, power: float = 0.01) -> np.ndarray:
    """Chance of each slot to be chosen first: ``p_g ~ power * g ** (power - 1)``, g = 1..slots; 1 gives all the same.

    A small power makes near slots likelier, as a word comes back soon after it was said.
    """
    check_positive_int("slots", slots)
    if not 0 < power <= 1:
        raise ValueError(f"power: expected a number above 0 and at most 1, got {power!r}")
    p = power * np.arange(1, slots + 1, dtype=np.float64) ** (power - 1)
    out: np.ndarray = p / p.sum()
    return out


def mqar(
    examples: int,
    *,
    length: int = 64,
    pairs: int = 8,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_fillers: bool = True,
    seed: int | np.random.Generator = 0,
) -> Batch:
    """Draw examples of the task.

    1. Keys: ``pairs`` distinct tokens of 1..V/2 - 1; values: distinct tokens of V/2..V - 1. Token 0 is the filler.
    2. The example begins with k1 v1 k2 v2 ...: 2 * pairs tokens.
    3. The rest is cut into slots of two tokens. Each key gets a slot of its own, drawn without replacement with
       :func:`gap_probabilities`, and stands at the slot's first place. There its value is the target.
    4. ``random_fillers``: every token 0 is replaced by a uniform one of the vocabulary, which may repeat a key.

    Args:
        examples: n, at least 1.
        length: N tokens, even, at least ``4 * pairs``.
        pairs: P, at least 1, at most V/2 - 1.
        vocab_size: V, even, more than ``length``.
        power: of the gaps, see :func:`gap_probabilities`. Default 0.01.
        random_fillers: as Zoology's library and the Based runs do (default); False: zeros, as in Zoology's figure 2.
        seed: an integer or a NumPy generator: the same seed, the same examples.

    Raises:
        ValueError: for sizes that do not fit together; the message names the argument.
    """
    for name, value in (
        ("examples", examples),
        ("length", length),
        ("pairs", pairs),
        ("vocab_size", vocab_size),
    ):
        check_positive_int(name, value)
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length: expected an even number of at least 4 * pairs = {4 * pairs}, got {length}")
    if vocab_size % 2 or vocab_size <= length or pairs > vocab_size // 2 - 1:
        raise ValueError(
            f"vocab_size: expected an even number above length ({length}) with at least {pairs} keys, "
            f"got {vocab_size}"
        )
    slots = (length - 2 * pairs) // 2
    log_p = np.log(gap_probabilities(slots, power))
    rng = generator(seed)
    keys = distinct(rng, examples, 1, vocab_size // 2, pairs)
    values = distinct(rng, examples, vocab_size // 2, vocab_size, pairs)
    # Drawing without replacement, one by one, is sorting by log p plus Gumbel noise (Plackett and Luce's model).
    noisy = log_p + rng.gumbel(size=(examples, slots))
    at = 2 * pairs + 2 * np.argsort(-noisy, axis=1)[:, :pairs]  # position of key i
    inputs = np.zeros((examples, length), dtype=np.int64)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(inputs, at, keys, axis=1)
    targets = np.full((examples, length), IGNORE, dtype=np.int64)
    np.put_along_axis(targets, at, values, axis=1)
    if random_fillers:
        inputs = np.where(inputs == 0, rng.integers(0, vocab_size, size=inputs.shape), inputs)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of the asked positions where the likeliest token is the target.

    Args:
        logits: ``[..., V]``.
        targets: ``[...]`` int64, -100 where nothing is asked. With the same number of questions in each row, as here,
            this equals Zoology's mean over rows of each row's accuracy.

    Raises:
        ValueError: if the shapes do not fit, or nothing is asked.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits: expected shape {tuple(targets.shape)} and the vocabulary, got {tuple(logits.shape)}"
        )
    asked = targets != IGNORE
    if not asked.any():
        raise ValueError("targets: expected at least one position that is not -100, got none")
    return (logits.argmax(-1) == targets)[asked].double().mean().item()
