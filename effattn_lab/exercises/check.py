"""The self-check of the notebooks: ``check("full/flash/merge", merge)``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effattn_lab.exercises.causes import STRUCTURAL, reordered, structural
from effattn_lab.exercises.core import Exercise, Failure, NotMeasured, Probe, UsageError
from effattn_lab.exercises.judge import (
    COMMON,
    REPEATABLE,
    UNTOUCHED,
    Run,
    common_hint,
    diagnose,
    empty_blanks,
    repeated,
    run,
    touched,
)
from effattn_lab.exercises.registry import get
from effattn_lab.exercises.source import Blank, text_of

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
        offending index, the size of the error and a likely cause; never the expected values, except one row where
        they are integers or bools.
    """
    exercise = get(exercise_id)
    if not callable(fn):
        raise UsageError(f"fn: expected your function, got {type(fn).__name__}")
    if isinstance(hint, bool) or hint not in range(len(exercise.hints) + 1):
        raise UsageError(f"hint: expected 0 to {len(exercise.hints)}, got {hint!r}")
    result = _examine(exercise, fn, seed, hint)
    _last[exercise_id] = fn, bool(result)
    print(result.report)
    return result


def _examine(exercise: Exercise, fn: Callable[..., Any], seed: int, rungs: int) -> Result:
    device = exercise.device()
    judged: list[tuple[Run, Failure | None]] = []
    for case in exercise.make_inputs(np.random.default_rng(seed)):
        r = run(fn, case, device, from_scratch=exercise.from_scratch)
        judged.append((r, r.error or exercise.compare(r.value, exercise.want(case), case)))
        empty = empty_blanks(fn, *judged[-1])
        if empty is not None:
            return _not_yet(exercise, empty, rungs)
    failures: dict[str, Failure | None] = dict.fromkeys([*exercise.properties, *COMMON])
    for r, failure in judged:
        failures[r.case.property] = failures[r.case.property] or failure
        failures[UNTOUCHED] = failures[UNTOUCHED] or touched(r)
    for r, _ in judged[:2]:
        failures[REPEATABLE] = failures[REPEATABLE] or repeated(r, run(fn, r.case, device))

    # A wrong result is judged first: how it was computed says little about it.
    skipped: dict[str, str] = {}
    hints = dict(COMMON)
    if not any(failures.values()):
        for probe in exercise.probes:
            failures[probe.name], skipped[probe.name], hints[probe.name] = _observe(probe, fn)

    failed = tuple(n for n, f in failures.items() if f is not None)
    passed = tuple(n for n in failures if n not in failed and not skipped.get(n))
    lines = [f"{exercise.id}: {exercise.title}"]
    if failed:
        lines += _wrapped(_causes(exercise, fn, judged, failures, hints), "  ")
    lines += _listed(failures, skipped)
    if failed:
        lines += [_offer(exercise)] if not rungs else []
    elif any(skipped.values()):
        lines.append("  All that could be measured holds.")
    else:
        lines.append(f"  All {len(passed)} properties hold.")
    lines += _rungs(exercise, rungs)
    not_measured = tuple(n for n, why in skipped.items() if why)
    return Result(exercise.id, passed, failed, not_measured, True, "\n".join(lines))


def _listed(failures: Mapping[str, Failure | None], skipped: Mapping[str, str]) -> list[str]:
    """One line per property; the first failure of each kind is told in full."""
    lines: list[str] = []
    told: dict[str, list[str]] = {}
    for name, failure in failures.items():
        if failure is None:
            lines.append(f"  – {name}: {skipped[name]}" if skipped.get(name) else f"  ✓ {name}")
        elif failure.kind not in told:
            told[failure.kind] = failure.lines()
            lines.append(f"  ✗ {name}")
            lines += _wrapped([*failure.lines(), *([failure.row] if failure.row else [])], "      ")
        else:
            lines += _wrapped([f"✗ {name}: {_again(failure, told[failure.kind])}"], "  ")
    return lines


def _again(failure: Failure, first: list[str]) -> str:
    if failure.lines() == first:
        return "the same"
    if failure.kind == "exception" and _no_digits(failure.lines()) == _no_digits(first):
        return "the same, with other sizes"
    return failure.brief()


