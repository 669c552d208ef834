"""Every solved lab runs again from top to bottom; its deterministic cells print what they printed before.

In a process of its own: nbval's cells of one notebook share a kernel and must stay together and in order.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOLVED = sorted((ROOT / "labs" / "solved").glob("*/*.ipynb"))


def test_there_are_labs():
    assert SOLVED


@pytest.mark.slow
@pytest.mark.parametrize("notebook", SOLVED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_solved_lab_replays(notebook):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--nbval-lax",
    ]
    command += ["--nbval-cell-timeout=120", "--nbval-current-env", str(notebook)]
    start = time.monotonic()
    # As it was generated: without a GPU, so that kernels run in the interpreter and traffic is counted.
    environment = {**os.environ, "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    # The bar is 90 s on two free cores; here the other core runs other tests.
    assert time.monotonic() - start < 180
