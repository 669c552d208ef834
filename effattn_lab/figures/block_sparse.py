"""Pictures of choosing blocks: what an antidiagonal meets, three ways to choose, what a mean dilutes, the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Line, marker and colour of each rule of the study, the same in every picture.
LOOKS = {
    "oracle, by query": ("-", "o", style.PALETTE["black"]),
    "oracle, by block": ("--", "o", style.PALETTE["grey"]),
    "bound (Quest's)": ("-.", "^", style.PALETTE["green"]),
    "mean key (MoBA's gate)": ("-", "D", style.PALETTE["orange"]),
    "antidiagonal, S = 8": ("-", "s", style.PALETTE["blue"]),
    "random": (":", "x", style.PALETTE["vermillion"]),
}


def _grid(ax: Axes, level: torch.Tensor, colors: Sequence[str], step: int) -> None:
    """``level`` as cells of given colours, with a line every ``step`` cells."""
    from matplotlib.colors import ListedColormap

    n, m = level.shape
    ax.imshow(
        level.numpy(),
        cmap=ListedColormap(list(colors)),
        vmin=0,
        vmax=len(colors) - 1,
        interpolation="nearest",
    )
    for at in range(0, n + 1, step):
        ax.axhline(at - 0.5, color=style.PALETTE["grey"], linewidth=0.8)
    for at in range(0, m + 1, step):
        ax.axvline(at - 0.5, color=style.PALETTE["grey"], linewidth=0.8)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)


def antidiagonals(n: int = 16, stride: int = 4) -> Figure:
    """The pairs that are multiplied out, against a column, a slash of odd and one of even offset."""
    import matplotlib.pyplot as plt

    i, j = torch.arange(n)[:, None], torch.arange(n)
    sampled = i % stride == stride - 1 - j % stride
    shown = {"a column": j == 5, "a slash, 5 back": i - j == 5, "a slash, 6 back": i - j == 6}
    colors = [style.PALETTE[c] for c in ("white", "sky", "orange", "vermillion")]
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 2.75), layout="constrained")
        for ax, (title, lines) in zip(axes, shown.items()):
            line = lines.expand(n, n) & (j <= i)
            _grid(ax, sampled.long() + 2 * line.long(), colors, stride)
            met = (line & sampled).nonzero()
            ax.plot(met[:, 1], met[:, 0], "x", color="black", markersize=5, markeredgewidth=1.6)
            ax.set_title(f"{title}:\n{len(met)} pairs met", fontsize=10.5)
            ax.set_xlabel("keys →", fontsize=10)
        axes[0].set_ylabel("queries ↓", fontsize=10)
    plt.close(fig)
    return fig


def three_choices(n: int = 64, size: int = 8) -> Figure:
    """What 64 queries of one random head read: XAttention, MoBA, and NSA's selected and window branches."""
    import matplotlib.pyplot as plt

    from effattn_lab.sparse import nsa
    from effattn_lab.sparse.block_sparse import moba_selection, select_by_mass, xattention_scores

    q, k = 1.6 * torch.randn(2, 1, 1, n, 16, generator=torch.Generator().manual_seed(6))
    past = torch.ones(n, n, dtype=torch.bool).tril()
    blocks = select_by_mass(xattention_scores(q, k, block_size=size, stride=4), 0.5)[0, 0]
    together = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
    each = moba_selection(q, k, block_size=size, top_k=3)[0, 0].repeat_interleave(size, 1)
    sizes = nsa.Blocks(length=4, stride=2, select=size, count=3, first=1, local=1, window=6)
    p = nsa.compressed_weights(q, nsa.compress(k, sizes), sizes)
    fine = nsa.nsa_selection(p, sizes, 1)[0, 0].repeat_interleave(size, 1)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near = i - j < sizes.window
    levels = {
        "XAttention\na block of queries chooses": together.long() * 2,
        "MoBA\neach query chooses": each.long() * 2,
        "NSA\neach query, and a window": torch.where(near, 3, fine.long() * 2),
    }
    colors = [style.PALETTE[c] for c in ("white", "light", "blue", "orange")]
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 2.9), layout="constrained")
        for ax, (title, level) in zip(axes, levels.items()):
            _grid(ax, torch.where(past, level.clamp_min(1), 0), colors, size)
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("keys →", fontsize=10)
        axes[0].set_ylabel("queries ↓", fontsize=10)
    plt.close(fig)
    return fig


