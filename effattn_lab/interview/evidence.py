"""Which numbers of a question have no evidence? A test walks the bank with this and fails on any.

A number printed in a question, an answer, a rubric or a follow-up must be a result listed under ``numbers`` or an
assumption listed under ``given``. Small counts without a unit ("4 heads") and parts of names ("Llama-3-8B", "fp16")
are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from effattn_lab.interview.bank import Question

_SMALL = 8
_POWER_OF_TEN = re.compile(r"(?:(\d+(?:\.\d+)?)\s*\\cdot\s*)?10\^\{?(-?\d+)\}?")
_NUMBER = re.compile(
    r"(?<![\w.^])(?<![A-Za-z0-9]-)"  # not inside a name, not an exponent
    r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    r"(?![\w]|\.\d)"
    r"(\s?(?:%|×(?!\s*\w)|[KMGT]i?B\b|[mµn]?s\b|[GT]FLOP|FLOP/))?"
)


def printed_numbers(text: str) -> Iterator[tuple[float, bool]]:
    """Numbers in a Markdown `text`, each with whether a unit follows. Inline code and names are skipped."""
    text = re.sub(r"`[^`]*`", " ", text)
    text = _POWER_OF_TEN.sub(lambda match: f" {match[1] or 1}e{match[2]} ", text)
    for match in _NUMBER.finditer(text):
        yield float(match[1].replace(",", "")), match[2] is not None


def unsupported_numbers(question: Question) -> list[float]:
    """Numbers of the question's texts that are neither computed, nor reported, nor given."""
    known = {float(number.value) for number in question.numbers} | {float(value) for value in question.given}
    return [
        value for value, unit in _numbers_of(question) if value not in known and (unit or not _small(value))
    ]


def unused_assumptions(question: Question) -> list[float]:
    """Entries of ``given`` that no text prints any more."""
    printed = {value for value, _ in _numbers_of(question)}
    return [value for value in question.given if float(value) not in printed]


def _small(value: float) -> bool:
    return value <= _SMALL and value == int(value)


def _numbers_of(question: Question) -> Iterator[tuple[float, bool]]:
    texts = [question.question, question.strong_answer, *question.key_points]
    for follow_up in question.follow_ups:
        texts += [follow_up.ask, follow_up.answer]
    for text in texts:
        yield from printed_numbers(text)
