"""Every registered mistake is refused by the grader's own path too: in the sandbox, on secret inputs.

The mutants are imported inside, from a site that holds them for this test only. Mistakes that show only in how a
result is computed are judged from a kernel's text, so those stand as text (`solved_labs.by_text`). A new lab is found
by itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import solved_labs

from effattn_lab import notebooks
from effattn_lab.exercises.registry import all_exercises, get
from effattn_lab.grading import build
from effattn_lab.grading.judge import Boxes, judge
from effattn_lab.grading.sandbox import Limits
from effattn_lab.grading.task import site as student_site

SEED = "every mutant"
EXERCISES = all_exercises()
LABS = [lab for lab in notebooks.labs() if solved_labs.items(lab)]
BY_TEXT = [(e, name) for lab in LABS for e, table in solved_labs.by_text(lab).items() for name in table]


def lab_of(exercise_id: str) -> str:
    return exercise_id.rsplit("/", 1)[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package as students find it, and the exercises with their mutants beside it."""
    found = build.build_site(tmp_path_factory.mktemp("mutants") / "site", ())
    inside = found / "effattn_lab" / "exercises"
    shutil.rmtree(inside)
    shutil.copytree(Path(build.__file__).parents[1] / "exercises", inside)
    return found


@pytest.fixture(scope="module")
def boxes(site):
    with Boxes(site, Limits()) as found:
        yield found


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_mutants_are_refused(exercise, boxes):
    lost = []
    lab = lab_of(exercise.id)
    item = solved_labs.items(lab)[exercise.id]
    for mutant in exercise.mutants:
        if mutant.name in solved_labs.by_text(lab).get(exercise.id, ()):
            continue
        source = f"""
from effattn_lab.exercises.registry import get

{item.function} = {{m.name: m.fn for m in get("{exercise.id}").mutants}}[{mutant.name!r}]
"""
        result = judge(boxes, item, [(1, source)], SEED)
        wrong = [v for v in result.verdicts if not v.passed]
        if result.status != "failed" or result.points or result.error or not wrong:
            lost.append((mutant.name, result.status, result.error))
        elif mutant.hint not in (result.cause, *(v.hint for v in wrong)):
            lost.append((mutant.name, "its hint is not given", result.cause))
    assert not lost, "right numbers by a wrong kernel? Such a mutant stands in tests/<part>/<slug>_by_text.py"


@pytest.mark.parametrize("lab", LABS)
def test_the_solved_lab_passes(lab):
    """On the site that students get, where nothing of what the lab asks to write is left."""
    items = solved_labs.items(lab)
    names = {name for item in items for name in get(item).from_scratch}
    with Boxes(student_site(lab, tuple(sorted(names))), Limits()) as boxes:
        for item in items.values():
            result = judge(boxes, item, list(solved_labs.cells(lab)), SEED)
            assert result.status == "passed", (item.id, result.error, result.cause, result.verdicts)


@pytest.mark.parametrize(("exercise", "name"), BY_TEXT, ids=[f"{e}-{name}" for e, name in BY_TEXT])
def test_kernels_with_right_numbers_are_refused(exercise, name, boxes):
    mutant = next(m for m in get(exercise).mutants if m.name == name)
    lab = lab_of(exercise)
    cells = solved_labs.edited(lab, solved_labs.by_text(lab)[exercise][name])
    result = judge(boxes, solved_labs.items(lab)[exercise], cells, SEED)
    wrong = [v for v in result.verdicts if not v.passed]
    assert (result.status, result.points) == ("failed", 0.0)
    # The numbers are right: nothing but how they came about is held against it.
    assert {v.property for v in wrong} <= {p.name for p in get(exercise).probes}
    if not name.startswith("plain "):  # refused before a compiler sees them, in words of their own
        assert any(mutant.hint[:60] in (v.hint + v.detail) for v in wrong), wrong
