"""Where the grader is root, the kernel itself stops a fork bomb: a control group around each sandbox."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from effattn_lab.grading import cgroup
from effattn_lab.grading.build import build_site
from effattn_lab.grading.sandbox import CROWD, Limits, Stopped, python, run_once
from effattn_lab.grading.watch import Watch, descendants

BOMB = """
import os
while True:
    try: os.fork()
    except BlockingIOError: pass
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("site") / "site", ())


@pytest.fixture
def group():
    made = cgroup.make(24)
    if made is None:
        pytest.skip("this user cannot make control groups")
    yield made
    made.remove()


def test_the_kernel_refuses_the_process_after_the_last(group):
    forks = (
        "import os, sys, time\n"
        "for n in range(200):\n"
        "    try:\n"
        "        if os.fork() == 0: time.sleep(30); os._exit(0)\n"
        "    except BlockingIOError: break\n"
        "print(n)\n"
        "sys.stdout.flush(); os.killpg(0, 9)\n"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", 'echo 0 >"$0"; exec "$@"', group.tasks, "python3", "-c", forks],
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert 20 <= int(done.stdout) <= 23, done
    group.remove()
    assert not group.path.exists()


def test_a_bomb_that_nobody_watches_stays_small(group, site, monkeypatch):
    """What saves the machine when the watch comes too late: here it never comes."""
    held = []

    class Blind(Watch):
        def _look(self):
            while not self._done.wait(0.05):
                held.append(sum(1 for _ in descendants(self._pid)))

    monkeypatch.setattr("effattn_lab.grading.sandbox.Watch", Blind)
    with pytest.raises(Stopped, match="no end within"):
        run_once(python("-c", BOMB), site, Limits(processes=8), seconds=3.0)
    assert 8 < max(held) < CROWD * 8
    assert [p for p in group.path.parent.glob(f"effattn-{os.getpid()}-*") if p != group.path] == []


def test_where_groups_are_looked_for(tmp_path):
    (tmp_path / "mounts").write_text(
        "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
        "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
        "cgroup /sys/fs/cgroup/pids cgroup rw,nosuid,pids 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    )
    (tmp_path / "cgroup").write_text("8:pids:/jobs/7\n4:memory:/x\n0::/user.slice\n")
    assert list(cgroup.places(tmp_path)) == [
        Path("/sys/fs/cgroup/pids/jobs/7"),
        Path("/sys/fs/cgroup/pids/jobs"),
        Path("/sys/fs/cgroup/unified/user.slice"),
        Path("/sys/fs/cgroup/unified"),
    ]
    assert list(cgroup.places(tmp_path / "nowhere")) == []


def test_an_ordinary_user_needs_none(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cgroup.make(8) is None


def test_a_machine_without_writable_groups_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cgroup, "places", lambda: [tmp_path / "absent", Path("/proc/self/none")])
    assert cgroup.make(8) is None
