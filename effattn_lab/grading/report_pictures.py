"""The pictures of ``effattn report``: how the totals are spread, how each exercise went. PNG bytes, alt texts."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from effattn_lab.grading.model import Assignment, StudentResult
from effattn_lab.grading.text import number, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Statuses in the order of the bars, with colour and hatch: a colour never carries the meaning alone.
STATUSES = (
    ("passed", "green", ""),
    ("failed", "orange", "///"),
    ("not written", "light", ""),
    ("missing", "grey", "..."),
    ("stopped", "vermillion", "xxx"),
)
_BARS = 12


def totals(assignment: Assignment, results: Sequence[StudentResult]) -> tuple[bytes, str]:
    """(picture, alternative text): how many students have how many points, to the nearest step."""
    most = assignment.points
    step = next((width for width in (0.5, 1.0, 2.0, 5.0, 10.0) if most / width <= _BARS), most / _BARS)
    counts = Counter(round(result.total / step) for result in results)
    places = range(round(most / step) + 1)
    with _style():
        figure, axes = _figure(3.2)
        axes.bar(
            [n * step for n in places], [counts[n] for n in places], width=0.85 * step, color=_colour("blue")
        )
        for n in places:
            if counts[n]:
                axes.annotate(str(counts[n]), (n * step, counts[n]), ha="center", va="bottom")
        axes.set(xlim=(-0.6 * step, most + 0.6 * step), ylim=(0, max(counts.values()) * 1.15 + 0.5))
        axes.set(xlabel=f"total points, to the nearest {number(step)}", ylabel="students")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)
        said = [f"about {number(n * step)}: {plural(counts[n], 'student')}" for n in places if counts[n]]
        return _png(figure), f"Histogram of the total points. {'; '.join(said)}."


def exercises(assignment: Assignment, results: Sequence[StudentResult]) -> tuple[bytes, str]:
    """(picture, alternative text): for each exercise the share of students by status."""
    items = assignment.items
    counts = {item.id: Counter[str]() for item in items}
    for result in results:
        for exercise in result.exercises:
            if exercise.id in counts:
                counts[exercise.id][exercise.status] += 1
    with _style():
        figure, axes = _figure(0.9 + 0.42 * len(items))
        rows = list(range(len(items)))
        left = [0.0] * len(items)
        for status, colour, hatch in STATUSES:
            shares = [100 * counts[item.id][status] / max(1, len(results)) for item in items]
            if any(shares):
                axes.barh(
                    rows, shares, left=left, height=0.7, label=status,
                    color=_colour(colour), edgecolor="#1A1A1A", linewidth=0.6, hatch=hatch,
                )  # fmt: skip
                left = [a + b for a, b in zip(left, shares)]
        names = [item.id.rsplit("/", 1)[-1] for item in items]
        axes.set_yticks(rows, names if len(set(names)) == len(names) else [item.id for item in items])
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="% of students")
        axes.grid(axis="y", visible=False)
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(STATUSES),
            handlelength=1.4,
            columnspacing=1.2,
        )
        png = _png(figure)
    parts = []
    for item in items:
        said = [f"{counts[item.id][status]} {status}" for status, _, _ in STATUSES if counts[item.id][status]]
        parts.append(f"{item.id}: {', '.join(said) or 'no results'}")
    return png, "Bars of results by exercise. " + "; ".join(parts) + "."


def _style() -> AbstractContextManager[None]:
    import matplotlib

    from effattn_lab.figures import style

    return matplotlib.rc_context(style.rc())


def _figure(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    from effattn_lab.figures import style

    figure = Figure(figsize=(style.WIDTH, height))
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _colour(name: str) -> str:
    from effattn_lab.figures import style

    return style.PALETTE[name]
