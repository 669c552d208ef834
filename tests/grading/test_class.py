"""A class of sixty, graded by the real command, killed in the middle, resumed: every score as it was made.

What a hand-in is worth is written where it is made; the grader is never asked.
"""

# ruff: noqa: E501
# Attacks, edits and hand-ins are text of others' making: one to a line.

from __future__ import annotations

import functools
import json
import os
import signal
import time
from datetime import timedelta

import classroom
import command
import pytest
from classroom import EXERCISES, MISTAKES, HandIn, hand_in, notebook, solution, solved, wrong

SEED = "5ixty"
FIRST = 20  # results that are there when it is killed
#: Judging a kernel takes most of a submission's time, so most leave it blank: that is worth nothing, as it should be.
CHEAP = tuple(n for n in EXERCISES if n != "triton_forward")
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


def right() -> list[HandIn]:
    """Solved by three people, and with things around it that do no harm."""
    import variants

    imports = "import math"
    batched, plain = variants.cells(variants.BATCHED), variants.cells(variants.PLAIN)
    notes = (
        "# my notes\nx = torch.randn(3)\nprint(x)\n%timeit x.sum()\n!ls\nraise ValueError('an experiment')"
    )
    return [
        hand_in("right-model", solved(), EXERCISES),
        hand_in("right-batched", notebook(batched), EXERCISES),
        hand_in("right-plain", notebook(plain, [imports]), EXERCISES),
        hand_in("right-with-notes", notebook({n: solution(n) for n in CHEAP}, [notes]), CHEAP),
        hand_in("right-check-deleted", notebook({n: solution(n) for n in CHEAP}, check_merge=""), CHEAP),
    ]


def partly() -> list[HandIn]:
    sets = [
        CHEAP[:1],
        CHEAP[:2],
        CHEAP[:3],
        CHEAP[3:4],
        CHEAP[1:],
        ("merge", "backward_tile"),
        ("triton_forward",),
    ]
    found = [hand_in(f"partly-{n}", solved(*names), names) for n, names in enumerate(sets)]
    half = solution("forward").replace(
        "        lse[:, :, i : i + block_q] = m + torch.log(l)\n", "        ...  # your code\n"
    )
    found.append(
        hand_in("partly-half-written", notebook({"merge": solution("merge"), "forward": half}), ("merge",))
    )
    return found


def mistaken() -> list[HandIn]:
    """One registered mistake each beside exercises that are right; several where they go together."""
    chosen = {
        "safe_softmax": ("no max", "global max", "sum axis", "no guard", "base 2"),
        "merge": ("swapped", "lse without m", "no max", "no guard"),
        "tile_step": ("acc not rescaled", "tile max only", "state replaced", "m not returned"),
        "forward": ("no scale", "state not reset", "mask too strict", "top-left", "masks every tile", "whole matrix", "heads tiled"),
        "backward_tile": ("delta missing", "delta from the tile", "mask forgotten", "dq unscaled", "dv from ds"),
        "triton_forward": ("padding counted", "top-left", "reads every tile", "no kernel", "plain global"),
    }  # fmt: skip
    assert all(name in MISTAKES[exercise] for exercise, names in chosen.items() for name in names)
    found = []
    for exercise, names in chosen.items():
        for name in names:
            # The kernel without one needs the forward pass that it calls.
            others = (
                ("merge", "forward")
                if exercise == "triton_forward"
                else ("merge", "tile_step", "backward_tile")
            )
            others = tuple(o for o in others if o != exercise)
            parts = {**{o: solution(o) for o in others}, exercise: wrong(exercise, name)}
            found.append(
                hand_in(f"wrong-{exercise}-{name.replace(' ', '-')}", notebook(parts), others, why=name)
            )
    return found


def late() -> list[HandIn]:
    """10 % for each day begun after ten minutes of grace, 50 % at most."""
    work = solved("merge", "tile_step"), ("merge", "tile_step")
    return [
        hand_in("late-in-grace", *work, late=9 * MINUTE),
        hand_in("late-after-grace", *work, late=11 * MINUTE, percent=10),
        hand_in("late-two-days", *work, late=DAY + MINUTE, percent=20),
        hand_in("late-a-month", *work, late=31 * DAY, percent=50),
    ]


def unreadable() -> list[HandIn]:
    return [
        hand_in("empty-untouched", notebook({})),
        HandIn("empty-folder", {"notes.ipynb.txt": b"sorry"}),
        hand_in("empty-file", b""),
        hand_in("broken-cut-off", solved()[:5000]),
        hand_in("broken-not-json", b"\x89PNG\r\n"),
        hand_in("broken-no-cells", b'{"nbformat": 4}'),
    ]


