"""What a student gets back: a page to read and the same as data. Never a hidden input or an expected value.

The page is a file of its own: no script runs in it and nothing is loaded. All that comes from the student is escaped,
its invisible characters are written out, and its length is limited.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from effattn_lab.grading.model import FORMAT, Assignment, ExerciseResult, StudentResult, Verdict
from effattn_lab.grading.page import document
from effattn_lab.grading.release_text import due_words, late_words
from effattn_lab.grading.text import escaped, number, plural

_LINE, _TEXT = 400, 3_000  # characters of a sentence, of an error
_MOST = 100  # entries of a list

_STATUS = {
    "passed": "passed: every property holds",
    "failed": "a property does not hold",
    "not written": "not written: the blank is empty",
    "missing": "missing: this function was not found",
    "stopped": "stopped: it crashed, or took too long or too much memory",
}


def page(assignment: Assignment, result: StudentResult) -> str:
    """The student's feedback as one HTML page."""
    parts = [f"<h1>{escaped(assignment.title)}</h1>", _summary(assignment, result)]
    parts += [
        f'<section class="exercise" id="e{n}">{_exercise(exercise)}</section>'
        for n, exercise in enumerate(result.exercises)
    ]
    parts.append(_checks(result))
    parts.append(_replays(result))
    credit = "An exercise earns its points when every property holds, else nothing."
    if assignment.credit == "properties":
        credit = "An exercise earns points in proportion to the properties that hold."
    parts.append(
        f'<p class="soft">{credit} Graded on hidden inputs, with effattn-lab '
        f"{escaped(assignment.version)}. They are of the same kinds as those of the self-checks.</p>"
    )
    return document(f"{assignment.title}: {result.name}", "\n".join(part for part in parts if part))


def data(assignment: Assignment, result: StudentResult) -> dict[str, Any]:
    """The same for programs, made of JSON's types. Texts are as they came: whoever shows them must escape them."""
    return {
        "format": FORMAT,
        "title": assignment.title,
        "version": assignment.version,
        "student": result.student,
        "name": result.name,
        "submitted": result.submitted,
        "due": assignment.due.isoformat() if assignment.due else None,
        "raw": result.raw,
        "late_minutes": result.late_minutes,
        "late_percent": result.late_percent,
        "penalty": result.penalty,
        "total": result.total,
        "possible": assignment.points,
        "exercises": [
            {
                "id": e.id,
                "status": e.status,
                "points": e.points,
                "possible": e.possible,
                "properties": [
                    {
                        "property": v.property,
                        "passed": v.passed,
                        "detail": v.detail[:_LINE],
                        "hint": v.hint[:_LINE],
                    }
                    for v in e.verdicts[:_MOST]
                ],
                "cause": e.cause[:_LINE],
                "error": e.error[:_TEXT],
            }
            for e in result.exercises
        ],
        "changed_checks": list(result.changed_checks[:_MOST]),
        "cells_that_do_not_run": [
            {
                "lab": r.lab,
                "ran": r.ran,
                "failed": [[n, t[:_LINE]] for n, t in r.failed[:_MOST]],
                "note": r.note,
            }
            for r in result.replays
        ],
        "problems": list(result.problems[:_MOST]),
    }


# ---- parts of the page -------------------------------------------------------------------------------------


