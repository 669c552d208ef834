"""Run the cells of a student's notebook that define things, one after another, in one namespace."""

from __future__ import annotations

import ast
import dis
import linecache
from dataclasses import dataclass
from types import CodeType
from typing import Any


@dataclass(frozen=True)
class CellError:
    """A cell that stopped with an exception: its number in the notebook, and the message."""

    cell: int
    message: str


def run_cells(cells: list[tuple[int, str]], wanted: str) -> tuple[dict[str, Any], list[CellError]]:
    """Execute what ``wanted`` needs, in the notebook's order; an error ends its cell, not the others.

    Of each cell only those statements run that bind ``wanted`` or a name that it uses, directly or by way of others.
    So an experiment beside the function costs nothing, and cannot fail it.

    Returns:
        the namespace, and the cells that raised.
    """
    names: dict[str, Any] = {
        "__name__": "__main__",
        "__builtins__": __builtins__,
        "display": lambda *a, **k: None,
        "get_ipython": lambda: None,
    }
    statements, errors = _statements(cells)
    for chosen in _needed(statements, wanted):
        try:
            exec(chosen.code, names)
        except BaseException as error:
            errors.append(CellError(chosen.cell, told(error)))
    return names, errors


@dataclass(frozen=True)
class _Statement:
    cell: int
    code: CodeType
    binds: frozenset[str]
    uses: frozenset[str]


def _statements(cells: list[tuple[int, str]]) -> tuple[list[_Statement], list[CellError]]:
    found: list[_Statement] = []
    errors: list[CellError] = []
    for number, source in cells:
        text = python_of(source)
        file = f"<cell {number}>"
        # inspect.getsource, which Triton calls, finds the text here.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        try:
            for node in ast.parse(text, file).body:
                code = compile(ast.Module([node], []), file, "exec")
                binds, uses = _names(code)
                found.append(_Statement(number, code, frozenset(binds | _changed(node)), frozenset(uses)))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            errors.append(CellError(number, told(error)))
    return found, errors


def _names(code: CodeType, top: bool = True) -> tuple[set[str], set[str]]:
    """Global names that code binds and uses, as the compiler sees them: local variables are not among them."""
    binds: set[str] = set()
    uses: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_GLOBAL" or (top and step.opname == "STORE_NAME"):
            binds.add(step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            uses.add(step.argval)
        elif step.opname in ("IMPORT_STAR", "CALL_INTRINSIC_1") and step.argrepr in (
            "",
            "INTRINSIC_IMPORT_STAR",
        ):
            binds.add("*")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant, top=False)
            binds |= inner[0]
            uses |= inner[1]
    return binds, uses


def _changed(node: ast.stmt) -> set[str]:
    """Names whose object an assignment to an entry or an attribute changes: ``table["x"] = 1``."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    found = set()
    for target in targets:
        while isinstance(target, ast.Subscript | ast.Attribute):
            target = target.value
            if isinstance(target, ast.Name):
                found.add(target.id)
    return found


def _needed(statements: list[_Statement], wanted: str) -> list[_Statement]:
    names, chosen = {wanted, "*"}, set[int]()
    while True:
        new = [n for n, s in enumerate(statements) if n not in chosen and s.binds & names]
        if not new:
            return [statements[n] for n in sorted(chosen)]
        chosen.update(new)
        names.update(*(statements[n].uses for n in new))


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
