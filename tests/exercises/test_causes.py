"""What a report says of mistakes that no exercise has registered: the machinery that all labs share."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from effattn_lab import notebooks
from effattn_lab.exercises import check, get
from effattn_lab.exercises.causes import two_types
from effattn_lab.exercises.core import Case
from effattn_lab.linear.rotary import rotate

HEAD = (
    "import effattn_kernels\nimport torch, triton\nimport triton.language as tl\n"
    "import torch.nn.functional as F\nfrom effattn_lab.foundations.attention import repeat_kv\n"
    "from effattn_lab.exercises.registry import get\n"
)


def flat(text: str) -> str:
    return " ".join(text.split())


def lab_function(tmp_path, lab: str, name: str, changes: dict[str, str], head: str = ""):
    """The solved cell of a lab that defines ``name``, changed; from a file, so that lines can be quoted."""
    cell = next(c.source for c in notebooks.parse(lab).cells if f"def {name}(" in c.source)
    text = notebooks.solved(cell)
    for old, new in changes.items():
        assert old in text, text
        text = text.replace(old, new)
    path = tmp_path / f"{name}_{len(list(tmp_path.iterdir()))}.py"
    path.write_text(HEAD + head + text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_numbers_that_nobody_knows_get_a_word():
    """Every property fails, no mutant matches: the first line that fails is explained."""
    exercise = get("full/flash/merge")
    report = flat(check(exercise.id, lambda o, lse, *_: (o * 0 + 7.0, lse * 0 + 5.0)).report)
    name, text = next(iter(exercise.properties.items()))
    assert f"About “{name}”: {flat(text)}" in report
    assert "Likely cause" not in report


@pytest.mark.parametrize(
    ("message", "line", "says"),
    [
        ("Got fp16 and fp32", "out = tl.dot(q, s)", "the second is fp32, the first fp16: s.to(q.dtype)."),
        ("Got fp32 and fp16", "acc += tl.dot(p, v, input_precision='ieee')", "the second fp16: p.to(v.dtype)."),
        ("Got fp32 and bf16", "o = tl.dot(a * b, tl.trans(k[:, 0]))", "(a * b).to(tl.trans(k[:, 0]).dtype)."),
        ("Got fp16 and fp32", "o = tl.dot(a, b) + tl.dot(c, d)", "cast the second one, x.to(y.dtype)."),
        ("Got fp32 and fp16", "o = tl.dot(", "cast the first one, x.to(y.dtype)."),
        ("same dtype", "o = tl.dot(a, b)", "Cast one of them"),
    ],
)  # fmt: skip
def test_the_operand_that_is_to_be_cast(message, line, says):
    assert says in two_types(message, line)


def test_a_kernels_operands(tmp_path):
    fn = lab_function(
        tmp_path, "linear/linear_attention", "linear_triton", {"tl.dot(q, s.to(q.dtype)": "tl.dot(q, s"}
    )
    report = flat(check("linear/linear_attention/triton_forward", fn).report)
    assert "s.to(q.dtype)" in report
    assert "p is float32" not in report


def test_a_tile_cannot_be_indexed_by_a_variable(tmp_path):
    change = {"done = tl.sum(tl.where(rows[:, None] == j, x, 0.0), 0)": "done = x[j]"}
    fn = lab_function(tmp_path, "linear/delta_rule", "delta_triton", change)
    assert "A tile inside a kernel cannot be indexed" in flat(
        check("linear/delta_rule/triton_forward", fn).report
    )


def test_tiles_that_do_not_line_up(tmp_path):
    change = {"tl.exp(delta[None, :] * A)": "tl.exp(delta[:, None] * A)"}
    fn = lab_function(tmp_path, "linear/selective_ssm", "ssm_triton", change)
    report = flat(check("linear/selective_ssm/triton_scan", fn).report)
    assert "along the columns as x[None, :]" in report
    assert "[..., None]" not in report


def test_integers_show_a_row():
    """An error of 5.0e+00 in a token says nothing. No tolerance either."""
    exercise = get("linear/linearized_llm/tree_mask")
    case = exercise.make_inputs(np.random.default_rng(0))[0]
    (want,) = exercise.want(case)
    want = want.bool()
    assert exercise.compare(want, (want,), case) is None
    wrong = want.clone()
    wrong[-1, 0] = ~wrong[-1, 0]
    failure = exercise.compare(wrong, (want,), case)
    assert failure.compared == "mask against the reference"
    assert f"first at mask[{len(want) - 1}, 0]; 1 of {want.numel()} entries" in failure.where
    assert "got [" in failure.row
    assert "expected [" in failure.row
    assert failure.row not in failure.lines(), "what a grader sends out: its inputs are secret"
    report = check(exercise.id, lambda *a: ~exercise.solution(*a)).report
    assert "got [" in report


def test_a_long_row_is_cut_around_the_mistake():
    exercise = get("linear/linearized_llm/verify")
    want = torch.arange(100)
    got = want.clone()
    got[50] = 7
    failure = exercise.compare(got, (want,), Case("x", {}))
    assert failure.row == (
        "tokens, entries 44 to 55: got [44, 45, 46, 47, 48, 49, 7, 51, 52, 53, 54, 55], "
        "expected [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55]"
    )


def test_results_that_differ_and_are_wrong():
    """In a kernel that is a load without its mask; where the numbers are right it is something else."""
    for spread, says in ((1.0, "reads memory that belongs to something else"), (1e-7, "torch.empty")):
        exercise = get("full/flash/triton_forward")

        def fn(*a, spread=spread, exercise=exercise):
            out = exercise.solution(*a)
            return type(out)(x + spread * torch.rand_like(x) for x in out)

        report = flat(check(exercise.id, fn).report)
        assert "two calls with the same inputs differ" in report
        assert says in report


def test_a_step_called_with_swapped_arguments(tmp_path):
    head = "solve, system, chunk = (get('linear/delta_rule/' + n).solution for n in ('solve', 'system', 'chunk'))\n"
    head += "def take(name, fn):\n    return fn\n"
    for old, new, inside in (
        ("step3(L, R)", "step3(R, L)", "chunk"),  # which meets what solve made of it
        ("step5(S, q_c", "step5(q_c, S", "chunk"),
    ):
        fn = lab_function(tmp_path, "linear/delta_rule", "delta_forward", {old: new}, head)
        report = flat(check("linear/delta_rule/forward", fn).report)
        assert f"; inside {inside}" in report, report
        assert "Are its arguments in the order of its signature" in report
        assert "keepdim" not in report


def test_all_axes_turned(tmp_path):
    """In the function itself, and in a step that it calls."""
    fn = lab_function(tmp_path, "linear/linear_attention", "chunk", {"(q @ k.mT).tril()": "(q @ k.T).tril()"})
    assert ".T turns all axes" in flat(check("linear/linear_attention/chunk", fn).report)
    flat_chunk = (
        "def take(name, fn):\n    return fn\n\n\ndef chunk(S, z, q, k, v):\n    inside = (q @ k.T).tril()\n"
        "    return q @ S + inside @ v, q @ z + inside.sum(-1), S + k.T @ v, z + k.sum(0)\n\n\n"
    )
    fn = lab_function(tmp_path, "linear/linear_attention", "linear_forward", {}, flat_chunk)
    report = flat(check("linear/linear_attention/forward", fn).report)
    assert "; inside chunk: inside = (q @ k.T).tril()" in report
    assert ".T turns all axes" in report
    assert "keepdim" not in report


@pytest.mark.parametrize(
    "call",
    [
        lambda M, B: torch.linalg.solve_triangular(M, B, upper=False),
        lambda M, B: torch.linalg.solve(M, B),
        lambda M, B: torch.linalg.inv(M) @ B,
        lambda M, B: M.inverse() @ B,
        lambda M, B: torch.linalg.pinv(M) @ B,
    ],
    ids=["solve_triangular", "solve", "inv", "inverse", "pinv"],
)
def test_a_solver_of_the_library_is_refused(call):
    """Under the names of torch.linalg too, whose functions call themselves linalg_something."""

    def fn(A, B):
        return call(torch.eye(A.shape[-1]) + A.tril(-1), B)

    result = check("linear/delta_rule/solve", fn)
    assert not result
    report = flat(result.report)
    assert "does what this exercise asks you to write" in report
    assert "Start at the top" in report
    fn(torch.zeros(3, 3), torch.ones(3, 1))  # outside of a check it is there


def test_what_is_to_be_written_comes_with_a_nudge():
    def fn(x, weight, bias, tail):
        return torch.nn.functional.conv1d(x[None], weight[:, None], bias, groups=len(x))[0], tail

    report = flat(check("linear/selective_ssm/short_conv", fn).report)
    assert "It has to be written from simpler operations. Put the tail in front of x." in report


def test_one_truth_value_of_a_tensor():
    """Python's `and`, chained comparisons, products of truth values; a number in place of a tensor."""
    for wrong in (lambda i, j, l: (i >= j) and (i - j <= l), lambda i, j, l: i - l <= j <= i):
        assert "chained comparisons" in flat(check("sparse/static_patterns/strided", wrong).report)
    report = flat(check("sparse/static_patterns/reach", lambda keep, layers: keep @ keep).report)
    assert "Likely cause: Truth values cannot be multiplied" in report
    report = flat(
        check("sparse/streaming/place", lambda k, q, at, base: (rotate(k, -3, base=base), q)).report
    )
    assert "Likely cause: A tensor is expected on that line, and a plain number came" in report
