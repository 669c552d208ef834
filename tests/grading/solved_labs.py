"""Every lab as the grader sees it when it is solved, and the mistakes that show only in the text of a kernel."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effattn_lab import notebooks
from effattn_lab.grading.model import Item
from effattn_lab.grading.release_plan import read_lab

TESTS = Path(__file__).resolve().parents[1]
#: (old, new) pairs that turn the solved cell into the wrong one.
Edits = tuple[tuple[str, str], ...]


@functools.cache
def cells(lab: str) -> tuple[tuple[int, str], ...]:
    """(number, source) of the cells that a grader runs, blanks filled in."""
    needed = {given.id for given in read_lab(lab).cells if given.role in ("define", "blank")}
    found = enumerate(c for c in notebooks.solved_notebook(lab).cells if c.cell_type == "code")
    return tuple((number, cell.source) for number, cell in found if cell.id in needed)


@functools.cache
def items(lab: str) -> dict[str, Item]:
    """The exercises of a lab by id."""
    return {item.id: item for item in read_lab(lab).items}


@functools.cache
def by_text(lab: str) -> Mapping[str, Mapping[str, Edits]]:
    """exercise → mutant → edits, for mutants that compute the right numbers by a wrong kernel, or by none.

    They stand as ``BY_TEXT`` in ``tests/<part>/<slug>_by_text.py``; a lab without such mutants has no such file.
    """
    part, slug = lab.split("/")
    path = TESTS / part / f"{slug}_by_text.py"
    if not path.is_file():
        return {}
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {f"{lab}/{name}": table for name, table in module.BY_TEXT.items()}


def edited(lab: str, edits: Edits) -> list[tuple[int, str]]:
    """The solved cells with a mistake; every edit must apply to exactly one of them."""
    found = dict(cells(lab))
    for old, new in edits:
        (number,) = [n for n, source in found.items() if old in source]
        found[number] = found[number].replace(old, new)
    return list(found.items())
