"""Pictures of the chapter and the lab on static patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from effattn_lab.sparse.static_patterns import MaskMod


def _show(ax: Axes, keep: torch.Tensor, title: str, causal: bool = True) -> None:
    from matplotlib.colors import ListedColormap

    n = keep.shape[0]
    future = (torch.arange(n)[:, None] < torch.arange(n)) & causal
    # 0 hidden future, 1 hidden past, 2 seen
    level = torch.where(keep, 2, torch.where(future, 0, 1))
    colors = ListedColormap([style.PALETTE["white"], style.PALETTE["light"], style.PALETTE["blue"]])
    ax.imshow(level, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    ax.set_title(title, fontsize=10.5)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(True)
        side.set_linewidth(0.6)


def gallery(n: int = 32) -> Figure:
    """The six patterns as masks: rows are queries, columns keys."""
    import matplotlib.pyplot as plt

    from effattn_lab.sparse import static_patterns as patterns

    shown: list[tuple[str, MaskMod]] = [
        ("strided, l = 6", patterns.strided(6)),
        ("fixed, l = 6, c = 1", patterns.fixed(6, 1)),
        ("sinks 2, window 6", patterns.sinks_and_window(2, 6)),
        ("Longformer, w = 6", patterns.longformer(6, (0, 13))),
        ("BigBird, blocks of 2", patterns.bigbird(n, 2, window=3, random=1)),
        ("LongNet, r = 1, 2, 4", patterns.union(*(patterns.dilated(w, w // 8) for w in (8, 16, 32)))),
    ]
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, axes = plt.subplots(2, 3, figsize=(style.WIDTH, 4.9), layout="constrained")
        for ax, (title, mask) in zip(axes.flat, shown):
            _show(
                ax, patterns.dense_mask(mask, n, n)[0], title, not title.startswith(("Longformer", "BigBird"))
            )
        axes[0, 0].set_ylabel("queries ↓")
        axes[1, 0].set_ylabel("queries ↓")
        for ax in axes[1]:
            ax.set_xlabel("keys →")
    return fig


def work(head_dim: int = 64) -> Figure:
    """FLOPs of one head against the length: full, root of N, linear."""
    import matplotlib.pyplot as plt

    from effattn_lab.sparse import static_patterns_cost as cost

    lengths = [2**x for x in range(9, 18)]
    lines: list[tuple[str, list[int], str]] = [
        ("full, causal", [n * (n + 1) // 2 for n in lengths], "o-"),
        ("strided, l = √N", [cost.strided_pairs(n, round(n**0.5)) for n in lengths], "s-"),
        ("LongNet, w = 2k, 4k, 8k …", [_longnet(n) for n in lengths], "D--"),
        ("4 sinks + window 1024", [cost.sinks_and_window_pairs(n, 4, 1024) for n in lengths], "^-."),
    ]
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.8), layout="constrained")
        for (name, pairs, dash), color in zip(lines, style.CYCLE):
            flops = [cost.pair_flops(p, head_dim) / 1e9 for p in pairs]
            ax.plot(lengths, flops, dash, color=color, label=name, markersize=5)
        ax.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="GFLOP a head")
        ticks = [512, 2048, 8192, 32_768, 131_072]
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.minorticks_off()
        ax.legend()
    return fig


def _longnet(n: int) -> int:
    """Pairs of segments 2048, 4096, ... with rates 1, 2, ..., up to the length."""
    from effattn_lab.sparse import static_patterns_cost as cost

    total, segment, rate = 0, 2048, 1
    while True:
        total += cost.dilated_pairs(n, min(segment, n), rate)
        if segment >= n:
            return total
        segment, rate = 2 * segment, 2 * rate


def reached(keeps: Mapping[str, torch.Tensor], reached_by: Mapping[str, Sequence[torch.Tensor]]) -> Figure:
    """Share of the past that the last token knows after 1, 2, ... layers, for each pattern."""
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.4), layout="constrained")
        for place, (name, steps) in enumerate(reached_by.items()):
            n = keeps[name].shape[0]
            share = [100 * float(x[-1].sum()) / n for x in steps]
            # Curves may lie on each other: the later ones are thinner, so that both are seen.
            size = {"linewidth": 4.5 - 0.7 * place, "markersize": 9.0 - place}
            mark, color = "os^DvP"[place], style.CYCLE[place]
            ax.plot(range(1, len(share) + 1), share, mark + "-", color=color, label=name, **size)
        ax.set(xlabel="layers", ylabel="% of the text\nthat the last token knows", ylim=(0, 104))
        ax.legend()
    plt.close(fig)
    return fig


def masses(mass: Mapping[str, Sequence[Sequence[float]]], layers: Sequence[int] | None = None) -> Figure:
    """Captured mass of every head, one strip a pattern, with the mean; ``layers`` names a few to tell apart."""
    import matplotlib.pyplot as plt

    names = list(mass)
    draw = np.random.default_rng(0)
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 0.52 * len(names) + 1.0), layout="constrained")
        for y, name in enumerate(names):
            heads = 100 * np.asarray(mass[name])
            at = y + draw.uniform(-0.22, 0.22, heads.shape)
            if layers is None:
                ax.plot(heads.ravel(), at.ravel(), ".", color=style.PALETTE["sky"], markersize=4)
            else:
                for row, spread, layer, color, mark in zip(heads, at, layers, style.CYCLE, "os^D"):
                    label = f"layer {layer}" if y == 0 else None
                    ax.plot(row, spread, mark, color=color, markersize=4, alpha=0.8, label=label)
            ax.plot([heads.mean()] * 2, [y - 0.34, y + 0.34], color=style.COLORS["text"], linewidth=2.6)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        if layers is not None:
            ax.legend(loc="lower right")
        ax.set(xlabel="captured mass, % of the full softmax", xlim=(0, 101))
    plt.close(fig)
    return fig
