"""Pictures of the lab on chosen blocks: a head's blocks, and what choices hold and cost in the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Methods of `curves`, in the order of the legend, with the dash of their lines.
METHODS = {
    "the true mass": "k-",
    "antidiagonals, S = 8": "o-",
    "mean query, mean key": "s--",
    "nearest": "^-.",
    "random": "v:",
}
#: Choices of `loss`, by how their names begin, with the words of the legend.
FAMILIES = {
    "XAttention, ": "antidiagonals, by threshold",
    "best by antidiagonals, ": "antidiagonals, fixed count",
    "first and nearest, ": "first and nearest",
    "MoBA, ": "MoBA, not trained for it",
    "MoBA with block 0, ": "the same with block 0",
}


def maps(true: torch.Tensor, guess: torch.Tensor, keep: torch.Tensor) -> Figure:
    """One head: share of the weight by block, its estimate, and the blocks that are read. ``[n, n]`` each."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    past = torch.ones_like(keep).tril()
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 3.3), layout="constrained")
        for ax, x, title in zip(axes, (true, guess), ("the true weight", "from antidiagonals")):
            share = x / x.sum(dim=-1, keepdim=True)
            shown = share.clamp(min=1e-3).log10().masked_fill(~past, float("nan"))
            image = ax.imshow(shown, cmap="viridis", vmin=-3, vmax=0, interpolation="nearest")
            ax.set_title(title, fontsize=10.5)
        fig.colorbar(
            image, ax=axes.tolist(), location="bottom", shrink=0.6, aspect=30,
            label="share of the row's weight, left and middle",
            ticks=[-3, -2, -1, 0],
        ).ax.set_xticklabels(["0.1 %", "1 %", "10 %", "100 %"])  # fmt: skip
        level = torch.where(keep, 2, torch.where(past, 1, 0))
        colors = ListedColormap([style.PALETTE["white"], style.PALETTE["light"], style.PALETTE["blue"]])
        axes[2].imshow(level, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
        axes[2].set_title("blocks read", fontsize=10.5)
        axes[0].set_ylabel("blocks of queries ↓")
        for ax in axes:
            ax.set_xlabel("blocks of keys →")
            ax.set_xticks([])
            ax.set_yticks([])
    plt.close(fig)
    return fig


def curves(record: Mapping[str, Any], most: int = 16) -> Figure:
    """Mass held by k blocks a row, mean over all heads of the model, for each way to choose them."""
    import matplotlib.pyplot as plt

    table: Mapping[str, Sequence[float]] = record["curves"]
    counts = range(2, most + 1)
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.8), layout="constrained")
        colors = [style.PALETTE["black"], *style.CYCLE]
        for (name, dash), color in zip(METHODS.items(), colors):
            mass = [100 * table[name][k - 1] for k in counts]
            ax.plot(counts, mass, dash.replace("k", ""), color=color, label=name, markersize=4)
        ax.set(xlabel="blocks read by a block of queries", ylabel="% of the attention held")
        ax.set_xticks([2, 4, 8, 12, 16][: 1 + most // 4])
        ax.legend()
    plt.close(fig)
    return fig


def losses(record: Mapping[str, Any]) -> Figure:
    """Loss against the share of pairs seen, for each family of choices; full attention as a line."""
    import matplotlib.pyplot as plt

    table: Mapping[str, Mapping[str, float]] = record["loss"]
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.8), layout="constrained")
        for (family, label), mark, color in zip(
            FAMILIES.items(), ("o-", "D-", "^-.", "s--", "v:"), style.CYCLE
        ):
            points = [row for name, row in table.items() if name.startswith(family)]
            ax.plot(
                [100 * p["density"] for p in points], [p["nats"] for p in points], mark, color=color,
                label=label, markersize=5,
            )  # fmt: skip
        ax.axhline(table["full"]["nats"], color=style.COLORS["text"], linestyle=":", label="full attention")
        ax.set(xlabel="% of the causal pairs seen", ylabel="nats a token", xlim=(0, None))
        ax.legend()
    plt.close(fig)
    return fig
