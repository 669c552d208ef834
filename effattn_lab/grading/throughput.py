"""How fast a class is graded on this machine, and what the sandbox itself costs.

``python -m effattn_lab.grading.throughput SUBMISSIONS [--replay] [--json FILE]``: the same submissions with one
process, with two, and on a Dask cluster with two workers, in one run; then the sandbox's share of one exercise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from effattn_lab.grading.model import Item, StudentResult
from effattn_lab.grading.task import Done, Options, Task, checked_boundary

SEED = "throughput"


def tasks_of(submissions: Path, replay: bool) -> list[Task]:
    """One task a submission; ValueError where there is none."""
    from effattn_lab.grading.run import assignment_of
    from effattn_lab.grading.submissions import collect

    assignment = assignment_of(None, submissions)
    found = collect(submissions, assignment)
    if not found:
        raise ValueError(f"SUBMISSIONS: no student's notebook was found in {submissions}")
    return [Task(s, assignment, Options(SEED, replay, wall=6.0)) for s in found]


def classes(tasks: list[Task], workers: int = 2) -> dict[str, dict[str, Any]]:
    """Grade all of them in three ways; seconds, submissions a minute, and the grades, which have to agree."""
    from distributed import LocalCluster

    from effattn_lab.grading import pool

    ways: dict[str, Callable[[], Iterator[Done]]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="effattn-throughput-"))
    for jobs in (1, 2):
        ways[f"{jobs} process{'es' if jobs > 1 else ''}"] = partial(
            pool.on_this_machine, tasks, jobs, scratch
        )
    rows = {}
    try:
        with LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster:
            ways[f"Dask, {workers} workers"] = partial(pool.on_a_cluster, tasks, cluster.scheduler_address)
            for name, way in ways.items():
                begun = time.perf_counter()
                grades = sorted(outcome(done.result) for done in way())
                seconds = time.perf_counter() - begun
                rows[name] = {"seconds": seconds, "a_minute": 60 * len(tasks) / seconds, "grades": grades}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def outcome(result: StudentResult) -> tuple[str, list[tuple[str, str, float]]]:
    """What must not depend on where a submission is graded."""
    return result.student, [(e.id, e.status, e.points) for e in result.exercises]


def overhead(item: Item, cells: list[tuple[int, str]], repeats: int = 15) -> dict[str, float]:
    """Seconds of one exercise: in a warm sandbox, and the same calls in this process without one.

    Returns:
        medians: ``sandbox`` (fork, load the cells, all calls, comparison), ``here`` (the same calls and comparison),
        ``trials`` (what only a grader does: long inputs, the kernel by itself, the compiler), ``start`` (a new
        sandbox with torch imported, once a submission).
    """
    from effattn_lab.exercises import judge as selfcheck
    from effattn_lab.exercises.registry import get
    from effattn_lab.grading.inside.cells import run_cells
    from effattn_lab.grading.judge import Boxes, Sitting, drawn
    from effattn_lab.grading.sandbox import Limits
    from effattn_lab.grading.task import site

    exercise = get(item.id)
    fn = run_cells(cells, item.function)[0][item.function]
    cases = drawn(item.id, SEED)

    def here() -> None:
        for number, (case, want) in enumerate(cases):
            for _ in range(2 if number < 2 else 1):
                assert exercise.compare(selfcheck.run(fn, case).value, want, case) is None

    where = site("throughput", tuple(exercise.from_scratch))
    begun = time.perf_counter()
    with Boxes(where, Limits()) as boxes:
        boxes.get()
        start = time.perf_counter() - begun

        def inside(probes: bool) -> None:
            asked = exercise if probes else replace(exercise, probes=())
            assert Sitting(boxes, asked, item, cells, SEED).run()[0] == "passed"

        sandbox = _median(lambda: inside(False), repeats)
        whole = _median(lambda: inside(True), repeats) if exercise.probes else sandbox
        here_s = _median(here, repeats)
    return {"sandbox": sandbox, "here": here_s, "trials": whole - sandbox, "start": start}


def _median(act: Callable[[], None], repeats: int) -> float:
    act()  # warm
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def measure(submissions: Path, replay: bool) -> dict[str, Any]:
    """Everything the docs show, as a dictionary. RuntimeError where the three ways do not give the same grades."""
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    checked_boundary()
    tasks = tasks_of(submissions, replay)
    rows = classes(tasks)
    grades = [row.pop("grades") for row in rows.values()]
    if any(other != grades[0] for other in grades):
        raise RuntimeError(
            "the same submissions got other grades on another way of running: no figure is shown"
        )
    labs = sorted({lab for task in tasks for lab in task.submission.notebooks})
    return {
        "submissions": len(tasks),
        "labs": labs,
        "replay": replay,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "ways": rows,
        "overhead": _exercises(labs),
    }


def _exercises(labs: Sequence[str]) -> dict[str, dict[str, float]]:
    """`overhead` of every exercise of these labs with its model solution, as the solved lab has it."""
    from effattn_lab import notebooks
    from effattn_lab.grading.release import default_assignment

    found = {}
    for plan in default_assignment().labs:
        if plan.lab not in labs:
            continue
        needed = {given.id for given in plan.cells if given.role in ("define", "blank")}
        solved = notebooks.solved_notebook(plan.lab)
        cells = [
            (n, cell.source)
            for n, cell in enumerate(solved.cells)
            if cell.cell_type == "code" and cell.id in needed
        ]
        for item in plan.items:
            found[item.id] = overhead(item, cells)
    return found


def recorded() -> dict[str, Any]:
    """The figures that the book shows: `measure` of one run, kept beside this module."""
    found: dict[str, Any] = json.loads(
        Path(__file__).with_name("throughput.json").read_text(encoding="utf-8")
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m effattn_lab.grading.throughput", description=__doc__)
    parser.add_argument("submissions", type=Path)
    parser.add_argument("--replay", action="store_true", help="run the whole notebooks too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    args = parser.parse_args()
    found = measure(args.submissions, args.replay)
    text = json.dumps(found, indent=1) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
