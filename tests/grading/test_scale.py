"""Processes of this machine, or a Dask cluster: the same grades, also when a process dies on the way."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import nbformat
import pytest

from effattn_lab import notebooks
from effattn_lab.grading import pool
from effattn_lab.grading.model import Submission
from effattn_lab.grading.release import default_assignment
from effattn_lab.grading.task import Options, Task
from effattn_lab.grading.throughput import outcome

pytestmark = pytest.mark.slow


def notebook(*edits):
    """The solved flash lab with some text replaced."""
    solved = notebooks.solved_notebook("full/flash")
    for old, new in edits:
        assert any(old in cell.source for cell in solved.cells)
        for cell in solved.cells:
            cell.source = cell.source.replace(old, new)
    return nbformat.writes(solved).encode()


@pytest.fixture(scope="module")
def tasks():
    """A class of four with one exercise of each kind: enough to see whether grades depend on where they come from."""
    assignment = default_assignment()
    plan = next(plan for plan in assignment.labs if plan.lab == "full/flash")
    few = replace(plan, items=tuple(i for i in plan.items if i.function in ("merge", "flash_triton")))
    assignment = replace(assignment, labs=(few,), seed_per_student=True)
    hand_ins = {
        "ann": notebook(),
        "ben": notebook(("l = w_a + w_b", "l = w_a - w_b")),
        "cem": notebook(("    m = torch.maximum(lse_a, lse_b)", "    while True: pass")),
        "dot": b"{",
    }
    options = Options("scale", replay=False, wall=3.0)
    return [
        Task(Submission(name, name, {"full/flash": data}), assignment, options)
        for name, data in hand_ins.items()
    ]


@pytest.fixture(scope="module")
def grades(tasks, tmp_path_factory):
    """One process, one after another: what all other ways have to give."""
    found = {}
    for done in pool.on_this_machine(tasks, 1, tmp_path_factory.mktemp("sites")):
        found[done.result.student] = done.result
    return found


def test_one_process(grades):
    points = {name: [e.points for e in result.exercises] for name, result in grades.items()}
    assert points == {"ann": [1, 1], "ben": [0, 1], "cem": [0, 1], "dot": [0, 0]}
    statuses = {name: [e.status for e in result.exercises] for name, result in grades.items()}
    assert statuses["cem"] == ["stopped", "passed"]
    assert statuses["dot"] == ["missing", "missing"]
    assert "endless loop" in grades["cem"].exercises[0].error


def test_a_process_that_dies(tasks, grades, tmp_path):
    """Two processes; one is killed after the first result. Nothing is lost, nothing differs."""
    killed = []
    found = []
    for done in pool.on_this_machine(tasks, 2, tmp_path):
        found.append(outcome(done.result))
        if not killed:
            import multiprocessing

            killed = [p.pid for p in multiprocessing.active_children()][:1]
            os.kill(killed[0], signal.SIGKILL)
    assert killed
    assert sorted(found) == sorted(outcome(r) for r in grades.values())


class Deadly:
    """Ends the process that reads it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_submission_that_ends_the_grader_is_given_up(tasks, tmp_path):
    bad = replace(tasks[0], submission=replace(tasks[0].submission, student="zoe", name=Deadly()))
    results = {
        done.result.student: done.result for done in pool.on_this_machine([bad, tasks[3]], 1, tmp_path)
    }
    assert set(results) == {"dot", "zoe"}
    assert results["zoe"].total == 0
    assert "a person has to look at it" in results["zoe"].problems[-1]


def test_dask_with_a_lost_worker(tasks, grades):
    """Two workers, one killed in the middle: the scores are those of one process."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        pids = client.run(os.getpid)
        assert len(set(pids.values())) == 2
        found = []
        for done in pool.on_a_cluster(tasks, cluster.scheduler_address):
            found.append(outcome(done.result))
            if len(found) == 1:
                os.kill(next(iter(pids.values())), signal.SIGKILL)
    assert sorted(found) == sorted(outcome(r) for r in grades.values())


def test_no_scheduler():
    with pytest.raises(RuntimeError, match="--scheduler: no Dask scheduler answers at tcp://127"):
        list(pool.on_a_cluster([], "tcp://127.0.0.1:9"))
