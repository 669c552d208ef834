"""Grade one submission: the unit of work, the same on one machine and on a cluster."""

from __future__ import annotations

import atexit
import errno
import functools
import glob
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import effattn_lab
from effattn_lab.grading.model import Assignment, ExerciseResult, LabPlan, Replay, StudentResult, Submission
from effattn_lab.grading.store import commitment, student_seed


@dataclass(frozen=True)
class Options:
    """How to grade.

    Args:
        seed: of the run; secret until it is complete.
        replay: run the whole notebook with nbval as well.
        gpu: let the GPU's device files into the sandbox.
        wall: seconds that one call may take.
    """

    seed: str = field(repr=False)
    replay: bool = True
    gpu: bool = False
    wall: float = 20.0


@dataclass(frozen=True)
class Task:
    """One submission with all that grading it needs; it can travel to another machine."""

    submission: Submission
    assignment: Assignment
    options: Options


@dataclass(frozen=True)
class Done:
    """A result, and the student's own code for `effattn report`."""

    result: StudentResult
    source: str


#: The machine's own failures: no disk, no memory, no more files. They say nothing of a submission.
_OURS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE}

#: Torch's switches and the counters of traffic belong to the process: threads of a worker take turns.
_turn = threading.Lock()


_given: list[Path] = []


def use_scratch(folder: Path) -> None:
    """Build what the sandbox sees below ``folder``, which its owner removes, instead of in the system's own place."""
    _given[:] = [folder]


