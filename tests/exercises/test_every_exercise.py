"""What holds for every exercise of every lab: the solution passes, every known mistake is rejected and named.

A new exercise is found by itself. Kernels run in an interpreter: one seed each, where tensors take three.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effattn_lab import notebooks
from effattn_lab.exercises import Case, all_exercises, check, reference, solution
from effattn_lab.exercises.core import Exercise, Mutant

EXERCISES = all_exercises()
MUTANTS = [(e, m) for e in EXERCISES for m in e.mutants]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    yield
    torch.set_num_threads(before)


def seeds(exercise: Exercise) -> range:
    return range(1) if exercise.kernel else range(3)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_every_exercise_has_its_lab():
    labs = {e.id.rsplit("/", 1)[0] for e in EXERCISES}
    assert labs == set(notebooks.labs())
    assert len({e.id for e in EXERCISES}) == len(EXERCISES)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_it_is_whole(exercise):
    assert len(exercise.mutants) >= 5
    assert len(exercise.hints) == 3
    assert exercise.from_scratch, "what may not be called"
    assert exercise.tolerance.why
    assert all(t.why for t in exercise.loose.values())
    assert set(exercise.loose) <= set(exercise.properties)
    drawn = {c.property for c in exercise.make_inputs(np.random.default_rng(0))}
    assert drawn == set(exercise.properties), "every property has a case and a generic hint"
    assert all(p.trial for p in exercise.probes), "a grader cannot look into the process: see core.Trial"
    hints = [m.hint for m in exercise.mutants]
    assert len(set(hints)) == len(hints), "mutants have hints of their own"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_reference_passes(exercise, capsys):
    for seed in [*seeds(exercise), 17]:
        result = check(exercise.id, exercise.solution, seed=seed)
        assert result, result.report
    assert "✗" not in capsys.readouterr().out


@pytest.mark.parametrize(("exercise", "mutant"), MUTANTS, ids=[f"{e.id}-{m.name}" for e, m in MUTANTS])
def test_mutant_is_rejected_and_named(exercise: Exercise, mutant: Mutant):
    for seed in seeds(exercise):
        result = check(exercise.id, mutant.fn, seed=seed)
        assert not result
        assert mutant.hint in flat(result.report), result.report


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_seeds_draw_other_inputs_of_the_same_shapes(exercise):
    a, b = (exercise.make_inputs(np.random.default_rng(s)) for s in (0, 1))
    assert [c.property for c in a] == [c.property for c in b]
    assert any(not torch.equal(x, y) for c, d in zip(a, b) for x, y in _pairs(c, d) if x.numel() > 1)
    again = exercise.make_inputs(np.random.default_rng(0))
    assert all(torch.equal(x, y) for c, d in zip(a, again) for x, y in _pairs(c, d))


def _pairs(c: Case, d: Case):
    return [(c.kwargs[n], d.kwargs[n]) for n in c.kwargs if isinstance(c.kwargs[n], torch.Tensor)]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_reference_can_be_taken(exercise, capsys):
    fn = reference(exercise.id)
    assert f"Taking the reference for {exercise.id}" in capsys.readouterr().out
    assert fn is exercise.solution
    solution(exercise.id)
    assert "def " in capsys.readouterr().out


def test_none_needs_triton_to_be_imported():
    import subprocess
    import sys

    code = (
        "import sys\nfor name in ('triton', 'effattn_kernels'):\n    sys.modules[name] = None\n"
        "import effattn_lab.exercises as e\n"
        f"assert len(e.all_exercises()) == {len(EXERCISES)}\n"
        "assert e.check('full/flash/merge', e.get('full/flash/merge').solution)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
