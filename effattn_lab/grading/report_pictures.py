"""The pictures of ``effattn report``: how the totals are spread, how each exercise went. PNG bytes, alt texts."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
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
_BINS = 12


def totals(assignment: Assignment, results: Sequence[StudentResult]) -> tuple[bytes, str]:
    """(picture, alternative text): how many students have how many points."""
    most = assignment.points
    bins = min(_BINS, max(1, round(most * 2)))
    width = most / bins
    # The last bin holds those who have everything.
    counts = Counter(min(bins - 1, int(result.total / width + 1e-9)) for result in results)
    heights = [counts[n] for n in range(bins)]
    figure, axes = _figure(3.2)
    axes.bar(
        [(n + 0.5) * width for n in range(bins)],
        heights,
        width=0.92 * width,
        color=_palette("blue"),
    )
    for n, height in enumerate(heights):
        if height:
            axes.annotate(str(height), ((n + 0.5) * width, height), ha="center", va="bottom", fontsize=10.5)
    axes.set(xlim=(0, most), ylim=(0, max(heights, default=1) * 1.15 + 0.5), xlabel="total points")
    axes.set_ylabel("students")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", visible=False)
    edges = [
        f"{number(n * width)} to {number((n + 1) * width)} points: {plural(h, 'student')}"
        for n, h in enumerate(heights)
        if h
    ]
    return _png(figure), "Histogram of the totals. " + "; ".join(edges) + "."


def exercises(assignment: Assignment, results: Sequence[StudentResult]) -> tuple[bytes, str]:
    """(picture, alternative text): for each exercise the share of students by status."""
    items = assignment.items
    counts = {item.id: Counter[str]() for item in items}
    for result in results:
        for exercise in result.exercises:
            if exercise.id in counts:
                counts[exercise.id][exercise.status] += 1
    figure, axes = _figure(0.9 + 0.42 * len(items))
    rows = list(range(len(items)))
    left = [0.0] * len(items)
    for status, colour, hatch in STATUSES:
        shares = [100 * counts[item.id][status] / max(1, len(results)) for item in items]
        if any(shares):
            axes.barh(
                rows, shares, left=left, height=0.7, label=status,
                color=_palette(colour), edgecolor="#1A1A1A", linewidth=0.6, hatch=hatch,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, shares)]
    names = [item.id.rsplit("/", 1)[-1] for item in items]
    axes.set_yticks(rows, names if len(set(names)) == len(names) else [item.id for item in items])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of students")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(STATUSES), handlelength=1.4)
    parts = []
    for item in items:
        said = [f"{counts[item.id][status]} {status}" for status, _, _ in STATUSES if counts[item.id][status]]
        parts.append(f"{item.id}: {', '.join(said) or 'no results'}")
    return _png(figure), "Bars of results by exercise. " + "; ".join(parts) + "."


def _figure(height: float) -> tuple[Figure, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    from effattn_lab.figures import style

    with matplotlib.rc_context(style.rc()):
        figure = Figure(figsize=(style.WIDTH, height))
        return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    import matplotlib

    from effattn_lab.figures import style

    out = io.BytesIO()
    with matplotlib.rc_context(style.rc()):
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _palette(name: str) -> str:
    from effattn_lab.figures import style

    return style.PALETTE[name]
