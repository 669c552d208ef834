"""A run of `effattn grade` that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import sys
import time
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

from effattn_lab import _atomic
from effattn_lab._atomic import write_atomic
from effattn_lab.grading import pool, run, task
from effattn_lab.grading.model import (
    Assignment,
    ExerciseResult,
    Item,
    LabPlan,
    LateRule,
    StudentResult,
    Submission,
    Verdict,
)
from effattn_lab.grading.store import Store, StoreError, commitment, student_seed

sys.path.insert(0, str(Path(__file__).parent))
import command

PLAN = LabPlan("full/flash", "flash.ipynb", "0" * 64, (Item("full/flash/merge", "merge", 2.0),), ())
ASSIGNMENT = Assignment(
    "Flash", "0.1.0", (PLAN,), datetime(2026, 12, 24, tzinfo=timezone.utc), LateRule(), seed_per_student=True
)
STUDENTS = ("alice", "bob", "carol")


def canned(work):
    """What grading would give; pure, so that a run can be compared with another."""
    submission, seed = work.submission, work.options.seed
    mine = student_seed(seed, submission.student, work.assignment.seed_per_student)
    points = 2.0 if submission.student != "bob" else 0.0
    verdicts = (Verdict("one", True), Verdict("two", points > 0, "off", "hint"))
    result = ExerciseResult("full/flash/merge", "passed" if points else "failed", points, 2.0, verdicts)
    return task.Done(
        StudentResult(
            submission.student, submission.name, submission.digest(), (result,), sealed=commitment(mine)
        ),
        f"# ---- cell 1\ndef merge(): return {submission.student!r}\n",
    )


@pytest.fixture
def klass(tmp_path):
    folder = tmp_path / "class"
    for name in STUDENTS:
        (folder / name).mkdir(parents=True)
        notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}
        (folder / name / "flash.ipynb").write_text(json.dumps(notebook))
    (folder / "assignment.json").write_text(json.dumps(ASSIGNMENT.to_json()))
    return folder


def arguments(klass, out, seed="5eed"):
    return Namespace(
        submissions=klass, out=out, assignment=None, jobs=1, scheduler=None, no_replay=True, gpu=False,
        seconds=20.0, seed=seed,
    )  # fmt: skip


class Mortal:
    """Stands in for ``os`` where files are written: the n-th operation ends the process, a write half done."""

    def __init__(self, dies_at):
        self.left = dies_at

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "fchmod", "replace"):
            return real

        def operation(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    os.write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return operation


def graded(klass, out, log, dies_at=None, seed="5eed"):
    """Run the command in a forked process with canned results; True where it came to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            # Not the patched os: what was graded has to be known whatever happens to the store.
            book = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

            def grade(tasks, jobs, scratch):
                for work in tasks:
                    os.write(book, f"{work.submission.student}\n".encode())
                    yield canned(work)

            pool.on_this_machine = grade
            run.checked_boundary = lambda: "0.8"
            if dies_at is not None:
                _atomic.os = Mortal(dies_at)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = run.run(arguments(klass, out, seed))
        finally:
            os._exit(status)
    _, code = os.waitpid(pid, 0)
    assert code in (0, signal.SIGKILL), code
    return code == 0


def everything(out):
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


def test_killed_at_every_operation(klass, tmp_path):
    """Each file operation of a run is the last one once; the next run ends with the same files."""
    shutil.rmtree(klass / "carol")  # two students see every kind of operation
    whole = tmp_path / "whole"
    assert graded(klass, whole, tmp_path / "log")
    want = everything(whole)
    assert {"gradebook.csv", "canvas.csv", "moodle.csv", "run.json", "feedback/bob.html"} <= set(want)
    moments = 0
    for n in range(1, 2000):
        out, log = tmp_path / f"r{n}", tmp_path / f"log{n}"
        if graded(klass, out, log, dies_at=n):
            break
        moments = n
        before = set()
        for path in (out / "students").glob("*.json") if out.is_dir() else ():
            StudentResult.from_json(json.loads(path.read_text()))  # whole, whenever it is there
            before.add(path.stem)
        for name in ("gradebook.csv", "run.json", "assignment.json"):
            if (out / name).is_file() and (
                name != "run.json" or b'"complete": true' in (out / name).read_bytes()
            ):
                assert (out / name).read_bytes() == want[name]
        assert graded(klass, out, log)
        assert everything(out) == want, f"killed at operation {n}"
        names = log.read_text().split()
        assert sorted(set(names)) == ["alice", "bob"]
        # What was kept is never graded again; at most the one that was being written is.
        assert all(names.count(student) == 1 for student in before)
        assert len(names) <= 3
    assert moments > 60, "the run has far more operations than that"


