"""The wheel by itself, away from the checkout: what Colab gets.

The fresh environment borrows the third-party packages of this one (two gigabytes need no second copy) but not this
project: the checkout's own ``.pth`` is not read from a borrowed folder, so ``effattn_lab`` comes from the wheel.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

RUN_NOTEBOOK = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
if sys.argv[2] == "bootstrap":
    code = [c for c in notebook.cells if c.cell_type == "code"]
    notebook.cells = code[:1]
nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text", ""), end="")
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Python of an environment that has the wheel and not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "dist", ROOT], check=True
    )
    (wheel,) = (folder / "dist").glob("effattn_lab-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", purelib, wheel], check=True
    )
    return python, folder


def call(fresh, *arguments):
    python, folder = fresh
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**environment, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-5000:]
    return run.stdout


def test_comes_from_the_wheel(fresh):
    out = call(
        fresh,
        "-c",
        "import effattn_lab, effattn_kernels; print(effattn_lab.__file__, effattn_kernels.__file__)",
    )
    assert str(ROOT) not in out
    assert out.count(str(fresh[1])) == 2


def test_carries_the_questions(fresh):
    script = (
        "from effattn_lab.interview import load; import json; print(json.dumps(sorted(q.id for q in load())))"
    )
    ids = json.loads(call(fresh, "-c", script))
    assert len(ids) >= 12


@pytest.mark.parametrize("notebook", sorted((ROOT / "labs").glob("[!s]*/*.ipynb")), ids=lambda p: p.stem)
def test_student_notebook_starts(fresh, notebook):
    copy = fresh[1] / f"student-{notebook.name}"
    copy.write_bytes(notebook.read_bytes())
    out = call(fresh, "-c", RUN_NOTEBOOK, copy, "bootstrap")
    assert "torch" in out


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "labs" / "solved").glob("*/*.ipynb")), ids=lambda p: p.stem
)
def test_solved_lab_runs(fresh, notebook):
    copy = fresh[1] / f"solved-{notebook.name}"
    copy.write_bytes(notebook.read_bytes())
    call(fresh, "-c", RUN_NOTEBOOK, copy, "all")
