"""The boundary: bubblewrap around everything that a student wrote.

Inside are a user, process, network, mount, IPC and host-name namespace of its own, no capabilities, a read-only
system, sized memory file systems, hard limits per process. From outside, `watch` looks at the memory and the number
of processes of the whole tree, and every answer has a deadline. Where this cannot be had, `probe` says why, and
nothing is graded.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effattn_lab.grading import cgroup, seccomp
from effattn_lab.grading.inside import wire
from effattn_lab.grading.watch import Watch, cpu_seconds, descendants

MB = 2**20
SITE = "/lab/site"
#: A call may take so many times its limit where the sandbox had less than half a core.
PATIENCE = 4
#: The kernel stops a bomb at so many times the number of processes at which the watch ends it, and says why.
CROWD = 4
INSTALL = "install bubblewrap 0.8 or newer (Debian, Ubuntu: apt-get install bubblewrap)"


class NoBoundary(RuntimeError):
    """Isolation cannot be had on this machine; the message says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What one sandbox and its processes may take. Bytes and seconds.

    Args:
        data: memory that one process may allocate beyond what it has at its start; address: address space, likewise.
        cpu: CPU seconds of one process; wall: seconds until an answer to one call; exercise: for all calls of one
            exercise; start: until the sandbox is ready.
        file: largest file; files: open files; processes: of the whole sandbox.
        tree: memory of all processes together; scratch: size of /tmp; shared: size of /dev/shm.
    """

    data: int = 2048 * MB
    address: int = 8192 * MB
    cpu: int = 60
    wall: float = 20.0
    exercise: float = 240.0
    start: float = 120.0
    file: int = 64 * MB
    files: int = 256
    processes: int = 64
    tree: int = 5120 * MB
    scratch: int = 128 * MB
    shared: int = 64 * MB

    def inside(self) -> dict[str, int]:
        return {n: v for n, v in asdict(self).items() if n in _INSIDE}


_INSIDE = ("data", "address", "cpu", "file", "files", "processes")


class Stopped(Exception):
    """The sandbox, or a process in it, ended or was ended; the message says why, in words for the student."""


# ---- the command -------------------------------------------------------------------------------------------


@functools.cache
def system_binds() -> tuple[str, ...]:
    """Read-only system: /usr, the interpreter and installed packages, at their own places."""
    binds = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            binds += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            binds += ["--ro-bind", name, name]
    if os.path.exists("/etc/ld.so.cache"):
        binds += ["--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    folders = dict.fromkeys([sys.base_prefix, *package_folders()])
    for folder in folders:
        if not folder.startswith("/usr/") and folder != "/usr":
            binds += ["--ro-bind", folder, folder]
    # An installed copy of this package holds the answers.
    places = [
        *package_folders(),
        *(f"{p}/lib/python*/*-packages" for p in ("/usr", "/usr/local", sys.base_prefix)),
    ]
    for path in sorted({p for place in places for p in glob.glob(f"{place}/effattn_*")}):
        hidden = ["--tmpfs", path, "--remount-ro", path]
        binds += hidden if os.path.isdir(path) else ["--ro-bind", "/dev/null", path]
    return tuple(binds)


@functools.cache
def package_folders() -> tuple[str, ...]:
    """Where installed packages lie."""
    return tuple(dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib")))


def command(
    program: Sequence[str],
    limits: Limits,
    binds: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
    devices: Sequence[str] = (),
) -> list[str]:
    """The bubblewrap command line that runs ``program``.

    Args:
        program: what to run inside, with its arguments.
        limits: sizes of the memory file systems.
        binds: host path → path inside, read-only.
        environment: added to the minimal one.
        devices: device files to let in (a GPU's), none by default.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NoBoundary(f"bubblewrap is not installed: {INSTALL}")
    line = [
        bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
        "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox",
        # Bubblewrap's own first process would be open to all others inside: its environment is the instructor's, its
        # files are this machine's, and it alone holds the string that ends the sandbox with the grader.
        "--as-pid-1",
        "--size", str(limits.scratch), "--tmpfs", "/tmp",
        *system_binds(),
        "--proc", "/proc", "--dev", "/dev", "--size", str(limits.shared), "--tmpfs", "/dev/shm",
    ]  # fmt: skip
    if not devices:
        # Mapped by several, it is memory that no limit counts.
        line += ["--ro-bind", "/dev/null", "/dev/zero"]
    for device in devices:
        line += ["--dev-bind", device, device]
    for source, target in binds.items():
        line += ["--ro-bind", source, target]
    # Where the grader is root, root's files are the student's own inside: the kernel's switches in /proc/sys too.
    for path in ("/proc", "/dev", "/"):
        line += ["--remount-ro", path]
    line += ["--chdir", "/tmp"]
    for name, value in {**_environment(), **(environment or {})}.items():
        line += ["--setenv", name, value]
    return [*line, *program]


def _environment() -> dict[str, str]:
    kept = {n: os.environ[n] for n in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if n in os.environ}
    return {
        **kept,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",
        "USER": "student",
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join([SITE, *package_folders()]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",  # what a student leaves in /tmp is no module
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "TRITON_INTERPRET": "1",
        "EFFATTN_STATIC": "1",
        "HF_HUB_OFFLINE": "1",
    }


def launch(
    line: Sequence[str], *, shared_memory: bool = False, group: cgroup.Group | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start bubblewrap with a line of `command` and a filter of system calls in ``group``; ``options`` are Popen's.

    Raises:
        NoBoundary: there is no filter for this processor.
    """
    if not seccomp.supported():
        raise NoBoundary(f"grading needs an x86-64 or 64-bit ARM processor, this is {platform.machine()}")
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as file:
            file.write(seccomp.program(shared_memory))
        # When memory is short, the kernel ends the sandbox and not the grader. From inside it could not be said.
        first = "echo 1000 2>/dev/null >/proc/self/oom_score_adj"
        if group is not None:
            first += f"; echo 0 2>/dev/null >{shlex.quote(group.tasks)}"
        return subprocess.Popen(
            ["/bin/sh", "-c", first + '; exec "$0" "$@"', line[0], "--seccomp", str(reader), *line[1:]],
            pass_fds=[reader],
            **options,
        )
    finally:
        os.close(reader)


def python(*arguments: str) -> list[str]:
    """This interpreter inside, without site directories: only PYTHONPATH counts."""
    return [os.path.realpath(sys.executable), "-S", *arguments]


# ---- one sandbox -------------------------------------------------------------------------------------------


class Child:
    """One process inside, with a socket of its own. What it answers is a claim."""

    def __init__(self, box: Sandbox, sock: socket.socket) -> None:
        self._box, self._sock, self._count = box, sock, 0

    def ask(
        self, header: Mapping[str, Any], *, fd: int | None = None, seconds: float | None = None
    ) -> wire.Frame:
        """One request and its answer. `Stopped` where none comes in time, or none that can be read."""
        self._count += 1
        nonce = self._count
        seconds = self._box.limits.wall if seconds is None else seconds
        patient = self._box.patience(seconds)
        try:
            self._sock.settimeout(seconds)
            wire.send(self._sock, {**header, "nonce": nonce}, fds=[] if fd is None else [fd])
            frame = wire.receive(self._sock, seconds, patient=patient)
        except wire.Broken as reason:
            raise Stopped(self._box.why(str(reason), seconds)) from None
        if frame.header.get("nonce") != nonce:
            raise Stopped("the answer belongs to another call")
        return frame

    def close(self) -> None:
        self._sock.close()


class Sandbox:
    """A running sandbox; use it in a ``with`` block. Leaving it kills every process inside."""

    def __init__(
        self,
        site: Path,
        limits: Limits,
        preload: Sequence[str] = (),
        devices: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        program = python("-m", "effattn_lab.grading.inside.zygote", *preload)
        line = command(program, limits, {str(site): SITE}, environment, devices)
        self.limits = limits
        self._sock = ours
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in stop()
        self._group = cgroup.make(CROWD * limits.processes)
        self._process = launch(
            line,
            shared_memory=bool(devices),
            group=self._group,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        theirs.close()
        self._watch = Watch(self._process.pid, limits.tree, limits.processes, self._process.kill)
        try:
            wire.receive(ours, limits.start)
        except wire.Broken as reason:
            said = self._said()
            self.stop()
            raise NoBoundary(f"the sandbox did not start ({reason}): {said or 'it said nothing'}") from None

    def child(self, **changed: int) -> Child:
        """Fork a process inside. Keyword arguments replace limits of the same name for this one process."""
        ours, theirs = socket.socketpair()
        try:
            wire.send(
                self._sock,
                {"op": "fork", "limits": {**self.limits.inside(), **changed}},
                fds=[theirs.fileno()],
            )
            wire.receive(self._sock, self.limits.wall)
        except wire.Broken as reason:
            ours.close()
            raise Stopped(self.why(str(reason), self.limits.wall)) from None
        finally:
            theirs.close()
        return Child(self, ours)

    def processes(self) -> int:
        """How many processes there are inside; one is the sandbox's own."""
        return sum(1 for _ in descendants(self._process.pid))

    def patience(self, seconds: float) -> Callable[[], bool]:
        """Is this sandbox kept from working by others? Asked when ``seconds`` are over, it says whether to wait on.

        On a busy machine an honest call may get little of a core. So time that the sandbox did not have does not
        count against it, up to `PATIENCE` times the limit; somebody who sleeps gains as much, and nothing by it.
        """
        begun, before = time.monotonic(), cpu_seconds(self._process.pid)

        def patient() -> bool:
            had, passed = cpu_seconds(self._process.pid) - before, time.monotonic() - begun
            return had < seconds / 2 and passed < (PATIENCE - 0.5) * seconds

        return patient

    def why(self, reason: str, seconds: float) -> str:
        """Why there was no answer, in words for the student."""
        if self._watch.reason:
            return self._watch.reason
        if reason == "too slow":
            return f"no answer within {seconds:g} s: an endless loop?"
        if reason == "closed":
            return "the process ended before it answered: a crash, exit(), or too much memory or CPU time"
        return f"its answer cannot be read: {reason}"

    def stop(self) -> None:
        """Kill everything inside; returns when it is gone."""
        self._watch.stop()
        self._process.kill()
        self._process.wait()
        self._sock.close()
        self._errors.close()
        cgroup.remove(self._group)

    def _said(self) -> str:
        self._errors.seek(0)
        text = self._errors.read(4000).decode(errors="replace").strip()
        return (text.splitlines() or [""])[-1]

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_once(
    program: Sequence[str],
    site: Path,
    limits: Limits,
    *,
    given: bytes = b"",
    seconds: float,
    most: int = 2**20,
    binds: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program in a sandbox of its own and return what it wrote to standard output.

    Args:
        program: path inside and arguments.
        site: host folder that becomes `SITE`.
        limits: of the sandbox and of the process.
        given: its standard input.
        seconds: wall time that it gets.
        most: bytes of output that are read; a program that writes more is ended.
        binds, environment: as for `command`.

    Raises:
        Stopped: it took too long, or too much of something.
    """
    limited = python("-m", "effattn_lab.grading.inside.limited", json.dumps(limits.inside()), *program)
    line = command(limited, limits, {str(site): SITE, **(binds or {})}, environment)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as errors:
        source.write(given)
        source.seek(0)
        group = cgroup.make(CROWD * limits.processes)
        process = launch(line, group=group, stdin=source, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        watch = Watch(process.pid, limits.tree, limits.processes, process.kill)
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            said = process.stdout.read(most + 1)
        finally:
            late = timer.finished.is_set()
            timer.cancel()
            watch.stop()
            process.kill()
            process.wait()
            process.stdout.close()
            cgroup.remove(group)
        if watch.reason or late or len(said) > most:
            raise Stopped(
                watch.reason
                or (f"no end within {seconds:g} s" if late else f"more than {most} bytes of output")
            )
        return said
