"""An assignment and results of made-up students, for the tests of gradebook, feedback and report."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from effattn_lab.grading.model import (
    Assignment,
    ExerciseResult,
    Item,
    LabPlan,
    Replay,
    StudentResult,
    Verdict,
)

DUE = datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=3)))
MERGE = Item("full/flash/merge", "merge", 2)
STEP = Item("full/flash/tile_step", "tile_step", 1.5)
ASSIGNMENT = Assignment(
    "Week 1", "0.1.0", (LabPlan("full/flash", "flash.ipynb", "", (MERGE, STEP), ()),), DUE
)

#: A text with everything that must not reach a page, a table or a terminal as it is.
NASTY = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp.exe\x1b[31m\x00'\"&"


def verdicts(*passed, hint="Take the larger of the two."):
    names = ("two parts give the whole", "large scores", "both parts see nothing")
    return tuple(
        Verdict(name, ok, "" if ok else "o is off by 1.0e+00 at worst; 1.0e-05 allowed", "" if ok else hint)
        for name, ok in zip(names, passed)
    )


def student(key="ann", name="Ann Lee", merge="passed", step="passed", **more):
    points = {"passed": 1.0}
    exercises = tuple(
        ExerciseResult(
            item.id, status, points.get(status, 0.0) * item.points, item.points,
            verdicts(True, status == "passed", status == "passed") if status in ("passed", "failed") else (),
        )
        for item, status in ((MERGE, merge), (STEP, step))
    )  # fmt: skip
    return StudentResult(key, name, "0" * 64, exercises, **more)


def nasty():
    """Every field that a student can influence holds `NASTY`."""
    exercise = ExerciseResult(
        MERGE.id, "failed", 0.0, 2, (Verdict(NASTY, False, NASTY, NASTY),), cause=NASTY, error=NASTY * 500
    )
    return StudentResult(
        "eve", NASTY, "0" * 64, (exercise,), (Replay("full/flash", 3, ((7, NASTY),), NASTY),),
        changed_checks=(NASTY,), problems=(NASTY,) * 150, submitted=NASTY,
    )  # fmt: skip
