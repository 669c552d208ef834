"""What an exercise is: inputs by property, a float64 reference, a tolerance with its reason, known mistakes.

Nothing here runs a learner's code (see `judge`) or prints (see `check`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

#: What a case may hold: all of it can be written as arrays and sent to another process.
Value = torch.Tensor | float | int | bool | str | None
#: Entries of a row of integers that a report shows.
_ROW = 12


@dataclass(frozen=True)
class Case:
    """One call: ``fn(*kwargs.values())``, made to test one property.

    Args:
        property: the property it tests, a key of `Exercise.properties`.
        kwargs: arguments by name, in the order of the signature; tensors, numbers, bools, strings or None.
        secret: what only the judge of a `Trial` sees, such as the places where it will look.
    """

    property: str
    kwargs: Mapping[str, Value]
    secret: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.kwargs.items():
            if not isinstance(value, torch.Tensor | float | int | bool | str | None):
                raise ValueError(
                    f"kwargs[{name!r}]: expected a tensor, number, bool, str or None, got {type(value).__name__}"
                )

    def arguments(self, device: str = "cpu") -> dict[str, Value]:
        """Fresh copies of the arguments, tensors on ``device``."""
        return {
            name: value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value
            for name, value in self.kwargs.items()
        }


@dataclass(frozen=True)
class Output:
    """One returned tensor. ``dtype`` is a torch dtype's name, or the name of the argument whose dtype it has."""

    name: str
    dtype: str

    def expected_dtype(self, case: Case) -> torch.dtype:
        like = case.kwargs.get(self.dtype)
        return like.dtype if isinstance(like, torch.Tensor) else getattr(torch, self.dtype)


@dataclass(frozen=True)
class Tolerance:
    """Accept ``|got - want| <= atol + rtol * |want|``; ``why`` justifies the two numbers."""

    rtol: float
    atol: float
    why: str

    def allowed(self, want: torch.Tensor) -> torch.Tensor:
        return self.atol + self.rtol * want.abs()


