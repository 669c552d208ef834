"""Look at a process tree from outside: its memory and the number of its processes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

#: Seconds between two looks. A fork bomb makes some hundred processes in this time; a kill takes them all.
INTERVAL = 0.02


class Watch:
    """Calls ``kill`` when the tree below ``pid`` takes too much; ``reason`` then says what.

    Args:
        pid: root of the tree, not counted itself.
        memory: bytes that all processes together may hold in private and shared memory.
        processes: how many there may be, threads counted.
        kill: ends the tree.
    """

    def __init__(self, pid: int, memory: int, processes: int, kill: Callable[[], None]) -> None:
        self.reason = ""
        self._pid, self._memory, self._processes, self._kill = pid, memory, processes, kill
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        # Before a hundred processes that all want to run. For an ordinary user the kernel limits their number.
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        while not self._done.wait(INTERVAL):
            count = held = 0
            for pid in descendants(self._pid):
                memory, threads = taken_by(pid)
                held, count = held + memory, count + threads
                if count > self._processes:
                    break
            if count > self._processes:
                self.reason = f"more than {self._processes} processes and threads at once"
            elif held > self._memory:
                self.reason = f"more than {self._memory // 2**20} MB of memory in all"
            if self.reason:
                self._kill()
                return


def descendants(pid: int) -> Iterator[int]:
    """All processes below ``pid``, parents first."""
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        children: list[int] = []
        try:
            # A child belongs to the thread that forked it.
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    children += [int(n) for n in file.read().split()]
        except OSError:  # gone meanwhile
            pass
        yield from children
        waiting += children


def cpu_seconds(pid: int) -> float:
    """CPU time of the processes below ``pid`` that live, and of those that they have waited for."""
    ticks = 0
    for child in descendants(pid):
        try:
            with open(f"/proc/{child}/stat", encoding="utf-8", errors="replace") as file:
                # The name, in parentheses, may hold anything; what follows are numbers.
                fields = file.read().rpartition(")")[2].split()
            ticks += sum(int(n) for n in fields[11:15])
        except (OSError, ValueError):  # gone meanwhile
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def taken_by(pid: int) -> tuple[int, int]:
    """(bytes of anonymous and shared memory that a process holds, number of its threads)."""
    held, threads = 0, 1
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    held += int(line.split()[1]) * 1024
                elif line.startswith("Threads:"):
                    threads = int(line.split()[1])
    except (OSError, ValueError):
        return 0, 1
    return held, threads
