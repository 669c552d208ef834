"""The trusted side: draws secret inputs, asks the sandbox for results, compares them itself.

Nothing here runs a student's code, and no claim of the sandbox earns anything: points depend on bytes that are
compared with a float64 reference, on memory that the operating system refused, on arguments read back from shared
memory. What the sandbox says of itself (an error, a result that is an argument) can only lower a grade.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises import judge as selfcheck
from effattn_lab.exercises.causes import STRUCTURAL, compiler_cause, reordered, structural
from effattn_lab.exercises.core import Case, Exercise, Failure, Outcome, Probe, Trial
from effattn_lab.exercises.judge import COMMON, REPEATABLE, UNTOUCHED, Diagnosis, common_hint, compiler_said
from effattn_lab.exercises.registry import get
from effattn_lab.grading.claims import own_words, same_bits, value_of
from effattn_lab.grading.compiled import compile_error
from effattn_lab.grading.inside import wire
from effattn_lab.grading.model import Credit, ExerciseResult, Item, Status, Verdict
from effattn_lab.grading.sandbox import Child, Limits, Sandbox, Stopped

#: Imported in the sandbox before any student's code is there. The first decides how kernels run.
PRELOAD = (
    "effattn_kernels", "torch", "numpy", "triton.language", "effattn_lab.exercises.judge",
    "effattn_lab.exercises.compiles", "effattn_lab.measure.traffic", "effattn_lab.grading.inside.kernel",
)  # fmt: skip
_ALIAS = "An argument, or a view of it, is handed back as a result: return a new tensor, or clone it."
Cells = Sequence[tuple[int, str]]


def generator(seed: str, *names: str) -> np.random.Generator:
    """Random numbers that follow from a seed and what they are for; one exercise tells nothing of another."""
    digest = hashlib.sha256("\0".join([seed, *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


@functools.lru_cache(maxsize=32)
def drawn(exercise_id: str, seed: str) -> list[tuple[Case, tuple[torch.Tensor, ...]]]:
    """Cases of an exercise and what the float64 reference says of them; the same for all students of a seed."""
    exercise = get(exercise_id)
    return [(case, exercise.want(case)) for case in exercise.make_inputs(generator(seed, exercise_id))]


_mutant_runs: dict[tuple[int, int], selfcheck.Run] = {}


def _run_mutant(fn: Callable[..., Any], case: Case, device: str) -> selfcheck.Run:
    """Mutants are ours, so they run here; results are kept, since many students make the same mistakes."""
    key = id(fn), id(case)
    if key not in _mutant_runs:
        if len(_mutant_runs) > 20_000:
            _mutant_runs.clear()
        _mutant_runs[key] = selfcheck.run(fn, case, device)
    return _mutant_runs[key]


class Boxes:
    """The sandbox of one submission's notebook; a new one is started when an exercise has broken the last."""

    def __init__(self, site: Path, limits: Limits, devices: Sequence[str] = ()) -> None:
        self.site, self.limits, self.devices = site, limits, devices
        self._boxes: dict[bool, Sandbox] = {}

    def get(self, gpu: bool = False) -> Sandbox:
        """The running sandbox; with ``gpu`` the one that holds the device files."""
        if gpu not in self._boxes:
            if gpu:
                limits = replace(self.limits, data=16 * 2**30, address=1 << 46)  # CUDA reserves terabytes
                environment = {"TRITON_INTERPRET": "0"}
                self._boxes[gpu] = Sandbox(self.site, limits, PRELOAD, self.devices, environment)
            else:
                self._boxes[gpu] = Sandbox(self.site, self.limits, PRELOAD)
        return self._boxes[gpu]

    def alone(self) -> Sandbox:
        """A sandbox in which nothing of the student's runs any more: the present one, or a new one."""
        box = self.get()
        end = time.monotonic() + 0.5  # a process whose socket was closed is on its way out
        while box.processes() > 1:
            if time.monotonic() > end:
                self.drop()
                return self.get()
            time.sleep(0.005)
        return box

    def drop(self) -> None:
        for box in self._boxes.values():
            box.stop()
        self._boxes = {}

    def __enter__(self) -> Boxes:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()


