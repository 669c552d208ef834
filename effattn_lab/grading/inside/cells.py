"""Run the cells of a student's notebook that define things, one after another, in one namespace."""

from __future__ import annotations

import ast
import linecache
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CellError:
    """A cell that stopped with an exception: its number in the notebook, and the message."""

    cell: int
    message: str


def run_cells(cells: list[tuple[int, str]]) -> tuple[dict[str, Any], list[CellError]]:
    """Execute cells as a notebook would; an error ends its cell, not the others.

    Returns:
        the namespace, and the cells that raised.
    """
    names: dict[str, Any] = {
        "__name__": "__main__",
        "__builtins__": __builtins__,
        "display": lambda *a, **k: None,
        "get_ipython": lambda: None,
    }
    errors = []
    for number, source in cells:
        text = python_of(source)
        file = f"<cell {number}>"
        # inspect.getsource, which Triton calls, finds the text here.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        try:
            exec(compile(text, file, "exec"), names)
        except BaseException as error:
            errors.append(CellError(number, told(error)))
    return names, errors


def python_of(source: str) -> str:
    """A cell without what only IPython understands: ``%magic``, ``!command`` and ``help?`` lines."""
    lines = source.splitlines()
    if lines and lines[0].lstrip().startswith("%%"):
        lines[0] = ""
        if source.lstrip().split(maxsplit=1)[0] not in ("%%time", "%%timeit", "%%capture"):
            lines = []
    for n, line in enumerate(lines):
        text = line.strip()
        if text.startswith(("%", "!")) or (text.endswith("?") and not text.startswith("#")):
            lines[n] = line[: len(line) - len(line.lstrip())] + "pass"
    return "\n".join(lines) + "\n"


def told(error: BaseException, limit: int = 300) -> str:
    """An exception in one line. Its own ``__str__`` is the student's code and may do anything."""
    try:
        text = f"{type(error).__name__}: {error}"
        return str((text.splitlines() or [""])[0])[:limit]
    except BaseException:
        return "an exception whose message cannot be read"


def parse(source: str) -> ast.Module | None:
    """Syntax tree of a cell, None where it has none."""
    try:
        return ast.parse(python_of(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
