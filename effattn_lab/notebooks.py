"""Make the notebooks of a lab from its one source, ``labs/src/<part>/<slug>.py`` (jupytext percent format).

* ``labs/<part>/<slug>.ipynb``: the student notebook, no outputs, solutions replaced by blanks. Colab opens it.
* ``labs/solved/<part>/<slug>.ipynb``: the solved notebook, executed, outputs kept. The book shows it.

A solution stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION``. The student sees ``...`` instead, or the
lines that follow ``### STUB`` inside the block, which are written behind ``#|`` in the source. Code cells must
run with the blanks left empty. ``python -m effattn_lab.notebooks [--check] [full/flash ...]``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

BEGIN, STUB, END = "### BEGIN SOLUTION", "### STUB", "### END SOLUTION"
BLANK = "...  # your code"
MAX_BYTES = 500_000
TIMEOUT_S = 120
#: The past runtime that Colab keeps available with the oldest versions that the package supports. An unknown key in
#: this metadata is ignored, and the bootstrap cell checks the versions in any case.
COLAB_RUNTIME = "2026.01"


def root() -> Path:
    """Folder of the checkout. RuntimeError when the package is installed without its labs."""
    for folder in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (folder / "labs" / "src").is_dir():
            return folder
    raise RuntimeError("labs/src was not found: run this in a checkout of the repository")


def labs() -> list[str]:
    """``part/slug`` of every lab source."""
    source = root() / "labs" / "src"
    return sorted(str(p.relative_to(source).with_suffix("")) for p in source.glob("*/*.py"))


def repository_url() -> str:
    """The address of the repository, from ``_config.yml``."""
    import yaml

    config = yaml.safe_load((root() / "_config.yml").read_text(encoding="utf-8"))
    return str(config["repository"]["url"]).rstrip("/")


# ---- from source to cells ----------------------------------------------------------------------------------


def parse(lab: str) -> Any:
    """The lab as a notebook with its solutions and markers, deterministic cell ids, no outputs."""
    import jupytext
    import nbformat

    path = root() / "labs" / "src" / f"{lab}.py"
    if not path.is_file():
        raise ValueError(f"lab: expected one of {', '.join(labs())}, got {lab!r}")
    text = path.read_text(encoding="utf-8").replace("@REPOSITORY@", repository_url())
    cells = jupytext.reads(text, fmt="py:percent").cells
    notebook = nbformat.v4.new_notebook(cells=[_plain(cell) for cell in cells])
    seen: set[str] = set()
    for cell in notebook.cells:
        _balanced(cell.source, path)
        digest = hashlib.sha256(cell.source.encode())
        while digest.hexdigest()[:8] in seen:  # the same text twice
            digest.update(b"+")
        cell.id = digest.hexdigest()[:8]
        seen.add(cell.id)
    return notebook


def _plain(cell: Any) -> Any:
    import nbformat

    metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "mystnb")}
    make = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
    return make(cell.source, metadata=metadata)


def _balanced(source: str, path: Path) -> None:
    found = [line.strip() for line in source.splitlines() if line.strip() in (BEGIN, STUB, END)]
    joined = " ".join(found).replace(f"{BEGIN} {STUB} {END}", "").replace(f"{BEGIN} {END}", "").strip()
    if joined:
        raise ValueError(
            f"{path.name}: solution markers do not match in the cell that begins {source[:60]!r}"
        )


def blanked(source: str) -> str:
    """Source of a cell as the student gets it."""
    out: list[str] = []
    inside = stubbed = False
    for line in source.splitlines():
        text = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if text == BEGIN:
            inside, stubbed = True, False
        elif text == STUB:
            stubbed = True
        elif text == END:
            if not stubbed:
                out.append(indent + BLANK)
            inside = False
        elif not inside:
            out.append(line)
        elif stubbed:
            out.append(re.sub(r"^(\s*)#\| ?", r"\1", line).rstrip())
    return "\n".join(out)


def solved(source: str) -> str:
    """Source of a cell with its solution, markers taken out."""
    out: list[str] = []
    stub = False
    for line in source.splitlines():
        text = line.strip()
        if text in (BEGIN, STUB, END):
            stub = text == STUB
        elif not stub:
            out.append(line)
    return "\n".join(out)


def _metadata() -> dict[str, Any]:
    return {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }


def student_notebook(lab: str) -> Any:
    """The notebook with blanks; a GPU is asked for but not needed."""
    notebook = parse(lab)
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.source = blanked(cell.source)
    notebook.metadata.update(_metadata())
    notebook.metadata.accelerator = "GPU"
    notebook.metadata.colab = {
        "gpuType": "T4",
        "provenance": [],
        "runtime_attributes": {"runtime_version": COLAB_RUNTIME},
        "toc_visible": True,
    }
    return notebook


def solved_notebook(lab: str) -> Any:
    """The notebook with solutions, not executed. For the book: a label at its top, solutions folded."""
    notebook = parse(lab)
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        raise ValueError(f"{lab}: expected the first cell to be Markdown with the title")
    first.source = f"(lab-{lab.replace('/', '-')})=\n{first.source}"
    for cell in notebook.cells:
        if cell.cell_type == "code" and BEGIN in cell.source:
            cell.source = solved(cell.source)
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input", "solution"]
            prompts = {"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
            cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), **prompts}
    notebook.metadata.update(_metadata())
    return notebook


# ---- execution ---------------------------------------------------------------------------------------------


def execute(notebook: Any, *, timeout: int = TIMEOUT_S, allow_errors: bool = False) -> Any:
    """Run a notebook in a fresh kernel and an empty folder, and clean its outputs.

    ``EFFATTN_STATIC`` is set, which makes widgets show their static picture.
    """
    from nbclient import NotebookClient

    notebook = copy.deepcopy(notebook)
    # No GPU even where there is one: the stored outputs must not depend on who ran `make labs`.
    environment = {**os.environ, "EFFATTN_STATIC": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            allow_errors=allow_errors,
            resources={"metadata": {"path": folder}},
        )
        metadata = copy.deepcopy(notebook.metadata)
        client.execute(env=environment)
    notebook.metadata = metadata  # the kernel writes its own versions there
    clean(notebook)
    return notebook


def clean(notebook: Any) -> None:
    """Take out of the outputs what differs from run to run: times, counters, widget ids, progress on stderr."""
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        count += 1
        cell.execution_count = count
        kept: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    print(output.text, end="", file=sys.stderr)
                elif kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                else:
                    kept.append(output)
                continue
            if "data" in output:
                if "application/vnd.jupyter.widget-view+json" in output.data:
                    continue  # a progress bar; it has a random id, and nothing to show without a kernel
                output.metadata = {}
            if output.output_type == "execute_result":
                output.execution_count = count
            kept.append(output)
        cell.outputs = kept


def _text(notebook: Any) -> str:
    import nbformat

    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def paths(lab: str) -> tuple[Path, Path]:
    """(student notebook, solved notebook) of a lab."""
    return root() / "labs" / f"{lab}.ipynb", root() / "labs" / "solved" / f"{lab}.ipynb"


def write(lab: str) -> None:
    """Write both notebooks of a lab; the solved one is executed. RuntimeError when it is too large."""
    student, done = paths(lab)
    for path in (student, done):
        path.parent.mkdir(parents=True, exist_ok=True)
    student.write_text(_text(student_notebook(lab)), encoding="utf-8")
    print(f"{student.relative_to(root())}: written; executing the solved notebook ...", flush=True)
    text = _text(execute(solved_notebook(lab)))
    if len(text.encode()) > MAX_BYTES:
        raise RuntimeError(f"{done.name}: expected at most {MAX_BYTES} bytes, got {len(text.encode())}")
    done.write_text(text, encoding="utf-8")
    print(f"{done.relative_to(root())}: {len(text.encode()) // 1000} kB", flush=True)


def differences(lab: str) -> list[str]:
    """What is out of step between the source and the committed notebooks; empty when nothing is."""
    import nbformat

    student, done = paths(lab)
    wrong = [f"{p.relative_to(root())} is missing" for p in (student, done) if not p.is_file()]
    if wrong:
        return wrong
    if student.read_text(encoding="utf-8") != _text(student_notebook(lab)):
        wrong.append(f"{student.relative_to(root())} is not what its source gives")
    stored = nbformat.read(done, as_version=4)
    bare = copy.deepcopy(stored)
    for cell in bare.cells:
        if cell.cell_type == "code":
            if cell.execution_count is None:
                wrong.append(f"{done.relative_to(root())}: cell {cell.id} was not executed")
            cell.execution_count, cell.outputs = None, []
    if _text(bare) != _text(solved_notebook(lab)):
        wrong.append(f"{done.relative_to(root())} is not what its source gives")
    if done.stat().st_size > MAX_BYTES:
        wrong.append(f"{done.relative_to(root())} has {done.stat().st_size} bytes, more than {MAX_BYTES}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effattn_lab.notebooks", description="Make the notebooks of the labs from labs/src."
    )
    parser.add_argument("labs", nargs="*", metavar="LAB", help="part/slug; all labs by default")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a notebook is out of step"
    )
    options = parser.parse_args(arguments)
    chosen = [re.sub(r"^labs/src/|\.py$", "", lab) for lab in options.labs] or labs()
    status = 0
    for lab in chosen:
        if not options.check:
            write(lab)
            continue
        for line in differences(lab):
            print(f"{line}; run `make labs`")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
