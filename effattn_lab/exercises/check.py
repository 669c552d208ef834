"""The self-check of the notebooks: ``check("full/flash/merge", merge)``."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effattn_lab.exercises.core import Exercise, Failure, NotMeasured, Probe
from effattn_lab.exercises.judge import (
    COMMON,
    REPEATABLE,
    UNTOUCHED,
    Run,
    diagnose,
    repeated,
    run,
    touched,
    unwritten,
)
from effattn_lab.exercises.registry import get

_WIDTH = 100


@dataclass(frozen=True)
class Result:
    """Outcome of a check; true when every property holds.

    Args:
        id: the exercise.
        passed: names of the properties that hold.
        failed: names of those that do not.
        not_measured: properties that this machine cannot observe.
        written: False where the blank is still empty.
        report: the printed text.
    """

    id: str
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    not_measured: tuple[str, ...] = ()
    written: bool = True
    report: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return self.written and not self.failed

    def __str__(self) -> str:
        return self.report

    def _ipython_display_(self) -> None:
        """Nothing: the report is printed already, and a notebook would show it a second time."""


def check(exercise_id: str, fn: Callable[..., Any], *, seed: int = 0, hint: int = 0) -> Result:
    """Check a solution and print one line per property.

    Args:
        exercise_id: ``part/slug/name``.
        fn: your function.
        seed: draws other inputs. Default 0.
        hint: 1, 2 or 3 prints that many rungs of hints below the report. Default 0: none.

    Returns:
        a `Result`, true when every property holds. What a failing line says: what was compared, the first
        offending index, the size of the error and a likely cause; never the expected values.
    """
    exercise = get(exercise_id)
    if not callable(fn):
        raise ValueError(f"fn: expected your function, got {type(fn).__name__}")
    result = _examine(exercise, fn, seed, hint)
    _last[exercise_id] = fn, bool(result)
    print(result.report)
    return result


def _examine(exercise: Exercise, fn: Callable[..., Any], seed: int, rungs: int) -> Result:
    device = exercise.device()
    judged: list[tuple[Run, Failure | None]] = []
    for case in exercise.make_inputs(np.random.default_rng(seed)):
        r = run(fn, case, device)
        judged.append((r, r.error or exercise.compare(r.value, exercise.want(case), case)))
        if len(judged) == 1 and unwritten(fn, *judged[0]):
            return _not_yet(exercise)
    failures: dict[str, Failure | None] = dict.fromkeys([*exercise.properties, *COMMON])
    for r, failure in judged:
        failures[r.case.property] = failures[r.case.property] or failure
        failures[UNTOUCHED] = failures[UNTOUCHED] or touched(r)
    for r, _ in judged[:2]:
        failures[REPEATABLE] = failures[REPEATABLE] or repeated(r, run(fn, r.case, device))

    found = (
        diagnose(exercise, [(r.case, r.value, f) for r, f in judged]) if any(f for _, f in judged) else None
    )
    if found is not None and found.mutant.unwritten:
        return _not_yet(exercise)

    # A wrong result is judged first: how it was computed says little about it.
    skipped: dict[str, str] = {}
    if not any(failures.values()):
        for probe in exercise.probes:
            failures[probe.name], skipped[probe.name] = _observe(probe, fn)

    lines = [f"{exercise.id}: {exercise.title}"]
    shown: list[str] = []
    for name, failure in failures.items():
        if failure is not None and failure.kind == "exception" and failure.lines() == shown:
            lines.append(f"  ✗ {name}: the same")
        elif failure is not None:
            shown = failure.lines()
            lines.append(f"  ✗ {name}")
            lines += _wrapped(shown, "      ")
        elif skipped.get(name):
            lines.append(f"  – {name}: {skipped[name]}")
        else:
            lines.append(f"  ✓ {name}")
    failed = tuple(n for n, f in failures.items() if f is not None)
    passed = tuple(n for n in failures if n not in failed and not skipped.get(n))
    if not failed:
        everything = f"All {len(passed)} properties hold."
        lines.append("  All that could be measured holds." if any(skipped.values()) else f"  {everything}")
    else:
        causes = _causes(exercise, failures, found.mutant.hint if found else None)
        if found is not None:
            part = f" of {found.explains} of the {found.failing} wrong results"
            share = "" if found.explains == found.failing else part
            lines += _wrapped([f"Likely cause{share}: {causes[0]}", *causes[1:]], "  ")
        else:
            lines += _wrapped([f"Likely cause: {cause}" for cause in causes], "  ")
        if not rungs:
            lines.append(
                f'  Hints, from a nudge to nearly the code: check("{exercise.id}", ..., hint=1), 2, 3'
            )
    if rungs:
        lines += _rungs(exercise, rungs)
    not_measured = tuple(n for n, why in skipped.items() if why)
    return Result(exercise.id, passed, failed, not_measured, True, "\n".join(lines))


def _observe(probe: Probe, fn: Callable[..., Any]) -> tuple[Failure | None, str]:
    """(failure or None, why it was not measured or "")."""
    try:
        wrong = probe.run(fn)
    except NotMeasured as reason:
        return None, str(reason)
    return (Failure(probe.name, "probe", wrong) if wrong else None), ""


def _causes(exercise: Exercise, failures: dict[str, Failure | None], exact: str | None) -> list[str]:
    """The mistake that reproduces the numbers, or else the generic hint of the first property that fails."""
    generic = {**exercise.properties, **COMMON, **{p.name: p.hint for p in exercise.probes}}
    causes = [exact] if exact else []
    for name, failure in failures.items():
        # Changing an argument has its own cause, whatever else is wrong.
        if failure is not None and (name in COMMON or not causes):
            # An error in one case only has to do with what that case is about.
            some_hold = failure.kind == "exception" and any(failures[n] is None for n in exercise.properties)
            causes.append(generic[name] if some_hold else _by_kind(exercise, failure) or generic[name])
    return causes


def _by_kind(exercise: Exercise, failure: Failure) -> str | None:
    if failure.kind == "alias":
        return "An argument, or a view of it, is handed back as a result: return a new tensor, or clone it."
    if failure.kind == "none":
        return "A branch of the function ends without a return statement."
    if failure.kind == "type":
        return f"The function should be {exercise.signature}."
    if failure.kind == "shape":
        return (
            "A reduction without keepdim, a missing [..., None], or an axis too many. Print the shapes line by "
            f"line; the function should be {exercise.signature}."
        )
    if failure.kind == "dtype":
        return "A cast in between (.half(), .double(), a tensor made without dtype=) changed the type of the result."
    if failure.kind == "exception":
        return f"Python stopped at the line above. The function should be {exercise.signature}."
    return None


def _not_yet(exercise: Exercise) -> Result:
    text = f"{exercise.id}: {exercise.title}\n  ○ not written yet: fill in the blank above, then run this cell again"
    return Result(exercise.id, failed=tuple(exercise.properties), written=False, report=text)


def _wrapped(parts: list[str], indent: str) -> list[str]:
    out: list[str] = []
    for part in parts:
        out += textwrap.wrap(part, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
    return out


def _rungs(exercise: Exercise, upto: int) -> list[str]:
    lines: list[str] = []
    for number, text in enumerate(exercise.hints[:upto], start=1):
        lines.append(f"  Hint {number} of {len(exercise.hints)}:")
        # Code in a hint keeps its line breaks.
        for line in text.splitlines():
            lines += _wrapped([line], "    ") if len(line) > _WIDTH - 4 else ["    " + line]
    return lines


def hint(exercise_id: str, rung: int = 1) -> None:
    """Print the first ``rung`` hints of an exercise: 1 is a nudge, the last is nearly the code."""
    exercise = get(exercise_id)
    if not isinstance(rung, int) or not 1 <= rung <= len(exercise.hints):
        raise ValueError(f"rung: expected 1 to {len(exercise.hints)}, got {rung!r}")
    print("\n".join([f"{exercise.id}: {exercise.title}", *_rungs(exercise, rung)]))


#: The function last checked for an exercise, and whether it passed.
_last: dict[str, tuple[Callable[..., Any], bool]] = {}


def take(exercise_id: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Your function where it passes its check, else the reference; prints which.

    So a lab goes on when one step does not work yet.
    """
    checked, passes = _last.get(exercise_id, (None, False))
    if checked is not fn:
        passes = bool(_examine(get(exercise_id), fn, 0, 0))
    print(f"{exercise_id}: {'yours' if passes else 'the reference (yours does not pass yet)'}")
    return fn if passes else get(exercise_id).solution


def reference(exercise_id: str) -> Callable[..., Any]:
    """A working solution as a function, so that one step does not stop the lab; says that it was taken."""
    exercise = get(exercise_id)
    print(f"Taking the reference for {exercise.id}. Go on with it, and come back to write your own.")
    return exercise.solution


def solution(exercise_id: str) -> None:
    """Print the code of a working solution."""
    exercise = get(exercise_id)
    print(f"# A solution of {exercise.id}; close it and write it from memory.")
    print(exercise.source() if exercise.source else inspect.getsource(exercise.solution))
