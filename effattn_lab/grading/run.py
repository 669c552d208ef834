"""``effattn grade``: submissions in, gradebook and feedback out. ``effattn regrade``: one of them again."""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import effattn_lab
from effattn_lab.grading import feedback, gradebook
from effattn_lab.grading.model import Assignment, StudentResult, Submission
from effattn_lab.grading.store import Store, commitment, reading
from effattn_lab.grading.submissions import collect
from effattn_lab.grading.task import Done, Options, Task, checked_boundary, grade


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``effattn grade``."""
    parser.add_argument(
        "submissions", type=Path, help="folder of submissions, or the zip of Canvas or Moodle"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS", help="folder of the results")
    parser.add_argument(
        "--assignment", type=Path, metavar="FILE",
        help="assignment.json of `effattn release`; by default the one beside the submissions",
    )  # fmt: skip
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=cores, metavar="N", help=f"processes at a time; here {cores}"
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="grade on the Dask cluster at this address")
    parser.add_argument("--no-replay", action="store_true", help="do not run whole notebooks with nbval")
    parser.add_argument("--gpu", action="store_true", help="compile kernels; lets the GPU into the sandbox")
    parser.add_argument("--seconds", type=float, default=20.0, help="that one call may take; default 20")
    parser.add_argument("--seed", help="draw the inputs of an earlier run again instead of secret ones")


def add_regrade_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``effattn regrade``."""
    parser.add_argument("student", help="as in the gradebook: the key, or the name where only one has it")
    parser.add_argument(
        "--seed", help="one that a run told at its end; default: the one that drew this grade"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(),
        metavar="RESULTS",
        help="folder of the results; here by default",
    )
    parser.add_argument("--submissions", type=Path, help="where they are now, if they were moved")


def run(args: argparse.Namespace) -> int:
    """Run ``effattn grade``; returns its exit status: 130 where it was stopped with Ctrl-C."""
    if args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds: expected more than 0, got {args.seconds:g}")
    assignment = assignment_of(args.assignment, args.submissions)
    boundary = None if args.scheduler else checked_boundary()
    notes: list[str] = []
    submissions = collect(args.submissions, assignment, notes)
    if not submissions:
        raise ValueError(f"SUBMISSIONS: no student's notebook was found in {args.submissions}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not args.no_replay and not args.scheduler:
        _prepare_model()
    try:
        _grade_all(args, assignment, submissions, boundary)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on: what is graded stays in {args.out}", file=sys.stderr)
        return 130
    except OSError as error:
        # Copying a tree collects the reasons as text.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise ValueError(
            f"--out: no space left where {args.out} is, or in the folder for temporary files; make room and give "
            "the same command again, what is graded is kept"
        ) from None
    return 0


def _grade_all(
    args: argparse.Namespace, assignment: Assignment, submissions: Sequence[Submission], boundary: str | None
) -> None:
    """Grade what is new and write all that is made from the results together."""
    with Store(args.out, assignment) as store:
        known = store.results()
        todo = [s for s in submissions if s.student not in known or known[s.student].digest != s.digest()]
        gone = sorted(set(known) - {s.student for s in submissions})
        kept = len(submissions) - len(todo)
        print(f"{len(submissions)} submissions" + (f", {kept} of them graded before" if kept else ""))
        if gone:
            print(f"kept, though no longer handed in: {', '.join(gone)}")
        if todo:
            seed = store.seed(args.seed)
            print(f"inputs are secret; hash of their seed: {commitment(seed)}")
            options = Options(seed, not args.no_replay, args.gpu, args.seconds)
            _record(store, args, seed, boundary)
            for done in _graded([Task(s, assignment, options) for s in todo], args, store):
                store.add(done.result, done.source)
        _finish(store)


def run_regrade(args: argparse.Namespace) -> int:
    """Run ``effattn regrade``: 0 where the result is the recorded one, 1 where it is not. Writes nothing."""
    with reading(args.results) as store:
        recorded = _student(args.student, store.results(), args.results)
        seed = args.seed or store.seed_of(recorded)
        where = args.submissions or Path(store.run().get("submissions", ""))
        found = [s for s in collect(where, store.assignment) if s.student == recorded.student]
        if not found:
            raise ValueError(f"--submissions: {args.student!r} has handed in nothing in {where}")
        if found[0].digest() != recorded.digest:
            print("note: the submission is not the one that was graded", file=sys.stderr)
        checked_boundary()
        os.environ.setdefault("TRITON_INTERPRET", "1")
        # The seed may be the run's or the student's own.
        own = commitment(seed) == recorded.sealed
        assignment = store.assignment
        if own and assignment.seed_per_student:
            from dataclasses import replace

            assignment = replace(assignment, seed_per_student=False)
        result = grade(Task(found[0], assignment, Options(seed, replay=False))).result
    same = _outcome(result) == _outcome(recorded)
    for exercise in result.exercises:
        failing = ", ".join(v.property for v in exercise.verdicts if not v.passed)
        print(
            f"{exercise.id}  {exercise.points:g}/{exercise.possible:g}  {exercise.status}  {failing}".rstrip()
        )
    print(f"total {result.total:g}; recorded {recorded.total:g}: {'the same' if same else 'NOT the same'}")
    if result.sealed != recorded.sealed:
        print("note: the recorded grade was drawn with another seed", file=sys.stderr)
    return 0 if same else 1