@functools.cache
def _scratch() -> Path:
    if _given:
        return _given[0]
    folder = Path(tempfile.mkdtemp(prefix="effattn-grade-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def site(lab: str, from_scratch: tuple[str, ...]) -> Path:
    """The package without what a lab asks to write, made once in a process."""
    from effattn_lab.grading.build import build_site

    return build_site(Path(tempfile.mkdtemp(dir=_scratch())) / lab.replace("/", "-"), from_scratch)


@functools.cache
def whole_site() -> Path:
    from effattn_lab.grading.build import full_site

    return full_site(Path(tempfile.mkdtemp(dir=_scratch())) / "whole")


@functools.cache
def checked_boundary() -> str:
    """`probe`, once in a process."""
    from effattn_lab.grading.probe import probe

    return probe()


def grade(task: Task) -> Done:
    """Grade a submission.

    Raises:
        NoBoundary: code cannot be isolated on this machine.
        RuntimeError: the machine has another version of the package than the assignment's.
        OSError: the machine has no disk, memory or files left.
    """
    if effattn_lab.__version__ != task.assignment.version:
        raise RuntimeError(
            f"this assignment is of effattn-lab {task.assignment.version}, here is {effattn_lab.__version__}"
        )
    from effattn_lab.grading.sandbox import NoBoundary

    with _turn:
        checked_boundary()
        if task.options.gpu:
            _gpu_devices()
        try:
            return _grade(task)
        except NoBoundary:
            raise
        except Exception as error:  # one submission must not end the grading of all
            if isinstance(error, OSError) and (error.errno in _OURS or isinstance(error, shutil.Error)):
                raise
            return given_up(task, f"the grader failed on it ({type(error).__name__}: {str(error)[:100]})")


def _grade(task: Task) -> Done:
    submission, assignment, options = task.submission, task.assignment, task.options
    seed = student_seed(options.seed, submission.student, assignment.seed_per_student)
    exercises: list[ExerciseResult] = []
    replays: list[Replay] = []
    changed: list[str] = []
    problems = list(submission.problems)
    sources: list[str] = []
    for plan in assignment.labs:
        notebook = submission.notebooks.get(plan.lab)
        if notebook is None:
            exercises += _none(plan, "no notebook was handed in")
            continue
        lab = _Lab(plan, notebook, seed, task)
        exercises += lab.exercises()
        changed += lab.changed
        # `collect` may have said the same of the file.
        problems += [p for p in lab.problems if not any(q.endswith(p.partition(": ")[2]) for q in problems)]
        sources += [f"# ---- cell {number}\n{source}" for number, source in lab.cells]
        if options.replay and not lab.problems:
            replays.append(lab.replay())
    late, percent, note = lateness(submission, assignment)
    result = StudentResult(
        submission.student,
        submission.name,
        submission.digest(),
        tuple(exercises),
        tuple(replays),
        tuple(changed),
        tuple([*problems, *note]),
        submission.submitted.isoformat() if submission.submitted else "",
        round(late.total_seconds() / 60, 1),
        percent,
        commitment(seed),
        dict(submission.ids),
    )
    return Done(result, "\n\n".join(sources) + "\n")


class _Lab:
    """One notebook of a submission."""

    def __init__(self, plan: LabPlan, notebook: bytes, seed: str, task: Task) -> None:
        from effattn_lab.grading.notebook import NotebookError, cells_to_run, changed_checks, read_cells

        self.plan, self.notebook, self.seed, self.task = plan, notebook, seed, task
        self.cells: list[tuple[int, str]] = []
        self.changed: tuple[str, ...] = ()
        self.problems: list[str] = []
        try:
            cells = read_cells(notebook)
        except NotebookError as error:
            self.problems.append(f"{plan.file}: {error}")
            return
        self.changed = changed_checks(cells, plan)
        self.cells = cells_to_run(cells, plan)

    def exercises(self) -> list[ExerciseResult]:
        from effattn_lab.exercises.registry import get
        from effattn_lab.grading.judge import Boxes, judge
        from effattn_lab.grading.sandbox import Limits

        if self.problems:
            return _none(self.plan, self.problems[0])
        names = {name for item in self.plan.items for name in get(item.id).from_scratch}
        options = self.task.options
        devices = _gpu_devices() if options.gpu else ()
        where = site(self.plan.lab, tuple(sorted(names)))
        found = []
        with Boxes(where, Limits(wall=options.wall), devices) as boxes:
            for item in self.plan.items:
                found.append(judge(boxes, item, self.cells, self.seed, self.task.assignment.credit))
        return found

    def replay(self) -> Replay:
        from effattn_lab.grading.replay import replay

        return replay(self.plan.lab, self.notebook, whole_site())


def given_up(task: Task, why: str) -> Done:
    """The result of a submission that cannot be graded; people have to look at it."""
    submission, assignment = task.submission, task.assignment
    why = f"{why}; a person has to look at it"
    exercises = tuple(e for plan in assignment.labs for e in _none(plan, why))
    seed = student_seed(task.options.seed, submission.student, assignment.seed_per_student)
    result = StudentResult(
        submission.student,
        submission.name,
        submission.digest(),
        exercises,
        problems=(*submission.problems, why),
        submitted=submission.submitted.isoformat() if submission.submitted else "",
        sealed=commitment(seed),
        ids=dict(submission.ids),
    )
    return Done(result, "")


def _none(plan: LabPlan, why: str) -> list[ExerciseResult]:
    return [ExerciseResult(item.id, "missing", 0.0, item.points, error=why) for item in plan.items]


def _gpu_devices() -> tuple[str, ...]:
    found = [p for pattern in ("/dev/nvidia*", "/dev/kfd", "/dev/dri") for p in sorted(glob.glob(pattern))]
    if not found:
        raise RuntimeError("--gpu: this machine shows no GPU device (/dev/nvidia*, /dev/kfd)")
    return tuple(found)


def lateness(submission: Submission, assignment: Assignment) -> tuple[timedelta, float, list[str]]:
    """(how late in whole minutes, per cent taken off, a note where the two sources of time disagree).

    Seconds do not count: pages show minutes, and 23:59:40 is not later than 23:59 to anybody who reads them.
    """
    nothing = timedelta(0)
    if assignment.due is None:
        return nothing, 0.0, []
    late = nothing
    if submission.submitted is not None:
        late = max(nothing, submission.submitted - assignment.due)
        late -= late % timedelta(minutes=1)
    percent = assignment.late.percent(late)
    if submission.late_flag and late == nothing:
        return late, percent, [
            "marked late by the learning platform, but its time is not known to be: no penalty was taken; put the "
            "time into submitted.csv"
        ]  # fmt: skip
    return late, percent, []
