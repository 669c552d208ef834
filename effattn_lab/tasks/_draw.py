"""What the synthetic tasks share: a generator from a seed, distinct tokens, the label that nothing is asked for."""

from __future__ import annotations

import numpy as np

#: Target where nothing is asked: what ``torch.nn.functional.cross_entropy`` ignores.
IGNORE = -100


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    """A NumPy generator: the one given, or a new one from an integer of at least 0."""
    if isinstance(seed, np.random.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0 or a NumPy Generator, got {seed!r}")
    return np.random.default_rng(seed)


def distinct(rng: np.random.Generator, rows: int, low: int, high: int, count: int) -> np.ndarray:
    """``[rows, count]`` integers of ``low..high - 1``, distinct in each row, every ordered choice equally likely."""
    out = np.empty((rows, count), dtype=np.int64)
    # In slices: a row of random numbers for each candidate, which for a vocabulary of 8,192 would fill the memory.
    for begin in range(0, rows, 256):
        noise = rng.random((min(256, rows - begin), high - low))
        out[begin : begin + 256] = low + np.argsort(noise, axis=1)[:, :count]
    return out
