"""Pictures of speculative decoding: why the rule is exact, what a tree's node sees, what real text yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"prompt lookup": "o", "n-gram": "s", "early exit": "^"}


def exactness_picture(p: torch.Tensor, q: torch.Tensor, names: Sequence[str]) -> Figure:
    """Left: p and q, their overlap filled. Right: what comes out, in two parts; crosses where a wrong rule ends up.

    Args:
        p, q: ``[V]``, the target's and the draft's distribution. names: of the V tokens.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    from effattn_lab.linear.speculative import overlap, residual
    from effattn_lab.linear.speculative_proof import WRONG_RULES

    x, beta = np.arange(len(p)), overlap(p, q).item()
    both, rest = torch.minimum(p, q), (1 - beta) * residual(p, q)
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.5), sharey=True, layout="constrained")
        left.bar(x - 0.2, p, 0.38, color=style.PALETTE["blue"], label="p, target")
        left.bar(
            x + 0.2,
            q,
            0.38,
            color=style.PALETTE["white"],
            edgecolor=style.PALETTE["orange"],
            hatch="//",
            label="q, draft",
        )
        left.hlines(both, x - 0.42, x + 0.42, color=style.COLORS["text"], linewidth=2.0, label="min(p, q)")
        left.set_title("one token drafted from q")
        left.set_ylabel("probability")
        right.bar(x, both, 0.6, color=style.PALETTE["sky"], label="draft accepted")
        right.bar(
            x,
            rest,
            0.6,
            bottom=both,
            color=style.PALETTE["green"],
            hatch="..",
            edgecolor=style.PALETTE["white"],
            label="rejected, residual",
        )
        right.plot(x, p, "_", color=style.COLORS["text"], markersize=26, markeredgewidth=2.2, label="p")
        right.plot(
            x,
            WRONG_RULES["resample from p"](p, q),
            "x",
            color=style.PALETTE["vermillion"],
            markersize=8,
            markeredgewidth=2.2,
            label="if redrawn from p",
        )
        right.set_title(f"what comes out (accepted: {beta:.0%})")
        for ax in (left, right):
            ax.set_xticks(x, names)
            ax.grid(axis="x", visible=False)
            ax.legend()
    plt.close(fig)
    return fig


def tree_picture(parents: torch.Tensor, tokens: Sequence[str], context: int = 2) -> Figure:
    """Left: the tree. Right: its mask; crosses mark what the causal mask of the stored order would add."""
    import matplotlib.pyplot as plt

    from effattn_lab.linear.speculative_tree import depths, tree_mask

    nodes, depth, mask = len(parents), depths(parents), tree_mask(parents, context)
    height = {n: 0.0 for n in range(nodes)}
    leaves = [n for n in range(nodes) if n not in parents.tolist()]
    for row, leaf in enumerate(sorted(leaves, key=lambda n: _line(parents, n))):
        height[leaf] = -float(row)
    for n in reversed(range(nodes)):
        children = [height[m] for m in range(nodes) if int(parents[m]) == n]
        if children:
            height[n] = sum(children) / len(children)
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(
            1, 2, figsize=(8.6, 3.7), width_ratios=(1.15, 1), layout="constrained"
        )
        for n in range(1, nodes):
            m = int(parents[n])
            left.plot(
                [depth[m], depth[n]], [height[m], height[n]], color=style.COLORS["muted"], linewidth=1.5
            )
        for n in range(nodes):
            left.text(
                float(depth[n]),
                height[n],
                f"{n}: {tokens[n]}",
                ha="center",
                va="center",
                fontsize=10.5,
                bbox={
                    "boxstyle": "round,pad=0.3",
                    "facecolor": style.PALETTE["white"],
                    "edgecolor": style.COLORS["text"],
                },
            )
        left.set(xlim=(-0.5, float(depth.max()) + 0.5), ylim=(-len(leaves) + 0.4, 0.6))
        left.axis("off")
        left.set_title("guesses for the next places")
        right.imshow(mask, cmap=_two_greys(), aspect="equal", vmin=0, vmax=1)
        for n in range(nodes):
            for m in range(n + 1):
                if not mask[n, context + m]:
                    right.plot(context + m, n, "x", color=style.PALETTE["vermillion"], markersize=7)
        right.axvline(context - 0.5, color=style.COLORS["text"], linewidth=1)
        right.set_xticks(range(context + nodes), ["·"] * context + [str(n) for n in range(nodes)])
        right.set_yticks(range(nodes), [str(n) for n in range(nodes)])
        right.set_xlabel("key: context · · , then nodes")
        right.set_ylabel("query node")
        right.set_title("what each may see")
        right.grid(visible=False)
    plt.close(fig)
    return fig


def _line(parents: torch.Tensor, node: int) -> list[int]:
    line = [node]
    while int(parents[line[0]]) >= 0:
        line.insert(0, int(parents[line[0]]))
    return line


def _two_greys() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([style.PALETTE["white"], style.PALETTE["sky"]])


def measured_picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens a pass of the target yields, by text, draft and gamma, and what the formula makes of the same rounds.

    Dashed with the acceptance rate of all judged drafts, dotted with that of the first draft of each round.

    Args:
        rows: of :func:`effattn_lab.linear.speculative_smollm2.measured`; those at temperature 0 are drawn.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    from effattn_lab.linear.speculative_cost import expected_tokens

    greedy = [r for r in rows if r["temperature"] == 0]
    kinds = list(dict.fromkeys(r["text"] for r in greedy))
    names = list(dict.fromkeys(r["draft"] for r in greedy))
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, len(kinds), figsize=(9.2, 3.7), sharey=True, layout="constrained")
        for ax, kind in zip(axes, kinds):
            for name, color in zip(names, style.CYCLE):
                mine = sorted(
                    (r for r in greedy if (r["text"], r["draft"]) == (kind, name)), key=lambda r: r["gamma"]
                )
                gammas = [r["gamma"] for r in mine]
                ax.plot(
                    gammas,
                    [r["tokens_per_pass"] for r in mine],
                    marker=MARKS.get(name, "D"),
                    color=color,
                    label=name,
                )
                ax.plot(gammas, [r["predicted"] for r in mine], "--", color=color, linewidth=1.4)
                first = [
                    1 + r["coverage"] * (expected_tokens(r["by_depth"][0], r["gamma"]) - 1) for r in mine
                ]
                ax.plot(gammas, first, ":", color=color, linewidth=1.4)
            ax.axhline(1, color=style.COLORS["muted"], linewidth=1)
            ax.set_title(kind)
            ax.set_ylim(0.9, 4.3)
            ax.set_xlabel("drafts a round, γ")
        axes[0].set_ylabel("tokens per pass of the target")
        axes[0].legend(loc="upper left")
        axes[1].legend(
            handles=[
                Line2D(
                    [], [], color=style.COLORS["muted"], linestyle="--", label="formula, all drafts' rate"
                ),
                Line2D([], [], color=style.COLORS["muted"], linestyle=":", label="formula, first drafts'"),
            ],
            loc="upper left",
        )
    plt.close(fig)
    return fig