def test_a_secret_seed_survives_the_kill(klass, tmp_path):
    out, log = tmp_path / "r", tmp_path / "log"
    assert not graded(klass, out, log, dies_at=40, seed=None)
    (seed,) = json.loads((out / ".state" / "seeds.json").read_text())
    assert seed.encode() not in b"".join(
        data for name, data in everything(out).items() if not name.startswith(".state")
    )  # fmt: skip
    assert stat.S_IMODE((out / ".state" / "seeds.json").stat().st_mode) == 0o600
    assert json.loads((out / "run.json").read_text())["sealed"] == commitment(seed)
    assert graded(klass, out, log, seed=None)
    record = json.loads((out / "run.json").read_text())
    assert record["complete"]
    assert record["seeds"] == [seed]
    for name in STUDENTS:
        machine = json.loads((out / "feedback" / f"{name}.json").read_text())["machine"]
        assert machine["seed"] == student_seed(seed, name, True)


def test_a_told_seed_is_not_used_again(klass, tmp_path):
    """A submission that arrives after the seed was told gets other inputs."""
    out, log = tmp_path / "r", tmp_path / "log"
    assert graded(klass, out, log, seed=None)
    (klass / "dave").mkdir()
    (klass / "dave" / "flash.ipynb").write_bytes((klass / "bob" / "flash.ipynb").read_bytes())
    assert graded(klass, out, log, seed=None)
    first, second = json.loads((out / "run.json").read_text())["seeds"]
    assert first != second
    seeds = {
        name: json.loads((out / "feedback" / f"{name}.json").read_text())["machine"]["seed"]
        for name in (*STUDENTS, "dave")
    }
    assert seeds["dave"] == student_seed(second, "dave", True)
    assert seeds["alice"] == student_seed(first, "alice", True)
    assert log.read_text().split() == [*STUDENTS, "dave"]


def test_a_changed_submission_is_graded_again_alone(klass, tmp_path):
    out, log = tmp_path / "r", tmp_path / "log"
    assert graded(klass, out, log)
    path = klass / "bob" / "flash.ipynb"
    path.write_text(path.read_text().replace('"cells": []', '"cells": [ ]'))
    assert graded(klass, out, log)
    assert log.read_text().split() == [*STUDENTS, "bob"]


def stopping(monkeypatch, error):
    """Canned results, and then ``error`` instead of the last one."""

    def grade(tasks, jobs, scratch):
        for work in tasks[:-1]:
            yield canned(work)
        raise error

    monkeypatch.setattr(pool, "on_this_machine", grade)
    monkeypatch.setattr(run, "checked_boundary", lambda: "0.8")


def test_ctrl_c_says_how_to_go_on(klass, tmp_path, monkeypatch, capsys):
    stopping(monkeypatch, KeyboardInterrupt())
    out = tmp_path / "out"
    assert run.run(arguments(klass, out)) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert sorted(p.stem for p in (out / "students").iterdir()) == ["alice", "bob"]
    assert not json.loads((out / "run.json").read_text())["complete"]


