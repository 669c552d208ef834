"""What in the bank has no evidence, and where do two answers contradict? Tests walk the bank with this.

**Numbers.** One printed in a question, an answer, a rubric or a follow-up must be a result listed under ``numbers``
or an assumption listed under ``given``. Small counts without a unit ("4 heads") and parts of names ("Llama-3-8B",
"fp16") are left alone.

**Claims.** The strong answer, each key point and each follow-up's answer name what shows them: one of the question's
numbers, its proof, a test of the package or a paper.

**One place.** What more than one question uses, and every figure that a paper reports, stands in ``quantities.yml``
alone (`contradictions`).
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from effattn_lab.interview.bank import Evidence, Number, Quantity, Question
from effattn_lab.interview.files import resolve

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


def claims(question: Question) -> Iterator[tuple[str, tuple[Evidence, ...]]]:
    """Every claim of an answer with the evidence it names: the strong answer, the key points, the follow-ups."""
    yield "strong answer", question.answer_by
    yield from zip(question.key_points, question.points_by, strict=True)
    for follow_up in question.follow_ups:
        yield follow_up.answer, follow_up.by


def unbound_claims(question: Question) -> list[str]:
    """Claims that name no evidence at all."""
    return [claim for claim, by in claims(question) if not by]


def cited(question: Question) -> set[str]:
    """Keys of references.bib that claims and numbers of the question rest on."""
    keys = {e.target for _, by in claims(question) for e in by if e.kind == "cite"}
    return keys | {number.source for number in question.numbers if number.source is not None}


def named_tests(question: Question) -> set[str]:
    """Tests that claims of the question rest on, as pytest writes them: ``tests/full/test_flash.py::test_x``."""
    return {e.target for _, by in claims(question) for e in by if e.kind == "test"}


def missing_tests(question: Question, root: Path) -> list[str]:
    """Tests that the question names and that are not defined in the checkout `root`."""
    return sorted(name for name in named_tests(question) if not _defines(root, name))


def contradictions(questions: Iterable[Question], quantities: Mapping[str, Quantity]) -> list[str]:
    """Sentences, one for each place where two answers disagree about a quantity or could come to.

    - A number that prints another value than its quantity has.
    - The same claim with two different computations, or one figure of a paper in two versions.
    - A computation that two questions use, or that repeats a quantity's, without naming the quantity.
    - A reported figure outside ``quantities.yml``, or typed into an expression.
    - Two quantities with one meaning or one computation.
    """
    questions = list(questions)
    found = _double_quantities(quantities)
    users: dict[str, set[str]] = defaultdict(set)
    sayings: dict[str, dict[str, str]] = defaultdict(dict)
    computed = {
        canonical(resolve(q.expr, quantities)): q.id for q in quantities.values() if q.expr is not None
    }
    for question in questions:
        for number in question.numbers:
            where = f"{question.id}: {number.claim!r}"
            if number.quantity is not None:
                quantity = quantities[number.quantity]
                true = number.evaluate() if number.expr is not None else quantity.value
                if true is None or abs(number.value - true) > number.rel_tol * abs(true):
                    found.append(f"{where}: prints {number.value:g}, {quantity.id} is {true:g}")
            else:
                found += [f"{where}: {problem}" for problem in _not_shared(number, computed)]
            form = (number.expr and canonical(number.expr)) or f"{number.value:g} of {number.source}"
            if number.quantity is None:
                users[form].add(question.id)
            others = sayings[_words(number.claim)]
            others.setdefault(form, question.id)
            if len(set(others.values())) > 1 and others[form] == question.id:
                found.append(f"{where}: computed otherwise than in {next(iter(others.values()))}")
    for form, ids in users.items():
        if len(ids) > 1:
            found.append(f"{', '.join(sorted(ids))}: all compute {form}; make it a quantity")
    return found


def canonical(expr: str) -> str:
    """One spelling for expressions that differ in spaces, quotes or brackets only."""
    return ast.unparse(ast.parse(expr.strip(), mode="eval"))


def _not_shared(number: Number, computed: Mapping[str, str]) -> Iterator[str]:
    if number.expr is None:
        yield f"reported by {number.source}, so it belongs in quantities.yml"
        return
    if number.source is not None and not number.uses:
        yield f'computed from figures of {number.source} that are typed in; name them as Q["..."]'
    if canonical(number.expr) in computed:
        yield f"repeats {computed[canonical(number.expr)]}; write q: {computed[canonical(number.expr)]}"


def _double_quantities(quantities: Mapping[str, Quantity]) -> list[str]:
    found: list[str] = []
    seen: dict[str, str] = {}
    for id_, quantity in quantities.items():
        forms = ["meaning " + _words(quantity.meaning)]
        if quantity.expr is not None:
            forms.append("computation " + canonical(resolve(quantity.expr, quantities)))
        for form in forms:
            if form in seen:
                found.append(f"quantities {seen[form]} and {id_}: the same {form.split()[0]}")
            seen.setdefault(form, id_)
    return found


def _words(claim: str) -> str:
    return " ".join(re.findall(r"[\w%.]+", claim.lower()))


def _defines(root: Path, name: str) -> bool:
    path, _, function = name.partition("::")
    if not (root / path).is_file():
        return False
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
