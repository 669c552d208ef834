"""Pictures of Elastic Attention: what the router reads and decides, and what the small study found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effattn_lab.figures import style
from effattn_lab.sparse import elastic_experiment as study
from effattn_lab.sparse.elastic_tasks import ASKED, TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"recall": style.PALETTE["vermillion"], "local": style.PALETTE["blue"]}
_DASH = {"recall": "-", "local": "--"}


def idea_picture(
    tokens: int = 24,
    boundary: int = 4,
    sinks: int = 2,
    window: int = 6,
    modes: Sequence[bool] = (True, False, False),
) -> Figure:
    """The prompt with the tokens that the router pools; below, for each head, the keys that its mode reads."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    from effattn_lab.sparse.static_patterns import causal, dense_mask, sinks_and_window

    ends = np.zeros((1, tokens))
    ends[0, :boundary] = ends[0, -boundary:] = 1
    colors = ListedColormap([style.PALETTE["light"], style.COLORS["key"]])
    seen = ListedColormap([style.PALETTE["light"], style.COLORS["score"]])
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig = plt.figure(figsize=(7.0, 3.9), layout="constrained")
        grid = fig.add_gridspec(2, len(modes), height_ratios=[1, 5])
        top = fig.add_subplot(grid[0, :])
        top.pcolormesh(ends, cmap=colors, edgecolors="white", linewidth=1.5)
        top.set_title(f"the router reads {boundary} keys at either end, before RoPE", fontsize=11.5)
        top.set(xticks=[], yticks=[], xlabel="tokens of the prompt")
        for i, full in enumerate(modes):
            axis = fig.add_subplot(grid[1, i])
            mask = causal() if full else sinks_and_window(sinks, window)
            keep = dense_mask(mask, tokens, tokens)[0].int().numpy()
            axis.pcolormesh(keep, cmap=seen, edgecolors="white", linewidth=0.4)
            axis.invert_yaxis()
            axis.set_aspect("equal")
            share = keep.sum() / (tokens * (tokens + 1) / 2)
            title = f"KV head {i}: {'full' if full else 'sparse'}"
            axis.set_title(title, fontsize=11.5)
            axis.set(
                xticks=[],
                yticks=[],
                xlabel=f"keys ({share:.0%} of the pairs)",
                ylabel="queries" if i == 0 else "",
            )
        for side in ("left", "bottom"):
            for axis in fig.axes:
                axis.spines[side].set_visible(False)
    plt.close(fig)
    return fig


def static_picture(record: Mapping[str, Any]) -> Figure:
    """A panel a seed: every static mask, the best for each number of sparse heads, and the trained routers."""
    import matplotlib.pyplot as plt

    recipe = study.Recipe(**record["recipe"])
    heads, of = recipe.layers * recipe.heads, 2 * ASKED * recipe.test
    rows = sorted(record["rows"], key=lambda r: r["seed"])
    entries = study.summary(dict(record))
    marks = {"signed": ("o", style.PALETTE["vermillion"]), "absolute": ("s", style.PALETTE["green"]),
             "one target": ("^", style.PALETTE["purple"])}  # fmt: skip
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(
            1, len(rows), figsize=(9.4, 3.8), sharey=True, layout="constrained", squeeze=False
        )
        for axis, row in zip(axes[0], rows):
            test = row["static"]["test"]
            x = [(heads - m.bit_count()) / heads for m in range(2**heads)]
            axis.scatter(x, [sum(t) / of for t in test], s=9, color=style.COLORS["muted"], alpha=0.5,
                         label="a static mask")  # fmt: skip
            best = [sum(test[study.best_mask(row, recipe, k)]) / of for k in range(heads + 1)]
            axis.plot(np.arange(heads + 1) / heads, best, color=style.PALETTE["black"], linewidth=1.4,
                      label="chosen static mask")  # fmt: skip
            for entry in entries:
                if entry["seed"] == row["seed"]:
                    mark, color = marks[entry["variant"]]
                    # Hollow, of two sizes: signed and absolute often end in the same place.
                    axis.scatter(entry["mean_sparsity"], sum(entry["accuracy"]) / 2, marker=mark, facecolor="none",
                                 s=45 if mark == "o" else 110, edgecolor=color, linewidth=2, zorder=3,
                                 label=f"router, {entry['variant']}")  # fmt: skip
            axis.set(title=f"seed {row['seed']}", xlabel="share of sparse heads")
        axes[0, 0].set_ylabel("accuracy, mean of both tasks")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3)
    plt.close(fig)
    return fig


def prices_picture(record: Mapping[str, Any], seed: int = 0) -> Figure:
    """Sparsity of each task and its linear multiplier while the routers train, signed and absolute, one seed."""
    import matplotlib.pyplot as plt

    row = next(r for r in record["rows"] if r["seed"] == seed)
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(2, 2, figsize=(8.4, 5.2), sharex=True, sharey="row", layout="constrained")
        for column, variant in enumerate(("signed", "absolute")):
            trace = row["routed"][variant]["trace"]
            steps = [t["step"] for t in trace]
            for i, task in enumerate(TASKS):
                line = {"color": _COLORS[task], "linestyle": _DASH[task]}
                axes[0, column].plot(steps, [t["sparsity"][i] for t in trace], label=task, **line)
                axes[1, column].plot(steps, [t["linear"][i] for t in trace], **line)
                target = study.VARIANTS[variant][0][i]
                axes[0, column].axhline(target, color=_COLORS[task], linewidth=1, linestyle=":")
            axes[0, column].set_title(f"linear term {variant}")
            axes[1, column].set_xlabel("step")
            axes[1, column].axhline(0, color=style.COLORS["text"], linewidth=0.9)
        axes[0, 0].set_ylabel("share of sparse heads")
        axes[1, 0].set_ylabel("linear multiplier")
        fig.legend(
            *axes[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
            title="dotted: targets",
        )
    plt.close(fig)
    return fig


def heads_picture(record: Mapping[str, Any], variant: str = "signed") -> Figure:
    """For each seed and task, how often each head is full: layers from top to bottom, heads from left to right."""
    import matplotlib.pyplot as plt

    rows = sorted(record["rows"], key=lambda r: r["seed"])
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, axes = plt.subplots(
            len(TASKS), len(rows), figsize=(8.4, 3.6), layout="constrained", squeeze=False
        )
        for column, row in enumerate(rows):
            for line, task in enumerate(TASKS):
                axis = axes[line, column]
                share = torch.tensor(row["routed"][variant][task]["full"]).numpy()
                shown = axis.imshow(share, vmin=0, vmax=1, cmap="cividis", aspect="auto")
                for (layer, head), value in np.ndenumerate(share):
                    color = "black" if value > 0.5 else "white"
                    axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color=color, fontsize=10)
                axis.set(xticks=[], yticks=range(len(share)))
                axis.set_yticklabels([f"layer {n + 1}" for n in range(len(share))] if column == 0 else [])
                axis.set_title(f"{task}, seed {row['seed']}", fontsize=11.5)
        fig.colorbar(shown, ax=axes, label="share of prompts: full", shrink=0.85)
    plt.close(fig)
    return fig
