"""Reading notebooks that nobody vouches for: malformed, enormous, edited."""

from __future__ import annotations

import contextlib
import json
import random
import time

import pytest

from effattn_lab.grading.model import GivenCell, LabPlan, source_digest
from effattn_lab.grading.notebook import NotebookError, cells_to_run, changed_checks, lab_of, read_cells
from effattn_lab.grading.text import visible


def notebook(*sources):
    cells = [{"cell_type": "code", "id": f"c{n}", "source": s} for n, s in enumerate(sources)]
    return json.dumps({"nbformat": 4, "cells": cells}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"[1]", "a JSON object, not a list"),
        (b"[" * 200_000, "nested more than 100 deep"),
        (b'{"nbformat": 4, "x": ' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 deep"),
        (b'{"nbformat": 4, "x": ' + b"9" * 10_000 + b"}", "too long"),
        (b'{"nbformat": NaN}', "expected 4, got nothing"),
        (b'{"nbformat": true, "cells": []}', "nbformat: expected 4"),
        (b'{"nbformat": 3, "worksheets": []}', "nbformat: expected 4, got 3"),
        (b'{"nbformat": 4, "cells": {}}', "cells: expected a list, got an object"),
        (b'{"nbformat": 4, "cells": [5]}', "cell 1: expected an object, got a number"),
        (b'{"nbformat": 4, "cells": [{"cell_type": "code"}]}', "cell 1: expected its source to be text"),
        (b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": [1]}]}', "source to be text, got a list"),
        (json.dumps({"nbformat": 4, "cells": [{}] * 2001}).encode(), "2001 cells; at most 2000"),
        (notebook("x" * 2_000_001), "more than 2000000 characters of code"),
        (b" " * 20_000_001, "at most 20000000 are read"),
    ],
)  # fmt: skip
def test_notebooks_that_are_refused(data, message):
    with pytest.raises(NotebookError, match=message) as error:
        read_cells(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_notebooks_that_are_read():
    cells = read_cells(
        b'\xef\xbb\xbf{"nbformat": 4, "metadata": [], "cells": ['
        b'{"cell_type": "markdown", "source": 7}, {"cell_type": "code", "source": ["a\\r\\n", "b\\ud800"]},'
        b'{"cell_type": "code", "id": 5, "metadata": {"id": "colab"}, "source": "", "outputs": [NaN, 1e999]}]}'
    )
    assert [(c.index, c.id, c.source) for c in cells] == [(1, "", "a\nb\ufffd"), (2, "colab", "")]
    assert source_digest(cells[0].source)
    assert lab_of(b'{"metadata": {"effattn": {"lab": ["x"]}}}') is None


PLAN = LabPlan(
    "full/flash", "flash.ipynb", "", (),
    (
        GivenCell("imp", source_digest("import torch"), "define"),
        GivenCell("blank", source_digest("def merge(): ..."), "blank"),
        GivenCell("check", source_digest('check("full/flash/merge", merge)'), "check", "full/flash/merge"),
        GivenCell("show", source_digest("print(merge())"), "show"),
    ),
)  # fmt: skip


def handed(*pairs):
    cells = [{"cell_type": "code", "id": i, "source": s} for i, s in pairs]
    return read_cells(json.dumps({"nbformat": 4, "cells": cells}).encode())


def test_cells_to_run_and_changed_checks():
    cells = handed(
        ("imp", "import torch  \n"),
        ("blank", "def merge(): return 1"),
        ("check", 'check("full/flash/merge", merge)'),
        ("show", "print(merge())"),
        ("mine", "helper = 3"),
    )
    assert cells_to_run(cells, PLAN) == [
        (1, "import torch  \n"),
        (2, "def merge(): return 1"),
        (5, "helper = 3"),
    ]
    assert changed_checks(cells, PLAN) == ()
    edited = handed(("check", "print('passed')"), ("show", "x = 1"), ("n", 'hint("full/flash/merge")\n# x'))
    assert cells_to_run(edited, PLAN) == [(2, "x = 1")]
    assert changed_checks(edited, PLAN) == ("the self-check of full/flash/merge was edited (cell 1)",)
    assert changed_checks(handed(("a", "b")), PLAN) == (
        "the self-check of full/flash/merge was deleted or rewritten",
    )
    # A tool that writes new ids has changed nothing.
    renamed = handed(("z1", 'check("full/flash/merge", merge)'), ("z2", "def merge(): ..."))
    assert changed_checks(renamed, PLAN) == ()
    assert cells_to_run(renamed, PLAN) == [(2, "def merge(): ...")]


def test_slow_texts_take_linear_time():
    start = time.perf_counter()
    for text in ("check(" * 50_000, "check(" + ")" * 300_000, "(" * 300_000, "#" * 300_000, "\n" * 300_000):
        cells_to_run(handed(("x", text)), PLAN)
        visible(text)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("seed", range(4))
def test_random_notebooks(seed):
    rng = random.Random(seed)
    values = [None, True, -1, 1e308, "", "x", [], {}, [1], {"source": 1}, "\ud800", "check", 4, "code"]

    def value(depth):
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(values)
        keys = ["cells", "metadata", "effattn", "lab", "id", "source", "cell_type", "nbformat"]
        if rng.random() < 0.5:
            return {rng.choice(keys): value(depth - 1) for _ in range(4)}
        return [value(depth - 1) for _ in range(3)]

    for _ in range(300):
        book = {"nbformat": 4, "metadata": value(3), "cells": value(3)}
        data = json.dumps(book).encode()
        for read in (read_cells, lab_of):
            with contextlib.suppress(NotebookError):
                read(data)
