"""Pictures of the chapter for instructors: the boundary, and where the time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def boundary() -> Figure:
    """The trusted process on the left, the sandbox on the right, and the only things that pass between them."""
    import matplotlib.pyplot as plt

    style.use()
    fig, ax = plt.subplots(figsize=(style.WIDTH, 4.3))
    ax.set(xlim=(0, 100), ylim=(0, 64))
    ax.axis("off")
    _box(ax, 1, 3, 36, 58, style.COLORS["good"], "Grader", "-")
    _box(ax, 63, 3, 36, 58, style.COLORS["bad"], "Sandbox", "--")
    left = (
        "secret seed,\nrandom inputs", "float64 reference", "known mistakes", "compares values,\nshapes, dtypes",
        "gradebook, clock", "watches memory\nand processes",
    )  # fmt: skip
    right = (
        "student's cells", "NumPy, torch, triton", "the package,\nwithout answers",
        "no network, no files,\nno others",
        "read-only system", "hard limits",
    )  # fmt: skip
    for x, lines in ((4, left), (66, right)):
        y = 51.0
        for line in lines:
            ax.text(x, y, line, fontsize=10, va="top")
            y -= 6.6 + 3.6 * line.count("\n")
    arrows = (
        (45, "cells, names", True), (35, "arguments in\nshared memory", True), (22, "arrays, .npy", False),
        (12, "an error, a claim:\ncosts points only", False),
    )  # fmt: skip
    for y, text, there in arrows:
        start, end = (38, 62) if there else (62, 38)
        ax.annotate(
            "",
            (end, y),
            (start, y),
            arrowprops={"arrowstyle": "-|>", "lw": 1.6, "color": style.COLORS["text"]},
        )
        ax.text(50, y + 1, text, ha="center", va="bottom", fontsize=9.5)
    return fig


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, color: str, title: str, dash: str
) -> None:
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=2", fill=False, ec=color, lw=2, ls=dash
        )
    )
    ax.text(x + width / 2, y + height - 3, title, ha="center", va="top", fontsize=11.5, weight="bold")


def overhead(figures: dict[str, Any]) -> Figure:
    """Milliseconds of each exercise: the same calls without a sandbox, with one, and what only a grader does."""
    import matplotlib.pyplot as plt

    style.use()
    rows = list(figures["overhead"].items())[::-1]
    names = [name.rsplit("/", 1)[-1] for name, _ in rows]
    fig, ax = plt.subplots(figsize=(style.WIDTH, 3.6), layout="constrained")
    parts = (
        ("the calls themselves", style.PALETTE["blue"], "", lambda r: r["here"]),
        ("the sandbox", style.PALETTE["orange"], "//", lambda r: r["sandbox"] - r["here"]),
        ("what only a grader asks", style.PALETTE["light"], "..", lambda r: r["trials"]),
    )
    left = [0.0] * len(rows)
    for label, color, hatch, of in parts:
        width = [max(0.0, 1000 * of(row)) for _, row in rows]
        ax.barh(names, width, left=left, color=color, hatch=hatch, edgecolor="white", label=label)
        left = [a + b for a, b in zip(left, width)]
    ax.set_xlabel("milliseconds an exercise, warm (median)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return fig