def test_ctrl_c_does_not_wait_for_what_runs(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "grade", command.sleeps)
    monkeypatch.setattr(pool, "wait", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(pool.on_this_machine([SimpleNamespace(submission=SimpleNamespace(student="ann"))], 1, tmp_path))
    assert time.monotonic() - began < 45, "the call sleeps for 60"


def test_a_full_disk_is_nobodys_zero(klass, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    copied = shutil.Error([("a", "b", str(full))])  # what copying a tree makes of it
    for number, error in enumerate((full, copied)):
        stopping(monkeypatch, error)
        with pytest.raises(ValueError, match=r"^--out: no space left where .* the same command again"):
            run.run(arguments(klass, tmp_path / f"out{number}"))

    def fails(work):
        raise copied if work.options.replay else full

    assignment = SimpleNamespace(version=run.effattn_lab.__version__)
    monkeypatch.setattr(task, "checked_boundary", lambda: "0.8")
    monkeypatch.setattr(task, "_grade", fails)
    for replay in (True, False):
        with pytest.raises(OSError, match="No space left"):
            task.grade(task.Task(None, assignment, task.Options("5eed", replay=replay)))


def test_late_to_the_minute():
    def handed_in(*when):
        time_ = datetime(2026, 12, *when, tzinfo=timezone.utc)
        late, percent, _ = task.lateness(Submission("ann", "Ann", {}, time_), ASSIGNMENT)
        return late.total_seconds() / 60, percent

    assert handed_in(24, 0, 0, 59) == (0, 0)
    assert handed_in(24, 0, 10, 59) == (10, 0), "the grace period ends with its last minute"
    assert handed_in(24, 0, 11) == (11, 10)
    assert handed_in(25, 0, 0, 59) == (1440, 10), "one day begun"
    assert handed_in(25, 0, 1) == (1441, 20)


def test_regrade_finds_seed_and_student(klass, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (klass / "carol").rename(klass / "Carol Ann")
    assert graded(klass, out, tmp_path / "log", seed=None)
    before = everything(out)
    monkeypatch.setattr(run, "checked_boundary", lambda: "0.8")
    monkeypatch.setattr(run, "grade", canned)
    again = Namespace(student="carol ann", seed=None, results=out, submissions=None)
    assert run.run_regrade(again) == 0
    said = capsys.readouterr()
    assert "total 2; recorded 2: the same" in said.out
    assert said.err == ""
    assert everything(out) == before
    with pytest.raises(ValueError, match=r"'dora' is not in .*; there are Carol-Ann, alice, bob"):
        run.run_regrade(Namespace(student="dora", seed=None, results=out, submissions=None))


def test_two_runs_do_not_meet(tmp_path):
    with Store(tmp_path / "r", ASSIGNMENT), pytest.raises(StoreError, match="another `effattn grade`"):
        Store(tmp_path / "r", ASSIGNMENT).__enter__()
    with Store(tmp_path / "r", ASSIGNMENT):
        pass


def test_wrong_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="expected a folder, got the file"):
        Store(tmp_path / "file", ASSIGNMENT).__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="holds other files"):
        Store(tmp_path / "other", ASSIGNMENT).__enter__()
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    with Store(tmp_path / "r", ASSIGNMENT):
        pass
    other = Assignment("Other", "0.1.0", (PLAN,))
    with pytest.raises(StoreError, match="results of another assignment"):
        Store(tmp_path / "r", other).__enter__()


def test_a_broken_result_is_named(tmp_path):
    with Store(tmp_path / "r", ASSIGNMENT) as open_store:
        (tmp_path / "r" / "students" / "eve.json").write_text("{}")
        with pytest.raises(StoreError, match=r"eve\.json.*delete it to grade this student again"):
            open_store.results()


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_late_rule():
    from datetime import timedelta

    rule = LateRule(grace_minutes=10, percent_per_day=10, most_percent=50)
    minutes = (0, 10, 10.5, 1440, 1441, 5 * 1440, 50 * 1440)
    assert [rule.percent(timedelta(minutes=m)) for m in minutes] == [0, 0, 10, 10, 20, 50, 50]


def test_paths_are_only_those_of_the_folder(klass, tmp_path):
    """Everything that a run writes lies in the results folder."""
    before = {p for p in tmp_path.rglob("*")}
    assert graded(klass, tmp_path / "r", tmp_path / "log")
    new = {p for p in tmp_path.rglob("*")} - before - {tmp_path / "log"}
    assert all(Path(tmp_path / "r") in (p, *p.parents) for p in new)
