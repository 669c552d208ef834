"""``effattn report``: how a class did, as one page: by exercise, by property, and submissions that look alike."""

from __future__ import annotations

import argparse
import base64
import json
import os
import stat
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from effattn_lab._atomic import write_atomic
from effattn_lab.grading.model import Assignment, StudentResult, source_digest
from effattn_lab.grading.page import document
from effattn_lab.grading.release import load_assignment
from effattn_lab.grading.text import escaped, number, plural

PAGE = "report.html"
_MAX_RESULT = 5_000_000
_MAX_SOURCE = 1_000_000
_SHOWN = 20_000  # characters of one side of a pair
_MOST = 200  # rows of a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    parser.add_argument("results", metavar="RESULTS", help="folder that `effattn grade --out` wrote")
    parser.add_argument(
        "--similar",
        type=float,
        metavar="SHARE",
        help="list pairs of submissions that share this much of their own code, 0.3 to 1; default 0.6",
    )


def run(args: argparse.Namespace) -> int:
    """Write ``RESULTS/report.html``; returns 0. ValueError says what is wrong with the folder."""
    from effattn_lab.grading.similarity import THRESHOLD

    threshold = THRESHOLD if args.similar is None else args.similar
    if not 0.3 <= threshold <= 1:
        raise ValueError(f"--similar: expected a share from 0.3 to 1, got {threshold:g}")
    folder = Path(args.results)
    assignment, results = load_results(folder)
    print(f"{plural(len(results), 'student')}; comparing their code ...", flush=True)
    complete = is_complete(folder)
    if not complete:
        print("note: the run is not finished; this is what is graded so far")
    text = page(assignment, results, load_sources(folder, results), threshold, complete=complete)
    path = folder / PAGE
    write_atomic(path, text.encode())
    totals = [result.total for result in results]
    print(f"{path}: mean {number(round(statistics.fmean(totals), 2))} of {number(assignment.points)} points")
    return 0


def load_results(folder: Path) -> tuple[Assignment, list[StudentResult]]:
    """The assignment and the results in a folder that ``effattn grade`` wrote, sorted by student."""
    students = folder / "students"
    if not students.is_dir():
        raise ValueError(f"RESULTS: expected a folder that `effattn grade` wrote, got {str(folder)!r}")
    assignment = load_assignment(folder)
    results = []
    for path in sorted(students.glob("*.json")):
        try:
            results.append(StudentResult.from_json(json.loads(_text(path, _MAX_RESULT))))
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            raise ValueError(f"{path.name}: {error}") from None
    if not results:
        raise ValueError(f"RESULTS: no graded student in {str(students)!r}")
    return assignment, sorted(results, key=lambda result: result.student)


def is_complete(folder: Path) -> bool:
    """Did ``effattn grade`` reach its end? True where nothing says so."""
    try:
        record = json.loads(_text(folder / "run.json", _MAX_RESULT))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(record, dict) or record.get("complete") is not False


def load_sources(folder: Path, results: Iterable[StudentResult]) -> dict[str, str]:
    """Student → code of the student's own cells, for those that have any."""
    found = {}
    for result in results:
        path = folder / "sources" / f"{result.student}.py"
        if path.is_file():
            found[result.student] = _text(path, _MAX_SOURCE)
    return found


def page(
    assignment: Assignment,
    results: Sequence[StudentResult],
    sources: Mapping[str, str],
    threshold: float,
    *,
    complete: bool = True,
) -> str:
    """The report as one HTML page.

    Args:
        assignment: what was graded.
        results: at least one.
        sources: student → own code, cells after lines ``# ---- cell N``.
        threshold: which pairs are listed, see `similarity.pairs`.
        complete: False where students are still to be graded.
    """
    from effattn_lab.grading import report_pictures as pictures

    parts = [
        f"<h1>{escaped(assignment.title)}: how the class did</h1>",
        _summary(assignment, results),
        "" if complete else "<p><strong>The run is not finished: this is what is graded so far.</strong></p>",
        _attention(results),
        "<h2>Totals</h2>",
        _figure(*pictures.totals(assignment, results), "Totals after the late penalty."),
        "<h2>By exercise</h2>",
        _figure(*pictures.exercises(assignment, results), "How each exercise ended, in % of the students."),
        _exercises(assignment, results),
        "<h2>What fails most often</h2>",
        _failures(results),
        _notes(results),
        "<h2>Submissions that look alike</h2>",
        _alike(assignment, results, sources, threshold),
    ]
    return document(f"{assignment.title}: report", "\n".join(parts), images=True, wide=True)


# ---- parts of the page -------------------------------------------------------------------------------------


