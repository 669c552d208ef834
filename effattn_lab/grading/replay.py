"""Replay a submitted notebook with nbval inside a sandbox, and report the cells that don't run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from effattn_lab.grading.model import Replay
from effattn_lab.grading.notebook import NotebookError, read_cells
from effattn_lab.grading.sandbox import MB, Limits, Stopped, python, run_once

#: A solved lab needs half a minute; a model of 135 million parameters in float32 has half a gigabyte.
LIMITS = Limits(data=6144 * MB, address=64 * 1024 * MB, cpu=600, files=1024, processes=128, tree=8192 * MB,
                file=512 * MB, scratch=512 * MB)  # fmt: skip
CELL_SECONDS = 60
SECONDS = 240.0
_CACHE = "/lab/cache"


def model_cache() -> Path | None:
    """Folder of the converted language model, if this machine has one."""
    try:
        from effattn_lab.models.smollm2 import cache_folder

        folder = cache_folder()
    except Exception:
        return None
    return folder if folder.is_dir() else None


def replay(lab: str, notebook: bytes, site: Path) -> Replay:
    """Run every cell of a notebook in a sandbox of its own, with the whole package inside.

    Args:
        lab: part/slug.
        notebook: its bytes.
        site: made by `build.full_site`.
    """
    cache = model_cache()
    binds = {str(cache): f"{_CACHE}/{cache.name}"} if cache else {}
    note = (
        ""
        if cache
        else "the language model is not converted on this machine, so that cells which load it fail"
    )
    try:
        said = run_once(
            python("-m", "effattn_lab.grading.inside.replay", str(CELL_SECONDS)),
            site,
            LIMITS,
            given=notebook,
            seconds=SECONDS,
            most=256 * 1024,
            binds=binds,
            environment={"EFFATTN_CACHE": _CACHE, "IPYTHONDIR": "/tmp/ipython"},
        )
    except Stopped as reason:
        return Replay(lab, 0, (), f"the notebook was ended: {reason}")
    try:
        answer = json.loads(said)
        failed = tuple((_number(notebook, int(n)), _plain(text)) for n, text in answer["failed"][:100])
        problem = _plain(answer["problem"])
        return Replay(lab, int(answer["ran"]), failed, problem or note)
    except (ValueError, TypeError, KeyError, RecursionError):
        return Replay(lab, 0, (), "the notebook ended the program that replayed it")


def _number(notebook: bytes, code_cell: int) -> int:
    """nbval counts code cells alone; people are told a cell's place among all cells, as everywhere else."""
    try:
        cells = read_cells(notebook)
    except NotebookError:
        return code_cell
    return cells[code_cell - 1].number if 0 < code_cell <= len(cells) else code_cell


def _plain(text: object) -> str:
    return re.sub(r"[^\x20-\x7e\u00a1-\uffff]", " ", str(text))[:200]
