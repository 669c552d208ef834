"""A language-modelling task on real text, byte by byte: predict the next byte of Python's language reference.

Bytes need no tokenizer and no vocabulary beyond 256, so a loss is bits of the text itself: comparable between models,
and with any compressor. The text is :func:`effattn_lab.tasks.text.topics`, or any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.tasks._draw import generator
from effattn_lab.tasks.mqar import Batch
from effattn_lab.tasks.text import topics

VOCAB_SIZE = 256


class ByteText:
    """A text as bytes, split once into a training part and a held-out part.

    The held-out part consists of whole blocks spread over the text, so that both parts treat the same subjects; a
    block of either part is never cut into the other.

    Args:
        text: any string. Default: Python's language reference, some 465 kB in Python
            3.11, passages that it repeats included.
        held_out: share of the blocks kept for validation, above 0 and below 1. Default 0.1.
        block: bytes a block. Default 4096. The text needs at least two.
        seed: which blocks.
    """

    def __init__(
        self, text: str | None = None, *, held_out: float = 0.1, block: int = 4096, seed: int = 0
    ) -> None:
        check_positive_int("block", block)
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: expected a share above 0 and below 1, got {held_out!r}")
        data = (topics() if text is None else text).encode("utf-8")
        blocks = [data[i : i + block] for i in range(0, len(data), block)]
        if len(blocks) < 2:
            raise ValueError(f"text: expected at least two blocks of {block} bytes, got {len(data)} bytes")
        count = min(max(1, round(held_out * len(blocks))), len(blocks) - 1)
        chosen = set(generator(seed).choice(len(blocks), size=count, replace=False).tolist())
        self.train = _tensor(b for i, b in enumerate(blocks) if i not in chosen)
        self.valid = _tensor(b for i, b in enumerate(blocks) if i in chosen)
        #: Which text this was: results on another Python's wording are not the same numbers.
        self.sha256 = hashlib.sha256(data).hexdigest()

    def batch(self, examples: int, length: int, rng: int | np.random.Generator) -> Batch:
        """Random windows of the training part: ``inputs [n, length]``, and ``targets`` one byte further on."""
        check_positive_int("examples", examples)
        _check_length(length, len(self.train), "training")
        begin = generator(rng).integers(0, len(self.train) - length, size=examples)
        rows = torch.from_numpy(begin)[:, None] + torch.arange(length + 1)
        window = self.train[rows]
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

    def validation(self, length: int, max_windows: int | None = None) -> Batch:
        """The held-out part in windows side by side, from its beginning, each byte a target once."""
        _check_length(length, len(self.valid), "held-out")
        count = (len(self.valid) - 1) // length
        if max_windows is not None:
            check_positive_int("max_windows", max_windows)
            count = min(count, max_windows)
        inputs = self.valid[: count * length].view(count, length)
        targets = self.valid[1 : count * length + 1].view(count, length)
        return Batch(inputs, targets)


def _tensor(blocks: Iterator[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(blocks), dtype=np.uint8).astype(np.int64))


def _check_length(length: int, bytes_there: int, part: str) -> None:
    check_positive_int("length", length)
    if length >= bytes_there:
        raise ValueError(
            f"length: expected less than the {bytes_there} bytes of the {part} part, got {length}"
        )