def _summary(assignment: Assignment, results: Sequence[StudentResult]) -> str:
    totals = [result.total for result in results]
    late = sum(result.late_percent > 0 for result in results)
    everything = sum(all(e.status == "passed" for e in result.exercises) for result in results)
    return (
        f"<p>{plural(len(results), 'student')}. Mean {number(round(statistics.fmean(totals), 2))}, median "
        f"{number(round(statistics.median(totals), 2))} of {number(assignment.points)} points. "
        f"{everything} passed every exercise; {late} lost points for being late.</p>"
    )


def _attention(results: Sequence[StudentResult]) -> str:
    """Whom to look at first, and why, with links to the students' pages; the sections below have the details."""
    rows = []
    for result in results:
        why = []
        if result.problems:
            why.append(result.problems[0] + (" (and more)" if len(result.problems) > 1 else ""))
        if stopped := [e.id for e in result.exercises if e.status == "stopped"]:
            why.append(f"stopped: {', '.join(stopped)}")
        if result.changed_checks:
            why.append("changed self-checks")
        if not result.raw and any(e.status in ("failed", "stopped") for e in result.exercises):
            why.append("tried, and nothing passed")
        if why:
            page_of = f"feedback/{quote(result.student)}.html"
            rows.append(
                f'<tr><td><a href="{escaped(page_of)}">{escaped(_who(result))}</a></td>'
                f'<td class="n">{number(result.total)}</td><td class="long">{escaped("; ".join(why), 400)}</td></tr>'
            )
    if not rows:
        return "<h2>Whom to look at</h2><p>Nobody: no problems, no changed self-checks.</p>"
    head = (
        '<tr><th scope="col">student</th><th scope="col" class="n">points</th><th scope="col">why</th></tr>'
    )
    more = f"<p>and {len(rows) - _MOST} more</p>" if len(rows) > _MOST else ""
    return (
        '<h2>Whom to look at</h2><div class="scroll" tabindex="0"><table><thead>'
        f"{head}</thead><tbody>{''.join(rows[:_MOST])}</tbody></table></div>{more}"
    )


def _figure(png: bytes, alternative: str, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escaped(alternative, 3_000)}">'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def _exercises(assignment: Assignment, results: Sequence[StudentResult]) -> str:
    rows = []
    for item in assignment.items:
        got = [e for result in results for e in result.exercises if e.id == item.id]
        passed = sum(e.status == "passed" for e in got)
        mean = sum(e.points for e in got) / len(results)
        seconds = statistics.median([e.seconds for e in got] or [0.0])
        rows.append(
            (
                item.id,
                f"{100 * passed / len(results):.0f} %",
                f"{number(round(mean, 2))} of {number(item.points)}",
                f"{seconds:.1f} s",
            )
        )
    return _table(("exercise", "passed", "mean points", "median time"), rows, numbers=(1, 2, 3))


def _failures(results: Sequence[StudentResult]) -> str:
    """Properties by how many students failed them, each with its most frequent hint; then the likely causes."""
    counts: Counter[tuple[str, str]] = Counter()
    hints: dict[tuple[str, str], Counter[str]] = {}
    causes: Counter[str] = Counter()
    for result in results:
        for exercise in result.exercises:
            if exercise.cause:
                causes[exercise.cause] += 1
            for verdict in exercise.verdicts:
                if not verdict.passed:
                    key = (exercise.id, verdict.property)
                    counts[key] += 1
                    hints.setdefault(key, Counter())[verdict.hint] += 1
    if not counts:
        return "<p>No property failed.</p>"
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:15]
    rows = [
        (exercise, name, str(count), f"{100 * count / len(results):.0f} %", _most(hints[exercise, name]))
        for (exercise, name), count in ranked
    ]
    text = _table(("exercise", "property", "students", "share", "hint"), rows, numbers=(2, 3))
    if causes:
        ranked_causes = sorted(causes.items(), key=lambda entry: (-entry[1], entry[0]))[:10]
        text += "<h3>Likely causes</h3>" + _table(
            ("exercises", "cause"), [(str(count), cause) for cause, count in ranked_causes], numbers=(0,)
        )
    return text


def _most(hints: Counter[str]) -> str:
    return min(hints, key=lambda hint: (-hints[hint], hint))


