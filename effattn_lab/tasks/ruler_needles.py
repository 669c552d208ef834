"""RULER's eight needle tasks: say one value or several that a long text once gives for a key.

A needle is one fixed sentence: *The secret number of "calm-otter" is 4182077.* What differs is what lies around it:
five dull sentences repeated, real prose, or nothing but other needles.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np

from effattn_lab.tasks._draw import distinct
from effattn_lab.tasks.ruler_sample import Sample
from effattn_lab.tasks.ruler_text import ADJECTIVES, NOISE, NOUNS, sentences

#: Relative depths, in percent, that needles in prose are put at.
DEPTHS = tuple(round(x) for x in np.linspace(0, 100, 40).tolist())


@dataclass(frozen=True)
class Needle:
    """What one of the eight tasks is made of.

    Attributes:
        haystack: "noise", "essay", or "needle", where every line of filler is another needle.
        keys: keys in the text that are named in the question or lie about; in "needle" the asked one alone.
        values: values of each key.
        queries: keys asked for.
        key, value: "words" (adjective and noun), "number" (7 digits) or "uuid".
    """

    haystack: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: str = "words"
    value: str = "number"


NEEDLES = {
    "niah_single_1": Needle("noise"),
    "niah_single_2": Needle("essay"),
    "niah_single_3": Needle("essay", value="uuid"),
    "niah_multikey_1": Needle("essay", keys=4),
    "niah_multikey_2": Needle("needle"),
    "niah_multikey_3": Needle("needle", key="uuid", value="uuid"),
    "niah_multivalue": Needle("essay", values=4),
    "niah_multiquery": Needle("essay", keys=4, queries=4),
}


def sentence(key: str, value: str, kind: str) -> str:
    """The needle."""
    return f'The secret {kind} of "{key}" is {value}.'


def most(needle: Needle) -> int | None:
    """The largest amount of filler there is: only keys of words can run out."""
    return len(ADJECTIVES) * len(NOUNS) - 1 if needle.haystack == "needle" and needle.key == "words" else None


def build(task: str, filler: int, rng: np.random.Generator, reserve: int) -> Sample:
    """A sample with ``filler`` sentences, or lines of other needles.

    In prose, depths are drawn without replacement from :data:`DEPTHS`; among noise and other needles every place is
    equally likely. Prose begins at a random sentence of the reference and goes round (RULER begins at the start).
    """
    made = NEEDLES[task]
    others = filler if made.haystack == "needle" else 0
    names = _draw(rng, made.keys + others, made.key)
    # Values of all needles at once: none stands in two places, else an answer could be right by accident.
    values = _draw(rng, len(names) * made.values, made.value)
    of = {name: values[i * made.values : (i + 1) * made.values] for i, name in enumerate(names)}
    needles = [sentence(name, v, made.value) for name in names for v in of[name]]
    asked = names[: made.queries]
    if made.haystack == "needle":
        text = "\n".join(needles[i] for i in rng.permutation(len(needles)))
    elif made.haystack == "noise":
        lines = [NOISE[i % len(NOISE)] for i in range(filler)]
        text = "\n".join(_insert(lines, needles, np.sort(rng.integers(0, filler + 1, len(needles)))))
    else:
        prose, at = sentences(), int(rng.integers(0, len(sentences())))
        lines = [prose[(at + i) % len(prose)] for i in range(filler)]
        depths = np.sort(rng.choice(DEPTHS, len(needles), replace=False))
        order = [needles[i] for i in rng.permutation(len(needles))]
        text = " ".join(_insert(lines, order, [int(filler * depth / 100) for depth in depths]))
    many = made.queries * made.values > 1
    what = f"secret {made.value}s" if many else f"secret {made.value}"
    keys = _listed([f'"{name}"' for name in asked])
    whose = "a name" if made.queries == 1 else "some names"
    first = (
        f"Somewhere in the text below {'are' if many else 'is'} the {what} of {whose}. "
        f"Keep {'them' if many else 'it'} in mind, a question follows the text.\n\n"
    )
    verb = "are" if many else "is"
    begin = f"The {what} of {keys} in the text {verb}"
    question = f"\n\nQuestion: What {verb} the {what} of {keys} in the text?\nAnswer: {begin}"
    wanted = tuple(v for name in asked for v in of[name])
    return Sample(task, first + text, question, wanted, "all", reserve, filler)


def _draw(rng: np.random.Generator, count: int, kind: str) -> list[str]:
    """``count`` distinct keys or values of a kind."""
    if kind == "words":
        pairs = distinct(rng, 1, 0, len(ADJECTIVES) * len(NOUNS), count)[0]
        return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in pairs.tolist()]
    if kind == "number":
        found: dict[str, None] = {}
        while len(found) < count:
            found.update(
                dict.fromkeys(str(x) for x in rng.integers(10**6, 10**7, count - len(found)).tolist())
            )
        return list(found)
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def _insert(lines: list[str], needles: list[str], places: np.ndarray | list[int]) -> list[str]:
    """``needles`` put before the lines with these numbers, ascending; ``len(lines)`` is the end."""
    out = list(lines)
    for needle, place in reversed(list(zip(needles, places))):
        out.insert(int(place), needle)
    return out


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
