"""`effattn release`: what students get, what grading gets, and that a folder is written whole or not at all."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from datetime import datetime, timedelta, timezone

import nbformat
import pytest

from effattn_lab import notebooks
from effattn_lab.exercises import all_exercises
from effattn_lab.grading import release as release_module
from effattn_lab.grading.model import Assignment, LateRule
from effattn_lab.grading.notebook import cells_to_run, changed_checks, lab_of, read_cells
from effattn_lab.grading.release import (
    add_arguments,
    default_assignment,
    due_date,
    load_assignment,
    release,
    release_id,
    run,
)
from effattn_lab.grading.release_plan import _checks, _defines
from effattn_lab.grading.release_text import due_words, late_words

DUE = datetime(2026, 12, 24, 23, 59, tzinfo=timezone(timedelta(hours=1)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "week1"
    return out, release(out, ["full/flash"], due=DUE)


def options(out, labs=(), due=None, points=None, seed=False):
    return argparse.Namespace(out=str(out), labs=list(labs), due=due, points=points, seed_per_student=seed)


def test_what_is_written(made):
    out, assignment = made
    assert sorted(p.name for p in out.iterdir()) == ["INSTRUCTIONS.md", "assignment.json", "flash.ipynb"]
    assert load_assignment(out) == load_assignment(out / "assignment.json") == assignment
    (plan,) = assignment.labs
    data = (out / "flash.ipynb").read_bytes()
    assert plan.sha256 == hashlib.sha256(data).hexdigest()
    assert [item.id for item in assignment.items] == [e.id for e in all_exercises() if "full/flash/" in e.id]
    for item in assignment.items:
        exercise = next(e for e in all_exercises() if e.id == item.id)
        assert exercise.signature.startswith(f"{item.function}("), item
    book = nbformat.reads(data.decode(), as_version=4)
    nbformat.validate(book)
    assert book.metadata.effattn == {"lab": "full/flash", "assignment": release_id(assignment)}
    assert lab_of(data) == "full/flash"


def test_the_table(made):
    out, _ = made
    book = nbformat.read(out / "flash.ipynb", as_version=4)
    assert book.cells[0].source.startswith("# Flash attention")
    assert book.cells[1].cell_type == "markdown"
    for words in (
        "| `merge` | full/flash/merge | 1 |",
        "**6**",
        "2026-12-24 23:59 (UTC+01:00)",
        "10 %",
        "50 %",
    ):
        assert words in book.cells[1].source
    plain = notebooks.student_notebook("full/flash")
    assert [c.source for c in book.cells[2:]] == [c.source for c in plain.cells[1:]]


def test_instructions(made):
    text = (made[0] / "INSTRUCTIONS.md").read_text(encoding="utf-8")
    for words in (
        "Colab",
        "hidden inputs",
        "is not the grade",
        "`reference(...)`, `take(...)` and `solution(...)` earn nothing",
        "Academic honesty",
        "You may import",
        "2026-12-24 23:59 (UTC+01:00)",
        "| flash.ipynb | `flash_triton` | full/flash/triton_forward | 1 |",
    ):
        assert words in text
    assert len(text.split()) < 500, "one page"


def test_the_cells_are_recognised(made):
    """An untouched notebook runs what defines, skips what shows; a solved one runs its blanks."""
    out, assignment = made
    (plan,) = assignment.labs
    cells = read_cells((out / "flash.ipynb").read_bytes())
    assert [c.id for c in cells] == [given.id for given in plan.cells]
    assert changed_checks(cells, plan) == ()
    ran = [source for _, source in cells_to_run(cells, plan)]
    assert any(source.startswith("import effattn_kernels") for source in ran)
    assert not any("check(" in source or "smollm2" in source or "install(" in source for source in ran)
    for item in plan.items:
        assert sum(f"def {item.function}(" in source for source in ran) == 1, item
    roles = [given.role for given in plan.cells]
    assert roles.count("check") == 6
    assert roles.count("blank") == 7
    solved = notebooks.solved_notebook("full/flash")
    solved = read_cells(nbformat.writes(solved).encode())
    assert changed_checks(solved, plan) == ()
    assert next(s for _, s in cells_to_run(solved, plan) if "def merge(" in s).count("torch.exp") == 2


def test_roles():
    assert _defines(
        '"""Doc."""\nimport a\nfrom b import c\nN, D = 1, (2, [3])\n@jit\ndef f(): ...\nclass A: x = 1'
    )
    for text in ("x = f()", "f()", "if 1: x = 1", "x += 1", "for i in (): ...", "x = [1][0]"):
        assert not _defines(text), text
    assert _checks('check("a/b/c", f)\ncheck("a/b/d", g, seed=1)') == [("a/b/c", "f"), ("a/b/d", "g")]
    assert _checks('x = check("a/b/c", f)\nother("a/b/c", f)\ncheck("a/b/c", lambda: 1)') == []


def test_same_bytes_again(made, tmp_path):
    out, _ = made
    release(tmp_path / "again", ["full/flash"], due=DUE)
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    release(out, ["full/flash"], due=DUE)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in out.parent.iterdir()] == ["week1"]


def test_points_file(tmp_path):
    points = tmp_path / "points.yml"
    points.write_text(
        "title: Week 1\npoints: {full/flash/merge: 2.5, full/flash/triton_forward: 0}\n"
        "late: {grace_minutes: 0, percent_per_day: 20, most_percent: 100}\ncredit: properties\n"
    )
    assignment = release(tmp_path / "out", points_file=points, seed_per_student=True)
    assert {item.id: item.points for item in assignment.items}["full/flash/merge"] == 2.5
    assert "full/flash/triton_forward" not in {item.id for item in assignment.items}
    assert assignment.title == "Week 1"
    assert assignment.late == LateRule(0, 20, 100)
    assert (assignment.credit, assignment.seed_per_student, assignment.due) == ("properties", True, None)
    assert load_assignment(tmp_path / "out") == assignment
    text = (tmp_path / "out" / "INSTRUCTIONS.md").read_text(encoding="utf-8")
    assert "in proportion" in text
    assert "differ from student to student" in text
    assert "no due date" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pionts: {}", "expected some of title, points, late, credit, got 'pionts'"),
        ("points: {full/flash/mrege: 1}", "some of full/flash/safe_softmax, .*, got 'full/flash/mrege'"),
        ("points: {full/flash/merge: -1}", "points of full/flash/merge: expected a number from 0 to 1000, got -1"),
        ("points: {full/flash/merge: true}", "expected a number"),
        ("points: {full/flash/merge: .nan}", "expected a number"),
        ("points: [1]", "points: expected names with values, got list"),
        ("late: {percent: 1}", "late: expected some of grace_minutes, percent_per_day, most_percent"),
        ("late: {most_percent: 101}", "from 0 to 100"),
        ("credit: some", "credit: expected all or properties, got 'some'"),
        ("title: [1]", "title: expected a line"),
        ('title: "a\\nb"', "title: expected a line"),
        ("{", "is not YAML"),
        ("- 1", r"points\.yml: expected names with values, got list"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)  # fmt: skip
def test_points_file_refused(tmp_path, text, message):
    (tmp_path / "points.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        release(tmp_path / "out", points_file=tmp_path / "points.yml")
    assert [p.name for p in tmp_path.iterdir()] == ["points.yml"]


def test_nothing_to_grade(tmp_path):
    ids = [item.id for item in default_assignment().items]
    (tmp_path / "points.yml").write_text(json.dumps({"points": dict.fromkeys(ids, 0)}))
    with pytest.raises(ValueError, match="every exercise has 0 points"):
        release(tmp_path / "out", points_file=tmp_path / "points.yml")


def test_other_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"LAB: expected some of full/flash.*, got 'full/none'"):
        release(tmp_path / "out", ["full/none"])
    with pytest.raises(ValueError, match="with a time zone"):
        release(tmp_path / "out", due=datetime(2026, 1, 1))
    with pytest.raises(ValueError, match=r"--points: .* cannot be read"):
        release(tmp_path / "out", points_file=tmp_path / "none.yml")


def test_dates(capsys, tmp_path, monkeypatch):
    assert due_date("2026-12-24T23:59+01:00") == DUE
    assert due_date("2026-12-24T22:59Z") == DUE
    assert due_date("2026-12-24T23:59").tzinfo is not None
    for text in ("tomorrow", "2026-13-01T00:00", "2026-12-24"):
        with pytest.raises(ValueError, match=r"^--due: expected a date"):
            due_date(text)
    assert due_words(DUE) == "2026-12-24 23:59 (UTC+01:00)"
    assert run(options(tmp_path / "a", due="2026-12-24T23:59")) == 0
    assert "the time zone of this machine" in capsys.readouterr().out
    assert run(options(tmp_path / "b", due="2026-12-24T23:59+01:00")) == 0
    said = capsys.readouterr().out
    assert "Due 2026-12-24 23:59 (UTC+01:00). Up to 10 minutes late nothing is lost;" in said
    assert run(options(tmp_path / "c", due="2020-12-24T23:59+01:00")) == 0
    assert "in the past" in capsys.readouterr().out
    assert run(options(tmp_path / "d", due="9020-12-24T23:59+01:00")) == 0
    assert "in the past" not in capsys.readouterr().out


def test_late_words():
    assert late_words(LateRule()) == (
        "Up to 10 minutes late nothing is lost; after that 10 % of the points for each day begun since the due time, "
        "at most 50 %."
    )
    assert late_words(LateRule(percent_per_day=0)) == "Late submissions lose nothing."


def test_what_the_instructor_wrote_is_kept(tmp_path):
    out, page = tmp_path / "week", tmp_path / "week" / "INSTRUCTIONS.md"
    release(out, ["full/flash"], due=DUE)
    above, heading, ours = page.read_text(encoding="utf-8").partition("## Academic honesty\n")
    assert "fills in" in ours
    page.write_text(f"{above}{heading}\nTalk, then write alone.\n", encoding="utf-8")
    release(out, ["full/flash"], due=DUE + timedelta(days=1))
    text = page.read_text(encoding="utf-8")
    assert "Due 2026-12-25" in text
    assert text.endswith("## Academic honesty\n\nTalk, then write alone.\n")
    page.write_text("Come to my office.\n" + text, encoding="utf-8")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="was edited, or another version wrote it; name a new folder"):
        release(out, ["full/flash"], due=DUE)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    page.unlink()
    release(out, ["full/flash"], due=DUE)
    assert "fills in" in page.read_text(encoding="utf-8")


def test_what_is_not_overwritten(made, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no earlier release"):
        release(tmp_path / "full")
    release(tmp_path / "one", ["full/flash"])
    (tmp_path / "one" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds more than a release: 'notes\.txt'"):
        release(tmp_path / "one", ["full/flash"])
    (tmp_path / "points.yml").write_text("title: Another")
    release(tmp_path / "two", ["full/flash"])
    with pytest.raises(ValueError, match="holds another assignment, 'Flash attention: the lab'"):
        release(tmp_path / "two", ["full/flash"], points_file=tmp_path / "points.yml")
    (tmp_path / "link").symlink_to(tmp_path / "two")
    with pytest.raises(ValueError, match="something else"):
        release(tmp_path / "link", ["full/flash"])
    (tmp_path / "empty").mkdir()
    release(tmp_path / "empty", ["full/flash"])
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    """Whichever step fails: the earlier release is still there, byte for byte, and nothing else is."""
    out = tmp_path / "out"
    release(out, ["full/flash"])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    real = {name: getattr(os, name) for name in ("fsync", "rename")}
    failed = 0
    for step in range(1, 20):
        count = 0

        def once(name, *arguments, step=step):
            nonlocal count
            count += 1
            if count == step:
                raise OSError("no space left")
            return real[name](*arguments)

        for name in real:
            monkeypatch.setattr(release_module.os, name, lambda *a, name=name: once(name, *a))
        try:
            release(out, ["full/flash"], due=DUE)
        except OSError:
            failed += 1
            monkeypatch.undo()
            assert {p.name: p.read_bytes() for p in out.iterdir()} == before
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
        else:
            break
    monkeypatch.undo()
    assert failed == 5, "three files, two renames"
    assert load_assignment(out).due == DUE


def test_default_assignment():
    assignment = default_assignment()
    assert [plan.lab for plan in assignment.labs] == notebooks.labs()
    assert assignment.points == len(assignment.items)
    for plan in assignment.labs:
        data = notebooks.paths(plan.lab)[0].read_bytes()
        assert plan.sha256 == hashlib.sha256(data).hexdigest()
        assert [c.id for c in read_cells(data)] == [given.id for given in plan.cells]
    assert Assignment.from_json(json.loads(json.dumps(assignment.to_json()))) == assignment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("labs"), "a field is missing"),
        (lambda d: d.update(format=99), "expected format 1"),
        (lambda d: d.update(due="2026-01-01T00:00"), "with a time zone"),
        (lambda d: d.update(credit="x"), "credit: expected"),
    ],
)
def test_manifests_refused(made, tmp_path, change, message):
    data = json.loads((made[0] / "assignment.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "assignment.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_assignment(tmp_path)
    (tmp_path / "assignment.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_assignment(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_assignment(tmp_path / "none")


def test_a_notebook_is_no_manifest(made):
    with pytest.raises(ValueError, match=r"flash\.ipynb: expected the assignment\.json .* got a notebook"):
        load_assignment(made[0] / "flash.ipynb")


def test_files_of_labs_with_one_slug(made):
    from effattn_lab.grading.release_plan import plan_of, read_lab

    book = read_lab("full/flash")
    assert plan_of("full/flash", book, ["full/flash", "sparse/window"], {}).file == "flash.ipynb"
    assert plan_of("full/flash", book, ["full/flash", "sparse/flash"], {}).file == "full-flash.ipynb"
    assert dataclasses.replace(made[1].labs[0], sha256="") == plan_of("full/flash", book, ["full/flash"], {})


def test_the_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(tmp_path / "out"), "full/flash"])) == 0
    said = capsys.readouterr().out
    assert "flash.ipynb: 6 exercises, 6 points" in said
    assert "No due date: nothing is late." in said
