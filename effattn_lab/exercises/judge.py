"""Run a learner's function on the cases of an exercise and find out what went wrong.

``run`` executes code in this process, for self-checks. A grader runs it elsewhere and hands the arrays that came
back to `Exercise.compare`; `diagnose` serves both.
"""

from __future__ import annotations

import linecache
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

import torch

from effattn_lab.exercises.core import Case, Exercise, Failure, Mutant, Value
from effattn_lab.exercises.scratch import refusing
from effattn_lab.exercises.source import Blank, blanks

UNTOUCHED = "inputs untouched"
REPEATABLE = "same inputs, same result"
#: Checked for every exercise, beside its own properties.
COMMON = {
    UNTOUCHED: "An operation that ends in _ (add_, masked_fill_), an augmented assignment such as `x *= a`, or "
    "an indexed assignment changes the caller's tensor. Write `x = x * a`, or clone first.",
    REPEATABLE: "The same call gave two different results: torch.empty that is not filled everywhere, a random "
    "number, or something kept in a global variable between calls.",
}


#: Instead of `REPEATABLE`'s hint where a kernel's results are wrong besides.
_FOREIGN = (
    "The same call gave two different results, and wrong ones: a tl.load without its mask, or with one that lets too "
    "much through, reads memory that belongs to something else. (Masks are joined by & and |; `and` and `or` keep "
    "one of the two.)"
)


def common_hint(exercise: Exercise, name: str, wrong: bool) -> str:
    """The hint for a property of `COMMON`, or "". ``wrong``: properties of the exercise's own fail too."""
    if name == REPEATABLE and wrong and exercise.kernel is not None:
        return _FOREIGN
    return COMMON.get(name, "")


@dataclass(frozen=True)
class Run:
    """One call of a learner's function: what came back, or why nothing did, and the arguments afterwards."""

    case: Case
    value: Any
    error: Failure | None
    arguments: dict[str, Value]


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that entries nobody wrote are seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(
    fn: Callable[..., Any],
    case: Case,
    device: str = "cpu",
    *,
    arguments: dict[str, Value] | None = None,
    from_scratch: Iterable[str] = (),
) -> Run:
    """Call ``fn`` on a case; its exceptions become a `Failure`.

    Args:
        fn: the function.
        case: its arguments.
        device: where tensors go.
        arguments: used as they are; by default fresh copies of the case's.
        from_scratch: torch functions that ``fn`` may not call, see `scratch.refusing`.
    """
    with suppress(ImportError):
        # Decides how kernels run. It must come first: torch imports triton by itself, for instance when it is
        # asked for deterministic algorithms, and after that it is too late for the interpreter.
        import effattn_kernels  # noqa: F401
    arguments = case.arguments(device) if arguments is None else arguments
    try:
        with _poisoned(), refusing(from_scratch):
            value = fn(*arguments.values())
    except (Exception, SystemExit) as error:
        message, quoted = _told(_innermost(error))
        where = f"at the line: {quoted}" if quoted else _line_of(fn, error)
        return Run(case, None, Failure(case.property, "exception", message, where), arguments)
    return Run(case, value, None, arguments)


def _innermost(error: BaseException) -> BaseException:
    """What was raised first: Triton's interpreter wraps an exception of the kernel in one of its own."""
    while error.__cause__ is not None and type(error).__name__ != "CompilationError":
        error = error.__cause__
    return error


def _told(error: BaseException) -> tuple[str, str]:
    """(message, the line it quotes or ""). Triton's compiler says "at 12:4:", the code, a ^, the reason."""
    text = str(error).strip()
    if type(error).__name__ == "CompilationError":
        return compiler_said(text)
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:160]}", ""


def compiler_said(text: str) -> tuple[str, str]:
    """The reason in a message of Triton's compiler, in one line, and the line of the kernel it points at."""
    lines = text.splitlines() or [""]
    mark = next((n for n, line in enumerate(lines) if line.strip() == "^"), None)
    reason = next((line for line in lines[(mark or 0) + (mark is not None) :] if line.strip()), lines[-1])
    reason = re.sub(r"<(?:built-in )?(?:function|method) (\w+)[^>]*>", r"\1", reason).strip()
    return reason[:400], lines[mark - 1].strip() if mark else ""


def _line_of(fn: Callable[..., Any], error: BaseException) -> str:
    """The learner's own line that an exception came through, quoted: the innermost in this or another cell."""
    code = getattr(fn, "__code__", None)
    own, names = (code.co_filename if code else None), getattr(fn, "__globals__", None)
    found: tuple[str, int] | None = None
    # The launcher's line first, then, when the kernel in the same cell failed, the kernel's.
    for part in (error, _innermost(error)):
        tb: TracebackType | None = part.__traceback__
        while tb is not None:
            frame = tb.tb_frame
            if frame.f_code.co_filename == own or frame.f_globals is names:
                found = frame.f_code.co_filename, tb.tb_lineno
            tb = tb.tb_next
    if found is None:
        return "raised while calling the function: does it take these arguments, in this order?"
    called = _called(code, error, own, names)
    line, inner = (_quoted(*at) if at else "" for at in (called[1] if called else found, found))
    if called is None:
        return f"at the line: {line}"
    return f"at the line: {line}; inside {called[0]}" + (f": {inner}" if inner != line else "")


def _quoted(file: str, number: int) -> str:
    return linecache.getline(file, number).strip() or f"number {number}"


