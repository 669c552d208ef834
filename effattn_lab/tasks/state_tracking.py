"""State tracking: a long word over a small group, and after each letter the product so far is asked.

Parity is the group of two elements, counting modulo m the cyclic one, S3 and S5 all orders of three and five things.
S5 is the smallest symmetric group that is not solvable: its word problem is complete for NC1 (Barrington 1989), so
that models of constant depth over TC0 cannot solve every length (Merrill and Sabharwal 2023; Merrill et al. 2024).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations

import numpy as np
import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.tasks._draw import generator
from effattn_lab.tasks.mqar import Batch


def parity(examples: int, *, length: int = 64, seed: int | np.random.Generator = 0) -> Batch:
    """Bits in, and at each place whether an odd number of ones has been read: ``y_t = x_1 + ... + x_t mod 2``."""
    return modular_counting(examples, length=length, modulus=2, seed=seed)


def modular_counting(
    examples: int, *, length: int = 64, modulus: int = 5, seed: int | np.random.Generator = 0
) -> Batch:
    """Digits 0..m - 1 in, their running sum modulo m out: ``y_t = x_1 + ... + x_t mod m``; m tokens, m answers.

    Args:
        examples: n, at least 1.
        length: N, at least 1.
        modulus: m, at least 2.
        seed: an integer or a NumPy generator.
    """
    for name, value in (("examples", examples), ("length", length), ("modulus", modulus)):
        check_positive_int(name, value)
    if modulus < 2:
        raise ValueError(f"modulus: expected at least 2, got {modulus}")
    x = generator(seed).integers(0, modulus, size=(examples, length))
    return Batch(torch.from_numpy(x), torch.from_numpy(np.cumsum(x, axis=1) % modulus))


@lru_cache
def symmetric_group(n: int) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """The permutations of 0..n - 1 in lexicographic order (0 is the identity) and their multiplication table.

    Returns:
        ``(elements, table)``: ``table[a, b]`` is the number of "a first, then b": i goes to ``b[a[i]]``.
    """
    check_positive_int("n", n)
    if n > 5:
        raise ValueError(f"n: expected 1 to 5 (5! = 120 tokens), got {n}")
    elements = tuple(permutations(range(n)))
    number = {p: i for i, p in enumerate(elements)}
    table = np.array([[number[tuple(b[a[i]] for i in range(n))] for b in elements] for a in elements])
    table.setflags(write=False)
    return elements, table


def permutation_composition(
    examples: int,
    *,
    length: int = 64,
    n: int = 5,
    swaps_only: bool = False,
    seed: int | np.random.Generator = 0,
) -> Batch:
    """Permutations in, their product so far out: ``y_t = x_1 x_2 ... x_t``, applied in the order of reading.

    Args:
        examples: number of words.
        length: N, at least 1.
        n: of S_n, 2 to 5; n! tokens and as many answers, numbered as in :func:`symmetric_group`.
        swaps_only: draw letters from the exchanges of two things and the identity; they generate the whole group,
            and a delta rule with beta = 2 applies one such reflection a token. Default: any permutation.
        seed: an integer or a NumPy generator.
    """
    for name, value in (("examples", examples), ("length", length), ("n", n)):
        check_positive_int(name, value)
    if n < 2:
        raise ValueError(f"n: expected 2 to 5, got {n}")
    elements, table = symmetric_group(n)
    letters = np.arange(len(elements))
    if swaps_only:
        letters = np.array([i for i, p in enumerate(elements) if sum(a != b for a, b in enumerate(p)) <= 2])
    x = generator(seed).choice(letters, size=(examples, length))
    y = np.empty_like(x)
    y[:, 0] = x[:, 0]
    for t in range(1, length):
        y[:, t] = table[y[:, t - 1], x[:, t]]
    return Batch(torch.from_numpy(x), torch.from_numpy(y))
