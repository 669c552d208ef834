"""What the source of a lab says about grading: its exercises, and the role of each code cell."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from effattn_lab.grading.model import GivenCell, Item, LabPlan, source_digest


@dataclass(frozen=True)
class Book:
    """What a lab's source says: its title, its exercises in order (1 point each), its code cells."""

    title: str
    items: tuple[Item, ...]
    cells: tuple[GivenCell, ...]


def read_lab(lab: str) -> Book:
    """Read a lab's source. ValueError where a self-check names no exercise, or one exercise has two functions."""
    from effattn_lab import notebooks
    from effattn_lab.exercises import get

    source = notebooks.parse(lab)
    items: dict[str, Item] = {}
    cells = []
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        blank = notebooks.BEGIN in cell.source
        text = notebooks.blanked(cell.source)
        checked = _checks(text)
        role: Literal["check", "blank", "define", "show"] = "define" if _defines(text) else "show"
        if blank:
            role = "blank"
        elif checked:
            role = "check"
        for exercise, function in checked:
            get(exercise)  # an id that is no exercise is refused
            if items.setdefault(exercise, Item(exercise, function, 1.0)).function != function:
                raise ValueError(f"{lab}: {exercise} is checked with two functions")
        cells.append(GivenCell(cell.id, source_digest(text), role, checked[0][0] if checked else None))
    title = source.cells[0].source.splitlines()[0].lstrip("# ").strip()
    return Book(title, tuple(items.values()), tuple(cells))


def _checks(source: str) -> list[tuple[str, str]]:
    """(exercise, function) of each ``check("part/slug/name", function)`` at the top level of our own source."""
    found = []
    for statement in ast.parse(source).body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "check":
            continue
        exercise, function = (*call.args, None, None)[:2]
        if isinstance(exercise, ast.Constant) and isinstance(function, ast.Name):
            found.append((str(exercise.value), function.id))
    return found


def _defines(source: str) -> bool:
    """Nothing but imports, functions, classes, and names for literals?"""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        try:
            if not isinstance(statement, ast.Assign):
                return False
            ast.literal_eval(statement.value)
        except ValueError:
            return False
    return True


def plan_of(lab: str, book: Book, chosen: Sequence[str], points: dict[str, float]) -> LabPlan:
    """The plan of a lab among the ``chosen`` ones; its notebook's hash is still empty."""
    part, slug = lab.split("/")
    alone = sum(other.split("/")[1] == slug for other in chosen) == 1
    worth = [replace(item, points=points.get(item.id, item.points)) for item in book.items]
    file = f"{slug if alone else f'{part}-{slug}'}.ipynb"
    return LabPlan(lab, file, "", tuple(item for item in worth if item.points), book.cells)
