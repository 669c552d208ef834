"""What an assignment, a submission and a result are. Plain data that can be written as JSON and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

#: Version of the files that `effattn release` and `effattn grade` write.
FORMAT = 1

Credit = Literal["all", "properties"]
#: passed, or why not. ``failed``: it ran and a property does not hold. ``not written``: the blank is empty.
#: ``missing``: no function of that name. ``stopped``: it crashed the sandbox, or took too long or too much memory.
Status = Literal["passed", "failed", "not written", "missing", "stopped"]


@dataclass(frozen=True)
class Item:
    """One graded exercise of a lab.

    Args:
        id: ``part/slug/name`` of the exercise.
        function: name of the function that the student writes.
        points: what it is worth.
    """

    id: str
    function: str
    points: float


@dataclass(frozen=True)
class GivenCell:
    """A code cell as it was released: enough to recognise it in a submission.

    Args:
        id: the cell's id.
        digest: `source_digest` of its text.
        role: ``check`` (a self-check), ``blank`` (the student writes here), ``define`` (imports, functions,
            constants: run while grading) or ``show`` (the rest: not run while grading).
        exercise: the exercise that a check cell checks.
    """

    id: str
    digest: str
    role: Literal["check", "blank", "define", "show"]
    exercise: str | None = None


@dataclass(frozen=True)
class LabPlan:
    """One notebook of an assignment: ``lab`` is part/slug, ``file`` the released file's name."""

    lab: str
    file: str
    sha256: str
    items: tuple[Item, ...]
    cells: tuple[GivenCell, ...]


@dataclass(frozen=True)
class LateRule:
    """How lateness lowers a total.

    Args:
        grace_minutes: no penalty up to here.
        percent_per_day: taken off the total for each day begun after that.
        most_percent: never more than this; at 100 a submission can lose everything.
    """

    grace_minutes: float = 10
    percent_per_day: float = 10
    most_percent: float = 50

    def percent(self, late: timedelta) -> float:
        """Per cent taken off for a submission that is this late."""
        if late <= timedelta(minutes=self.grace_minutes):
            return 0.0
        days = -(-late // timedelta(days=1))
        return float(min(self.most_percent, days * self.percent_per_day))


@dataclass(frozen=True)
class Assignment:
    """What was released. ``due`` has a time zone. ``credit`` is ``all`` (points for an exercise whose properties all
    hold) or ``properties`` (points in proportion to the properties that hold)."""

    title: str
    version: str
    labs: tuple[LabPlan, ...]
    due: datetime | None = None
    late: LateRule = field(default_factory=LateRule)
    seed_per_student: bool = False
    credit: Credit = "all"

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(item for lab in self.labs for item in lab.items)

    @property
    def points(self) -> float:
        return sum(item.points for item in self.items)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["due"] = self.due.isoformat() if self.due else None
        return {"format": FORMAT, **data}

    @staticmethod
    def from_json(data: Any) -> Assignment:
        """The reverse of `to_json`. ValueError says which field is wrong."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"assignment: expected format {FORMAT}, got {found!r}")
        try:
            labs = tuple(
                LabPlan(
                    lab["lab"],
                    lab["file"],
                    lab["sha256"],
                    tuple(Item(**item) for item in lab["items"]),
                    tuple(GivenCell(**cell) for cell in lab["cells"]),
                )
                for lab in data["labs"]
            )
            due = datetime.fromisoformat(data["due"]) if data["due"] else None
            return Assignment(
                data["title"],
                data["version"],
                labs,
                due,
                LateRule(**data["late"]),
                bool(data["seed_per_student"]),
                data["credit"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"assignment: a field is missing or wrong ({error})") from error

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Submission:
    """What one student handed in.

    Args:
        student: a key that is unique in the class and safe as a file name.
        name: as the learning platform shows it.
        notebooks: lab → the notebook's bytes; a lab that was not handed in is absent.
        submitted: when, with a time zone; None where nothing tells.
        late_flag: the learning platform itself marked it late (Canvas does).
        problems: what could not be read, in one sentence each (a symbolic link, a broken archive).
        ids: identifiers that an import into the learning platform needs, e.g. ``{"canvas": "123", "moodle": "456"}``.
    """

    student: str
    name: str
    notebooks: Mapping[str, bytes] = field(default_factory=dict)
    submitted: datetime | None = None
    late_flag: bool = False
    problems: tuple[str, ...] = ()
    ids: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        total = hashlib.sha256(self.student.encode())
        for lab in sorted(self.notebooks):
            total.update(f"\0{lab}\0".encode() + hashlib.sha256(self.notebooks[lab]).digest())
        total.update(f"\0{self.submitted}\0{self.late_flag}\0{self.problems}".encode())
        return total.hexdigest()


@dataclass(frozen=True)
class Verdict:
    """One property of an exercise. ``detail`` says what was compared and where it failed; never an expected value."""

    property: str
    passed: bool
    detail: str = ""
    hint: str = ""


@dataclass(frozen=True)
class ExerciseResult:
    """How one exercise went. ``cause`` is the likely mistake, ``error`` the student's own exception."""

    id: str
    status: Status
    points: float
    possible: float
    verdicts: tuple[Verdict, ...] = ()
    cause: str = ""
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Replay:
    """What nbval said of a notebook, from inside the sandbox: information for people, worth no points."""

    lab: str
    ran: int
    failed: tuple[tuple[int, str], ...] = ()  # (number of the cell, what it raised)
    note: str = ""  # why there is nothing, or what was left out


@dataclass(frozen=True)
class StudentResult:
    """Everything about one student's submission.

    Args:
        changed_checks: self-check cells that were edited or deleted, in words.
        late_percent: taken off ``raw``; ``total`` is what remains.
        sealed: hash of the seed that drew the inputs; the seed itself is told when the run is complete.
    """

    student: str
    name: str
    digest: str
    exercises: tuple[ExerciseResult, ...]
    replays: tuple[Replay, ...] = ()
    changed_checks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    submitted: str = ""
    late_minutes: float = 0.0
    late_percent: float = 0.0
    sealed: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)

    @property
    def raw(self) -> float:
        return sum(e.points for e in self.exercises)

    @property
    def penalty(self) -> float:
        return round(self.raw * self.late_percent / 100, 2)

    @property
    def total(self) -> float:
        return round(self.raw - self.penalty, 2)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **asdict(self),
            "raw": self.raw,
            "penalty": self.penalty,
            "total": self.total,
        }

    @staticmethod
    def from_json(data: Any) -> StudentResult:
        """The reverse of `to_json`. ValueError where the file is not one."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("result: not a result file of this version")
        try:
            values = {k: v for k, v in data.items() if k not in ("format", "raw", "penalty", "total")}
            values["exercises"] = tuple(
                ExerciseResult(**{**e, "verdicts": tuple(Verdict(**v) for v in e["verdicts"])})
                for e in data["exercises"]
            )
            values["replays"] = tuple(
                Replay(**{**r, "failed": tuple((int(n), str(t)) for n, t in r["failed"])})
                for r in data["replays"]
            )
            for name in ("changed_checks", "problems"):
                values[name] = tuple(data[name])
            return StudentResult(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"result: a field is missing or wrong ({error})") from error


def source_digest(source: str) -> str:
    """Hash of a cell's text, blind to trailing blanks and to blank lines at its ends."""
    lines = [line.rstrip() for line in source.strip("\n").splitlines()]
    return hashlib.sha256("\n".join(lines).strip("\n").encode()).hexdigest()[:16]
