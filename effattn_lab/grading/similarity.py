"""Which submissions are nearly the same, for a human to judge. A score here is a reason to look, never a verdict.

Code is reduced to what a hurried copier leaves as it was: comments, docstrings and layout are dropped; names that a
student can choose become one sign, strings another, numbers a third; keywords, operators, built-ins, modules and
attributes (``torch.exp``) stay. The cells are sorted by what is left. What the released notebook holds is taken out.
Then ``copydetect`` compares the sequences of ``K`` tokens that two submissions share.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Tokens in a row that must agree; shorter runs are idioms of the trade.
K = 12
#: Pairs that share this much of the smaller of the two are listed. Measured on the flash lab (tests/grading): three
#: solutions written apart share at most 0.3, a copy with other names, comments, layout and order of cells shares 1.0,
#: one in which half of the exercises were written anew 0.8. At K = 6 the independent ones rise to 0.5.
THRESHOLD = 0.6
#: Less own code than this says nothing.
LEAST_TOKENS = 80
MAX_CHARACTERS = 60_000  # of one submission; a solved lab has 8,000
MAX_PAIRS = 25

_CELL = re.compile(r"^# ---- cell [^\n]*\n?", re.MULTILINE)
_BORDER = "\n"  # between cells; signs are of the higher planes
#: Names that cannot be chosen: the modules of the labs and of nearly every program.
_MODULES = {"torch", "tl", "triton", "np", "numpy", "math", "F", "nn", "effattn_lab", "effattn_kernels"}


@dataclass(frozen=True)
class Pair:
    """Two submissions that share code.

    Args:
        first, second: the students' keys.
        score: the shared part of the smaller one's own code, 0 to 1.
        tokens: how many tokens are shared.
        marks: for each of the two the shared stretches of its text, as (start, end) in characters, in order.
    """

    first: str
    second: str
    score: float
    tokens: int
    marks: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class _Print:
    """A submission reduced: copydetect's fingerprint, and where in the text each token stands."""

    name: str
    print: Any
    spans: tuple[tuple[int, int], ...]

    @property
    def own(self) -> int:
        return int(self.print.token_coverage)


def pairs(sources: Mapping[str, str], given: Iterable[str] = (), threshold: float = THRESHOLD) -> list[Pair]:
    """The pairs of ``sources`` whose score is at least ``threshold``, highest first, at most ``MAX_PAIRS``.

    Args:
        sources: student → code of the student's cells, each after a line ``# ---- cell N``. What follows
            ``MAX_CHARACTERS`` is not compared.
        given: code that everybody got: the cells of the released notebook.
        threshold: of `Pair.score`.
    """
    from copydetect.detector import compare_files

    known = set().union(*(_grams(text) for text in given))
    prints = [_reduced(name, text[:MAX_CHARACTERS], known) for name, text in sorted(sources.items())]
    prints = [p for p in prints if p.own >= LEAST_TOKENS]
    scored = []
    for n, one in enumerate(prints):
        for two in prints[n + 1 :]:
            score = _score(one, two)
            if score >= threshold:
                scored.append((-score, one.name, two.name, one, two))
    found = []
    for _, _, _, one, two in sorted(scored, key=lambda entry: entry[:3])[:MAX_PAIRS]:
        tokens, _, slices = compare_files(one.print, two.print)
        marks = (_marks(one, slices[0]), _marks(two, slices[1]))
        found.append(Pair(one.name, two.name, _score(one, two), int(tokens), marks))
    return found


def _score(one: _Print, two: _Print) -> float:
    """copydetect's similarity of the smaller of the two, without the marks: a tenth of the time."""
    smaller = one if one.own <= two.own else two
    common = one.print.hashes & two.print.hashes
    # Every sequence in common covers at most K tokens: most pairs end here.
    if len(common) * K * 5 < smaller.own:
        return 0.0
    at = sorted(position for gram in common for position in smaller.print.hash_idx[gram])
    covered = sum(min(K, after - before) for before, after in itertools.pairwise(at)) + K
    return min(1.0, covered / smaller.own)


def _reduced(name: str, text: str, known: set[int]) -> _Print:
    from copydetect.detector import CodeFingerprint
    from copydetect.utils import get_token_coverage

    cells = sorted(_tokens(text, start, end) for start, end in _cells(text))
    signs = _BORDER.join(cell for cell, _ in cells)
    spans = [span for _, spans in cells for span in (*spans, (0, 0))]  # (0, 0): the border
    # A window of 1 keeps every sequence: the choice among them depends on Python's hash, new in each process.
    made = CodeFingerprint(name, K, 1, filter=False, fp=io.StringIO(signs, newline=""))
    # Released code is taken out here and not by copydetect's own `boilerplate`, which expects that no sequence
    # occurs twice in a document. Sequences over the border of two cells say nothing. And Python's own integers:
    # sets of NumPy's are several times slower.
    made.hash_idx = {
        int(gram): kept
        for gram, at in made.hash_idx.items()
        if gram not in known and (kept := [int(n) for n in at if _BORDER not in signs[n : n + K]])
    }
    made.hashes = set(made.hash_idx)
    made.token_coverage = get_token_coverage(made.hash_idx, K, len(signs)) if made.hash_idx else 0
    return _Print(name, made, tuple(spans))


def _grams(text: str) -> set[int]:
    signs = _tokens(text, 0, len(text))[0]
    return {hash(signs[n : n + K]) for n in range(len(signs) - K + 1)}


def _cells(text: str) -> list[tuple[int, int]]:
    """(start, end) of each cell."""
    heads = list(_CELL.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return [(head.end(), end) for head, end in zip(heads, ends)] or [(0, len(text))]


def _tokens(text: str, start: int, end: int) -> tuple[str, tuple[tuple[int, int], ...]]:
    """One sign a token, and where the token stands in ``text``."""
    from pygments.token import Comment, Error, Name, Number, String, Text

    signs: list[str] = []
    spans: list[tuple[int, int]] = []
    before = ""
    for offset, kind, value in _lexer().get_tokens_unprocessed(text[start:end]):
        if kind in Text or kind in Comment or kind in String.Doc or kind in Error or not value.strip():
            continue
        if kind in String:
            word = "string"
        elif kind in Number:
            word = "number"
        elif kind in Name and before != "." and kind not in Name.Builtin and value not in _MODULES:
            word = "name"
        else:
            word = value
        span = (start + offset, start + offset + len(value))
        if word == "string" and before == "string":  # its quotes and its parts are tokens of their own
            spans[-1] = (spans[-1][0], span[1])
        elif word not in (";", "\\"):
            signs.append(chr(0x10000 + zlib.crc32(word.encode("utf-8", "replace")) % 0xF0000))
            spans.append(span)
        before = word
    return "".join(signs), tuple(spans)


@functools.cache
def _lexer() -> Any:
    from pygments.lexers.python import PythonLexer

    return PythonLexer()


def _marks(printed: _Print, slices: Any) -> tuple[tuple[int, int], ...]:
    """copydetect's slices of tokens as stretches of the text, in order, joined where they touch."""
    stretches = sorted(
        printed.spans[token]
        for first, last in zip(*slices)
        for token in range(int(first), min(int(last), len(printed.spans)))
    )
    joined: list[tuple[int, int]] = []
    for start, end in stretches:
        if joined and start - joined[-1][1] <= 1:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)
