"""A control group for a sandbox: where the grader is root, the kernel's own limit on the number of processes.

`RLIMIT_NPROC` does not bind processes whose user, seen from outside, is root, and a sandbox that root starts is
root's. The watch ends a fork bomb, but on a busy machine it may look too late, and then the bomb takes process
numbers from everybody. A group stops it at once. An ordinary user can make no group, and needs none.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

_numbers = itertools.count()
#: Seconds that the kernel gets to end what is left in a group that was killed.
GONE = 10.0


class Group:
    """At most ``most`` processes and threads; a process joins by writing 0 to the file ``tasks``."""

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        path.mkdir()
        try:
            (path / "pids.max").write_text(str(most))
        except OSError:
            path.rmdir()
            raise
        self.tasks = str(path / "cgroup.procs")

    def remove(self) -> None:
        """Remove the group; call it when its processes were killed. A group that stays is no harm, only a name."""
        end = time.monotonic() + GONE
        while True:
            try:
                return self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # the kernel is still ending them
                if time.monotonic() > end:
                    return
                time.sleep(0.01)


def make(most: int) -> Group | None:
    """A new group, or None: this user is not root, or the machine has no writable groups (most containers)."""
    if os.geteuid() != 0:
        return None
    for parent in places():
        try:
            return Group(parent / f"effattn-{os.getpid()}-{next(_numbers)}", most)
        except OSError:  # this one limits no processes, or is read-only
            continue
    return None


def remove(group: Group | None) -> None:
    """Remove the group of a sandbox that was killed, if it had one."""
    if group is not None:
        group.remove()


def places(proc: Path = Path("/proc/self")) -> Iterator[Path]:
    """Groups below which one that counts processes could be made: our own, then its parent; version 1, then 2."""
    try:
        mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
        own = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return
    for kind in ("cgroup", "cgroup2"):
        roots = [m[1] for m in mounts if m[2] == kind and (kind == "cgroup2" or "pids" in m[3].split(","))]
        names = [name for _, of, name in own if ("pids" in of.split(",") if kind == "cgroup" else not of)]
        for root, name in itertools.product(roots, names):
            here = Path(root) / name.lstrip("/")
            yield here
            if here != Path(root):
                # In version 2 a group that holds processes passes no limits on; its parent does.
                yield here.parent
