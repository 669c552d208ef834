"""What text costs without a neural network: compressors and counts of short contexts, on the study's held-out bytes.

A loss of the recall study's models means something only beside these. Everything here reads the whole training part;
a model of 200 steps has drawn fewer bytes from it than it has.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable

import numpy as np
import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.recall_tasks import RECIPES, byte_text, held_out
from effattn_lab.tasks.language import VOCAB_SIZE

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "lzma": lambda data: lzma.compress(data, preset=9),
    "bz2": lambda data: bz2.compress(data, 9),
}


def parts() -> tuple[bytes, bytes]:
    """The training part, and the held-out bytes that the study's models are asked for."""
    asked = held_out(RECIPES["language"], "test").targets.flatten()
    return _bytes(byte_text().train), _bytes(asked)


def compressed(name: str, train: bytes, asked: bytes) -> tuple[float, float]:
    """Bits a byte of ``asked``: compressed alone, and as what it adds to the compressed training part.

    The second is the fair neighbour of a trained model, which has read the training part too; each byte may refer to
    everything before it, a model's only to its own window.

    Args:
        name: "lzma" (preset 9) or "bz2" (level 9, blocks of 900 kB).
        train, asked: see :func:`parts`; ``asked`` not empty.
    """
    if name not in COMPRESSORS:
        raise ValueError(f"name: expected one of {', '.join(COMPRESSORS)}, got {name!r}")
    if not asked:
        raise ValueError("asked: expected at least one byte, got none")
    pack = COMPRESSORS[name]
    added = len(pack(train + asked)) - len(pack(train))
    return 8 * len(pack(asked)) / len(asked), 8 * added / len(asked)


def counted(order: int, train: bytes, asked: bytes) -> float:
    """Bits a byte of ``asked`` when each byte is guessed from counts behind the last ``order`` bytes.

    Witten and Bell's rule mixes the orders, from 256 equally likely bytes upwards: behind a context seen N times with
    T different followers, ``p = (count + T p_shorter) / (N + T)``. The first bytes have shorter contexts.

    Args:
        order: bytes of context, 0 to 6: 0 knows how often each byte occurs.
        train: what is counted, longer than ``order``.
        asked: what is guessed, not empty.
    """
    if order != 0:
        check_positive_int("order", order)
    if order > 6:
        raise ValueError(f"order: expected at most 6 (numbers of 64 bits hold no more), got {order}")
    for name, data in (("train", train), ("asked", asked)):
        if len(data) <= (order if name == "train" else 0):
            raise ValueError(f"{name}: expected more bytes, got {len(data)}")
    p = np.full(len(asked), 1 / VOCAB_SIZE)
    for n in range(min(order, len(asked) - 1) + 1):
        grams, counts = np.unique(_grams(train, n), return_counts=True)
        contexts, first = np.unique(grams // VOCAB_SIZE, return_index=True)
        seen, kinds = np.add.reduceat(counts, first), np.diff([*first, len(grams)])
        wanted = _grams(asked, n)
        count = _lookup(grams, counts, wanted)
        total, different = (_lookup(contexts, x, wanted // VOCAB_SIZE) for x in (seen, kinds))
        shorter = p[n:]
        p[n:] = np.where(total > 0, (count + different * shorter) / np.maximum(total + different, 1), shorter)
    return float(-np.log2(p).mean())


def _grams(data: bytes, order: int) -> np.ndarray:
    """Each byte with the ``order`` bytes before it as one number, the byte itself in the lowest eight bits."""
    values = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    out = np.zeros(len(values) - order, dtype=np.int64)
    for i in range(order + 1):
        out = out * VOCAB_SIZE + values[i : len(values) - order + i]
    return out


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``values`` where ``keys`` (sorted) equal ``wanted``, 0 where none does."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _bytes(tokens: torch.Tensor) -> bytes:
    return tokens.numpy().astype(np.uint8).tobytes()