def hit_rate(
    delta: float, size: int, *, length: int = 4096, share: float = 0.125, trials: int = 2000
) -> float:
    """How often a block's mean score finds a single key of score ``delta`` among scores of deviation 1.

    Args:
        delta: how far the key's score stands above the mean of the others.
        size: keys a block; ``share`` of all blocks are taken.
        length, trials: keys of a text, texts.
    """
    g = torch.Generator().manual_seed(size)
    scores = torch.randn(trials, length, generator=g)
    at = torch.randint(length, (trials, 1), generator=g)
    means = scores.scatter_add(1, at, torch.full((trials, 1), float(delta))).unflatten(1, (-1, size)).mean(-1)
    taken = max(1, round(share * means.shape[1]))
    return ((means > means.gather(1, at // size)).sum(1) < taken).double().mean().item()


def dilution(deltas: Sequence[float] = (8, 16, 32)) -> Figure:
    """Hit rate of a mean key against the block size: simulated, and by formula."""
    import matplotlib.pyplot as plt

    from effattn_lab.sparse.block_sparse_cost import expected_hit_rate

    sizes = [4, 8, 16, 32, 64, 128, 256, 512]
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.5), layout="constrained")
        for delta, color, mark in zip(deltas, style.CYCLE, "os^"):
            ax.plot(sizes, [100 * expected_hit_rate(delta, s) for s in sizes], color=color)
            ax.plot(
                sizes,
                [100 * hit_rate(delta, s) for s in sizes],
                mark,
                color=color,
                label=f"key stands out by {delta:g} σ",
            )
        ax.axhline(12.5, color=style.PALETTE["grey"], linestyle=":")
        ax.annotate("chance", (512, 6), ha="right", fontsize=10, color=style.COLORS["muted"])
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(s) for s in sizes])
        ax.set(xlabel="keys a block", ylabel="% of texts in which\nthe key's block is taken", ylim=(0, 104))
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.12))
    plt.close(fig)
    return fig


def masses(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Captured mass of each rule against the blocks it reads. ``table``: ``block_sparse_layers.summary``."""
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 4.0), layout="constrained")
        for rule, (dash, mark, color) in LOOKS.items():
            rows = [row for row in table if row["rule"] == rule]
            x, y = [row["budget"] for row in rows], [100 * row["mass"] for row in rows]
            ax.plot(x, y, dash, marker=mark, color=color, label=rule, markersize=6)
        ax.set_xticks([row["budget"] for row in table if row["rule"] == "random"])
        ax.set(
            xlabel="blocks of 64 that a query reads, of 17 to 32", ylabel="captured mass, %", ylim=(55, 100)
        )
        ax.legend(fontsize=9.5, loc="upper left")
    plt.close(fig)
    return fig


def layers(record: Mapping[str, Any], budget: int = 6) -> Figure:
    """By layer: captured mass of four rules at one budget, and how many keys share the best block's weight."""
    import matplotlib.pyplot as plt

    at = list(record["budgets"]).index(budget)
    x = range(len(record["layers"]))
    with plt.rc_context(style.rc()):
        fig, (top, low) = plt.subplots(
            2, 1, figsize=(style.WIDTH, 5.0), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        for rule in ("oracle, by query", "bound (Quest's)", "antidiagonal, S = 8", "random"):
            dash, mark, color = LOOKS[rule]
            y = [100 * layer["rules"][rule][at][0] for layer in record["layers"]]
            top.plot(x, y, dash, marker=mark, color=color, label=rule, markersize=5)
        top.set(ylabel="captured mass, %", ylim=(25, 101))
        top.legend(fontsize=9.5, loc="lower right")
        low.bar(x, [layer["effective"] for layer in record["layers"]], color=style.PALETTE["sky"])
        low.axhline(1, color=style.PALETTE["vermillion"], linewidth=1.2)
        low.set_yscale("log", base=2)
        low.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        low.set(xlabel="layer", ylabel="keys that share\nthe best block", ylim=(0.8, 64))
    plt.close(fig)
    return fig


def heads_at(record: Mapping[str, Any], tau: float = 0.9) -> Figure:
    """Every head at one threshold: the share of blocks it reads, and the mass that they really hold."""
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.8), layout="constrained")
        for name, keep, mark, color in (
            ("layers 3 to 10", lambda i: 3 <= i <= 10, "^", style.PALETTE["vermillion"]),
            ("all others", lambda i: not 3 <= i <= 10, "o", style.PALETTE["blue"]),
        ):
            dots = [t for i, layer in enumerate(record["layers"]) if keep(i) for t in layer["taus"][str(tau)]]
            ax.plot(
                [100 * d[0] for d in dots], [100 * d[1] for d in dots], mark,
                color=color, label=name, markersize=5, alpha=0.75,
            )  # fmt: skip
        ax.axhline(100 * tau, color=style.PALETTE["black"], linestyle="--", linewidth=1.3)
        ax.annotate(
            f"what the estimate says: {100 * tau:.0f} %", (99, 100 * tau - 4.5), ha="right", fontsize=10
        )
        ax.set(
            xlabel="blocks read, % of the causal ones",
            ylabel="captured mass, %",
            xlim=(0, 100),
            ylim=(25, 104),
        )
        ax.legend(loc="lower right")
    plt.close(fig)
    return fig
