"""What a learner's source text tells: which blanks are still empty, whether anything is returned."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Blank:
    """An empty blank: its function, its line in that function (from 1) and the comment above it."""

    function: str
    line: int
    below: str

    def __str__(self) -> str:
        place = f"line {self.line} of {self.function}"
        return f"{place}, below “{self.below}”" if self.below else place


def kernels_of(fn: Callable[..., Any]) -> list[Any]:
    """The ``@triton.jit`` functions that ``fn`` names: what its launcher launches."""
    names = getattr(getattr(fn, "__code__", None), "co_names", ())
    found = [getattr(fn, "__globals__", {}).get(name) for name in names]
    return [x for x in found if inspect.isfunction(getattr(x, "fn", None))]


def blanks(fn: Callable[..., Any]) -> list[Blank]:
    """The blanks of ``fn`` and of its kernels that nobody has filled.

    ``x = ...`` and ``return ...`` are blanks; a bare ``...`` is one unless code was written around it.
    (``x[..., None]`` is no blank.)
    """
    return [blank for part in [fn, *(k.fn for k in kernels_of(fn))] for blank in _blanks(part)]


def returns(fn: Callable[..., Any]) -> bool:
    """Does the source hold a ``return`` with a value? True also where there is no source to read."""
    tree = _parse(fn)[0]
    if tree is None:
        return True
    return any(
        isinstance(node, ast.Lambda) or (isinstance(node, ast.Return) and node.value is not None)
        for node in ast.walk(tree)
    )


def text_of(fn: Callable[..., Any]) -> str:
    """The source of ``fn`` and of its kernels; empty where there is none."""
    return "\n".join("\n".join(_parse(part)[1]) for part in [fn, *(k.fn for k in kernels_of(fn))])


def _parse(fn: Callable[..., Any]) -> tuple[ast.Module | None, list[str]]:
    try:
        text = textwrap.dedent("".join(inspect.getsourcelines(fn)[0]))
        return ast.parse(text), text.splitlines()
    except (OSError, TypeError, SyntaxError):
        return None, []


def _blanks(fn: Callable[..., Any]) -> list[Blank]:
    tree, lines = _parse(fn)
    if tree is None:
        return []
    found = []
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                found += [s.lineno for n, s in enumerate(block) if _empty(block, n, lines)]
    return [Blank(getattr(fn, "__name__", "the function"), n, _above(lines, n)) for n in sorted(found)]


def _empty(block: list[ast.stmt], number: int, lines: list[str]) -> bool:
    statement = block[number]
    if isinstance(statement, ast.Pass):
        filled = "your code" not in lines[statement.lineno - 1]
    elif isinstance(statement, ast.Expr | ast.Assign | ast.Return):
        filled = not (isinstance(statement.value, ast.Constant) and statement.value.value is Ellipsis)
        if not filled and not isinstance(statement, ast.Expr):
            return True
    else:
        return False
    # A bare `...` that was left behind stands next to code; an empty one next to a comment, or alone.
    neighbours = [
        (block[number - 1].end_lineno or 0, statement.lineno - 1)
        if number and not _docstring(block, number - 1)
        else None,
        (statement.lineno, block[number + 1].lineno - 1) if number + 1 < len(block) else None,
    ]
    return not filled and all(
        any(line.strip().startswith("#") for line in lines[gap[0] : gap[1]]) for gap in neighbours if gap
    )


def _docstring(block: list[ast.stmt], number: int) -> bool:
    first = block[number]
    return (
        number == 0 and isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    )


def _above(lines: list[str], number: int) -> str:
    line = lines[number - 2].strip() if number >= 2 else ""
    return line.lstrip("# ") if line.startswith("#") else ""