def _called(
    code: CodeType | None, error: BaseException, own: str | None, names: dict[str, Any] | None
) -> tuple[str, tuple[str, int]] | None:
    """The step of the lab that raised, the learner's or a reference, where ``fn`` called it; and from where."""
    found, before = None, None
    tb = error.__traceback__
    while tb is not None:
        frame = tb.tb_frame
        if before is not None:
            step = frame.f_code.co_filename == own or frame.f_globals is names
            step = step or frame.f_globals.get("__name__", "").startswith("effattn_lab.exercises.")
            if step and not frame.f_code.co_name.startswith(("<", "__")):
                found = frame.f_code.co_name, before
        before = (frame.f_code.co_filename, tb.tb_lineno) if frame.f_code is code else None
        tb = tb.tb_next
    return found


def empty_blanks(fn: Callable[..., Any], r: Run, failure: Failure | None) -> list[Blank] | None:
    """The blanks that nobody filled, where the result is wrong; None where the function is written."""
    if failure is None:
        return None
    if r.error is None:
        parts = r.value if isinstance(r.value, tuple | list) else (r.value,)
        if parts and all(p is Ellipsis for p in parts):
            return blanks(fn)
    return blanks(fn) or None


def touched(r: Run) -> Failure | None:
    """Were arguments changed in place, or handed back as results?"""
    for name, before in r.case.kwargs.items():
        after = r.arguments[name]
        if (
            isinstance(before, torch.Tensor)
            and isinstance(after, torch.Tensor)
            and not _same(before, after.cpu())
        ):
            return Failure(UNTOUCHED, "inputs", f"the argument {name} was changed in place")
    owners = {
        x.untyped_storage().data_ptr(): n
        for n, x in r.arguments.items()
        if isinstance(x, torch.Tensor) and x.numel()
    }
    for x in r.value if isinstance(r.value, tuple | list) else (r.value,):
        if isinstance(x, torch.Tensor) and x.numel() and x.untyped_storage().data_ptr() in owners:
            owner = owners[x.untyped_storage().data_ptr()]
            return Failure(UNTOUCHED, "alias", f"a result shares its memory with the argument {owner}")
    return None


def repeated(first: Run, second: Run) -> Failure | None:
    """Did the same call give the same bits twice?"""
    if first.error is not None or second.error is not None:
        return None
    for a, b in zip(_tensors(first.value), _tensors(second.value)):
        if a.shape != b.shape or not _same(a.cpu(), b.cpu()):
            return Failure(REPEATABLE, "repeat", "two calls with the same inputs differ")
    return None


def _tensors(value: Any) -> list[torch.Tensor]:
    parts = value if isinstance(value, tuple | list) else (value,)
    return [p.detach() for p in parts if isinstance(p, torch.Tensor)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@dataclass(frozen=True)
class Diagnosis:
    """The registered mistake that reproduces a learner's numbers, and the properties it accounts for."""

    mutant: Mutant
    explains: tuple[str, ...]


def diagnose(
    exercise: Exercise,
    values: list[tuple[Case, Any, Failure | None]],
    runner: Callable[[Callable[..., Any], Case, str], Run] = run,
) -> Diagnosis | None:
    """Look for the mutant whose results equal the learner's.

    Args:
        exercise: the exercise.
        values: for each case, what the learner's function returned and how that was judged.
        runner: runs a mutant on a case; a grader keeps the results for the next student.

    Returns:
        the mutant that reproduces the most failing properties, passing cases breaking a tie; None where none
        reproduces at least half of them.
    """
    failing = [(c, v) for c, v, f in values if f is not None and f.kind in ("value", "nan")]
    passing = [(c, v) for c, v, f in values if f is None]
    found: list[tuple[Mutant, Callable[..., Any], tuple[str, ...]]] = []
    properties = list(dict.fromkeys(c.property for c, _ in failing))
    for mutant in exercise.mutants:
        for fn in (mutant.fn, *mutant.variants):
            missed: set[str] = set()
            for case, value in failing:
                if case.property not in missed and not _reproduces(exercise, fn, case, value, runner):
                    missed.add(case.property)
                    if 2 * len(missed) > len(properties):
                        break
            else:
                found.append((mutant, fn, tuple(p for p in properties if p not in missed)))
    if not failing or not found:
        return None
    most = max(len(explains) for _, _, explains in found)
    found = [f for f in found if len(f[2]) == most]
    for case, value in passing:
        if len(found) == 1:
            break
        found = [f for f in found if _reproduces(exercise, f[1], case, value, runner)] or found
    return Diagnosis(found[0][0], found[0][2])


def _reproduces(
    exercise: Exercise,
    fn: Callable[..., Any],
    case: Case,
    value: Any,
    runner: Callable[[Callable[..., Any], Case, str], Run],
) -> bool:
    """Equal within rounding: another order of the same wrong operations must still match."""
    r = runner(fn, case, exercise.device())
    mine, theirs = _tensors(value), _tensors(r.value)
    if r.error is not None or len(mine) != len(theirs):
        return False
    tolerance = exercise.tolerance_of(case)
    for a, b in zip(mine, theirs):
        if a.shape != b.shape:
            return False
        x, y = a.cpu().double(), b.cpu().double()
        finite = x.isfinite() & y.isfinite()
        # Overflow may show as inf or as NaN, depending on the order of operations.
        if not torch.equal(x.isfinite(), y.isfinite()):
            return False
        if ((x - y).abs() > 4 * tolerance.allowed(y))[finite].any():
            return False
    return True
