"""Numeric drills: a question with fresh numbers, its answer, and what each typical slip would have given.

A drill of ``drills.yml`` is a template: parameters with the values they may take, the question, and *expressions*
over the package's cost model (`effattn_lab.interview.expressions`) for the answer and for each slip. Nothing is
computed anywhere else: the practice page receives drawn instances with answers and slips, and only compares.

In texts ``{name}`` is a parameter as a reader sees it (``8,192``); in expressions it is the bare value (``8192``).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from effattn_lab.interview import expressions
from effattn_lab.interview.bank import LEVELS

DRILLS = Path(__file__).with_name("drills.yml")

#: Units by dimension, each with its size in the dimension's first unit. The page reads answers with this table.
UNITS: dict[str, dict[str, float]] = {
    "bytes": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15,
              "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40, "PiB": 2.0**50},
    "flops": {"FLOP": 1, "kFLOP": 1e3, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18},
    "time": {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9, "min": 60, "h": 3600},
    "intensity": {"FLOP/B": 1},
    "number": {"": 1, "×": 1, "%": 0.01, "tokens": 1, "sequences": 1},
    "money": {"$": 1},
}  # fmt: skip
_DIMENSION = {unit: name for name, units in UNITS.items() for unit in units}
# Decimal and binary prefix of one power: mixing them up is off by 1.024 to that power.
_PAIRS = (("kB", "KiB"), ("MB", "MiB"), ("GB", "GiB"), ("TB", "TiB"))
_FIELD = re.compile(r"\{(\w+)\}")
_TEXT = {"type": "string", "minLength": 1}
_EXPRESSIONS = {"type": "object", "additionalProperties": _TEXT}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["id", "topic", "level", "title", "section", "parameters", "ask", "answer", "formula", "worked",
                 "slips"],
    "properties": {
        "id": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
        "topic": {"type": "string", "pattern": "^[a-z_]+/[a-z_]+$"},
        "level": {"enum": list(LEVELS)},
        "title": _TEXT,
        "section": {"type": "string", "pattern": "^[a-z_]+/[a-z_]+#[A-Za-z0-9_-]+$"},
        "parameters": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": "array", "minItems": 1, "items": {"type": ["number", "string"]}},
        },
        "let": _EXPRESSIONS,
        "keep": _TEXT,
        "ask": _TEXT,
        "answer": {
            "type": "object",
            "additionalProperties": False,
            "required": ["expr", "unit"],
            "properties": {
                "expr": _TEXT,
                "unit": {"enum": list(_DIMENSION)},
                "rel_tol": {"type": "number", "minimum": 0, "maximum": 0.05},
            },
        },
        "formula": _TEXT,
        "worked": _TEXT,
        "slips": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["expr", "say"],
                "properties": {"expr": _TEXT, "say": _TEXT},
            },
        },
    },
}  # fmt: skip


class DrillError(ValueError):
    """A drill is wrong; the message names the file, the drill and the field."""


@dataclass(frozen=True)
class Slip:
    """A typical mistake: `expr` is what it would give, `say` names it to the learner."""

    expr: str
    say: str


@dataclass(frozen=True)
class Instance:
    """One drill with numbers put in.

    Attributes:
        texts: parameter → what a reader sees.
        answer: in the first unit of the drill's dimension: bytes, FLOPs, seconds, FLOP/B, dollars or a number.
        shown: the answer in the unit that was asked for, bytes in both prefixes.
        slips: index into the drill's slips, and the value that this slip gives. Those that nobody could tell from
            the answer, or from an earlier slip, are left out.
    """

    texts: dict[str, str]
    answer: float
    shown: str
    slips: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Drill:
    """A template. `formula` is Markdown; `ask`, `worked` and the slips are plain text with ``{name}`` fields."""

    id: str
    topic: str
    level: str
    title: str
    section: str
    parameters: dict[str, tuple[Any, ...]]
    let: dict[str, str]
    keep: str | None
    ask: str
    expr: str
    unit: str
    rel_tol: float
    formula: str
    worked: str
    slips: tuple[Slip, ...]

    @property
    def dimension(self) -> str:
        """Key of `UNITS`."""
        return _DIMENSION[self.unit]

    @property
    def fields(self) -> set[str]:
        """Names that a reader sees."""
        return set(_FIELD.findall(" ".join([self.ask, self.worked, *(slip.say for slip in self.slips)])))

    def combinations(self) -> Iterator[dict[str, Any]]:
        """All values of the parameters that go together (`keep` above 0)."""
        names = list(self.parameters)
        for values in itertools.product(*self.parameters.values()):
            chosen = dict(zip(names, values))
            if self.keep is None or self._value(self.keep, self.bound(chosen)) > 0:
                yield chosen

    def bound(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters and everything under ``let``, which may use what stands before it."""
        bound = dict(chosen)
        for name, expr in self.let.items():
            bound[name] = _whole(self._value(expr, bound))
        return bound

    def instance(self, chosen: Mapping[str, Any]) -> Instance:
        """The drill with these parameters.

        Raises:
            DrillError: an expression fails, or the answer is not a positive number.
        """
        bound = self.bound(chosen)
        answer = self._value(self.expr, bound)
        if answer <= 0:
            raise DrillError(f"{self.id}: answer: expected a positive number, got {answer!r} for {chosen}")
        kept: list[tuple[int, float]] = []
        for index, slip in enumerate(self.slips):
            value = self._value(slip.expr, bound)
            others = (answer, *(other for _, other in kept))
            if all(distinct(value, other, self.rel_tol) for other in others):
                kept.append((index, value))
        texts = {name: _text(value) for name, value in bound.items()}
        return Instance(texts, answer, shown(answer, self.unit), tuple(kept))

    def draw(self, count: int = 60, seed: int = 0) -> list[Instance]:
        """At most `count` different instances, the same for the same `seed`."""
        combinations = list(self.combinations())
        chosen = random.Random(f"{self.id} {seed}").sample(combinations, min(count, len(combinations)))
        return [self.instance(values) for values in chosen]

    def mixed_prefixes(self) -> list[tuple[float, str]]:
        """For bytes: the factors by which decimal and binary prefixes differ, and what to say of each."""
        if self.dimension != "bytes":
            return []
        out = []
        for power, (decimal, binary) in enumerate(_PAIRS, start=1):
            ratio = 1.024**power
            percent = f"{100 * (ratio - 1):.1f} %"
            for factor, said, meant in ((ratio, binary, decimal), (1 / ratio, decimal, binary)):
                out.append((factor, f"Right digits, wrong prefix: it is that many {meant}, and you said {said}. They "
                                    f"differ by {percent}."))  # fmt: skip
        return out

    def _value(self, expr: str, bound: Mapping[str, Any]) -> float:
        try:
            return expressions.evaluate(_fill(expr, bound))
        except (ValueError, KeyError) as error:
            raise DrillError(f"{self.id}: {expr!r} with {dict(bound)}: {error}") from error


