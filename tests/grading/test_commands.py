"""From a release to a grade, a regrade and a report, by the commands that an instructor types."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import classroom
import pytest

from effattn_lab.grading.store import commitment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def effattn(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "effattn_lab.cli", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class of two, released and graded with a seed for each student, the notebooks replayed."""
    folder = tmp_path_factory.mktemp("course")
    points = folder / "points.yml"
    points.write_text(
        "title: Week 1\npoints: {full/flash/merge: 3, full/flash/forward: 0, full/flash/triton_forward: 0}\n"
    )
    released = effattn("release", folder / "week1", "full/flash", "--points", points, "--seed-per-student",
                       "--due", "2026-12-24T23:59+01:00")  # fmt: skip
    assert released.returncode == 0, released.stderr
    hand_ins = folder / "hand_ins"
    for name, notebook in {"ada": classroom.solved(), "bea": classroom.student()}.items():
        (hand_ins / name).mkdir(parents=True)
        (hand_ins / name / "flash.ipynb").write_bytes(
            notebook if isinstance(notebook, bytes) else notebook.encode()
        )
    (hand_ins / "assignment.json").write_bytes((folder / "week1" / "assignment.json").read_bytes())
    (hand_ins / "submitted.csv").write_text(
        "student,submitted\nada,2026-12-26T00:30+01:00\nbea,2026-12-24T12:00+01:00\n"
    )
    done = effattn("grade", hand_ins, "--out", folder / "results", "--no-replay")
    assert done.returncode == 0, done.stderr
    return folder, done


def rows(folder):
    with (folder / "results" / "gradebook.csv").open(newline="", encoding="utf-8") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def test_the_gradebook(graded):
    folder, _ = graded
    book = rows(folder)
    assert list(book) == ["ada", "bea"]
    assert "full/flash/forward" not in book["ada"]
    # Two days begun: 20 % of six points.
    assert [book["ada"][n] for n in ("raw", "late_percent", "penalty", "total", "possible")] == [
        "6", "20", "1.2", "4.8", "6",
    ]  # fmt: skip
    assert [book["bea"][n] for n in ("raw", "penalty", "total")] == ["0", "0", "0"]


def test_seeds_are_sealed_and_then_told(graded):
    _, done = graded
    sealed = re.search(r"hash of their seed: (\w{64})", done.stdout)[1]
    machine = json.loads(re.search(r"^machine (.*)$", done.stdout, re.MULTILINE)[1])
    assert commitment(machine["seeds"][0]) == sealed
    assert {"effattn-lab", "torch", "python", "bubblewrap"} <= set(machine["versions"])
    assert done.stdout.index(sealed) < done.stdout.index("[1/2]") < done.stdout.index(machine["seeds"][0])


def test_again_with_either_seed(graded):
    folder, _ = graded
    results = folder / "results"
    run_seed = json.loads((results / "run.json").read_text())["seeds"][0]
    own = json.loads((results / "feedback" / "ada.json").read_text())["machine"]["seed"]
    assert own != run_seed
    before = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    for seed, note in ((run_seed, ""), (own, ""), ("other", "another seed")):
        again = effattn("regrade", "ada", "--seed", seed, "--results", results)
        assert again.returncode == 0, again.stderr
        assert "total 6; recorded 4.8" not in again.stdout
        assert "the same" in again.stdout
        assert (note in again.stderr) if note else again.stderr == ""
    assert {p: p.read_bytes() for p in results.rglob("*") if p.is_file()} == before


def test_the_same_command_again_grades_nothing(graded):
    folder, _ = graded
    results = folder / "results"
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (results / "students").iterdir()}
    done = effattn("grade", folder / "hand_ins", "--out", results, "--no-replay")
    assert done.returncode == 0, done.stderr
    assert "2 submissions, 2 of them graded before" in done.stdout
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (results / "students").iterdir()} == before


def test_report(graded):
    folder, _ = graded
    done = effattn("report", folder / "results")
    assert done.returncode == 0, done.stderr
    assert "full/flash/merge" in (folder / "results" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("grade", "nowhere", "--out", "x"), "nowhere"),
        (("grade", ".", "--out", "x", "--jobs", "0"), "--jobs: expected at least 1, got 0"),
        (("grade", ".", "--out", "x", "--seconds", "0"), "--seconds: expected more than 0"),
        (("grade", ".", "--out", "x", "--assignment", "none.json"), "none.json"),
        (
            ("regrade", "ada", "--seed", "1", "--results", "nowhere"),
            "expected a folder made by `effattn grade`",
        ),
        (("report", "nowhere"), "nowhere"),
    ],
)
def test_called_wrongly(tmp_path, arguments, says):
    done = subprocess.run(
        [sys.executable, "-m", "effattn_lab.cli", *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_student_who_is_not_there(graded):
    folder, _ = graded
    done = effattn("regrade", "zoe", "--seed", "1", "--results", folder / "results")
    assert done.returncode == 2
    assert "'zoe' is not in" in done.stderr
