"""The checks of the flash lab: references pass, every known mistake is rejected and named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effattn_lab.exercises import Case, all_exercises, check, get, hint, reference, solution
from effattn_lab.exercises.core import Exercise, Mutant
from effattn_lab.exercises.full._flash_backward import BACKWARD_TILE
from effattn_lab.exercises.full._flash_tiles import tile_step

FLASH = [e for e in all_exercises() if e.id.startswith("full/flash/")]
MUTANTS = [(e, m) for e in FLASH for m in e.mutants]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    yield
    torch.set_num_threads(before)


def seeds(exercise: Exercise) -> range:
    """Kernels run in an interpreter: one seed each, where tensors take three."""
    return range(1) if exercise.id.endswith("triton_forward") else range(3)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_ids_and_sizes():
    assert [e.id.split("/")[-1] for e in FLASH] == [
        "safe_softmax", "merge", "tile_step", "forward", "backward_tile", "triton_forward",
    ]  # fmt: skip
    for e in FLASH:
        assert len(e.mutants) >= 6
        assert len(e.hints) == 3
        assert e.tolerance.why
        assert all(t.why for t in e.loose.values())
        drawn = {c.property for c in e.make_inputs(np.random.default_rng(0))}
        assert drawn == set(e.properties), "every property has a case and a generic hint"


@pytest.mark.parametrize("exercise", FLASH, ids=lambda e: e.id)
def test_reference_passes(exercise, capsys):
    for seed in [*seeds(exercise), 17]:
        result = check(exercise.id, exercise.solution, seed=seed)
        assert result, result.report
    assert "✗" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exercise", "mutant"), MUTANTS, ids=[f"{e.id.split('/')[-1]}-{m.name}" for e, m in MUTANTS]
)
def test_mutant_is_rejected_and_named(exercise: Exercise, mutant: Mutant):
    for seed in seeds(exercise):
        result = check(exercise.id, mutant.fn, seed=seed)
        assert not result
        if mutant.unwritten:
            assert not result.written
        else:
            assert mutant.hint in flat(result.report), result.report


def test_mutants_have_hints_of_their_own():
    for e in FLASH:
        hints = [m.hint for m in e.mutants]
        assert len(set(hints)) == len(hints)


@pytest.mark.parametrize("exercise", FLASH, ids=lambda e: e.id)
def test_seeds_draw_other_inputs_of_the_same_shapes(exercise):
    a, b = (exercise.make_inputs(np.random.default_rng(s)) for s in (0, 1))
    assert [c.property for c in a] == [c.property for c in b]
    assert any(not torch.equal(x, y) for c, d in zip(a, b) for x, y in _pairs(c, d) if x.numel() > 1)
    again = exercise.make_inputs(np.random.default_rng(0))
    assert all(torch.equal(x, y) for c, d in zip(a, again) for x, y in _pairs(c, d))


def _pairs(c: Case, d: Case):
    return [(c.kwargs[n], d.kwargs[n]) for n in c.kwargs if isinstance(c.kwargs[n], torch.Tensor)]


def test_reports_hold_no_expected_values():
    """No number of the reference appears: indices, shapes and error sizes do."""
    exercise = get("full/flash/safe_softmax")
    report = check(exercise.id, lambda s: torch.full_like(s, 2.0)).report
    want = exercise.want(exercise.make_inputs(np.random.default_rng(0))[0])[0]
    assert f"{float(want.flatten()[0]):.3f}" not in report
    assert "p against the float64 reference" in report
    assert "first at p[0, 0, 0]" in report


MERGE = "full/flash/merge"


def good(*args):
    return get(MERGE).solution(*args)


def in_place(o_a, lse_a, o_b, lse_b):
    o, lse = good(o_a, lse_a, o_b, lse_b)
    lse_a += 1.0
    return o, lse


def aliased(o_a, lse_a, o_b, lse_b):
    """Right, but for an empty part it hands an argument back."""
    return (o_a, lse_a) if lse_b.isneginf().all() else good(o_a, lse_a, o_b, lse_b)


def random_answer(o_a, lse_a, o_b, lse_b):
    o, lse = good(o_a, lse_a, o_b, lse_b)
    return o + 1e-7 * torch.rand_like(o), lse


def unfilled(o_a, lse_a, o_b, lse_b):
    return torch.empty_like(o_a), torch.empty_like(lse_a)


def raises(o_a, lse_a, o_b, lse_b):
    o = o_a @ o_b
    return o, lse_a + lse_b


def blank(o_a, lse_a, o_b, lse_b):
    """A template nobody has filled in."""
    ...


def half_blank(o_a, lse_a, o_b, lse_b):
    m = ...
    return o_a * m, m


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (in_place, "the argument lse_a was changed in place"),
        (aliased, "a result shares its memory with the argument o_a"),
        (random_answer, "two calls with the same inputs differ"),
        (unfilled, "entries are NaN"),
        (raises, "at the line: o = o_a @ o_b"),
        (lambda a, b, c: (a, b), "does it take these arguments, in this order?"),
        (lambda *a: good(*a)[0], "the function returned one Tensor; expected 2: o, lse"),
        (lambda *a: (*good(*a), 1), "the function returned 3 values; expected 2: o, lse"),
        (lambda *a: [x.numpy() for x in good(*a)], "o is a ndarray; expected a torch.Tensor"),
        (lambda *a: (good(*a)[0].double(), good(*a)[1]), "o has dtype float64; expected float32"),
        (lambda *a: (good(*a)[0], good(*a)[1][..., None]), "lse has shape (3, 8, 1); expected (3, 8)"),
        (lambda *a: (good(*a)[0] * float("nan"), good(*a)[1]), "entries are NaN"),
        (lambda *a: (good(*a)[0], good(*a)[1] + float("inf")), "infinite on one side, finite on the other"),
        (lambda *a: None if a[1].max() > 100 else good(*a), "the function returned None; expected o, lse"),
        (lambda *a: exit(), "SystemExit"),
    ],
    ids=["in-place", "aliasing", "random", "unfilled", "raises", "arguments", "one-value", "three-values", "numpy",
         "dtype", "shape", "nan", "inf", "none", "exit"],
)  # fmt: skip
def test_odd_submissions_get_a_clear_line(fn, says):
    result = check(MERGE, fn)
    assert not result
    assert result.written
    assert says in flat(result.report)
    assert "Likely cause: " in result.report


def test_an_error_in_a_kernel_names_the_kernels_line(tmp_path):
    """Triton's interpreter wraps what a kernel raises; the report shows the kernel's own line."""
    import importlib.util

    from effattn_lab.exercises.full import _flash_triton

    text = _flash_triton._source()
    faults = {
        "tl.max(s, 1)": (
            "tl.max(scores, 1)",
            "NameError: name 'scores' is not defined",
            "m_new = tl.maximum(",
        ),
        "tl.dot(p.to(v.dtype), v": ("tl.dot(p, v", "Both operands must be same dtype", "p.to(v.dtype)"),
    }
    for number, (right, (wrong, error, also)) in enumerate(faults.items()):
        path = tmp_path / f"wrong_{number}.py"
        path.write_text(text.replace(right, wrong))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        report = flat(check("full/flash/triton_forward", module.flash_triton).report)
        assert error in report
        assert f"at the line: {'m_new' if number == 0 else 'acc'} = " in report
        assert also in report
        assert report.count(error) == 1, "said once, then 'the same'"


@pytest.mark.parametrize("fn", [blank, half_blank, lambda *a: (None, None), lambda *a: ...])
def test_blank_is_not_written_yet(fn):
    result = check(MERGE, fn)
    assert not result
    assert not result.written
    assert "not written yet" in result.report
    assert "✗" not in result.report


def test_two_mistakes_are_explained_in_part():
    """Two mistakes at once match no mutant everywhere, but one where the other does not show."""

    def two(m, l, acc, s, v):
        m_new = torch.maximum(m, s.amax(dim=-1))
        alpha, p = torch.exp(m - m_new), torch.exp(s - m_new[:, None])
        return m_new, alpha * l + p.sum(dim=-1), acc + p @ v

    report = flat(check("full/flash/tile_step", two).report)
    assert "acc is not multiplied by alpha" in report or "becomes NaN" in report
    assert "wrong results" in report


def test_result_reads_like_a_result():
    result = check(MERGE, good)
    assert result
    assert result.failed == ()
    assert len(result.passed) == 9
    assert "All 9 properties hold" in str(result)
    assert result._ipython_display_() is None


def test_hints_come_in_rungs(capsys):
    hint(MERGE, 1)
    one = capsys.readouterr().out
    hint(MERGE, 3)
    three = capsys.readouterr().out
    assert "Hint 1 of 3" in one
    assert "Hint 2 of 3" not in one
    assert "Hint 3 of 3" in three
    check(MERGE, blank, hint=2)
    check(MERGE, lambda *a: good(*a)[::-1], hint=2)
    assert "Hint 2 of 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rung: expected 1 to 3, got 4"):
        hint(MERGE, 4)


@pytest.mark.parametrize("exercise", FLASH, ids=lambda e: e.id)
def test_reference_can_be_taken(exercise, capsys):
    fn = reference(exercise.id)
    assert f"Taking the reference for {exercise.id}" in capsys.readouterr().out
    assert fn is exercise.solution
    solution(exercise.id)
    assert "def " in capsys.readouterr().out


def test_unknown_exercises_are_named():
    for wrong in ("full/flash/nothing", "nowhere/flash/merge", "merge", "", "full/../flash/x"):
        with pytest.raises(ValueError, match="id: expected an exercise"):
            get(wrong)
    with pytest.raises(ValueError, match="fn: expected your function, got int"):
        check(MERGE, 3)
    with pytest.raises(ValueError, match="got dict"):
        Case("x", {"a": {}})


def test_backward_reference_is_the_derivative():
    """Tiles of the reference, summed, equal autograd on float64 attention."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(12, 8, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keep = torch.ones(12, 12).tril().bool()
    s = (0.3 * q @ k.T).masked_fill(~keep, float("-inf"))
    o, lse = torch.softmax(s, dim=-1) @ v, torch.logsumexp(s, dim=-1)
    want = torch.autograd.grad((o * do).sum(), leaves)
    dq = torch.zeros_like(q)
    for j in (0, 5):
        cols = slice(j, j + 5) if j == 0 else slice(5, 12)
        part, dk, dv = BACKWARD_TILE.reference(
            q=q, k=k[cols], v=v[cols], o=o, do=do, lse=lse, keep=keep[:, cols], scale=0.3
        )
        dq = dq + part
        torch.testing.assert_close(dk, want[1][cols])
        torch.testing.assert_close(dv, want[2][cols])
    torch.testing.assert_close(dq, want[0])


def test_tile_step_keeps_its_invariant():
    """Steps over ragged tiles end at softmax attention: the reference is right, not only like itself."""
    torch.manual_seed(0)
    s, v = torch.randn(5, 23, dtype=torch.float64) * 4, torch.randn(23, 7, dtype=torch.float64)
    state = (
        torch.full((5,), -torch.inf, dtype=torch.float64),
        torch.zeros(5).double(),
        torch.zeros(5, 7).double(),
    )
    for j in range(0, 23, 6):
        state = tile_step(*state, s[:, j : j + 6], v[j : j + 6])
    torch.testing.assert_close(state[2] / state[1][:, None], torch.softmax(s, dim=-1) @ v)


def test_no_exercise_needs_triton_to_be_imported():
    import subprocess
    import sys

    code = (
        "import sys\nfor name in ('triton', 'effattn_kernels'):\n    sys.modules[name] = None\n"
        "import effattn_lab.exercises as e\n"
        "assert len(e.all_exercises()) >= 6\nassert e.check('full/flash/merge', e.get('full/flash/merge').solution)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
