"""Read the code cells of a notebook that nobody vouches for.

The bytes are decoded as JSON and looked at, never run and never parsed as Python: on this side of the boundary a
student's text is hashed and matched by regular expressions that take linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effattn_lab.grading.model import GivenCell, LabPlan, source_digest

#: A solved lab with its outputs has half a megabyte.
MAX_BYTES = 20_000_000
MAX_CELLS = 2_000
MAX_SOURCE = 2_000_000  # characters of code in one notebook
MAX_DEPTH = 100  # outputs of plotting libraries nest about 20 deep
MAX_VALUES = 3_000_000

_SURROGATE = re.compile("[\ud800-\udfff]")
#: A line of a cell that does nothing but check, or ask for help.
_CHECKING = re.compile(r"(?:check|hint|solution)\([^\n]*\)[ \t;]*")


class NotebookError(ValueError):
    """The notebook cannot be read; the message is one sentence that may be shown to its author."""


@dataclass(frozen=True)
class Cell:
    """A code cell.

    Args:
        index: its place among all cells of the notebook, from 0. People are told it from 1, see `number`.
        id: its id; empty where there is none.
        source: its text.
    """

    index: int
    id: str
    source: str

    @property
    def number(self) -> int:
        """Its place among all cells, text included, counted from 1."""
        return self.index + 1


def read_cells(data: bytes) -> list[Cell]:
    """The code cells of a notebook, in order. `NotebookError` where it is none, or is too large."""
    found: list[Cell] = []
    length = 0
    for index, cell in enumerate(_cells(_load(data))):
        if not isinstance(cell, dict):
            raise NotebookError(f"cell {index + 1}: expected an object, got {_kind(cell)}")
        if cell.get("cell_type") != "code":
            continue
        source = _source(cell.get("source"), index)
        length += len(source)
        if length > MAX_SOURCE:
            raise NotebookError(f"the notebook holds more than {MAX_SOURCE} characters of code")
        found.append(Cell(index, _id(cell), source))
    return found


def lab_of(data: bytes) -> str | None:
    """``part/slug`` as `effattn release` wrote it into the notebook's metadata; None where it is not there."""
    metadata = _load(data).get("metadata")
    ours = metadata.get("effattn") if isinstance(metadata, dict) else None
    lab = ours.get("lab") if isinstance(ours, dict) else None
    return lab if isinstance(lab, str) else None


def changed_checks(cells: Sequence[Cell], plan: LabPlan) -> tuple[str, ...]:
    """Self-check cells that were edited or deleted, one phrase each.

    A cell is unchanged where its text is found, whatever its id: some tools write new ids.
    """
    texts = {source_digest(cell.source) for cell in cells}
    by_id = {cell.id: cell for cell in reversed(cells) if cell.id}
    changed = []
    for given in plan.cells:
        if given.role != "check" or given.digest in texts:
            continue
        cell = by_id.get(given.id)
        what = f"edited (cell {cell.number})" if cell else "deleted or rewritten"
        changed.append(f"the self-check of {given.exercise} was {what}")
    return tuple(changed)


def cells_to_run(cells: Sequence[Cell], plan: LabPlan) -> list[tuple[int, str]]:
    """(number, source) of the cells that make the student's functions, in order.

    These are the released cells that define something or hold a blank, and every cell that the student wrote or
    changed. Self-checks, changed or not, and the untouched cells that only show something are left out: they take
    minutes and decide nothing.
    """
    by_digest: dict[str, GivenCell] = {given.digest: given for given in plan.cells}
    by_id = {given.id: given for given in plan.cells}
    chosen = []
    for cell in cells:
        given = by_digest.get(source_digest(cell.source))
        if given is not None:
            run = given.role in ("define", "blank")
        else:
            origin = by_id.get(cell.id)
            edited_check = origin is not None and origin.role == "check"
            run = bool(cell.source.strip()) and not edited_check and not _only_checks(cell.source)
        if run:
            chosen.append((cell.number, cell.source))
    return chosen


def _only_checks(source: str) -> bool:
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return all(_CHECKING.fullmatch(line) for line in lines)


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise NotebookError(f"the notebook has {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        # NaN is no JSON, but widely written; it can stand only where nothing is read.
        notebook = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None)
    except UnicodeDecodeError:
        raise NotebookError("the notebook is not UTF-8 text") from None
    except RecursionError:
        raise NotebookError(f"the notebook is nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise NotebookError(f"the notebook is not JSON: {error.msg} in line {error.lineno}") from None
    except (ValueError, MemoryError):  # an integer of thousands of digits
        raise NotebookError("the notebook holds a number that is too long") from None
    if not isinstance(notebook, dict):
        raise NotebookError(f"the notebook should be a JSON object, not {_kind(notebook)}")
    _shallow(notebook)
    return notebook


def _shallow(notebook: dict[str, Any]) -> None:
    """Refuse what is nested too deep: a limit of our own, for the interpreter's depends on who calls."""
    level: list[Any] = [notebook]
    seen = 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            below.extend(value.values() if isinstance(value, dict) else value)
        seen += len(below)
        if seen > MAX_VALUES:
            raise NotebookError(f"the notebook holds more than {MAX_VALUES} values")
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise NotebookError(f"the notebook is nested more than {MAX_DEPTH} deep")


def _cells(notebook: dict[str, Any]) -> list[Any]:
    major = notebook.get("nbformat")
    if major != 4 or isinstance(major, bool):
        said = major if isinstance(major, int) and abs(major) < 1000 else _kind(major)
        raise NotebookError(f"nbformat: expected 4, got {said}; open and save it in a current Jupyter")
    cells = notebook.get("cells")
    if not isinstance(cells, list):
        raise NotebookError(f"cells: expected a list, got {_kind(cells)}")
    if len(cells) > MAX_CELLS:
        raise NotebookError(f"the notebook has {len(cells)} cells; at most {MAX_CELLS} are read")
    return cells


def _source(source: Any, index: int) -> str:
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        raise NotebookError(f"cell {index + 1}: expected its source to be text, got {_kind(source)}")
    # A lone surrogate can be neither hashed nor written as UTF-8.
    return _SURROGATE.sub("\ufffd", source.replace("\r\n", "\n").replace("\r", "\n"))


def _id(cell: dict[str, Any]) -> str:
    metadata = cell.get("metadata")
    for owner in (cell, metadata if isinstance(metadata, dict) else {}):  # Colab keeps it in the metadata
        value = owner.get("id")
        if isinstance(value, str) and 0 < len(value) <= 64:
            return _SURROGATE.sub("\ufffd", value)
    return ""


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
