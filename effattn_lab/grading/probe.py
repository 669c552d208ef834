"""Is the sandbox really one? Look around from inside before anything is graded, and say what is wrong."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from effattn_lab.grading.sandbox import INSTALL, SITE, Limits, NoBoundary, command, launch, python

_LOOK = """
import json, os, socket
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
def opens(path, mode):
    try:
        open(path, mode).close()
        return True
    except OSError:
        return False
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "filter": status["Seccomp"].strip() == "2",
    "processes": sum(name.isdigit() for name in os.listdir("/proc")),
    "network": [name for _, name in socket.if_nameindex() if name != "lo"],
    "writes": [p for p in ("/usr/x", "/x", "/dev/x", "/lab/site/x") if opens(p, "w")]
    + [p for p in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger") if opens(p, "r+")],
    "reads": opens(os.environ["LOOK_FOR"], "r"),
    "host": os.uname().nodename,
}))
"""


def probe() -> str:
    """Start a sandbox and look around from inside. Returns bubblewrap's version.

    Raises:
        NoBoundary: there is no bubblewrap, it is too old, it may not make namespaces here, or it isolates less
            than it should. The message says which and what to do.
    """
    if platform.system() != "Linux":
        raise NoBoundary(
            f"grading needs Linux, this is {platform.system()}: use a Linux machine, WSL 2 or a container host"
        )
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NoBoundary(f"bubblewrap is not installed: {INSTALL}")
    version = subprocess.run([bwrap, "--version"], capture_output=True, text=True).stdout.split()[-1:]
    number = tuple(int(n) for n in version[0].split(".")[:2]) if version else (0, 0)
    if number < (0, 8):
        raise NoBoundary(f"bubblewrap {'.'.join(map(str, number))} is too old: {INSTALL}")
    with tempfile.NamedTemporaryFile(prefix="effattn-", dir=Path.home()) as secret, _empty() as empty:
        line = command(python("-c", _LOOK), Limits(), {empty: SITE}, {"LOOK_FOR": secret.name})
        process = launch(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        seen, errors = process.communicate(timeout=60)
    if process.returncode != 0:
        said = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise NoBoundary(f"bubblewrap cannot isolate here ({said}). {_advice(said)}")
    _judge(json.loads(seen))
    return version[0]


def _empty() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="effattn-")


def _judge(seen: dict[str, Any]) -> None:
    wrong = []
    if seen["uid"] != 65534 or seen["capabilities"]:
        wrong.append("it keeps privileges")
    if not seen["filter"]:
        wrong.append("it has no filter of system calls")
    if seen["processes"] > 3:
        wrong.append("it sees other processes")
    if seen["network"]:
        wrong.append(f"it sees the network ({', '.join(seen['network'])})")
    if seen["writes"]:
        wrong.append(f"it can write to {', '.join(seen['writes'])}")
    if seen["reads"]:
        wrong.append("it reads files of this machine")
    if wrong:
        raise NoBoundary(f"the sandbox is not one: {'; '.join(wrong)}. Nothing is graded")


def _advice(said: str) -> str:
    if "user namespace" in said or "uid map" in said or "Operation not permitted" in said or "clone" in said:
        return (
            "User namespaces are restricted: on Ubuntu 24.04 by AppArmor (install the package apparmor-profiles and "
            "load its bwrap profile, or set kernel.apparmor_restrict_unprivileged_userns=0), in a container by "
            "seccomp (start it with --security-opt seccomp=unconfined, or grade on the host)"
        )
    return "Run `bwrap --unshare-all --ro-bind / / true` to see what this machine refuses"
