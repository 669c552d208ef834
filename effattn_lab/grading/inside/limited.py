"""Hard limits of one process, and a start-up that sets them: ``python -m ...limited '{"cpu": 60, ...}' program``."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

_PR_SET_DUMPABLE = 4


def limit(limits: dict[str, int]) -> None:
    """``data`` and ``address`` are bytes beyond what the process has now; the rest is absolute."""
    with open("/proc/self/statm") as file:
        pages = [int(n) for n in file.read().split()]
    size, data = pages[0] * resource.getpagesize(), _data_bytes()
    wanted = {
        resource.RLIMIT_DATA: data + limits["data"],
        resource.RLIMIT_AS: size + limits["address"],
        resource.RLIMIT_CPU: limits["cpu"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 64 * 2**20,
    }
    for which, value in wanted.items():
        resource.setrlimit(which, (value, value))


def harden() -> None:
    """For a process that shares a sandbox with a student's: closed to it.

    Children inherit it until they start another program: processes of one sandbox cannot trace each other, nor read
    each other's memory, environment and files.
    """
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # The folder where a program starts is one where students write; Python before 3.11 looks for modules there.
    sys.path[:] = [p for p in sys.path if p not in ("", ".", os.getcwd())]


def _data_bytes() -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    limit(json.loads(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