def distinct(a: float, b: float, rel_tol: float) -> bool:
    """Whether no number is within `rel_tol` of both."""
    return abs(a - b) > rel_tol * (abs(a) + abs(b))


def shown(value: float, unit: str) -> str:
    """`value` (in the dimension's first unit) in `unit`, four digits; bytes with the other prefix too."""
    if unit == "$":
        return f"${value:,.2f}" if value >= 100 else f"${value:.3g}"
    text = _scaled(value, unit)
    for pair in _PAIRS:
        if unit in pair:
            text += f" = {_scaled(value, pair[1 - pair.index(unit)])}"
    return text


def load(path: Path | str = DRILLS) -> list[Drill]:
    """The drills, in the file's order.

    Raises:
        DrillError: the file cannot be read, or an entry is wrong.
    """
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DrillError(f"{path}: cannot be read: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise DrillError(f"{path}: expected a list of drills, got {type(entries).__name__}")
    drills: list[Drill] = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("id", f"drill {number}") if isinstance(entry, dict) else f"drill {number}"
        errors = sorted(_validator().iter_errors(entry), key=lambda e: [str(p) for p in e.absolute_path])
        if errors:
            field = ".".join(str(part) for part in errors[0].absolute_path) or "(the entry)"
            raise DrillError(f"{path}: {name}: field {field!r}: {errors[0].message[:200]}")
        if any(drill.id == name for drill in drills):
            raise DrillError(f"{path}: {name}: field 'id': used twice")
        drills.append(_drill(entry))
        _check_fields(drills[-1], path)
    return drills


def page_data(count: int = 60) -> list[dict[str, Any]]:
    """What the practice page needs of every drill, JSON-ready; keys are short, for rows are many."""
    return [
        {
            "id": f"numeric/{drill.id}",
            "ask": drill.ask,
            "worked": drill.worked,
            "unit": drill.unit,
            "dimension": drill.dimension,
            "tol": drill.rel_tol,
            "says": [slip.say for slip in drill.slips],
            "mixed": drill.mixed_prefixes(),
            "instances": [
                {
                    "p": {name: text for name, text in i.texts.items() if name in drill.fields},
                    "a": i.answer,
                    "s": i.shown,
                    "w": [list(slip) for slip in i.slips],
                }
                for i in drill.draw(count)
            ],
        }
        for drill in load()
    ]


def _drill(entry: dict[str, Any]) -> Drill:
    return Drill(
        id=entry["id"],
        topic=entry["topic"],
        level=entry["level"],
        title=entry["title"],
        section=entry["section"].split("#")[1],
        parameters={name: tuple(values) for name, values in entry["parameters"].items()},
        let=dict(entry.get("let", {})),
        keep=entry.get("keep"),
        ask=" ".join(entry["ask"].split()),
        expr=entry["answer"]["expr"],
        unit=entry["answer"]["unit"],
        rel_tol=float(entry["answer"].get("rel_tol", 0.01)),
        formula=entry["formula"].strip(),
        worked=" ".join(entry["worked"].split()),
        slips=tuple(Slip(s["expr"], " ".join(s["say"].split())) for s in entry["slips"]),
    )


def _check_fields(drill: Drill, path: Path) -> None:
    """Every ``{name}`` is known where it stands."""
    known = set(drill.parameters)
    for name, expr in drill.let.items():
        _known(expr, known, f"{path}: {drill.id}: field 'let.{name}'")
        known.add(name)
    texts = {"ask": drill.ask, "answer.expr": drill.expr, "keep": drill.keep or ""}
    texts |= {f"slips[{i}]": f"{s.expr} {s.say}" for i, s in enumerate(drill.slips)}
    for field, text in texts.items():
        _known(text, known, f"{path}: {drill.id}: field {field!r}")
    _known(drill.worked, known | {"answer"}, f"{path}: {drill.id}: field 'worked'")
    # Above this, decimal and binary kilobytes could not be told apart.
    if drill.dimension == "bytes" and drill.rel_tol > 0.011:
        raise DrillError(f"{path}: {drill.id}: field 'answer.rel_tol': expected at most 0.011 for bytes, "
                         f"got {drill.rel_tol}")  # fmt: skip


def _known(text: str, known: set[str], where: str) -> None:
    unknown = sorted(set(_FIELD.findall(text)) - known)
    if unknown:
        raise DrillError(f"{where}: unknown {unknown[0]!r}; expected one of {', '.join(sorted(known))}")


def _fill(expr: str, bound: Mapping[str, Any]) -> str:
    def bare(match: re.Match[str]) -> str:
        value = bound[match[1]]
        return f"({value!r})" if isinstance(value, int | float) and value < 0 else str(value)

    return _FIELD.sub(bare, expr)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return _digits(value).replace("-", "−")


def _digits(value: float) -> str:
    """Four significant digits, no exponent: ``1,234,000``, ``17.18``, ``0.003906``."""
    if value == 0:
        return "0"
    places = 3 - math.floor(math.log10(abs(value)))
    text = f"{round(value, places):,.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scaled(value: float, unit: str) -> str:
    number = _digits(value / UNITS[_DIMENSION[unit]][unit])
    return f"{number} {unit}".rstrip()


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_SCHEMA)