@dataclass(frozen=True)
class Mutant:
    """A plausible wrong solution. ``hint`` names the mistake for a learner whose results equal the mutant's.

    ``variants`` make the same mistake beside another one, such as no care for rows of -inf: results that equal a
    variant's get the same hint.
    """

    name: str
    fn: Callable[..., Any]
    hint: str
    variants: tuple[Callable[..., Any], ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a result is not accepted. Holds sizes, indices, shapes and dtypes; an expected value only in ``row``.

    Args:
        property: the property that does not hold.
        kind: ``value``, ``nan``, ``shape``, ``dtype``, ``type``, ``none``, ``exception``, ``inputs``, ``alias``,
            ``repeat`` or ``probe``.
        compared: what was compared with what.
        where: the first offending index, or the line of an exception.
        size: how large the error is and how large it may be.
        row: for integers and bools, where the size of an error says nothing: one row as it came and as expected.
            For the self-check, whose inputs are no secret; a grader leaves it out.
    """

    property: str
    kind: str
    compared: str
    where: str = ""
    size: str = ""
    row: str = ""

    def lines(self) -> list[str]:
        return [part for part in (self.compared, self.where, self.size) if part]

    def brief(self) -> str:
        """The failure in one line, for those that follow a failure told in full."""
        return self.size if self.kind in ("value", "nan") else self.compared


@dataclass(frozen=True)
class Probe:
    """A property of *how* the result is computed, observed while ``fn`` runs in this process.

    ``run(fn)`` returns None where the property holds, a sentence where it does not (or a sentence and a hint of
    its own), and raises `NotMeasured` where this machine cannot tell.
    """

    name: str
    run: Callable[[Callable[..., Any]], str | tuple[str, str] | None]
    hint: str
    trial: Trial | None = None


@dataclass(frozen=True)
class Outcome:
    """What came back from one call of a `Trial`: tensors of the right number, and the kernel's traffic."""

    case: Case
    values: tuple[torch.Tensor, ...]
    loads_bytes: int = 0
    stores_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Trial:
    """How a grader judges a probe's property, since it cannot look into the process that runs the student's code.

    Args:
        make_inputs: draws the calls; each case's property is the probe's name.
        judge: a sentence where the property does not hold.
        memory_bytes: what the call may allocate beside its arguments; the operating system enforces it.
        kernel: call the exercise's `Kernel`, taken out of the notebook and launched by our own launcher, in place
            of the student's function; traffic is counted.
        gpu: compile that kernel for this GPU with the types of the first case; ``judge`` is not asked.
        through: code of a function ``through(fn, *arguments)`` that is called with the student's function in its
            place, for what a caller can observe and a result does not show, such as a gradient.
    """

    make_inputs: Callable[[np.random.Generator], list[Case]]
    judge: Callable[[list[Outcome]], str | None]
    memory_bytes: int | None = None
    kernel: bool = False
    gpu: str | None = None
    through: str = ""


@dataclass(frozen=True)
class Kernel:
    """The Triton kernel that an exercise asks for.

    Args:
        name: the kernel's name.
        launcher: the name of the function that launches it.
        source: that function's code.
        layout: what the axes of its tiles are, for a learner whose tiles do not line up.
    """

    name: str
    launcher: str
    source: Callable[[], str]
    layout: str = ""


class UsageError(ValueError):
    """A call that cannot be meant so. In a notebook the message alone is shown: there is nothing to trace."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class NotMeasured(Exception):
    """A probe cannot observe its property on this machine; the message says why."""


def _cpu() -> str:
    return "cpu"


@dataclass(frozen=True)
class Exercise:
    """One blank of a lab.

    Args:
        id: ``part/slug/name``.
        title: what is to be written, in a few words.
        signature: how the function is called and what it returns, for messages.
        outputs: the returned tensors in order.
        make_inputs: draws the cases from a NumPy generator, so that a grader can use seeds of its own.
        reference: the mathematics in float64; takes a case's arguments by name, returns a tuple of tensors.
        solution: a model solution with the exercise's signature, as a learner would write it.
        properties: what is checked, by name, each with the generic hint for when it fails.
        tolerance: for all properties but those in ``loose``.
        mutants: known wrong solutions; each must be rejected (the tests prove it).
        hints: rungs, from a nudge to nearly the code.
        loose: properties with a tolerance of their own.
        probes: properties of how the result is computed.
        device: where the function's tensors must live; the CPU unless a kernel needs a GPU.
        source: the code to show when a learner asks for the solution; by default that of ``solution``.
        from_scratch: what may not be called, because the exercise asks to write it: dotted names of modules or
            functions of this project, which a grader takes out of the student's environment, and of torch.
        kernel: the Triton kernel that is asked for, where one is.
    """

    id: str
    title: str
    signature: str
    outputs: tuple[Output, ...]
    make_inputs: Callable[[np.random.Generator], list[Case]]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    solution: Callable[..., Any]
    properties: Mapping[str, str]
    tolerance: Tolerance
    mutants: tuple[Mutant, ...]
    hints: tuple[str, ...]
    loose: Mapping[str, Tolerance] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    device: Callable[[], str] = _cpu
    source: Callable[[], str] | None = None
    from_scratch: tuple[str, ...] = ()
    kernel: Kernel | None = None

    def want(self, case: Case) -> tuple[torch.Tensor, ...]:
        """The float64 reference on a case."""
        wide = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in case.kwargs.items()
        }
        return self.reference(**wide)

    def tolerance_of(self, case: Case) -> Tolerance:
        return self.loose.get(case.property, self.tolerance)

    def compare(self, got: Any, want: tuple[torch.Tensor, ...], case: Case) -> Failure | None:
        """Judge what a solution returned on ``case``; None where it is accepted.

        ``got`` is whatever came back: any object is dealt with. Expects ``want`` from `want`.
        """

        def fail(kind: str, compared: str, where: str = "", size: str = "") -> Failure:
            return Failure(case.property, kind, compared, where, size)

        names = ", ".join(o.name for o in self.outputs)
        if got is None:
            return fail("none", f"the function returned None; expected {names}")
        results = got if isinstance(got, tuple | list) else (got,)
        if len(results) != len(self.outputs):
            what = f"{len(results)} values" if isinstance(got, tuple | list) else f"one {type(got).__name__}"
            return fail("type", f"the function returned {what}; expected {len(self.outputs)}: {names}")
        for output, x, ref in zip(self.outputs, results, want):
            if not isinstance(x, torch.Tensor):
                return fail("type", f"{output.name} is a {type(x).__name__}; expected a torch.Tensor")
            if x.shape != ref.shape:
                return fail("shape", f"{output.name} has shape {tuple(x.shape)}; expected {tuple(ref.shape)}")
            expected = output.expected_dtype(case)
            if x.dtype != expected:
                return fail(
                    "dtype", f"{output.name} has dtype {_short(x.dtype)}; expected {_short(expected)}"
                )
            if not x.is_floating_point():
                wrong = _wrong_entries(output.name, x.detach().cpu(), ref, case)
            else:
                wrong = self._wrong_values(output.name, x.detach().cpu().double(), ref, case)
            if wrong is not None:
                return wrong
        return None

    def _wrong_values(self, name: str, x: torch.Tensor, want: torch.Tensor, case: Case) -> Failure | None:
        allowed = self.tolerance_of(case).allowed(want)
        # nan_to_num: where both are infinite the difference is NaN, and `equal` decides.
        error = (x - want).abs().nan_to_num(nan=float("inf"))
        bad = ~((x == want) | ((error <= allowed) & x.isfinite() & want.isfinite()))
        if not bad.any():
            return None
        where = _first(name, bad)
        compared = f"{name} against the float64 reference"
        lost = x.isnan()
        if lost.any():
            size = f"{int(lost.sum())} entries of {name} are NaN"
            return Failure(case.property, "nan", compared, where, size)
        finite = bad & x.isfinite() & want.isfinite()
        if not finite.any():
            size = f"{name} is infinite on one side, finite on the other"
            return Failure(case.property, "value", compared, where, size)
        worst = int(torch.where(finite, error - allowed, -torch.inf).argmax())
        off, limit = float(error.flatten()[worst]), float(allowed.flatten()[worst])
        size = f"{name} is off by {off:.1e} at worst; {limit:.1e} allowed"
        return Failure(case.property, "value", compared, where, size)


def _first(name: str, bad: torch.Tensor) -> str:
    index = ", ".join(str(int(i)) for i in bad.nonzero()[0])
    at = f"{name}[{index}]" if index else name
    return f"first at {at}; {int(bad.sum())} of {bad.numel()} entries, shape {tuple(bad.shape)}"


def _wrong_entries(name: str, x: torch.Tensor, want: torch.Tensor, case: Case) -> Failure | None:
    """Integers and bools are right or wrong: no tolerance, and the row itself instead of the size of an error."""
    bad = x != want.to(x.dtype)
    if not bad.any():
        return None
    *row, last = (int(i) for i in bad.nonzero()[0]) if x.dim() else (0,)
    got, expected = (y.reshape(1) if not y.dim() else y[tuple(row)] for y in (x, want.to(x.dtype)))
    begin = max(0, min(last - _ROW // 2, len(got) - _ROW))
    at = f"{name}[{', '.join(map(str, row))}]" if row else name
    part = f", entries {begin} to {begin + _ROW - 1}" if len(got) > _ROW else ""
    told = [y[begin : begin + _ROW].int().tolist() for y in (got, expected)]
    size = f"{int(bad.sum())} of {bad.numel()} entries of {name} are wrong"
    line = f"{at}{part}: got {told[0]}, expected {told[1]}"
    return Failure(case.property, "value", f"{name} against the reference", _first(name, bad), size, line)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
