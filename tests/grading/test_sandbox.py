"""The boundary itself: what is inside, what is not, and what happens where it cannot be had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from effattn_lab.grading import build, probe, sandbox, watch
from effattn_lab.grading.sandbox import MB, Limits, NoBoundary, Stopped

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    scratch = ("effattn_lab.full.flash", "effattn_kernels.flash", "effattn_lab.foundations.attention.lse")
    return build.build_site(tmp_path_factory.mktemp("site") / "site", scratch)


def look(site, code, limits=None, seconds=20.0):
    """What a program inside prints."""
    return sandbox.run_once(
        sandbox.python("-c", code), site, limits or Limits(), seconds=seconds
    ).decode()  # fmt: skip


def test_it_holds_here():
    assert tuple(int(n) for n in probe.probe().split(".")[:2]) >= (0, 8)


def test_what_is_not_inside(site):
    code = f"""
import glob, json, os, socket
found = {{
    "repository": os.path.exists({str(ROOT / "labs")!r}),
    "home": os.path.exists({str(Path.home() / ".cache")!r}),
    "environment": sorted(set(os.environ) - {{"PWD", "LC_CTYPE"}}),
    "processes": sorted(int(n) for n in os.listdir("/proc") if n.isdigit()),
    "tmp": os.listdir("/tmp"),
    "devices": sorted(os.listdir("/dev")),
    "answers": [p for p in glob.glob("/lab/site/**/*", recursive=True) if "_flash" in p or "interview" in p],
    "grader": [p for p in glob.glob("/lab/site/effattn_lab/grading/*.py")],
    "sockets": os.path.exists("/run") or os.path.exists("/var/run"),
}}
print(json.dumps(found))
"""
    seen = json.loads(look(site, code))
    assert not seen["repository"]
    assert not seen["home"]
    assert not {"PATH_INFO", "CI", "VIRTUAL_ENV", "SSH_AUTH_SOCK"} & set(seen["environment"])
    assert len(seen["environment"]) < 20
    assert len(seen["processes"]) <= 2
    # Where this environment itself lies below /tmp, the way to it is there, and nothing else.
    folders = (*sandbox.package_folders(), sys.base_prefix)
    assert set(seen["tmp"]) <= {Path(f).parts[2] for f in folders if f.startswith("/tmp/")}
    assert "sda" not in seen["devices"]
    assert seen["answers"] == []
    assert seen["grader"] == ["/lab/site/effattn_lab/grading/__init__.py"]
    assert not seen["sockets"]


def test_what_is_to_be_written_is_not_there(site):
    code = """
import sys
from effattn_lab.foundations import attention
from effattn_lab.full import flash
for call in (lambda: flash.flash_attention(1), lambda: attention.lse(1, 2)):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
import importlib
for name in ("effattn_lab.exercises.full", "effattn_lab.exercises.registry", "effattn_lab.grading.judge",
             "effattn_lab.interview"):
    try:
        importlib.import_module(name)
        print("there:", name)
    except ImportError:
        pass
print(attention.repeat_kv.__name__)
"""
    lines = look(site, code).splitlines()
    assert lines[0].startswith(
        "NotAllowed flash_attention of effattn_lab.full.flash is what this exercise asks"
    )
    assert lines[1].startswith("NotAllowed effattn_lab.foundations.attention.lse is what")
    assert lines[2:] == ["repeat_kv"]


def test_unknown_name_is_refused(tmp_path):
    for name in ("effattn_lab.full.flush", "effattn_lab.foundations.attention.nothing"):
        with pytest.raises(ValueError, match=f"from_scratch: expected a module or a function.*{name}"):
            build.build_site(tmp_path / name, [name])


def test_limits_hold(site):
    small = Limits(data=200 * MB, address=1024 * MB, file=1 * MB, files=20, scratch=4 * MB)
    code = """
import os, resource
def outcome(name, act):
    try:
        act()
        print(name, "went through")
    except (MemoryError, OSError, ValueError) as error:
        print(name, type(error).__name__)
def write(path, size):
    with open(path, "wb") as file:
        for _ in range(size):
            file.write(b"0" * 2**20)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
