"""The flash lab: what its reports say. Solutions and mutants: tests/exercises/test_every_exercise.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effattn_lab.exercises import Case, all_exercises, check, get, hint
from effattn_lab.exercises.full._flash_backward import BACKWARD_TILE
from effattn_lab.exercises.full._flash_tiles import tile_step

FLASH = [e for e in all_exercises() if e.id.startswith("full/flash/")]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    yield
    torch.set_num_threads(before)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_ids_and_sizes():
    assert [e.id.split("/")[-1] for e in FLASH] == [
        "safe_softmax", "merge", "tile_step", "forward", "backward_tile", "triton_forward",
    ]  # fmt: skip
    assert all(len(e.mutants) >= 6 for e in FLASH)


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
        (unfilled, "of o are NaN"),
        (raises, "at the line: o = o_a @ o_b"),
        (lambda a, b, c: (a, b), "does it take these arguments, in this order?"),
        (lambda *a: good(*a)[0], "the function returned one Tensor; expected 2: o, lse"),
        (lambda *a: (*good(*a), 1), "the function returned 3 values; expected 2: o, lse"),
        (lambda *a: [x.numpy() for x in good(*a)], "o is a ndarray; expected a torch.Tensor"),
        (lambda *a: (good(*a)[0].double(), good(*a)[1]), "o has dtype float64; expected float32"),
        (lambda *a: (good(*a)[0], good(*a)[1][..., None]), "lse has shape (3, 8, 1); expected (3, 8)"),
        (lambda *a: (good(*a)[0] * float("nan"), good(*a)[1]), "of o are NaN"),
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
    assert 'hint("full/flash/merge", 1)' in result.report


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


@pytest.mark.parametrize("fn", [blank, half_blank, lambda *a: ...])
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
    assert "Likely cause: acc is not multiplied by alpha" in report, "a missing guard does not hide it"

    def other(m, l, acc, s, v):
        m, l, acc = two(m, l, acc, s, v)
        return m, l + (s.shape[1] == 5), acc

    report = flat(check("full/flash/tile_step", other).report)
    assert "Likely cause of 5 of the 6 lines marked ✗: acc is not multiplied" in report
    assert report.count("✗") == 1 + 6


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
    assert "Hint 2 of 3" in capsys.readouterr().out, "on an unwritten blank too"
    check(MERGE, lambda *a: good(*a)[::-1], hint=2)
    assert "Hint 2 of 3" in capsys.readouterr().out
    for fn in (blank, lambda *a: good(*a)[::-1]):
        report = check(MERGE, fn).report
        command = (
            next(line for line in report.splitlines() if "hint(" in line)
            .split("code: ")[1]
            .split(", then")[0]
        )
        capsys.readouterr()
        exec(command, {"hint": hint})
        assert "Hint 1 of 3" in capsys.readouterr().out, "what is printed can be pasted"
    with pytest.raises(ValueError, match="rung: expected 1 to 3, got 4"):
        hint(MERGE, 4)


def test_wrong_calls_show_one_clear_line(capsys, monkeypatch, tmp_path):
    """In a notebook the message alone is shown: no traceback, no paths of this machine."""
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # it keeps a history
    shell = InteractiveShell()
    shell.run_cell("from effattn_lab.exercises import check, hint, reference, solution", silent=True)
    capsys.readouterr()
    for call, says in (
        ("hint('full/flash/mrge')", "id: expected an exercise (full/flash/safe_softmax"),
        ("hint('full/flash/merge', 4)", "rung: expected 1 to 3, got 4"),
        ("check('full/flash/merge', ...)", "fn: expected your function, got ellipsis"),
        ("check('full/flash/merge', print, hint=4)", "hint: expected 0 to 3, got 4"),
        ("reference('x')", "id: expected an exercise"),
        ("solution('full')", "id: expected an exercise"),
    ):
        shell.run_cell(call)
        said = capsys.readouterr()
        assert says in said.out + said.err
        assert len((said.out + said.err).strip().splitlines()) == 1, said
        assert ".py" not in said.out + said.err


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


# ---- what a newcomer does wrong ----------------------------------------------------------------------------


def no_return(m, l, acc, s, v):
    m_new = torch.maximum(m, s.amax(dim=-1))
    l = torch.exp(m - m_new) * l


def no_axis(m, l, acc, s, v):
    m_new = torch.maximum(m, s.amax(dim=-1))
    alpha = torch.exp(m - m_new)
    return m_new, alpha * l, alpha * acc


def left_behind(m, l, acc, s, v):
    m_new = torch.maximum(m, s.amax(dim=-1))
    return m_new, l, acc
    ...


def no_keepdim(s):
    return torch.exp(s - s.amax(dim=-1))


def clamped(s):
    p = torch.exp(s - s.amax(dim=-1, keepdim=True).clamp(min=0.0))
    return p / p.sum(dim=-1, keepdim=True)


STEP = "full/flash/tile_step"


@pytest.mark.parametrize(
    ("exercise", "fn", "says", "never"),
    [
        (STEP, no_return, "There is no `return` in the function", "not written"),
        (STEP, no_axis, "needs a last axis of length 1", "Start:"),
        (STEP, left_behind, "✗", "not written"),
        (STEP, lambda m, l, acc, s, v: tile_step(m, m, acc, s, v), "✗", "-inf - -inf"),
        (STEP, lambda *a: (a[0].clone(), *tile_step(*a)[1:]), "the m returned is the old one", "Start:"),
        (STEP, lambda *a: [tile_step(*a)[n] for n in (1, 0, 2)], "yours are (l, m, acc), expected (m, l", "keepdim"),
        (STEP, lambda m, l, acc, s, v: (m, l, acc), "handed back as a result", "Start:"),
        (MERGE, lambda *a: good(*a)[::-1], "yours are (lse, o), expected (o, lse)", "keepdim"),
        ("full/flash/safe_softmax", lambda s: (s - s.max()).exp() / (s - s.max()).exp().sum(-1, keepdim=True),
         "One maximum is taken for the whole tensor", "all −inf"),
        ("full/flash/safe_softmax", clamped, "The origin is never allowed below 0", "absolute"),
        ("full/flash/safe_softmax", no_keepdim, "keepdim=True in a reduction", "Python"),
        ("full/flash/backward_tile", lambda *a: [BACKWARD_TILE.solution(*a)[n] for n in (1, 0, 2)],
         "yours are (dk, dq, dv)", "keepdim"),
    ],
    ids=["no-return", "no-axis", "left-behind", "no-guess", "old-m", "order-3", "inputs-back", "order-2",
         "global-max", "clamped", "keepdim", "dq-dk"],
)  # fmt: skip
def test_causes_fit(exercise, fn, says, never):
    result = check(exercise, fn)
    report = flat(result.report)
    assert not result
    assert result.written
    assert says in report
    assert never not in report


def source_of(tmp_path, name: str, text: str):
    """A function from a file of its own, as a notebook cell would hold it."""
    import importlib.util

    path = tmp_path / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lab_function(tmp_path, name: str, changes: dict[str, str], blanks: bool = False):
    """The cell of the lab that defines ``name``, solved or with its blanks, changed."""
    from effattn_lab import notebooks

    cell = next(c.source for c in notebooks.parse("full/flash").cells if f"def {name}(" in c.source)
    text = notebooks.blanked(cell) if blanks else notebooks.solved(cell)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    head = "import effattn_kernels\nimport torch, triton\nimport triton.language as tl\n"
    head += "from effattn_lab.foundations.attention import repeat_kv\n"
    return getattr(source_of(tmp_path, f"{name}_{abs(hash(str(changes)))}_{blanks}", head + text), name)


def test_forward_errors_of_a_newcomer(tmp_path):
    forward = "full/flash/forward"
    fn = lab_function(tmp_path, "flash_forward", {"s - origin[..., None]": "s - origin[:, None]"})
    report = flat(check(forward, fn).report)
    assert "[:, None] puts the new axis in second place" in report
    assert "at the line: alpha, p = " in report
    fn = lab_function(
        tmp_path, "flash_forward", {"torch.arange(j, j + k_j.shape[2])": "torch.arange(j, j + block_k)"}
    )
    assert "shorter than the block" in flat(check(forward, fn).report)
    fn = lab_function(
        tmp_path, "flash_forward", {"torch.arange(j, j + k_j.shape[2])": "torch.arange(k_j.shape[2])"}
    )
    assert "counted from the start of their tile" in flat(check(forward, fn).report)
    # The second of two blanks.
    fn = lab_function(
        tmp_path,
        "flash_forward",
        {"    ...  # your code\n        # After": "    pass\n        # After"},
        True,
    )
    result = check(forward, fn)
    assert not result.written
    assert "one blank is empty" in flat(result.report)
    assert "below “After the loop: write this tile of out and of lse.”" in flat(result.report)


def test_kernel_errors_of_a_newcomer(tmp_path):
    kernel = "full/flash/triton_forward"
    end = "end = tl.minimum(seqlen_k, last_position + 1)"
    for number, (old, new, says) in enumerate(
        [
            (end, "end = tl.minimum(seqlen_k, rows[-1] + 1)", "A tile inside a kernel cannot be indexed"),
            ("tl.exp(m - origin)", "torch.exp(m - origin)", "A kernel knows neither torch nor NumPy"),
            (
                'tl.dot(q, tl.trans(k), input_precision="ieee")',
                "(q @ tl.trans(k))",
                "There is no @ inside a kernel",
            ),
            ("BLOCK_M - 1 + seqlen_k - seqlen_q", "BLOCK_M - 1", "The loop ends too early where"),
            (end, "end = ...  # your code", "one blank is empty (line 21 of flash_kernel"),
        ]
    ):
        result = check(
            kernel, lab_function(tmp_path, "flash_triton", {old: new, "flash_kernel": "flash_kernel"})
        )
        assert not result, number
        assert result.written == (number != 4)
        assert says in flat(result.report), result.report
    # Only the scores are there yet: that is written, and it says what is missing.
    rest = {
        "l = alpha * l + tl.sum(p, 1)": "",
        "acc = alpha[:, None] * acc + tl.dot(": "unused = tl.dot(",
        "m = m_new": "",
    }
    result = check(kernel, lab_function(tmp_path, "flash_triton", rest))
    assert result.written
    assert "l and acc are still 0 after the loop" in flat(result.report)
    result = check(kernel, lab_function(tmp_path, "flash_triton", {}, True))
    assert not result.written
    assert "2 blanks are empty" in result.report


def test_a_kernel_that_only_the_interpreter_takes(tmp_path):
    """From a cell of its own, where names travel to the compiler as text."""
    kernel = "full/flash/triton_forward"
    fn = lab_function(
        tmp_path,
        "flash_triton",
        {"@triton.jit": 'NEG = float("-inf")\n\n\n@triton.jit', '(see, s, float("-inf"))': "(see, s, NEG)"},
    )
    result = check(kernel, fn)
    assert result.failed == ("the compiler accepts it (A100)",)
    report = flat(result.report)
    assert "NEG is one" in report
    assert "at the line: s = tl.where(see, s, NEG)" in report
    assert ".py" not in report
    fn = lab_function(
        tmp_path,
        "flash_triton",
        {
            "@triton.jit": "def soft(s, o):\n    return tl.exp(s - o)\n\n\n@triton.jit",
            "tl.exp(s - origin[:, None])": "soft(s, origin[:, None])",
        },
    )
    report = flat(check(kernel, fn).report)
    assert "soft is ordinary Python" in report
    assert "(function)" in report
    assert ".py" not in report


def test_without_a_compiler_the_kernel_is_not_checked(monkeypatch):
    from effattn_lab.measure import xray

    def nothing(*_, **__):
        raise RuntimeError("x-ray needs triton's compiler, which exists for Linux only.")

    monkeypatch.setattr(xray, "xray", nothing)
    result = check("full/flash/triton_forward", get("full/flash/triton_forward").solution)
    assert result
    assert result.not_measured == ("the compiler accepts it (A100)",)
    assert "not checked" in result.report


def test_each_kind_of_failure_is_told_in_full_once():
    report = check(MERGE, lambda *a: (good(*a)[0] + 1.0, good(*a)[1])).report
    assert report.count("first at") == 1
    assert report.count("against the float64 reference") == 1
    assert report.index("✗") < report.index("first at")
    report = check(MERGE, lambda *a: good(*a)[0]).report
    assert report.count("the function returned one Tensor") == 1
    assert report.index("Likely cause") < report.index("✗")


@pytest.mark.parametrize(
    "call",
    [
        lambda s: torch.softmax(s, -1),
        lambda s: s.softmax(-1),
        lambda s: torch.nn.functional.softmax(s, dim=-1),
        lambda s: torch.nn.Softmax(dim=-1)(s),
        lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)),
    ],
    ids=["torch", "method", "functional", "module", "logsumexp"],
)
def test_what_is_to_be_written_is_refused(call, capsys):
    """Under every name that torch has for it, with a word that says why; and only inside a check."""
    result = check("full/flash/safe_softmax", call)
    assert not result
    assert "does what this exercise asks you to write" in capsys.readouterr().out
    call(torch.zeros(2, 3))
