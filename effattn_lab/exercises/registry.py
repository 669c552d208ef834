"""Find exercises by id: ``part/slug/name`` is in the list ``EXERCISES`` of ``exercises/<part>/<slug>.py``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from effattn_lab.exercises.core import Exercise, UsageError


def _load(part: str, slug: str) -> dict[str, Exercise]:
    module = importlib.import_module(f"effattn_lab.exercises.{part}.{slug}")
    return {exercise.id: exercise for exercise in module.EXERCISES}


def get(exercise_id: str) -> Exercise:
    """The exercise with this id; a `UsageError` (a ValueError) says which ids are there when it is not."""
    part, slug, name = [*str(exercise_id).split("/"), "", "", ""][:3]
    known: dict[str, Exercise] = {}
    if part.isidentifier() and slug.isidentifier() and name:
        try:
            known = _load(part, slug)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(f"effattn_lab.exercises.{part}"):
                raise
    if exercise_id not in known:
        ids = ", ".join(known or {e.id: e for e in all_exercises()})
        raise UsageError(f"id: expected an exercise ({ids}), got {exercise_id!r}")
    return known[exercise_id]


def all_exercises() -> list[Exercise]:
    """Every exercise, in the order of parts, slugs and their steps."""
    found: list[Exercise] = []
    root = Path(__file__).parent
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("_")):
        for info in sorted(pkgutil.iter_modules([str(folder)]), key=lambda m: m.name):
            if not info.name.startswith("_"):
                found.extend(_load(folder.name, info.name).values())
    return found