outcome("memory", lambda: bytearray(400 * 2**20))
outcome("file", lambda: write("/tmp/a", 3))
outcome("disk", lambda: [write(f"/tmp/{n}", 1) for n in range(10)])
outcome("files", lambda: [os.open("/dev/null", 0) for _ in range(100)])
outcome("raise", lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**40, 2**40)))
outcome("system", lambda: open("/usr/x", "w"))
outcome("device", lambda: open("/dev/sda", "w"))
"""
    lines = look(site, code, small).splitlines()
    assert lines == [
        "memory MemoryError", "file OSError", "disk OSError", "files OSError", "raise ValueError", "system OSError",
        "device OSError",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "limits", "reason"),
    [
        ("while True: pass", Limits(), "no end within 1 s"),
        ("import time\ntime.sleep(60)", Limits(), "no end within 1 s"),
        ("while True: print('x' * 10_000)", Limits(), "bytes of output"),
        ("import os\nwhile True: os.fork()", Limits(processes=20), "more than 20 processes"),
        (
            "x = [bytearray(b'1' * 2**20 * 10) for _ in range(30)]\nimport time\ntime.sleep(60)",
            Limits(tree=100 * MB),
            "more than 100 MB",
        ),
    ],
    ids=["loop", "sleep", "output", "forks", "memory"],
)
def test_bombs_end(site, code, limits, reason):
    with pytest.raises(Stopped, match=reason):
        look(site, code, limits, seconds=1.0 if "no end" in reason else 20.0)
    assert left_over() == []


def left_over():
    """Processes of a sandbox that is gone."""
    found = []
    for pid in watch.descendants(os.getpid()):
        name = Path(f"/proc/{pid}/comm")
        if name.exists() and name.read_text().strip() == "bwrap":
            found.append(pid)
    return found


def test_children_of_a_sandbox_cannot_touch_each_other(site):
    spy = (
        "import os, ctypes\n"
        "def f():\n"
        "    parent = os.getppid()\n"
        "    told = []\n"
        "    for path in ('mem', 'environ', 'maps'):\n"
        "        try:\n"
        "            open(f'/proc/{parent}/{path}', 'rb').read(1)\n"
        "            told.append(path)\n"
        "        except OSError:\n"
        "            pass\n"
        "    if ctypes.CDLL(None).ptrace(16, parent, 0, 0) == 0:\n"
        "        told.append('ptrace')\n"
        "    raise ValueError('reads: ' + ','.join(told))\n"
    )
    with sandbox.Sandbox(site, Limits(), ["effattn_kernels", "torch"]) as box:
        child = box.child()
        child.ask({"op": "load", "cells": [[1, spy]], "function": "f", "refuse": []})
        from effattn_lab.grading.inside import wire

        arguments = wire.Arguments.of({})
        answer = child.ask({"op": "call", "arguments": arguments.header}, fd=arguments.fd).header
        assert answer["error"] == "ValueError: reads:"
        # A child that ends does not end the sandbox.
        child.ask({"op": "load", "cells": [[1, "x = 1"]], "function": "x", "refuse": []})
        child.close()
        assert (
            box.child().ask({"op": "load", "cells": [], "function": "x", "refuse": []}).header["found"]
            is False
        )


def test_a_child_that_answers_for_another_call_is_not_believed(site):
    with sandbox.Sandbox(site, Limits(wall=5), ["effattn_kernels"]) as box:
        child = box.child()
        child._count = 7
        answer = child.ask({"op": "load", "cells": [], "function": "x", "refuse": []})
        assert answer.header["nonce"] == 8


def called(box, body):
    """A child that holds ``f`` with this body, and the arguments of a call."""
    from effattn_lab.grading.inside import wire

    child = box.child()
    source = f"import time\ndef f():\n    {body}\n"
    child.ask({"op": "load", "cells": [[1, source]], "function": "f", "refuse": []})
    return child, wire.Arguments.of({})


def test_time_that_it_did_not_get_does_not_count(site):
    """Stopped from outside for twice its limit, as a crowd of others might keep it from a core; then it answers."""
    wall = 2.0
    with sandbox.Sandbox(site, Limits(wall=wall), ["effattn_kernels", "torch"]) as box:
        child, arguments = called(box, "return 1")
        pids = list(watch.descendants(box._process.pid))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wake = threading.Timer(2 * wall, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids])
        wake.start()
        begun = time.monotonic()
        frame = child.ask({"op": "call", "arguments": arguments.header}, fd=arguments.fd)
        assert frame.header["results"] == [{"type": "int"}]
        assert time.monotonic() - begun > wall
        wake.join()
        arguments.close()


@pytest.mark.parametrize(
    ("body", "least", "most"),
    [("while True: pass", 2, 6), ("time.sleep(60)", 6, 10)],
    ids=["a loop", "a sleeper"],
)
def test_time_that_it_got_does_count(site, body, least, most):
    """A loop has its limit and no more; who sleeps gains four times as much, and nothing by it."""
    with sandbox.Sandbox(site, Limits(wall=2.0), ["effattn_kernels", "torch"]) as box:
        child, arguments = called(box, body)
        begun = time.monotonic()
        with pytest.raises(Stopped, match="no answer within 2 s"):
            child.ask({"op": "call", "arguments": arguments.header}, fd=arguments.fd)
        assert least <= time.monotonic() - begun < most
        arguments.close()
    assert left_over() == []


# ---- where it cannot be had --------------------------------------------------------------------------------


def test_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(NoBoundary, match=r"bubblewrap is not installed: install bubblewrap 0\.8"):
        probe.probe()
    with pytest.raises(NoBoundary, match="not installed"):
        sandbox.command(["true"], Limits(), {})


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('[ "$1" = --version ] && echo "bubblewrap 0.6.1"', "0.6 is too old"),
        (
            '[ "$1" = --version ] && echo "bubblewrap 0.9.0" && exit; '
            'echo "bwrap: setting up uid map: Permission denied" >&2; exit 1',
            "cannot isolate here .*uid map.*AppArmor.*seccomp",
        ),
        # It runs the program without any isolation.
        (
            '[ "$1" = --version ] && echo "bubblewrap 0.9.0" && exit; '
            'while [ "$1" != --setenv ]; do shift; done; '
            'while [ "$1" = --setenv ]; do export "$2=$3"; shift 3; done; exec "$@"',
            "not one: it keeps privileges",
        ),
    ],
    ids=["too old", "not allowed", "no isolation"],
)
def test_a_boundary_that_is_none(tmp_path, monkeypatch, script, reason):
    """Programs in bubblewrap's place: each is found out, and grading refuses before it reads a submission."""
    fake = tmp_path / "bin" / "bwrap"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(NoBoundary, match=reason):
        probe.probe()
    out = tmp_path / "results"
    (tmp_path / "class").mkdir()
    command = [sys.executable, "-m", "effattn_lab.cli", "grade", str(tmp_path / "class"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("effattn grade: ")
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_not_linux(monkeypatch):
    monkeypatch.setattr(probe.platform, "system", lambda: "Darwin")
    with pytest.raises(NoBoundary, match="grading needs Linux, this is Darwin"):
        probe.probe()


def test_an_installed_package_is_masked(tmp_path, monkeypatch):
    """Where the package was installed instead of linked, its copy would hold every answer."""
    installed = tmp_path / "effattn_lab"
    installed.mkdir()
    (installed / "answers.py").write_text("x = 1")
    monkeypatch.setattr(sandbox, "package_folders", lambda: (str(tmp_path),))
    sandbox.system_binds.cache_clear()
    try:
        line = list(sandbox.system_binds())
        assert line[line.index(str(installed)) - 1] == "--tmpfs"
        code = f"import os; print(os.listdir({str(installed)!r}))"
        empty = tmp_path / "site"
        empty.mkdir()
        done = subprocess.run(
            sandbox.command(sandbox.python("-c", code), Limits(), {str(empty): sandbox.SITE}),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip() == "[]", done.stderr
    finally:
        sandbox.system_binds.cache_clear()


def test_limits_replace():
    assert replace(Limits(), data=1).inside()["data"] == 1
    assert set(Limits().inside()) == {"data", "address", "cpu", "file", "files", "processes"}