def _student(asked: str, results: dict[str, StudentResult], where: Path) -> StudentResult:
    """By key, else by name. ValueError where nobody or more than one is called so."""
    if asked in results:
        return results[asked]
    named = [r for r in results.values() if r.name.casefold() == asked.casefold()]
    if len(named) == 1:
        return named[0]
    if named:
        keys = ", ".join(r.student for r in named)
        raise ValueError(f"STUDENT: {asked!r} is the name of more than one; say which of {keys}")
    raise ValueError(f"STUDENT: {asked!r} is not in {where}; there are {', '.join(results)}")


def _outcome(result: StudentResult) -> list[Any]:
    return [
        (e.id, e.status, e.points, [(v.property, v.passed) for v in e.verdicts]) for e in result.exercises
    ]


def assignment_of(file: Path | None, submissions: Path) -> Assignment:
    """The assignment of a class: the named file, else the one in or beside the folder, else this checkout's labs."""
    from effattn_lab.grading.release import default_assignment, load_assignment

    if file is not None:
        return load_assignment(file)
    for folder in (submissions, submissions.parent):
        if (folder / "assignment.json").is_file():
            return load_assignment(folder / "assignment.json")
    try:
        assignment = default_assignment()
    except RuntimeError:
        raise ValueError(
            f"--assignment: no assignment.json in {submissions} or beside it; name the one of `effattn release`"
        ) from None
    print("no assignment.json: every lab of this checkout counts, one point an exercise, no due date")
    return assignment


def _prepare_model() -> None:
    """Convert the language model now: inside the sandbox there is no place to keep it."""
    from effattn_lab.grading.replay import model_cache

    if model_cache() is None:
        try:
            from effattn_lab.models import smollm2

            smollm2.load()
        except ImportError:
            print(
                "note: the language model is not installed; replayed cells that load it fail", file=sys.stderr
            )


def _graded(tasks: Sequence[Task], args: argparse.Namespace, store: Store) -> Iterator[Done]:
    """Results as they come, with a progress bar, or a line each where there is no terminal."""
    from effattn_lab.grading import pool

    scratch = store.root / ".state" / "sites"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    results = (
        pool.on_a_cluster(tasks, args.scheduler)
        if args.scheduler
        else pool.on_this_machine(tasks, args.jobs, scratch)
    )
    try:
        if not sys.stdout.isatty():
            for number, done in enumerate(results, start=1):
                print(f"[{number}/{len(tasks)}] {_line(done.result)}", flush=True)
                yield done
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("grading"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns) as progress:
            bar = progress.add_task("grading", total=len(tasks), rate="")
            for done in results:
                yield done
                progress.advance(bar)
                speed = progress.tasks[0].speed
                progress.update(bar, rate=f"{60 * speed:.1f} a minute" if speed else "")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _line(result: StudentResult) -> str:
    """``adams_jo  12``, with what a person should look at."""
    return f"{result.student}  {result.total:g}" + ("  (see problems)" if result.problems else "")


def _versions() -> dict[str, str]:
    found = {"effattn-lab": effattn_lab.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "nbval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _record(store: Store, args: argparse.Namespace, seed: str, boundary: str | None) -> None:
    """Before the first result: what this run is, and the hash that its seed will have to match."""
    earlier = store.run()
    run = {
        "format": 1,
        "complete": False,
        "versions": {**_versions(), "bubblewrap": boundary or "on the workers"},
        "assignment": store.assignment.digest(),
        "submissions": str(args.submissions.resolve()),
        "sealed": commitment(seed),
        "seeds": earlier.get("seeds", []),
    }
    store.write("run.json", json.dumps(run, indent=1) + "\n")


def _finish(store: Store) -> None:
    """All that is made from the results together; the last file says that the run is complete."""
    results = [store.results()[name] for name in sorted(store.results())]
    assignment, record = store.assignment, store.run()
    seeds = store.seeds()
    for result in results:
        data = feedback.data(assignment, result)
        data["machine"] = {"versions": record["versions"], "seed": store.seed_of(result)}
        store.write(f"feedback/{result.student}.json", json.dumps(data, indent=1) + "\n")
        store.write(f"feedback/{result.student}.html", feedback.page(assignment, result))
    store.write("gradebook.csv", gradebook.gradebook_csv(assignment, results))
    store.write("canvas.csv", gradebook.canvas_csv(assignment, results))
    store.write("moodle.csv", gradebook.moodle_csv(assignment, results))
    record |= {"complete": True, "seeds": seeds}
    store.write("run.json", json.dumps(record, indent=1) + "\n")
    print(
        f"{len(results)} results, mean {_mean(results):.2f} of {assignment.points:g}: {store.root / 'gradebook.csv'}"
    )
    print("machine " + json.dumps({"versions": record["versions"], "seeds": seeds}))
    if troubled := [r.student for r in results if r.problems]:
        shown = ", ".join(troubled[:8]) + (", ..." if len(troubled) > 8 else "")
        print(f"look at {len(troubled)} by hand, column problems: {shown}")
    print(f"how the class did: effattn report {store.root}")
    print(f"again, for one student: effattn regrade STUDENT --results {store.root}")


def _mean(results: Sequence[StudentResult]) -> float:
    return sum(r.total for r in results) / max(1, len(results))