def judge(boxes: Boxes, item: Item, cells: Cells, seed: str, credit: Credit = "all") -> ExerciseResult:
    """Judge one exercise of one submission.

    Args:
        boxes: where its code runs.
        item: the exercise, the function's name, the points.
        cells: (number, source) of the student's cells that define things.
        seed: decides the inputs.
        credit: all or nothing, or by property.

    Raises:
        NoBoundary: the sandbox does not start; nothing can be graded.
    """
    begun = time.monotonic()
    sitting = Sitting(boxes, get(item.id), item, cells, seed)
    status: Status
    try:
        status, error = sitting.run()
    except Stopped as reason:
        boxes.drop()
        status, error = "stopped", str(reason)
    verdicts = tuple(sitting.verdicts())
    share = 0.0
    if status == "passed":
        share = 1.0
    elif status == "failed" and credit == "properties":
        share = sum(v.passed for v in verdicts) / max(1, len(verdicts))
    return ExerciseResult(
        item.id,
        status,
        round(item.points * share, 4),
        item.points,
        verdicts if status in ("passed", "failed") else (),
        sitting.cause() if status == "failed" else "",
        error,
        round(time.monotonic() - begun, 3),
    )


class Sitting:
    """One exercise of one submission on the way through: results, failures, verdicts."""

    def __init__(self, boxes: Boxes, exercise: Exercise, item: Item, cells: Cells, seed: str) -> None:
        self.boxes, self.exercise, self.item, self.seed = boxes, exercise, item, seed
        self.cells = [[number, source] for number, source in cells]
        self.judged: list[tuple[Case, Any, Failure | None]] = []
        self.failures: dict[str, Failure | None] = {}
        self.hints: dict[str, str] = {**exercise.properties, **COMMON}
        self.own_hint: dict[str, str] = {}
        self.gpu = False
        self.begun = time.monotonic()

    def run(self) -> tuple[Status, str]:
        """(status, the student's own error or "")."""
        self.gpu = bool(self.boxes.devices) and self.exercise.kernel is not None
        child = self.boxes.get(self.gpu).child()
        self.begun = time.monotonic()
        try:
            loaded = self.load(child)
            if loaded.get("found") is not True:
                return "missing", self.load_error(loaded)
            self.values(child)
            self.gpu = False  # what follows is judged in the interpreter, where bytes can be counted
        finally:
            child.close()
        wrong = any(self.failures.values())
        if wrong and isinstance(loaded.get("blanks"), int) and loaded["blanks"] > 0:
            return "not written", ""
        if not wrong:
            self.probes()
        return ("failed" if any(self.failures.values()) else "passed"), self.first_exception()

    # ---- the function's results --------------------------------------------------------------------------

    def load(self, child: Child, through: str = "") -> dict[str, Any]:
        refuse = [n for n in self.exercise.from_scratch if n.startswith("torch.")]
        cells, function = self.cells, self.item.function
        if through:
            call = f"def _through(*arguments):\n    return through({function}, *arguments)\n"
            cells, function = [*cells, [0, f"{through}\n\n{call}"]], "_through"
        header = {"op": "load", "cells": cells, "function": function, "refuse": refuse}
        return self.ask(child, header).header

    def ask(self, child: Child, header: dict[str, Any], fd: int | None = None) -> wire.Frame:
        """One request, within what is left of the exercise's time."""
        limits = self.boxes.limits
        left = self.begun + limits.exercise - time.monotonic()
        if left <= 0:
            raise Stopped(f"all calls together took more than {limits.exercise:g} s")
        try:
            return child.ask(header, fd=fd, seconds=min(limits.wall, left))
        except Stopped:
            if self.begun + limits.exercise <= time.monotonic():
                raise Stopped(f"all calls together took more than {limits.exercise:g} s") from None
            raise

    def load_error(self, loaded: dict[str, Any]) -> str:
        errors = loaded.get("errors")
        for entry in errors if isinstance(errors, list) else []:
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int):
                return f"cell {entry[0]}: {own_words(entry[1])}"
        return own_words(loaded["error"]) if "error" in loaded else ""

    def values(self, child: Child) -> None:
        self.failures = dict.fromkeys([*self.exercise.properties, *COMMON])
        for number, (case, want) in enumerate(drawn(self.exercise.id, self.seed)):
            value, error, frame = self.call(child, case)
            failure = error or self.exercise.compare(value, want, case)
            self.judged.append((case, value, failure))
            self.note(case.property, failure)
            if number < 2 and error is None:
                again, error_again, _ = self.call(child, case)
                if error_again is not None or not same_bits(value, again):
                    self.note(
                        REPEATABLE, Failure(REPEATABLE, "repeat", "two calls with the same inputs differ")
                    )
            if frame.header.get("alias"):
                said = "a result shares its memory with an argument"
                self.note(UNTOUCHED, Failure(UNTOUCHED, "alias", said))
                self.own_hint[UNTOUCHED] = _ALIAS

    def call(self, child: Child, case: Case, count: bool = False) -> tuple[Any, Failure | None, wire.Frame]:
        """(what came back, why nothing did, the answer as it came)."""
        arguments = wire.Arguments.of(case.kwargs)
        try:
            header = {"op": "call", "arguments": arguments.header, "count": count, "gpu": self.gpu}
            frame = self.ask(child, header, arguments.fd)
            for name in arguments.changed():
                said = f"the argument {name} was changed in place"
                self.note(UNTOUCHED, Failure(UNTOUCHED, "inputs", said))
        finally:
            arguments.close()
        if "error" in frame.header:
            words, where = own_words(frame.header["error"]), own_words(frame.header.get("where", ""), 200)
            return None, Failure(case.property, "exception", words, where), frame
        try:
            return value_of(frame), None, frame
        except wire.Broken as reason:
            raise Stopped(f"its answer cannot be read: {reason}") from None

    def note(self, name: str, failure: Failure | None) -> None:
        self.failures[name] = self.failures.get(name) or failure

    # ---- how they were computed --------------------------------------------------------------------------

    def probes(self) -> None:
        clean: Child | None = None
        refused = ""
        for probe in self.exercise.probes:
            trial = probe.trial
            if trial is None:
                continue
            self.failures[probe.name], self.hints[probe.name] = None, probe.hint
            if trial.kernel and self.exercise.kernel is not None:
                if clean is None and not refused:
                    clean, refused = self.clean_kernel()
                sentence = refused or self.kernel_trial(clean, probe, trial)
                refused = refused and "not looked at, for the same reason"
            else:
                sentence = self.value_trial(trial)
            if sentence:
                self.failures[probe.name] = Failure(probe.name, "probe", sentence)
        if clean is not None:
            clean.close()

    def value_trial(self, trial: Trial) -> str | None:
        cases = trial.make_inputs(generator(self.seed, self.exercise.id, "trial"))
        limits = {} if trial.memory_bytes is None else {"data": trial.memory_bytes}
        child = self.boxes.get().child(**limits)
        spare = f"with {(trial.memory_bytes or 0) // 2**20} MB to spare: " if limits else ""
        try:
            self.load(child, trial.through)
            outcomes = []
            for case in cases:
                value, error, _ = self.call(child, case)
                if error is not None:
                    return spare + error.compared
                outcome = self.outcome(case, value)
                if outcome is None:
                    return "other results than expected came back for this input"
                outcomes.append(outcome)
        except Stopped as reason:
            self.boxes.drop()
            return spare + str(reason)
        finally:
            child.close()
        return trial.judge(outcomes)

    def outcome(self, case: Case, value: Any, frame: wire.Frame | None = None) -> Outcome | None:
        parts = value if isinstance(value, list) else [value]
        if len(parts) != len(self.exercise.outputs) or not all(isinstance(p, torch.Tensor) for p in parts):
            return None
        counted = frame.header.get("traffic") if frame else None
        numbers = counted if isinstance(counted, list) and all(isinstance(n, int) for n in counted) else []
        return Outcome(case, tuple(parts), *(numbers if len(numbers) == 3 else ()))

    def clean_kernel(self) -> tuple[Child | None, str]:
        """A process with the kernel's text and our launcher; no cell of the student's ran in it or runs beside it."""
        kernel = self.exercise.kernel
        assert kernel is not None
        child = self.boxes.alone().child()
        header = {"op": "kernel", "cells": self.cells, "kernel": kernel.name}
        answer = self.ask(child, {**header, "launcher": kernel.source(), "function": kernel.launcher}).header
        if answer.get("found") is True:
            return child, ""
        child.close()
        return None, own_words(answer.get("refused") or answer.get("error", "the kernel was not found"), 300)

    def kernel_trial(self, child: Child | None, probe: Probe, trial: Trial) -> str | None:
        assert child is not None
        cases = trial.make_inputs(generator(self.seed, self.exercise.id, "trial"))
        if trial.gpu is not None:
            return self.compiled(child, cases[0], probe, trial.gpu)
        outcomes = []
        for case in cases:
            value, error, frame = self.call(child, case, count=True)
            outcome = None if error else self.outcome(case, value, frame)
            if outcome is None:
                return error.compared if error else "the kernel gave no results"
            outcomes.append(outcome)
        return trial.judge(outcomes)

    def compiled(self, child: Child, case: Case, probe: Probe, gpu: str) -> str | None:
        arguments = wire.Arguments.of(case.kwargs)
        try:
            job = self.ask(child, {"op": "launches", "arguments": arguments.header}, arguments.fd).header
        finally:
            arguments.close()
        if "text" not in job:
            return own_words(job.get("error", "the kernel was not launched"))
        assert self.exercise.kernel is not None
        said = compile_error(self.boxes.site, self.boxes.limits, self.exercise.kernel.name, job, gpu)
        if said is None:
            return None
        self.own_hint[probe.name] = compiler_cause(said) or probe.hint
        reason, line = compiler_said(said)
        return f"compiled for {gpu}: {own_words(reason, 200)}" + (
            f"; at the line: {own_words(line, 120)}" if line else ""
        )

    # ---- what is said ------------------------------------------------------------------------------------

    def verdicts(self) -> Iterable[Verdict]:
        wrong = any(self.failures.get(name) for name in self.exercise.properties)
        for name, failure in self.failures.items():
            detail = "; ".join(failure.lines()) if failure else ""
            own = self.own_hint.get(name) or common_hint(self.exercise, name, wrong)
            hint = (own or self.hints.get(name, "")) if failure else ""
            yield Verdict(name, failure is None, detail, hint)

    def first_exception(self) -> str:
        for failure in self.failures.values():
            if failure is not None and failure.kind == "exception":
                return failure.compared
        return ""

    def cause(self) -> str:
        """The likely mistake in a sentence, or ""."""
        for case, value, failure in self.judged:
            if failure is not None and failure.kind in ("shape", "value", "nan", "dtype"):
                swapped = reordered(self.exercise, value, self.exercise.want(case), case)
                if swapped:
                    return swapped
                break
        for case, _, failure in self.judged:
            if failure is not None and failure.kind in STRUCTURAL:
                return structural(self.exercise, None, case, failure) or ""
        found: Diagnosis | None = selfcheck.diagnose(self.exercise, self.judged, _run_mutant)
        return found.mutant.hint if found else ""
