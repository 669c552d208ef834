"""The interview bank: find its files, check them, load them.

A file ``interview/<part>/<slug>.yml`` holds the questions of one mechanism. Its shape is `schema.json`; what a schema
cannot say (ids that match the file, expressions that parse, sources that are listed) is checked here. An error names
the file, the question and the field.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from effattn_lab.interview import expressions

LEVELS = ("junior", "mid", "senior", "staff")
_PACKAGE = Path(__file__).resolve().parent


class BankError(ValueError):
    """A bank file is wrong; the message names the file, the question and the field."""


@dataclass(frozen=True)
class Number:
    """One number of an answer and where it comes from: an expression, a source, or both."""

    claim: str
    value: float
    unit: str
    expr: str | None
    source: str | None
    rel_tol: float

    def evaluate(self) -> float:
        """Value of `expr`. Raises ValueError without one, or if it cannot be evaluated."""
        if self.expr is None:
            raise ValueError(f"number {self.claim!r} has no expr: it is reported by {self.source}")
        return expressions.evaluate(self.expr)


@dataclass(frozen=True)
class FollowUp:
    """What an interviewer asks next, and the answer in a sentence or two."""

    ask: str
    answer: str


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
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise BankError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BankError(f"{file}: not valid YAML: {error}") from None
    _check_schema(data, file)
    topic = f"{file.parent.name}/{file.stem}"
    if data["topic"] != topic:
        raise BankError(f"{file}: field 'topic': expected {topic!r} (the file's path), got {data['topic']!r}")
    questions: list[Question] = []
    for entry in data["questions"]:
        where = f"{file}: {entry['id']}"
        if any(question.id == entry["id"] for question in questions):
            raise BankError(f"{where}: field 'id': already used in this file")
        _check_entry(entry, topic, where)
        questions.append(_question(entry, data, file))
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
            raise ValueError(f"topic: expected one of {', '.join([*sorted(parts), *known])}, got {topic!r}")
        questions = [q for q in questions if q.topic == topic or q.topic.startswith(topic + "/")]
    return [q for q in questions if level is None or q.level == level]


def _question(entry: dict[str, Any], data: dict[str, Any], file: Path) -> Question:
    chapter, section = entry["links"]["section"].split("#")
    return Question(
        id=entry["id"],
        topic=data["topic"],
        topic_title=data["title"],
        level=entry["level"],
        minutes=float(entry.get("minutes", 2)),
        question=entry["question"].strip(),
        red_flag=entry["red_flag"].strip(),
        strong_answer=entry["strong_answer"].strip(),
        key_points=tuple(point.strip() for point in entry["key_points"]),
        follow_ups=tuple(FollowUp(f["ask"].strip(), f["answer"].strip()) for f in entry["follow_ups"]),
        chapter=chapter,
        section=section,
        lab=entry["links"].get("lab"),
        sources=tuple(entry["sources"]),
        given=tuple(entry.get("given", ())),
        numbers=tuple(
            Number(
                claim=n["claim"].strip(),
                value=n["value"],
                unit=n.get("unit", ""),
                expr=n.get("expr"),
                source=n.get("source"),
                rel_tol=n.get("rel_tol", 0.005),
            )
            for n in entry["numbers"]
        ),
        proof=entry.get("proof"),
        file=file,
    )


def _check_entry(entry: dict[str, Any], topic: str, where: str) -> None:
    if not entry["id"].startswith(topic + "/"):
        raise BankError(f"{where}: field 'id': expected it to begin with {topic + '/'!r}")
    for i, number in enumerate(entry["numbers"]):
        field = f"numbers[{i}]"
        if "expr" in number:
            try:
                expressions.parse(number["expr"])
            except ValueError as error:
                raise BankError(f"{where}: field '{field}.expr': {error}") from None
        if "source" in number and number["source"] not in entry["sources"]:
            raise BankError(f"{where}: field '{field}.source': {number['source']!r} is not in 'sources'")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((_PACKAGE / "schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def _check_schema(data: Any, file: Path) -> None:
    errors = sorted(
        _validator().iter_errors(data), key=lambda error: [str(part) for part in error.absolute_path]
    )
    if not errors:
        return
    error = errors[0]
    path = list(error.absolute_path)
    where = str(file)
    if len(path) >= 2 and path[0] == "questions":
        entry = data["questions"][path[1]]
        name = entry.get("id") if isinstance(entry, dict) else None
        where += f": {name or f'question {int(path[1]) + 1}'}"
        path = path[2:]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    raise BankError(f"{where}: {_explain(error, field)}")


def _explain(error: Any, field: str) -> str:
    def inside(names: Iterable[str]) -> str:
        return ", ".join(repr(f"{field}.{name}" if field else name) for name in names)

    match error.validator:
        case "required":
            return f"field {inside(n for n in error.validator_value if n not in error.instance)}: missing"
        case "additionalProperties":
            known = error.schema["properties"]
            extra = inside(str(n) for n in error.instance if n not in known)
            return f"field {extra}: unknown; expected one of {', '.join(known)}"
        case "anyOf":
            return f"field {field!r}: expected 'expr' (how to compute it) or 'source' (who reports it), got neither"
        case "enum":
            return (
                f"field {field!r}: expected one of {', '.join(error.validator_value)}, got {error.instance!r}"
            )
    return f"field {field!r}: {error.message[:300]}" if field else error.message[:300]


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
