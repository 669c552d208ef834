"""Pictures of linearized attention: who weighs whom, what a leak looks like, a tree's convolution, perplexities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weights_picture(tokens: int = 24, group: int = 8, lags: int = 4) -> Figure:
    """Which of the three branches weighs which pair: a square of ``tokens`` queries by ``tokens`` keys."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    kinds = {
        "local": (style.PALETTE["sky"], "", "relu(q·k)²: own group"),
        "global": (style.PALETTE["yellow"], "..", "α q·k: earlier groups, read from the state"),
        "conv": (style.PALETTE["white"], "", f"plus the convolution's weight: {lags} lags"),
    }
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        for t in range(tokens):
            for j in range(t + 1):
                color, hatch, _ = kinds["local" if t // group == j // group else "global"]
                ax.add_patch(
                    Rectangle((j, t), 1, 1, facecolor=color, hatch=hatch, edgecolor="#B0B0B0", lw=0.4)
                )
                if t - j < lags:
                    ax.plot(j + 0.5, t + 0.5, "s", color=style.PALETTE["vermillion"], markersize=3.4)
        for border in range(0, tokens + 1, group):
            ax.plot(
                [border, border], [border, min(border + group, tokens)], color=style.COLORS["text"], lw=1.6
            )
            if border:
                ax.plot([border - group, border], [border, border], color=style.COLORS["text"], lw=1.6)
        ax.set_xlim(0, tokens)
        ax.set_ylim(tokens, 0)
        ax.set_aspect("equal")
        ax.grid(False)
        ax.set_xlabel("key position j")
        ax.set_ylabel("query position t")
        handles = [
            Patch(facecolor=color, hatch=hatch, edgecolor="#B0B0B0", label=label)
            for name, (color, hatch, label) in kinds.items()
            if name != "conv"
        ]
        dot = plt.Line2D([], [], marker="s", ls="", color=style.PALETTE["vermillion"], label=kinds["conv"][2])
        ax.legend(handles=[*handles, dot], loc="upper right")
    plt.close(fig)
    return fig


def leak_picture(taps: Mapping[str, torch.Tensor], errors: Mapping[str, tuple[float, float]]) -> Figure:
    """Left: what each convolution learned, tap by tap. Right: its error while the future is there, and without it.

    Args:
        taps: name -> learned kernel ``[2p + 1]``, mean over the heads; taps that a mask hides as NaN.
        errors: name -> (error with the whole text, error with nothing after the token).
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(
            1, 2, figsize=(9.0, 3.5), layout="constrained", width_ratios=(1.5, 1)
        )
        looks = (("naive", "//"), ("flash", ""))
        for i, ((name, kernel), (color, hatch)) in enumerate(zip(taps.items(), looks)):
            p = len(kernel) // 2
            x = np.arange(-p, p + 1) + 0.4 * i - 0.2
            left.bar(
                x, kernel.numpy(), 0.4, color=style.COLORS[color], hatch=hatch, edgecolor="white", label=name
            )
        left.axvspan(0.5, p + 0.5, color=style.COLORS["masked"], zorder=0)
        left.set_ylim(None, 1.25)
        left.text(p / 2 + 0.5, 1.18, "the future", ha="center", va="top")
        left.set_xlabel("tap: position relative to the token")
        left.set_ylabel("learned weight")
        left.legend(loc="upper left")
        left.set_title("where it looks")
        for i, ((name, pair), (color, hatch)) in enumerate(zip(errors.items(), looks)):
            x = np.arange(2) + 0.4 * i - 0.2
            bars = right.bar(
                x, pair, 0.4, color=style.COLORS[color], hatch=hatch, edgecolor="white", label=name
            )
            right.bar_label(bars, fmt="%.2f")
        right.set_xticks([0, 1], ["text given\n(training)", "token by token\n(generation)"])
        right.set_ylim(0, 1.3)
        right.set_ylabel("error / size of the target")
        right.set_title("what it is worth")
    plt.close(fig)
    return fig


def tree_picture(parents: Sequence[int], matrix: torch.Tensor, errors: Sequence[float]) -> Figure:
    """A token tree, its unfolded convolution, and each node's error if the nodes are taken as a line.

    Args:
        parents: of each node, -1 for the root. matrix: ``[T, L - 1 + T]``, one head's. errors: one a node.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    nodes, before = len(parents), matrix.shape[1] - len(parents)
    depth: list[int] = []
    for p in parents:
        depth.append(0 if p < 0 else depth[p] + 1)
    rank = [sum(d == depth[a] for d in depth[:a]) for a in range(nodes)]
    count = [depth.count(d) for d in depth]
    height = [(r - (c - 1) / 2) for r, c in zip(rank, count)]
    with plt.rc_context(style.rc()):
        fig, (tree, grid, bars) = plt.subplots(
            1, 3, figsize=(9.4, 3.6), layout="constrained", width_ratios=(1.1, 1.5, 1)
        )
        for a, p in enumerate(parents):
            if p >= 0:
                tree.plot(
                    [depth[p], depth[a]],
                    [height[p], height[a]],
                    color=style.COLORS["muted"],
                    lw=1.4,
                    zorder=1,
                )
            tree.plot(depth[a], height[a], "o", color=style.COLORS["flash"], markersize=17, zorder=2)
            tree.text(depth[a], height[a], str(a), color="white", ha="center", va="center", zorder=3)
        tree.set_xlabel("depth: tokens after the text")
        tree.set_yticks([])
        tree.grid(False)
        tree.spines["left"].set_visible(False)
        tree.margins(0.18)
        tree.set_title("the tree")
        for a, column in matrix.nonzero().tolist():
            lag = depth[a] + before - column if column < before else depth[a] - depth[column - before]
            grid.add_patch(
                Rectangle((column, a), 1, 1, facecolor=style.COLORS["flash"], edgecolor="white", lw=0.6)
            )
            grid.text(column + 0.5, a + 0.5, str(lag), ha="center", va="center", color="white", fontsize=8.5)
        grid.set_xlim(0, before + nodes)
        grid.axvline(before, color=style.COLORS["text"], lw=1.4)
        grid.set_ylim(nodes, 0)
        grid.set_xticks([before / 2, before + nodes / 2], ["last values", "nodes 0, 1, ..."])
        grid.set_ylabel("node")
        grid.set_yticks(np.arange(nodes) + 0.5, range(nodes))
        grid.grid(False)
        grid.set_title("lag of every weight in M")
        bars.barh(range(nodes), errors, color=style.COLORS["naive"], hatch="//", edgecolor="white")
        bars.set_ylim(nodes - 0.5, -0.5)
        bars.set_yticks(range(nodes))
        bars.set_xlabel("largest error")
        bars.set_title("as stored")
    plt.close(fig)
    return fig


def perplexity_picture(rows: Mapping[str, float], softmax: float, title: str = "") -> Figure:
    """Perplexity of each way on a logarithmic axis, drawn as its distance from softmax."""
    import matplotlib.pyplot as plt

    names = list(rows)
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 0.5 * len(names) + 1.1), layout="constrained")
        for row, (name, value) in enumerate(rows.items()):
            color, mark = ("flash", "o") if "conv" in name else ("naive", "s")
            ax.plot([softmax, value], [row, row], color=style.COLORS[color], lw=3)
            ax.plot(value, row, mark, color=style.COLORS[color], markersize=9)
            ax.annotate(f"{value:.1f}", (value, row), xytext=(9, 0), textcoords="offset points", va="center")
        ax.axvline(softmax, color=style.COLORS["text"], ls="--", lw=1.4)
        ax.text(softmax, -0.75, f" softmax: {softmax:.1f}", va="center")
        ax.set_xscale("log")
        low, high = min(softmax, *rows.values()), max(rows.values())
        ax.set_xlim(low / 1.15, high * 1.5)
        ticks = [
            n for n in (5, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 10000) if low / 1.15 <= n <= high * 1.5
        ]
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.set_ylim(len(names) - 0.4, -1.1)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("perplexity on held-out text (log scale; lower is better)")
        ax.set_title(title)
    plt.close(fig)
    return fig
