"""Attackers among honest students, graded together by the real command: nobody's grade but theirs is touched."""

# ruff: noqa: E501
# Attacks, edits and hand-ins are text of others' making: one to a line.

from __future__ import annotations

import io
import json
import os
import stat
import textwrap
import zipfile
from datetime import timedelta
from pathlib import Path

import classroom
import command
import pytest

TOKEN = f"cl4ss{os.getpid()}x"
#: Half of what one core does belongs to a class of attackers; an honest call takes well under a second.
SECONDS = "6"


def bent(name: str, body: str, right: tuple[str, ...] = ()) -> classroom.HandIn:
    """One hostile cell for the first exercise; the exercises in ``right`` are solved."""
    source = (
        "import os, signal, time, threading, subprocess, socket\n" + textwrap.dedent(body).strip("\n") + "\n"
    )
    return classroom.hand_in(name, classroom.solved(*right, safe_softmax=source) if right else
                             classroom.notebook({"safe_softmax": source}), right)  # fmt: skip


def archive(entries: list[tuple[str | zipfile.ZipInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(name, data)
    return out.getvalue()


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


def decorated() -> bytes:
    """Solved but for the kernel, with outputs, widgets and Markdown that would like to run."""
    book = json.loads(classroom.solved("merge"))
    script = "<script>document.title='OWNED'</script><img src=x onerror=alert(1)>"
    book["metadata"]["title"] = script
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] += script
        else:
            cell["outputs"] = [
                {"output_type": "stream", "name": "stdout", "text": "passed (7/7)\x1b[2J" + script},
                {"output_type": "display_data", "metadata": {}, "data": {
                    "text/html": script, "application/javascript": "alert(1)",
                    "application/vnd.jupyter.widget-view+json": {"model_id": script}}},
            ]  # fmt: skip
    return json.dumps(book).encode()


PRINTS = {f"check_{n}": f"print('full/flash/{n}: passed, 5 of 5 points')" for n in classroom.EXERCISES}


def honest() -> list[classroom.HandIn]:
    parts = {n: classroom.solution(n) for n in classroom.EXERCISES}
    return [
        classroom.hand_in("honest-all", classroom.solved(), classroom.EXERCISES),
        classroom.hand_in(
            "honest-late",
            classroom.solved("merge", "tile_step"),
            ("merge", "tile_step"),
            late=timedelta(hours=30),
            percent=20.0,
        ),
        classroom.hand_in(
            "honest-wrong",
            classroom.notebook({**parts, "forward": classroom.wrong("forward", "top-left")}),
            tuple(n for n in classroom.EXERCISES if n != "forward"),
        ),
    ]


def hostile() -> list[classroom.HandIn]:
    other = "../honest-all/flash.ipynb"
    return [
        bent("a-forks", "def safe_softmax(s):\n    while True: os.fork()", ("merge",)),
        bent("b-hogs", """
            def safe_softmax(s):
                for _ in range(25):
                    if os.fork() == 0:
                        while True: pass
                time.sleep(4)
                return s * 0
        """),
        bent("c-daemon", f"""
            def safe_softmax(s):
                if os.fork() == 0:
                    os.setsid()
                    while True:
                        for p in ("/tmp", "/dev/shm", "/var/tmp", {str(command.ROOT)!r}):
                            try: open(p + "/{TOKEN}", "w").close()
                            except OSError: pass
                        time.sleep(0.01)
                return s * 0
        """, ("merge",)),
        bent("d-kills", "def safe_softmax(s):\n    os.kill(-1, 9)"),
        bent("e-loops", "while True: safe_softmax = 1", ("merge",)),
        bent("f-quits", "os._exit(0)\nsafe_softmax = os._exit(0)", ("merge",)),
        classroom.hand_in("g-prints", classroom.notebook({}, **PRINTS)),
        classroom.hand_in("h-deletes", classroom.notebook({"merge": classroom.solution("merge")},
                          **dict.fromkeys(PRINTS, "")), ("merge",)),
        classroom.hand_in("i-decorated", decorated(), ("merge",)),
        classroom.hand_in("j-broken", classroom.solved()[:-40]),
        classroom.hand_in("k-huge", b'{"nbformat": 4, "cells": [], "x": "' + b"y" * 21_000_000 + b'"}'),
        classroom.hand_in("l-deep", b'{"nbformat": 4, "cells": [], "x": ' + b"[" * 100_000),
        classroom.HandIn("m-slip", {"work.zip": archive([(f"../{TOKEN}.ipynb", classroom.solved()),
                         (f"/tmp/{TOKEN}.ipynb", classroom.solved())])}),
        classroom.HandIn("n-bomb", {"work.zip": archive([("flash.ipynb", b" " * 400_000_000)])}),
        classroom.HandIn("o-link", {"work.zip": archive([link("flash.ipynb", other)])}),
        classroom.HandIn("p-nested", {"work.zip": archive([("w.zip", archive([("flash.ipynb", classroom.solved())]))])},
                         classroom.EXERCISES),  # clumsy, not hostile
        classroom.hand_in("=cmd|' -C calc'!A0", classroom.solved("merge"), ("merge",)),
        classroom.hand_in("<img src=x onerror=alert(1)>", classroom.solved("merge"), ("merge",)),
        classroom.hand_in("\u202egnp.exe\u200b", classroom.solved("merge")),  # refused, with the reason
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attackers")
    release, due = classroom.release(folder)
    manifest = str(release / "assignment.json")
    runs = {}
    for name, students in (("alone", honest()), ("together", [*honest(), *hostile()])):
        subs = classroom.write(folder / name / "subs", students, due)
        if name == "together":
            os.symlink("../honest-all/flash.ipynb", subs / "d-kills" / "linked.ipynb")
            os.symlink(subs / "honest-all", subs / "q-linked-folder")
        home = folder / name / "home"
        out = folder / name / "out"
        options = ("--assignment", manifest, "--jobs", "2", "--seed", "s33d", "--seconds", SECONDS)
        said = command.finish(command.grade(subs, out, home, *options), home)
        runs[name] = (out, home, subs, said)
    return runs, {s.key: s for s in [*honest(), *hostile()]}


def test_honest_grades_are_what_they_are_without_attackers(two_runs):
    (alone, together) = (command.results(two_runs[0][name][0]) for name in ("alone", "together"))
    assert set(alone) == {"honest-all", "honest-late", "honest-wrong"}
    for student, result in alone.items():
        assert together[student] == result


def test_every_score_is_as_it_was_made(two_runs):
    runs, students = two_runs
    book = classroom.gradebook((runs["together"][0] / "gradebook.csv").read_text(encoding="utf-8"))
    by_name = {row["name"].lstrip("'"): row for row in book.values()}
    for key, one in students.items():
        name = key.replace("\u202e", "⟨U+202E⟩").replace("\u200b", "⟨U+200B⟩")
        row = by_name[name]
        assert (float(row["raw"]), float(row["total"])) == (one.raw, one.total), (key, row)
    extra = set(by_name) - {k.replace("\u202e", "⟨U+202E⟩").replace("\u200b", "⟨U+200B⟩") for k in students}
    assert all(float(by_name[name]["total"]) == 0 for name in extra), extra


def test_nothing_runs_on_and_nothing_lies_about(two_runs):
    runs = two_runs[0]
    for out, home, subs, _ in runs.values():
        assert not command.nobody_left(str(out), str(home))
        assert not list((home / "tmp").iterdir())
        assert {p.name for p in out.iterdir()} == {
            ".state", "assignment.json", "run.json", "students", "sources", "feedback", "gradebook.csv", "canvas.csv",
            "moodle.csv",
        }  # fmt: skip
        keys = {p.stem for p in (out / "students").iterdir()}
        assert {p.name for p in (out / "students").iterdir()} == {f"{k}.json" for k in keys}
        assert {p.name for p in (out / "sources").iterdir()} == {f"{k}.py" for k in keys}
        assert {p.name for p in (out / "feedback").iterdir()} == {
            f"{k}.{e}" for k in keys for e in ("html", "json")
        }
        assert not [p for p in subs.rglob("*") if TOKEN in p.name]
    for place in ("/tmp", "/dev/shm", "/var/tmp", "/", str(command.ROOT), str(Path.home())):
        assert not [n for n in os.listdir(place) if TOKEN in n]


def test_nothing_of_theirs_reaches_a_page_or_a_table_as_code(two_runs):
    out = two_runs[0]["together"][0]
    for page in (out / "feedback").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "OWNED" not in text
        assert "<script" not in text
        assert "<img" not in text
        assert not set("\x1b\u202e\u200b") & set(text)
    for table in ("gradebook.csv", "canvas.csv", "moodle.csv"):
        for line in (out / table).read_text(encoding="utf-8").splitlines():
            assert not any(field.lstrip('"').startswith(("=", "@", "+")) for field in line.split(","))


def test_edited_and_deleted_checks_are_reported(two_runs):
    together = command.results(two_runs[0]["together"][0])
    assert len(together["g-prints"]["changed_checks"]) == len(classroom.EXERCISES)
    assert "was edited" in together["g-prints"]["changed_checks"][0]
    assert "was deleted" in together["h-deletes"]["changed_checks"][0]
    assert {e["status"] for e in together["g-prints"]["exercises"]} <= {"not written"}