def _summary(assignment: Assignment, result: StudentResult) -> str:
    possible = assignment.points
    passed = sum(e.status == "passed" for e in result.exercises)
    lines = [
        f"<p>{escaped(result.name, 100)}</p>",
        f'<p class="total"><strong>{number(result.total)} of {number(possible)} points</strong>, '
        f"{passed} of {plural(len(result.exercises), 'exercise')} passed</p>",
    ]
    if result.problems:
        lines += ["<h2>About what you handed in</h2>", _list(result.problems)]
    lines.append("<h2>How the total comes about</h2>")
    rows = [
        f'<tr><th scope="row"><a href="#e{n}">{escaped(_title(e.id))}</a></th>'
        f'<td class="word">{escaped(e.status)}</td>'
        f'<td class="n">{number(e.points)} of {number(e.possible)}</td></tr>'
        for n, e in enumerate(result.exercises)
    ]
    rows.append(f'<tr><th scope="row" colspan="2">Together</th><td class="n">{number(result.raw)}</td></tr>')
    if result.late_percent:
        rows.append(
            f'<tr><th scope="row" colspan="2">Late: {number(result.late_percent)} % of {number(result.raw)}</th>'
            f'<td class="n">−{number(result.penalty)}</td></tr>'
            f'<tr><th scope="row" colspan="2">Total</th><td class="n">{number(result.total)}</td></tr>'
        )
    head = '<tr><th scope="col">exercise</th><th scope="col">result</th><th scope="col" class="n">points</th></tr>'
    lines.append(f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
    lines.append(f"<p>{_time(assignment, result)}</p>")
    return "\n".join(lines)


def _time(assignment: Assignment, result: StudentResult) -> str:
    handed = "Nothing says when this was handed in."
    if result.submitted:
        try:
            at = datetime.fromisoformat(result.submitted)
            zone = assignment.due.tzinfo if assignment.due else None
            handed = f"Handed in {due_words(at.astimezone(zone))}."
        except (ValueError, OverflowError):
            handed = f"Handed in {escaped(result.submitted, 40)}."
    if not assignment.due:
        return f"{handed} There was no due date."
    due = f"Due {due_words(assignment.due)}."
    rule = late_words(assignment.late)
    if result.late_minutes <= 0 and not result.submitted:
        return f"{handed} {due} Nothing was taken off."
    if result.late_minutes <= 0:
        return f"{handed} {due} Not late."
    late = f"That is {_duration(result.late_minutes)} late."
    if not result.late_percent:
        return f"{handed} {due} {late} {rule} Nothing was taken off."
    days = -(-timedelta(minutes=result.late_minutes) // timedelta(days=1))
    worked = (
        f"{plural(days, 'day')} begun: {number(result.late_percent)} % of {number(result.raw)} points is "
        f"{number(result.penalty)}."
    )
    return f"{handed} {due} {late} {rule} {worked}"


def _duration(minutes: float) -> str:
    whole = max(1, round(minutes))
    days, rest = divmod(whole, 24 * 60)
    hours, left = divmod(rest, 60)
    parts = [plural(n, what) for n, what in ((days, "day"), (hours, "hour"), (left, "minute")) if n]
    return " ".join(parts)


def _exercise(exercise: ExerciseResult) -> str:
    number_ = f"{number(exercise.points)} of {number(exercise.possible)}"
    good = exercise.status == "passed"
    status = escaped(_STATUS.get(exercise.status, exercise.status))
    parts = [
        f'<h2>{escaped(_title(exercise.id))}</h2><p class="soft"><code>{escaped(exercise.id)}</code></p>',
        f'<p><span class="{"good" if good else "bad"}">{status}</span>; {number_} points</p>',
    ]
    if exercise.cause:
        parts.append(f"<p><strong>Likely cause.</strong> {escaped(exercise.cause, _LINE)}</p>")
    if exercise.error:
        heading = "Why" if exercise.status == "missing" else "What your code raised"
        parts.append(f"<h3>{heading}</h3><pre>{escaped(exercise.error, _TEXT, lines=True)}</pre>")
    if exercise.verdicts:
        held = sum(v.passed for v in exercise.verdicts)
        parts.append(f"<h3>Properties: {held} of {len(exercise.verdicts)} hold</h3>")
        items = "".join(_property(v) for v in exercise.verdicts[:_MOST])
        parts.append(f'<ul class="properties">{items}</ul>')
    return "\n".join(parts)


def _property(verdict: Verdict) -> str:
    sign, word, kind = ("✓", "holds", "good") if verdict.passed else ("✗", "does not hold", "bad")
    parts = [f'<span class="{kind}" role="img" aria-label="{word}">{sign}</span> {escaped(verdict.property)}']
    if not verdict.passed:
        if verdict.detail:
            parts.append(f"<div>{escaped(verdict.detail, _LINE)}</div>")
        if verdict.hint:
            parts.append(f"<div>Hint: {escaped(verdict.hint, _LINE)}</div>")
    return f"<li>{''.join(parts)}</li>"


def _checks(result: StudentResult) -> str:
    if not result.changed_checks:
        return ""
    return (
        "<h2>Changed self-checks</h2><p>These cells are not as they were released. Points do not depend on them; "
        "what they print was ignored. Cells are counted from the top, text included.</p>"
        + _list(result.changed_checks)
    )


def _replays(result: StudentResult) -> str:
    parts = []
    for replay in result.replays:
        if not replay.failed and not replay.note:
            continue
        parts.append(f"<h3>{escaped(replay.lab)}: {plural(replay.ran, 'cell')} ran</h3>")
        if replay.note:
            parts.append(f"<p>{escaped(replay.note, _LINE)}</p>")
        if replay.failed:
            parts.append(_list(f"Cell {n}: {text}" for n, text in replay.failed))
    if not parts:
        return ""
    return (
        "<h2>Cells that do not run</h2><p>Your notebook, run from the top. For your information: no points. Cells "
        "are counted from the top, text included.</p>" + ("".join(parts))
    )


def _list(texts: Iterable[str]) -> str:
    entries = list(texts)
    items = "".join(f"<li>{escaped(text, _LINE)}</li>" for text in entries[:_MOST])
    more = f"<li>and {len(entries) - _MOST} more</li>" if len(entries) > _MOST else ""
    return f"<ul>{items}{more}</ul>"


@functools.cache
def _title(exercise_id: str) -> str:
    """The exercise's own title, its id where this version of the package does not know it."""
    from effattn_lab.exercises import get

    try:
        title = get(exercise_id).title
        return title[:1].upper() + title[1:]
    except ValueError:
        return exercise_id