def _no_digits(parts: list[str]) -> str:
    return re.sub(r"\d+", "#", " ".join(parts))


def _offer(exercise: Exercise) -> str:
    return f'  Hints, from a nudge to nearly the code: hint("{exercise.id}", 1), then 2 and 3'


def _observe(probe: Probe, fn: Callable[..., Any]) -> tuple[Failure | None, str, str]:
    """(failure or None, why it was not measured or "", what usually causes it)."""
    try:
        wrong = probe.run(fn)
    except NotMeasured as reason:
        return None, str(reason), probe.hint
    sentence, hint = wrong if isinstance(wrong, tuple) else (wrong, probe.hint)
    return (Failure(probe.name, "probe", sentence) if sentence else None), "", hint


def _causes(
    exercise: Exercise,
    fn: Callable[..., Any],
    judged: list[tuple[Run, Failure | None]],
    failures: Mapping[str, Failure | None],
    hints: Mapping[str, str],
) -> list[str]:
    """What to say first: an error or a wrong shape outranks a guess from numbers; a bad guess is worse than none."""
    wrong = [n for n in exercise.properties if failures[n] is not None]
    said: list[str] = []
    if wrong:
        said = _main_cause(exercise, fn, judged, wrong, sum(f is not None for f in failures.values()))
    for name, hint in hints.items():
        failure = failures.get(name)
        if failure is not None:
            # Changing an argument has its own cause, whatever else is wrong.
            alias = (
                "An argument, or a view of it, is handed back as a result: return a new tensor, or clone it."
            )
            hint = common_hint(exercise, name, bool(wrong)) or hint
            said.append(f"Likely cause: {alias if failure.kind == 'alias' else hint}")
    return said


def _main_cause(
    exercise: Exercise,
    fn: Callable[..., Any],
    judged: list[tuple[Run, Failure | None]],
    wrong: list[str],
    crosses: int,
) -> list[str]:
    for r, failure in judged:
        if failure is not None and failure.kind in ("shape", "value", "nan", "dtype"):
            swapped = reordered(exercise, r.value, exercise.want(r.case), r.case)
            if swapped:
                return [f"Likely cause: {swapped}"]
            break
    for r, failure in judged:
        if failure is not None and failure.kind in STRUCTURAL:
            cause = structural(exercise, fn, r.case, failure)
            return [f"Likely cause: {cause}"] if cause else []
    found = diagnose(exercise, [(r.case, r.value, f) for r, f in judged])
    if found is not None:
        part = f" of {len(found.explains)} of the {crosses} lines marked ✗"
        return [f"Likely cause{part if len(found.explains) < crosses else ''}: {found.mutant.hint}"]
    if "torch.empty" in text_of(fn) and _all_nan(judged):
        return [
            "Likely cause: Some entries were never written: during a check torch.empty is filled with NaN."
        ]
    # No mistake that is known: what the first line that fails is about.
    return [f"About “{wrong[0]}”: {exercise.properties[wrong[0]]}"]


def _all_nan(judged: list[tuple[Run, Failure | None]]) -> bool:
    """Is every wrong result a NaN?"""
    return all(failure is None or failure.kind == "nan" for _, failure in judged)


def _not_yet(exercise: Exercise, empty: list[Blank], rungs: int) -> Result:
    what = "fill in the blank above, then run this cell again"
    if empty:
        one = len(empty) == 1
        what = f"{'one blank is' if one else f'{len(empty)} blanks are'} empty ({'; '.join(map(str, empty))})"
    lines = [f"{exercise.id}: {exercise.title}", *_wrapped([f"○ not written yet: {what}"], "  ")]
    lines += _rungs(exercise, rungs) if rungs else [_offer(exercise)]
    return Result(exercise.id, failed=tuple(exercise.properties), written=False, report="\n".join(lines))


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
    """Print the first ``rung`` hints of an exercise: 1 is a nudge, the last is nearly the complete code."""
    exercise = get(exercise_id)
    if not isinstance(rung, int) or not 1 <= rung <= len(exercise.hints):
        raise UsageError(f"rung: expected 1 to {len(exercise.hints)}, got {rung!r}")
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
