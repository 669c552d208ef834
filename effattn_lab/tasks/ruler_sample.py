"""What all RULER tasks share: a sample, the two scores, and the search for the amount of filler.

Source: Hsieh et al. 2024 (RULER) and its released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One question about a long text.

    Attributes:
        task: name of the task.
        context: everything before the question, instruction first.
        question: the question with the beginning of its answer. It can be read late: :attr:`prompt` is the
            context and this.
        references: what the answer must name.
        match: "all": the share of the references that appear counts; "part": one of them is enough.
        reserve: tokens kept free for the answer.
        filler: amount of filler, in the task's own units (sentences, lines, words, documents).
        tokens: tokens of the prompt.
    """

    task: str
    context: str
    question: str
    references: tuple[str, ...]
    match: str
    reserve: int
    filler: int = 0
    tokens: int = 0

    @property
    def prompt(self) -> str:
        return self.context + self.question

    def score(self, output: str) -> float:
        """0 to 1 for one output, by the task's own rule."""
        rule = string_match_all if self.match == "all" else string_match_part
        return rule([output], [self.references]) / 100


def string_match_all(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over samples of the share of references that appear in the output, times 100; case is ignored."""
    _check(outputs, references)
    rows = zip(outputs, references)
    return 100 * float(np.mean([np.mean([r.lower() in o.lower() for r in refs]) for o, refs in rows]))


def string_match_part(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of samples in whose output at least one reference appears, times 100; case is ignored."""
    _check(outputs, references)
    rows = zip(outputs, references)
    return 100 * float(np.mean([any(r.lower() in o.lower() for r in refs) for o, refs in rows]))


def _check(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(outputs, str) or len(outputs) == 0:
        raise ValueError(f"outputs: expected a non-empty sequence of strings, got {outputs!r}")
    if len(outputs) != len(references):
        raise ValueError(
            f"references: expected one entry for each of {len(outputs)} outputs, got {len(references)}"
        )
    for refs in references:
        if isinstance(refs, str) or not refs or not all(refs):
            raise ValueError(f"references: expected non-empty sequences of non-empty strings, got {refs!r}")


def largest(fits: Callable[[int], bool], least: int, most: int | None = None) -> int | None:
    """The filler amount: doubled until it no longer fits, then halved in between.

    Args:
        fits: whether an amount fits; true up to some amount and false beyond. Where it goes up and down around the
            limit (lengths in tokens do, by a few), the answer fits and the next amount does not.
        least: smallest amount.
        most: largest amount there is. Default None: no limit.

    Returns:
        the amount, or None if even ``least`` doesn't fit.
    """
    if not fits(least):
        return None
    low, high = least, max(2 * least, least + 1)
    while most is None or high <= most:
        if not fits(high):
            break
        low, high = high, 2 * high
    else:
        if low == most or fits(most):
            return most
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
