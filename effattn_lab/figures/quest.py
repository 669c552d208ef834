"""Pictures of choosing tokens: a page's bound in two dimensions, and what each rule's choice holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Line, marker and colour of each rule, the same in every picture.
LOOKS = {
    "oracle": ("-", "D", style.PALETTE["black"]),
    "Adamas": ("-", "o", style.PALETTE["blue"]),
    "Quest": ("-.", "s", style.PALETTE["green"]),
    "SnapKV": ("--", "^", style.PALETTE["purple"]),
    "H2O": ("--", "v", style.PALETTE["orange"]),
    "StreamingLLM": (":", "X", style.PALETTE["vermillion"]),
}


def two_pages(count: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query ``[2]`` and two pages of keys ``[count, 2]``: one tight and good, one wide and poor."""
    g = torch.Generator().manual_seed(2)
    noise = torch.randn(2, count, 2, generator=g, dtype=torch.float64)
    q = torch.tensor([1.0, 0.8], dtype=torch.float64)
    tight = torch.tensor([1.5, 1.4], dtype=torch.float64) + 0.22 * noise[0]
    # along a falling line: no key is good in both channels, and the corner of the box is
    along = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]
    wide = torch.tensor([[2.3, -2.5]], dtype=torch.float64) * along + 0.12 * noise[1]
    return q, tight, wide


def bound_picture() -> Figure:
    """Two pages of two-dimensional keys with their boxes, the query, the best key and the corner that bounds it."""
    import matplotlib.pyplot as plt

    q, *pages = two_pages()
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.1), sharex=True, sharey=True, layout="constrained")
        for axis, keys, name in zip(axes, pages, ("page A: tight", "page B: wide")):
            least, greatest = keys.amin(dim=0), keys.amax(dim=0)
            corner = torch.where(q > 0, greatest, least)
            best = keys[(keys @ q).argmax()]
            axis.add_patch(
                plt.Rectangle(
                    least.tolist(), *(greatest - least).tolist(), facecolor=style.PALETTE["light"],
                    edgecolor=style.COLORS["muted"], linewidth=1.2,
                )
            )  # fmt: skip
            span = torch.tensor([-4.0, 4.0], dtype=torch.float64)
            for level, dash in (((keys @ q).max(), "-"), ((corner @ q), "--")):
                axis.plot(
                    span, (level - q[0] * span) / q[1], dash, color=style.COLORS["query"], linewidth=1.4
                )
            axis.plot(*keys.T, "o", color=style.COLORS["key"], markeredgecolor="black", markersize=6)
            axis.plot(*best, "o", color=style.COLORS["key"], markeredgecolor="black", markersize=11)
            axis.plot(*corner, "X", color=style.PALETTE["vermillion"], markeredgecolor="black", markersize=11)
            axis.annotate(
                "",
                q.tolist(),
                (0, 0),
                arrowprops={"arrowstyle": "-|>", "color": style.COLORS["query"], "lw": 2.2},
            )
            axis.set_title(f"{name}\nbest key {float((keys @ q).max()):.1f}, bound {float(corner @ q):.1f}")
            axis.set(xlim=(-3, 3.2), ylim=(-3.2, 3.4), xlabel="channel 1", aspect="equal")
        axes[0].set_ylabel("channel 2")
    plt.close(fig)
    return fig


def mass_picture(
    found: Mapping[str, Mapping[str, Sequence[float]]], budgets: Sequence[int], length: int
) -> Figure:
    """Softmax weight that a rule's choice holds, against the budget: one panel a layer.

    Args:
        found: panel → rule → one number for each budget, 0 to 1.
        budgets: tokens read.
        length: tokens there are.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(
            1, len(found), figsize=(3.2 * len(found), 3.5), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (panel, rules) in zip(axes[0], found.items()):
            for rule, values in rules.items():
                dash, marker, color = LOOKS[rule]
                axis.plot(budgets, values, dash, marker=marker, color=color, label=rule, markersize=5.5)
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(b) for b in budgets])
            axis.set_title(panel)
            axis.set_ylim(0, 1.03)
        axes[0, 0].set_ylabel("softmax weight held")
        axes[0, -1].legend(loc="lower right", fontsize=8.5)
        fig.supxlabel(f"budget, of {length}", fontsize=11.5)
    plt.close(fig)
    return fig