def hostile() -> list[HandIn]:
    cells = {
        "loops": "def safe_softmax(s):\n    while True: pass",
        "forks": "import os\ndef safe_softmax(s):\n    while True: os.fork()",
        "quits": "import os\ndef safe_softmax(s):\n    os._exit(0)",
        "kills": "import os\ndef safe_softmax(s):\n    os.kill(-1, 9)",
        "forges": "import os\ndef safe_softmax(s):\n    for fd in range(3, 40):\n        try: os.write(fd, b'\\0' * 99)\n"
        "        except OSError: pass",
        "imports": "from effattn_lab.exercises.full.flash import SAFE_SOFTMAX\nsafe_softmax = SAFE_SOFTMAX.solution",
        "fills-memory": "def safe_softmax(s):\n    x = []\n    while True: x.append(bytearray(b'x' * (1 << 26)))",
    }
    return [hand_in(f"hostile-{n}", notebook({"safe_softmax": c, "merge": solution("merge")}), ("merge",))
            for n, c in cells.items()]  # fmt: skip


@functools.cache
def sixty() -> list[HandIn]:
    return [*right(), *partly(), *mistaken(), *late(), *unreadable(), *hostile()]


def test_the_class_is_what_it_should_be():
    students = sixty()
    assert len(students) == 60
    assert len({s.key for s in students}) == 60
    assert len({(s.key.split("-")[1], s.why) for s in students if s.why}) >= 25
    assert len({s.total for s in students}) >= 12


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The sixty: killed after some results, then the same command to the end."""
    folder = tmp_path_factory.mktemp("class")
    release, due = classroom.release(folder)
    subs = classroom.write(folder / "subs", sixty(), due)
    out, home = folder / "out", folder / "home"
    options = (
        "--assignment",
        str(release / "assignment.json"),
        "--jobs",
        "2",
        "--seed",
        SEED,
        "--seconds",
        "6",
    )
    process = command.grade(subs, out, home, *options)
    end = time.monotonic() + 600
    while len(list((out / "students").glob("*.json"))) < FIRST:
        assert process.poll() is None, (home / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    orphans = command.nobody_left(str(out), str(home))
    kept = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (out / "students").glob("*.json")}
    unfinished = sorted(p.name for p in out.iterdir())
    said = command.finish(command.grade(subs, out, home, *options), home)
    return {"release": release, "due": due, "out": out, "home": home, "kept": kept, "orphans": orphans, "said": said,
            "unfinished": unfinished, "options": options}  # fmt: skip


def test_every_score_is_as_it_was_made(graded):
    book = classroom.gradebook((graded["out"] / "gradebook.csv").read_text(encoding="utf-8"))
    assert len(book) == 60
    for one in sixty():
        row = book[one.key]
        points = {n: float(row[f"full/flash/{n}"]) for n in EXERCISES}
        assert points == {n: float(classroom.POINTS[n] if n in one.right else 0) for n in EXERCISES}, (
            one.key,
            one.why,
        )
        assert (float(row["raw"]), float(row["late_percent"]), float(row["total"])) == (
            one.raw,
            one.percent,
            one.total,
        ), one.key


def test_a_registered_mistake_is_named(graded):
    """Feedback holds the hint of the mistake that was made."""
    from effattn_lab.exercises.registry import get

    found = command.results(graded["out"])
    missed = []
    for one in mistaken():
        exercise = f"full/flash/{one.key.split('-')[1]}"
        result = next(e for e in found[one.key]["exercises"] if e["id"] == exercise)
        hint = next(m.hint for m in get(exercise).mutants if m.name == one.why)
        said = [result["cause"], *(v["hint"] for v in result["verdicts"] if not v["passed"])]
        if hint not in said:
            missed.append(one.why)
    # A kernel with a plain global is refused before a compiler sees it, in words of its own.
    assert missed == ["plain global"]


def test_the_kill_ended_everything_and_lost_nothing(graded):
    kept = graded["kept"]
    assert not graded["orphans"]
    assert FIRST <= len(kept) < 60
    assert "gradebook.csv" not in graded["unfinished"]
    for name, (data, written) in kept.items():
        path = graded["out"] / "students" / name
        assert path.read_bytes() == data  # seconds included: it was not graded again
        assert path.stat().st_mtime_ns == written
    assert f"60 submissions, {len(kept)} of them graded before" in graded["said"]
    assert not list(graded["out"].rglob(".*.tmp"))
    assert not command.nobody_left(str(graded["out"]), str(graded["home"]))
    assert not list((graded["home"] / "tmp").iterdir())


def test_a_run_that_nobody_kills_gives_the_same(graded, tmp_path):
    """Some of the class again, uninterrupted, with the same seed: the same rows and results."""
    few = [s for s in sixty() if s.key in (
        "right-plain", "partly-4", "partly-half-written", "wrong-forward-top-left", "wrong-merge-no-guard",
        "late-two-days", "broken-cut-off", "hostile-quits", "hostile-imports", "empty-untouched")]  # fmt: skip
    subs = classroom.write(tmp_path / "subs", few, graded["due"])
    out = tmp_path / "out"
    command.finish(command.grade(subs, out, tmp_path / "home", *graded["options"]), tmp_path / "home")
    whole, part = (
        classroom.gradebook((folder / "gradebook.csv").read_text(encoding="utf-8"))
        for folder in (graded["out"], out)
    )
    assert len(part) == len(few)
    assert all(whole[key] == row for key, row in part.items())
    before, after = command.results(graded["out"]), command.results(out)
    assert all(before[key] == result for key, result in after.items())
    run = json.loads((out / "run.json").read_text())
    assert run["complete"]
    assert run["seeds"] == [SEED]