def _notes(results: Sequence[StudentResult]) -> str:
    """Who was late, changed self-checks, or handed in what could not be read or run."""
    parts = []
    late = [
        (_who(r), f"{r.late_minutes:.0f} min", f"{number(r.late_percent)} %", number(r.penalty))
        for r in results
        if r.late_minutes > 0
    ]
    if late:
        parts.append(
            "<h2>Late</h2>" + _table(("student", "late", "taken off", "points"), late, numbers=(1, 2, 3))
        )
    for heading, rows in (
        (
            "Changed self-checks",
            [(_who(r), "; ".join(r.changed_checks)) for r in results if r.changed_checks],
        ),
        ("Hand-ins with problems", [(_who(r), "; ".join(r.problems)) for r in results if r.problems]),
    ):
        if rows:
            parts.append(f"<h2>{heading}</h2>" + _table(("student", "what"), rows))
    broken = [
        (_who(r), replay.lab, str(len(replay.failed)), f"cell {replay.failed[0][0]}: {replay.failed[0][1]}")
        for r in results
        for replay in r.replays
        if replay.failed
    ]
    if broken:
        head = ("student", "lab", "cells", "the first")
        parts.append("<h2>Cells that do not run</h2>" + _table(head, broken, numbers=(2,)))
    return "\n".join(parts)


def _alike(
    assignment: Assignment, results: Sequence[StudentResult], sources: Mapping[str, str], threshold: float
) -> str:
    from effattn_lab.grading.similarity import LEAST_TOKENS, MAX_PAIRS, pairs

    found = pairs(sources, given_code(assignment), threshold)
    intro = (
        "<p>Two submissions are listed where the smaller one shares at least "
        f"{100 * threshold:.0f} % of its own code with the other, after names, comments, layout and the order of "
        "cells are set aside and the released code is taken out. <strong>This is a reason to look, not a "
        "finding.</strong> An exercise asks for a few lines, and good solutions of a few lines resemble each "
        "other; two students who both followed the same hints, or both copied what <code>solution(...)</code> "
        "prints, look alike without having met. Look at what is odd in both: the same needless line, the same "
        "mistake.</p>"
        f'<p class="soft">{plural(len(sources), "submission")} compared. Under {LEAST_TOKENS} tokens of own code say '
        "nothing and are left out. Open a pair to see both; what is common is marked.</p>"
    )
    if not found:
        return intro + "<p>No pair was found.</p>"
    names = {result.student: _who(result) for result in results}
    parts = [intro]
    if len(found) == MAX_PAIRS:
        parts.append(f"<p>The {MAX_PAIRS} most similar pairs are shown; there may be more.</p>")
    for pair in found:
        who = [names.get(student, student) for student in (pair.first, pair.second)]
        sides = [
            f"<div><h4>{escaped(name)}</h4><pre><code>{_marked(sources[student], marks)}</code></pre></div>"
            for name, student, marks in zip(who, (pair.first, pair.second), pair.marks)
        ]
        parts.append(
            f"<details><summary>{escaped(who[0])} and {escaped(who[1])}: {100 * pair.score:.0f} %, "
            f'{pair.tokens} tokens</summary><div class="pair">{"".join(sides)}</div></details>'
        )
    return "\n".join(parts)


def given_code(assignment: Assignment) -> list[str]:
    """The released code cells, as far as this checkout still has them; without them more looks common than is."""
    from effattn_lab import notebooks

    cells = []
    for plan in assignment.labs:
        known = {given.digest for given in plan.cells}
        try:
            book = notebooks.student_notebook(plan.lab)
        except (RuntimeError, ValueError):  # an installation without labs; a lab that is gone
            continue
        cells += [c.source for c in book.cells if c.cell_type == "code" and source_digest(c.source) in known]
    return cells


def _marked(text: str, marks: Sequence[tuple[int, int]]) -> str:
    parts = []
    at = 0
    for start, end in marks:
        if start >= _SHOWN:
            break
        end = min(end, _SHOWN)
        parts += [_code(text[at:start]), f"<mark>{_code(text[start:end])}</mark>"]
        at = end
    parts.append(_code(text[at:_SHOWN]))
    return "".join(parts) + ("…" if len(text) > _SHOWN else "")


def _code(text: str) -> str:
    return escaped(text, _SHOWN, lines=True)


def _who(result: StudentResult) -> str:
    """As in the gradebook: key and name."""
    return result.student if result.name == result.student else f"{result.student} ({result.name})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    kinds = [' class="n"' if n in numbers else "" for n in range(len(head))]
    if head[-1] in ("hint", "cause", "what", "the first"):
        kinds[-1] = ' class="long"'
    top = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for name, kind in zip(head, kinds))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escaped(value, 400)}</td>" for value, kind in zip(row, kinds)) + "</tr>"
        for row in rows[:_MOST]
    )
    more = f"<p>and {len(rows) - _MOST} more</p>" if len(rows) > _MOST else ""
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>{more}'


# ---- files -------------------------------------------------------------------------------------------------


def _text(path: Path, most: int) -> str:
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(opened, "rb") as file:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise ValueError(f"{path.name}: expected a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name}: expected at most {most} bytes")
    return data.decode("utf-8", "replace")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="effattn report")
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
