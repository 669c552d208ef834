"""The interview bank: find its files, check them, load them.

A file ``interview/<part>/<slug>.yml`` holds the questions of one mechanism. Its shape is `schema.json`; what a schema
cannot say (ids that match the file, expressions that parse, sources that are listed, evidence that is there) is
checked here. Quantities that several answers use stand once in ``interview/quantities.yml``. An error names the file,
the question and the field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from effattn_lab.interview import expressions
from effattn_lab.interview.files import (
    BankError,
    Quantity,
    check_schema,
    load_quantities,
    read_yaml,
    referred,
    resolve,
)

__all__ = [
    "LEVELS", "BankError", "Evidence", "FollowUp", "Number", "Quantity", "Question",
    "bank_root", "load", "load_file", "load_quantities", "select", "topics",
]  # fmt: skip
LEVELS = ("junior", "mid", "senior", "staff")
_PACKAGE = Path(__file__).resolve().parent
_MOST_POINTS = 5  # of an ordinary question: more than a listener can tick off in two minutes


@dataclass(frozen=True)
class Number:
    """One number of an answer and where it comes from: an expression, a source, or both.

    `quantity` is its id in ``quantities.yml``, if it is shared; claim, unit, expression and source are then from
    there. ``Q["id"]`` in an expression is written out already; `uses` keeps the ids.
    """

    claim: str
    value: float
    unit: str
    expr: str | None
    source: str | None
    rel_tol: float
    quantity: str | None = None
    uses: tuple[str, ...] = ()

    def evaluate(self) -> float:
        """Value of `expr`. Raises ValueError without one, or if it cannot be evaluated."""
        if self.expr is None:
            raise ValueError(f"number {self.claim!r} has no expr: it is reported by {self.source}")
        return expressions.evaluate(self.expr)


@dataclass(frozen=True)
class Evidence:
    """What a claim rests on.

    Attributes:
        kind: ``"number"`` (one of the question's numbers), ``"proof"`` (its proof), ``"test"`` (of the package) or
            ``"cite"`` (a paper).
        target: the number as printed with its unit (``"128 KiB"``), the test (``"tests/full/test_flash.py::test_x"``)
            or the key in references.bib; empty for a proof.
    """

    kind: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Evidence:
        """From the form in the files: ``number:128 KiB``, ``proof``, ``test:...::...``, ``cite:key``."""
        kind, _, target = text.partition(":")
        return cls(kind, target.strip())


@dataclass(frozen=True)
class FollowUp:
    """What an interviewer asks next, and the answer in a sentence or two."""

    ask: str
    answer: str
    by: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class Question:
    """One interview question with everything needed to judge an answer. Texts are Markdown with ``$`` formulas."""

    id: str
    topic: str
    topic_title: str
    level: str
    minutes: float
    question: str
    red_flag: str
    strong_answer: str
    key_points: tuple[str, ...]
    follow_ups: tuple[FollowUp, ...]
    chapter: str
    section: str
    lab: str | None
    sources: tuple[str, ...]
    given: tuple[float, ...]
    numbers: tuple[Number, ...]
    proof: str | None
    file: Path
    kind: str = "question"
    answer_by: tuple[Evidence, ...] = ()
    points_by: tuple[tuple[Evidence, ...], ...] = ()  # one entry a key point

    @property
    def anchor(self) -> str:
        """Id of the question in a page of the book."""
        return "q-" + re.sub(r"[/_]", "-", self.id)

    def texts(self) -> Iterator[str]:
        """Every text a learner reads, the proof apart."""
        yield from (self.question, self.red_flag, self.strong_answer, *self.key_points)
        for follow_up in self.follow_ups:
            yield from (follow_up.ask, follow_up.answer)
        yield from (number.claim for number in self.numbers)


def bank_root() -> Path:
    """Folder of the bank: ``interview/`` of a checkout, or the copy inside an installed wheel.

    Raises:
        BankError: neither is there.
    """
    checkout = _PACKAGE.parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / "interview").is_dir():
        return checkout / "interview"
    if (_PACKAGE / "bank").is_dir():
        return _PACKAGE / "bank"
    raise BankError(
        f"no interview bank: neither {checkout / 'interview'} nor {_PACKAGE / 'bank'} is a folder"
    )


def load(root: Path | str | None = None) -> list[Question]:
    """All questions, by file name and then in the file's order.

    Args:
        root: folder that holds ``<part>/<slug>.yml``; default `bank_root`.

    Raises:
        BankError: no file, a file that is wrong, or an id used twice.
    """
    root = bank_root() if root is None else Path(root)
    files = sorted(root.glob("*/*.yml"))
    if not files:
        raise BankError(f"{root}: expected <part>/<slug>.yml files, found none")
    questions: list[Question] = []
    seen: dict[str, Path] = {}
    for file in files:
        for question in load_file(file):
            if question.id in seen:
                raise BankError(f"{file}: {question.id}: field 'id': already used in {seen[question.id]}")
            seen[question.id] = file
            questions.append(question)
    return questions


def load_file(file: Path | str) -> list[Question]:
    """Questions of one file. Raises BankError as `load` does."""
    file = Path(file)
    data = read_yaml(file)
    check_schema(data, file)
    quantities = load_quantities(file.parent.parent)
    topic = f"{file.parent.name}/{file.stem}"
    if data["topic"] != topic:
        raise BankError(f"{file}: field 'topic': expected {topic!r} (the file's path), got {data['topic']!r}")
    questions: list[Question] = []
    for entry in data["questions"]:
        where = f"{file}: {entry['id']}"
        if any(question.id == entry["id"] for question in questions):
            raise BankError(f"{where}: field 'id': already used in this file")
        question = _question(entry, data, file, _numbers(entry, quantities, where))
        _check_question(question, where)
        questions.append(question)
    return questions


def topics(questions: Iterable[Question]) -> dict[str, str]:
    """Topic → title, in the order of `questions`."""
    return {question.topic: question.topic_title for question in questions}


def select(
    questions: Iterable[Question], topic: str | None = None, level: str | None = None
) -> list[Question]:
    """Questions of a topic (``full/flash``, or a whole part: ``full``) and a level; None means any.

    Raises:
        ValueError: no question has this topic, or there is no such level; the message lists what there is.
    """
    questions = list(questions)
    if level is not None and level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    if topic is not None:
        topic = topic.strip("/")
        known = topics(questions)
        parts = {name.split("/")[0] for name in known}
        if topic not in known and topic not in parts:
            names = [*sorted(parts), *known]
            near = [name for name in known if name.endswith("/" + topic)] or get_close_matches(
                topic, names, n=1
            )
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"topic: expected one of {', '.join(names)}, got {topic!r}{hint}")
        questions = [q for q in questions if q.topic == topic or q.topic.startswith(topic + "/")]
    return [q for q in questions if level is None or q.level == level]


def _question(
    entry: dict[str, Any], data: dict[str, Any], file: Path, numbers: tuple[Number, ...]
) -> Question:
    chapter, section = entry["links"]["section"].split("#")
    points = [p if isinstance(p, dict) else {"point": p} for p in entry["key_points"]]
    return Question(
        id=entry["id"],
        topic=data["topic"],
        topic_title=data["title"],
        level=entry["level"],
        minutes=float(entry.get("minutes", 2)),
        question=entry["question"].strip(),
        red_flag=entry["red_flag"].strip(),
        strong_answer=re.sub(r"\n+", "\n\n", entry["strong_answer"].strip()),
        key_points=tuple(p["point"].strip() for p in points),
        follow_ups=tuple(
            FollowUp(f["ask"].strip(), f["answer"].strip(), _evidence(f)) for f in entry["follow_ups"]
        ),
        chapter=chapter,
        section=section,
        lab=entry["links"].get("lab"),
        sources=tuple(entry["sources"]),
        given=tuple(entry.get("given", ())),
        numbers=numbers,
        proof=entry.get("proof"),
        file=file,
        kind=entry.get("kind", "question"),
        answer_by=_evidence(entry, "answer_by"),
        points_by=tuple(_evidence(p) for p in points),
    )


def _evidence(entry: dict[str, Any], field: str = "by") -> tuple[Evidence, ...]:
    return tuple(Evidence.parse(text) for text in entry.get(field, ()))


def _numbers(entry: dict[str, Any], quantities: Mapping[str, Quantity], where: str) -> tuple[Number, ...]:
    found = []
    for i, n in enumerate(entry["numbers"]):
        field, id_ = f"numbers[{i}]", n.get("q")
        if id_ is not None and id_ not in quantities:
            raise BankError(f"{where}: field '{field}.q': {id_!r} is not in quantities.yml")
        shared = quantities[id_] if id_ is not None else None
        expr = shared.expr if shared else n.get("expr")
        uses = referred(expr or "")
        try:
            expr = None if expr is None else resolve(expr, quantities)
            if expr is not None:
                expressions.parse(expr)
        except ValueError as error:
            raise BankError(f"{where}: field '{field}.expr': {error}") from None
        found.append(
            Number(
                claim=shared.meaning if shared else n["claim"].strip(),
                value=n["value"],
                unit=shared.unit if shared else n.get("unit", ""),
                expr=expr,
                source=shared.source if shared else n.get("source"),
                rel_tol=n.get("rel_tol", 0.005),
                quantity=id_,
                uses=uses,
            )
        )
    return tuple(found)


def _check_question(question: Question, where: str) -> None:
    if not question.id.startswith(question.topic + "/"):
        raise BankError(f"{where}: field 'id': expected it to begin with {question.topic + '/'!r}")
    if question.kind == "question" and len(question.key_points) > _MOST_POINTS:
        raise BankError(
            f"{where}: field 'key_points': expected at most {_MOST_POINTS} outside a case, "
            f"got {len(question.key_points)}"
        )
    for i, number in enumerate(question.numbers):
        if number.source is not None and number.source not in question.sources:
            raise BankError(f"{where}: field 'numbers[{i}].source': {number.source!r} is not in 'sources'")
    fields = {"answer_by": question.answer_by}
    fields |= {f"key_points[{i}].by": by for i, by in enumerate(question.points_by)}
    fields |= {f"follow_ups[{i}].by": f.by for i, f in enumerate(question.follow_ups)}
    printed = {_printed(n.value, n.unit) for n in question.numbers}
    for field, by in fields.items():
        for evidence in by:
            if problem := _missing(evidence, question, printed):
                raise BankError(f"{where}: field '{field}': {problem}")


def _printed(value: float, unit: str) -> str:
    return f"{value:.12g} {unit}".strip()


def _missing(evidence: Evidence, question: Question, printed: set[str]) -> str | None:
    """What the question lacks that `evidence` names. Whether a test exists, tests say: a wheel has none."""
    match evidence.kind:
        case "number":
            value, _, unit = evidence.target.partition(" ")
            try:
                known = _printed(float(value.replace(",", "")), unit) in printed
            except ValueError:
                known = False
            if not known:
                return f"no number of the question is {evidence.target!r}; there are {', '.join(sorted(printed))}"
        case "proof" if question.proof is None:
            return "the question has no proof"
        case "cite" if evidence.target not in question.sources:
            return f"{evidence.target!r} is not in 'sources'"
    return None
