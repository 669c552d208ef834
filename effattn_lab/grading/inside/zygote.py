"""First process in the sandbox: imports what is slow, then forks one process per exercise.

Standard input is a socket to the grader. A request ``fork`` brings limits and a socket of its own for the child, so
that no child ever holds another one's, nor this one's. Limits are set before any of the student's code exists in the
child, hard, so that nothing can raise them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys

from effattn_lab.grading.inside import student, wire
from effattn_lab.grading.inside.limited import harden, limit

_PR_SET_PDEATHSIG = 1


def main() -> None:
    sock = socket.socket(fileno=os.dup(0))
    # The student's code finds an empty standard input and nobody who reads what it prints.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in sys.argv[1:]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    _warm()
    harden()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears only the signals that it asked for
    wire.send(sock, {"ready": True})
    while True:
        try:
            frame = wire.receive(sock, max_fds=1)
        except wire.Broken:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            _child(sock, frame)
        os.close(frame.fds[0])
        wire.send(sock, {"pid": pid})


def _warm() -> None:
    """What is slow the first time it is used, once for all children."""
    import torch

    # Imports half of torch's compiler.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.use_deterministic_algorithms(False)
    torch.randn(64, 64) @ torch.randn(64, 64)
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter  # noqa: F401

        from effattn_lab.measure import traffic  # noqa: F401


def _child(zygote_sock: socket.socket, frame: wire.Frame) -> None:
    try:
        zygote_sock.close()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        limit(frame.header["limits"])
        student.serve(socket.socket(fileno=frame.fds[0]))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
