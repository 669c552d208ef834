"""Every registered mistake is refused by the grader's own path too: in the sandbox, on secret inputs.

The mutants are imported inside, from a site that holds them for this test only. Mistakes that show only in how a
result is computed are judged from a kernel's text, so those stand as text in `classroom`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import classroom
import pytest

from effattn_lab.exercises.registry import get
from effattn_lab.grading import build
from effattn_lab.grading.judge import Boxes, judge
from effattn_lab.grading.model import Item
from effattn_lab.grading.sandbox import Limits

SEED = "every mutant"
#: Right numbers by a wrong kernel, or by none.
BY_TEXT = {"no kernel", "reads every tile", "scores stored", "plain global", "plain helper", "changed dtype"}


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


def judged(boxes, exercise: str, cells) -> object:
    item = Item(f"full/flash/{exercise}", classroom.FUNCTIONS[exercise], 1.0)
    return judge(boxes, item, cells, SEED)


@pytest.mark.parametrize("exercise", classroom.EXERCISES)
def test_mutants_are_refused(exercise, boxes):
    lost = []
    for mutant in get(f"full/flash/{exercise}").mutants:
        if exercise == "triton_forward" and mutant.name in BY_TEXT:
            continue
        source = f"""
from effattn_lab.exercises.registry import get

{classroom.FUNCTIONS[exercise]} = {{m.name: m.fn for m in get("full/flash/{exercise}").mutants}}[{mutant.name!r}]
"""
        result = judged(boxes, exercise, [(1, source)])
        wrong = [v for v in result.verdicts if not v.passed]
        if result.status != "failed" or result.points or result.error or not wrong:
            lost.append((mutant.name, result.status, result.error))
        elif mutant.hint not in (result.cause, *(v.hint for v in wrong)):
            lost.append((mutant.name, "its hint is not given", result.cause))
    assert not lost


@pytest.mark.parametrize("exercise", classroom.EXERCISES)
def test_the_model_solution_passes(exercise, boxes):
    parts = {"forward": classroom.solution("forward"), exercise: classroom.solution(exercise)}
    assert judged(boxes, exercise, classroom.cells(**parts)).status == "passed"


@pytest.mark.parametrize("name", sorted(BY_TEXT))
def test_kernels_with_right_numbers_are_refused(name, boxes):
    mutant = next(m for m in get("full/flash/triton_forward").mutants if m.name == name)
    parts = {"forward": classroom.solution("forward"), "kernel": classroom.wrong("triton_forward", name)}
    result = judged(boxes, "triton_forward", classroom.cells(**parts))
    wrong = [v for v in result.verdicts if not v.passed]
    assert (result.status, result.points) == ("failed", 0.0)
    # The numbers are right: nothing but how they came about is held against it.
    assert {v.property for v in wrong} <= {p.name for p in get("full/flash/triton_forward").probes}
    if name not in (
        "plain global",
        "plain helper",
    ):  # refused before a compiler sees them, in words of their own
        assert any(mutant.hint[:60] in (v.hint + v.detail) for v in wrong), wrong
