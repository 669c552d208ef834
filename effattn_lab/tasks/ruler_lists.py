"""RULER's tracing and counting tasks: variables that point to variables, common words, frequent words."""

from __future__ import annotations

import math
import string
from itertools import pairwise

import numpy as np

from effattn_lab.tasks._draw import distinct
from effattn_lab.tasks.ruler_needles import _insert
from effattn_lab.tasks.ruler_sample import Sample
from effattn_lab.tasks.ruler_text import NOISE, words

#: Below this length in tokens the word list has fewer repetitions.
SHORT = 4096
COMMON = 10
#: Numbers of the five sentences in a worked example of ``vt``, and of the distinct words in one of ``cwe``.
_EXAMPLE_LINES, _EXAMPLE_WORDS = 5, 20


def letters(rng: np.random.Generator, count: int, size: int, alphabet: str) -> list[str]:
    """``count`` distinct random words of ``size`` letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = rng.integers(0, len(alphabet), size=(count - len(found), size))
        found.update(dict.fromkeys("".join(alphabet[i] for i in row) for row in drawn.tolist()))
    return list(found)


def variables(
    filler: int, rng: np.random.Generator, reserve: int, *, chains: int = 1, hops: int = 4
) -> Sample:
    """``vt``: ``VAR ABCDE = 12345``, ``VAR FGHIJ = VAR ABCDE``, ... among dull sentences: who has the value 12345?

    A chain's statements stand in order at random lines; several chains interleave. ``hops + 1`` names hold the value.
    A worked example, with names of its own, comes first.
    """
    shown, asked, prefix, answer = _chain_text(_EXAMPLE_LINES, rng, chains, hops)
    text, question, beginning, names = _chain_text(filler, rng, chains, hops)
    example = f"{shown}{asked}{prefix} {' '.join(answer)}\n\n"
    return Sample("vt", example + text, question + beginning, tuple(names), "all", reserve, filler)


def _chain_text(
    filler: int, rng: np.random.Generator, chains: int, hops: int
) -> tuple[str, str, str, list[str]]:
    size = hops + 1
    names = letters(rng, chains * size, 5, string.ascii_uppercase)
    values = [str(x) for x in (10_000 + rng.choice(90_000, chains, replace=False)).tolist()]
    lines = [NOISE[i % len(NOISE)] for i in range(filler)]
    placed = []
    for c in range(chains):
        own = names[c * size : (c + 1) * size]
        says = [f"VAR {own[0]} = {values[c]}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(own))]
        at = np.sort(rng.choice(filler + 1, size, replace=filler + 1 < size))
        placed += [(int(place), i, c, line) for i, (place, line) in enumerate(zip(at, says))]
    placed.sort(key=lambda entry: entry[:3])
    text = "\n".join(_insert(lines, [entry[3] for entry in placed], [entry[0] for entry in placed]))
    first = (
        "Keep track of the variables in the text below, which are set to numbers or to other variables.\n\n"
    )
    return (
        f"{first}{text}\n",
        f"Question: Which variables have the value {values[0]} in the text above?\n",
        f"Answer: By the text above, {size} variables have the value {values[0]}:",
        names[:size],
    )


def common_words(filler: int, rng: np.random.Generator, reserve: int, length: int) -> Sample:
    """``cwe``: a shuffled, numbered list in which ten words are common; ``filler`` distinct words in all.

    The ten come 30 times and the others 3 times; for lengths below 4,096 tokens 6 times and once. A small worked
    example comes first.
    """
    if length < SHORT:
        often, seldom, shown = 6, 1, (3, 1)
    else:
        often, seldom, shown = 30, 3, (10, 3)
    pool = words(filler + _EXAMPLE_WORDS)
    both = [pool[i] for i in distinct(rng, 1, 0, len(pool), filler + _EXAMPLE_WORDS)[0].tolist()]
    other, drawn = both[:_EXAMPLE_WORDS], both[_EXAMPLE_WORDS:]
    ask = f"\nQuestion: Which {COMMON} words are most common in the list above?\n"
    begin = f"Answer: The {COMMON} most common words in the list are:"
    example = f"{_word_list(other, rng, *shown)}{ask}{begin} {_numbered(other[:COMMON])}\n\n"
    text = _word_list(drawn, rng, often, seldom)
    return Sample("cwe", example + text, ask + begin, tuple(drawn[:COMMON]), "all", reserve, filler)


def most_words() -> int:
    """Distinct words that there are for ``cwe``, without the example's."""
    return len(words(10**9)) - _EXAMPLE_WORDS


def _word_list(drawn: list[str], rng: np.random.Generator, often: int, seldom: int) -> str:
    every = drawn[:COMMON] * often + drawn[COMMON:] * seldom
    shuffled = [every[i] for i in rng.permutation(len(every))]
    return f"Below is a numbered list in which some words come more often than others.\n{_numbered(shuffled)}"


def _numbered(items: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))


def zeta(alpha: float) -> float:
    """Riemann's ``sum_k k ** -alpha`` for alpha above 1: 1,000 terms, and the rest by Euler and Maclaurin."""
    if not alpha > 1:
        raise ValueError(f"alpha: expected a number above 1, got {alpha!r}")
    n = 1000
    rest = n ** (1 - alpha) / (alpha - 1) + 0.5 * n**-alpha + alpha * n ** (-alpha - 1) / 12
    return math.fsum(k**-alpha for k in range(1, n)) + rest


def frequencies(filler: int, size: int, alpha: float = 2.0) -> list[int]:
    """How often the word of rank k = 1..size comes: ``floor(M k ** -alpha / zeta(alpha))``, M the filler."""
    total = zeta(alpha)
    return [int(filler * k**-alpha / total) for k in range(1, size + 1)]


def frequent_words(
    filler: int, rng: np.random.Generator, reserve: int, length: int, *, alpha: float = 2.0
) -> Sample:
    """``fwe``: made-up words of six letters whose frequencies fall as a power; which three are most frequent?

    ``length / 50`` words; the first rank is written ``...`` and is noise, ranks 2 to 4 are the answer. ``filler`` is
    M of :func:`frequencies`.
    """
    size = max(5, length // 50)
    counts = frequencies(filler, size, alpha)
    coded = letters(rng, size, 6, string.ascii_lowercase)
    every = [w for word, count in zip(["...", *coded[1:]], counts) for w in [word] * count]
    text = " ".join(every[i] for i in rng.permutation(len(every)))
    first = "Read the following coded text and count its words. Leave out the dots '...'.\n\n"
    question = (
        "\n\nQuestion: Which three words are the most frequent in the coded text above?\n"
        "Answer: The three most frequent words are:"
    )
    return Sample("fwe", first + text, question, tuple(coded[1:4]), "all", reserve, filler)


def frequent_least(alpha: float = 2.0) -> int:
    """The smallest M at which ranks 1 to 5 differ in their counts, so that the question has one answer."""
    filler = 1
    while any(a <= b for a, b in pairwise(frequencies(filler, 5, alpha))):
        filler += 1
    return filler
