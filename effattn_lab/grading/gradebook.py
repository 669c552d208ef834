"""The gradebook as CSV: our own, one for Canvas, one for Moodle.

Canvas reads a row by its ID, else by the login, else by the name, and takes the column whose heading is the
assignment's name; the row "Points Possible" comes first. Moodle's offline grading worksheet is read by its Identifier
("Participant 1234567"), and needs the columns Grade and "Last modified (grade)".
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence

from effattn_lab.grading.model import Assignment, StudentResult
from effattn_lab.grading.text import number, visible

#: Spreadsheets take a cell that begins so for a formula (the wide forms are those of East Asian keyboards).
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")
_CANVAS_ID, _MOODLE_ID = "canvas", "moodle"


def gradebook_csv(assignment: Assignment, results: Iterable[StudentResult]) -> str:
    """One row a student, sorted by key: points by exercise, raw sum, lateness, penalty, total, problems."""
    head = ["student", "name", *(item.id for item in assignment.items)]
    head += ["raw", "late_minutes", "late_percent", "penalty", "total", "possible", "problems"]
    rows = [head]
    for result in _sorted(results):
        points = {exercise.id: exercise.points for exercise in result.exercises}
        rows.append(
            [
                cell(result.student),
                cell(result.name),
                *(number(points.get(item.id, 0.0)) for item in assignment.items),
                *map(number, (result.raw, result.late_minutes, result.late_percent)),
                *map(number, (result.penalty, result.total, assignment.points)),
                cell("; ".join(result.problems), 2_000),
            ]
        )
    return _text(rows)


def canvas_csv(assignment: Assignment, results: Iterable[StudentResult]) -> str:
    """For Gradebook → Import in Canvas. Where the submissions did not come from Canvas, the student's key stands in
    the login column, for Canvas to find."""
    column = cell(assignment.title)
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", column]]
    rows.append(["    Points Possible", "", "", "", "", number(assignment.points)])
    for result in _sorted(results):
        canvas = result.ids.get(_CANVAS_ID, "")
        login = "" if canvas else cell(result.student)
        rows.append([cell(result.name), canvas, "", login, "", number(result.total)])
    return _text(rows)


def moodle_csv(assignment: Assignment, results: Iterable[StudentResult]) -> str:
    """For "Upload grading worksheet" in a Moodle assignment whose feedback types include the offline worksheet.

    Students without a number of Moodle's are left out: the import could not place them. Feedback is HTML there.
    """
    rows = [
        [
            *("Identifier", "Full name", "Email address", "Status", "Grade", "Maximum grade"),
            *("Grade can be changed", "Last modified (submission)", "Last modified (grade)"),
            "Feedback comments",
        ]
    ]
    for result in _sorted(results):
        if participant := result.ids.get(_MOODLE_ID):
            who = [f"Participant {participant}", cell(result.name), "", ""]
            grade = [number(result.total), number(assignment.points)]
            rows.append([*who, *grade, "Yes", "-", "-", _comment(result)])
    return _text(rows)


def cell(text: str, limit: int = 200) -> str:
    """Text for a cell: one line, invisible characters written out, never a formula."""
    shown = visible(text, limit)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown


def _comment(result: StudentResult) -> str:
    """What passed, in one line of HTML."""
    parts = [
        f"{html.escape(visible(e.id, 100))}: {number(e.points)} of {number(e.possible)} ({e.status})"
        for e in result.exercises
    ]
    if result.late_percent:
        late = f"{number(result.late_minutes)} minutes late: {number(result.penalty)} points off"
        parts.append(f"{late} ({number(result.late_percent)} %)")
    return "<br>".join(parts)


def _sorted(results: Iterable[StudentResult]) -> list[StudentResult]:
    return sorted(results, key=lambda result: result.student)


def _text(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
