"""Who grades: processes of this machine, or the workers of a Dask cluster. The results are the same."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from effattn_lab.grading.task import Done, Task, given_up, grade, use_scratch

#: A submission whose grading ended the grader's own process this often is given up.
TRIES = 3


def on_this_machine(tasks: Sequence[Task], jobs: int, scratch: Path) -> Iterator[Done]:
    """Grade with ``jobs`` processes, results in the order they are ready.

    A process that dies takes nothing with it: its submission, and what waited, is given to new processes. They die
    with this one, and their sandboxes with them; so they do when the caller stops early (Ctrl-C).
    """
    left = {task.submission.student: task for task in tasks}
    tries = dict.fromkeys(left, 0)
    others = set(multiprocessing.active_children())
    while left:
        broken: list[str] = []
        with ProcessPoolExecutor(
            max_workers=min(jobs, len(left)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(scratch,),
        ) as pool:
            try:
                running: dict[Future[Done], str] = {}
                waiting = list(left)
                while waiting or running:
                    # No more than one each: a process that dies then points at few suspects.
                    while waiting and len(running) < jobs and not broken:
                        student = waiting.pop(0)
                        running[pool.submit(grade, left[student])] = student
                    if not running:
                        break
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        student = running.pop(future)
                        try:
                            done = future.result()
                        except BrokenProcessPool:
                            broken.append(student)
                            continue
                        del left[student]
                        yield done
            except BaseException:
                # Leaving the pool waits for what runs, and a replay takes minutes.
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                raise
        for student in broken:
            tries[student] += 1
            if tries[student] >= TRIES:
                yield given_up(left.pop(student), "grading it ended the grader's own process")


def _start(scratch: Path) -> None:
    """First in a new process: it ends with its parent, its libraries use one core, kernels are interpreted."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _environment()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")  # torch makes it, used or not
    use_scratch(scratch)


def _environment() -> None:
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def _on_a_worker(task: Task) -> Done:
    _environment()
    return grade(task)


def on_a_cluster(tasks: Sequence[Task], address: str) -> Iterator[Done]:
    """Grade on an existing Dask cluster; a lost worker's submissions are given to the others.

    Args:
        tasks: the submissions.
        address: of the scheduler, as ``tcp://host:8786``.

    Raises:
        RuntimeError: no scheduler answers there, or it has no workers.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise RuntimeError("--scheduler needs Dask: pip install 'effattn-lab[grade]'") from None

    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"--scheduler: no Dask scheduler answers at {address} ({error})") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise RuntimeError(f"--scheduler: the cluster at {address} has no workers")
        futures = [
            client.submit(_on_a_worker, task, key=f"grade-{task.submission.student}-{task.submission.digest()}",
                          retries=TRIES, pure=False)
            for task in tasks
        ]  # fmt: skip
        for future in as_completed(futures, loop=client.loop):
            yield future.result()
            future.release()
