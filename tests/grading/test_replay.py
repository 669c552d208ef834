"""Replaying a notebook with nbval inside the sandbox: which cells don't run, and nothing else."""

from __future__ import annotations

import json

import pytest

from effattn_lab.grading import build, replay

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build.full_site(tmp_path_factory.mktemp("site") / "whole")


def notebook(*sources):
    cells = [
        {
            "cell_type": "code",
            "id": f"c{n}",
            "metadata": {},
            "source": s,
            "outputs": [],
            "execution_count": None,
        }
        for n, s in enumerate(sources)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}
    ).encode()


def test_cells_that_do_not_run(site):
    sources = (
        "import torch\nfrom effattn_lab.exercises import check\nfrom effattn_lab.full.flash import flash_attention",
        "1 / 0",
        "print('x' * 100)",
        "raise ValueError('<script>alert(1)</script>')",
        "import socket\nsocket.create_connection(('1.1.1.1', 80), timeout=2)",
        "open('/usr/x', 'w')",
        "result = check('full/flash/merge', lambda *a: None)\nassert not result",
    )
    seen = replay.replay("full/flash", notebook(*sources), site)
    assert seen.ran == 3
    assert [(n, text.split(":")[0]) for n, text in seen.failed] == [
        (2, "ZeroDivisionError"), (4, "ValueError"), (5, "OSError"), (6, "OSError"),
    ]  # fmt: skip
    assert "Network is unreachable" in seen.failed[2][1]


def test_cells_are_counted_with_the_text_between():
    """One cell has one number, whoever speaks of it: the grader, the list of changed self-checks, the replay."""
    book = json.loads(notebook("1", "2", "3"))
    book["cells"].insert(1, {"cell_type": "markdown", "id": "m", "metadata": {}, "source": "text"})
    data = json.dumps(book).encode()
    assert [replay._number(data, n) for n in (1, 2, 3)] == [1, 3, 4]
    assert replay._number(data, 9) == 9
    assert replay._number(b"{", 2) == 2


@pytest.mark.parametrize(
    ("loop", "failed"),
    [
        ("while True: pass", [(2, "it took too long")]),
        (
            "import time\nwhile True:\n    try:\n        time.sleep(1)\n    except BaseException: pass",
            [(2, "it took too long"), (3, "not run: an earlier cell took too long")],
        ),
    ],
    ids=["can be interrupted", "cannot"],
)
def test_a_cell_without_end(site, monkeypatch, loop, failed):
    monkeypatch.setattr(replay, "CELL_SECONDS", 2)
    seen = replay.replay("full/flash", notebook("x = 1", loop, "y = 2"), site)
    assert list(seen.failed) == failed
    assert seen.ran + len(failed) == 3


@pytest.mark.parametrize(
    ("source", "ran"),
    [("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", 1), ("import os\nos.kill(-1, 9)", 0)],
    ids=["its parent", "everybody"],
)
def test_a_notebook_cannot_end_its_replay(site, source, ran):
    """The first process of the sandbox hears no signal from inside, and there is no other."""
    seen = replay.replay("full/flash", notebook(source), site)
    assert (seen.ran, len(seen.failed)) == (ran, 1 - ran)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff" * 100], ids=["nothing", "cut", "a list", "no text"]
)
def test_no_notebook(site, data):
    seen = replay.replay("full/flash", data, site)
    assert seen.ran == 0
    assert seen.note
