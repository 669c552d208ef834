"""Pictures of the recall study: every point is a recorded run, nothing is drawn by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effattn_lab.figures.style import COLORS, PALETTE, WIDTH, rc
from effattn_lab.linear.mixers import MIXERS
from effattn_lab.linear.recall import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colour, dash and marker of each mixer, the same in every picture of this study.
LOOKS: dict[str, tuple[str, str, str]] = {
    "softmax": (PALETTE["black"], "-", "D"),
    "linear_attention": (PALETTE["vermillion"], "--", "o"),
    "linear_taylor": (PALETTE["orange"], ":", "^"),
    "gated_linear": (PALETTE["green"], "-.", "s"),
    "ssd": (PALETTE["grey"], "-.", "*"),
    "delta_rule": (PALETTE["blue"], "-", "v"),
    "delta_no_conv": (PALETTE["blue"], "", "v"),
    "zeros": (PALETTE["purple"], "--", "X"),
    "zeros_eps": (PALETTE["purple"], "", "X"),
    "selective_ssm": (PALETTE["sky"], "-", "P"),
}


def recall_against_state(record: dict[str, Any]) -> Figure:
    """Share of questions answered, against the numbers that a mixer may remember; lines: means, bars: all seeds.

    Softmax has no fixed state: its cache is drawn as a bar from one token to the task's whole length.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    recipe = record["recipes"]["mqar"]
    fig, axes = plt.subplots(figsize=(WIDTH, 4.7), layout="constrained")
    entries = summary(record)
    for name, (color, dash, marker) in LOOKS.items():
        rows = [e for e in entries if e["mixer"] == name]
        if not rows:
            continue
        states, means = [e["state"] for e in rows], [100 * e["mean"] for e in rows]
        label = MIXERS[name].label
        if name == "softmax":
            # The smallest cache: one token of it is the whole divided by the length.
            axes.plot(
                [states[0] / recipe["length"], states[0]],
                [means[0]] * 2,
                color=color,
                linewidth=6,
                alpha=0.25,
            )
            axes.annotate(
                "softmax: the cache grows with every token",
                (states[0] / recipe["length"], means[0]),
                xytext=(0, 9),
                textcoords="offset points",
            )
        for e in rows:
            axes.plot([e["state"]] * 2, [100 * e["low"], 100 * e["high"]], color=color, linewidth=1.2)
            axes.plot([e["state"]] * len(e["values"]), [100 * v for v in e["values"]], "_", color=color)
        hollow = {"markerfacecolor": PALETTE["white"]} if not dash else {}
        axes.plot(states, means, linestyle=dash, marker=marker, color=color, label=label, **hollow)
    for level, words in (
        (200 / recipe["vocab_size"], "any value"),
        (100 / recipe["pairs"][-1], "any value seen"),
    ):
        axes.axhline(level, color=COLORS["muted"], linewidth=1.2, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            words, (66, level), (0, 3), textcoords="offset points", color=COLORS["muted"], fontsize=10.5
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set(
        xlabel="numbers remembered by the mixing layer",
        ylabel=f"recall of {recipe['pairs'][-1]} pairs, %",
        ylim=(0, 112),
        yticks=range(0, 101, 20),
    )
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def longer_training(record: dict[str, Any]) -> Figure:
    """Recall of the same model after few steps and after many: hollow and filled marks at the means, ticks: seeds."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    short = {(e["mixer"], e["size"]): e for e in summary(record)}
    entries = sorted(summary(record, "mqar_long"), key=lambda e: -e["mean"])
    steps = [record["recipes"][task]["steps"] for task in ("mqar", "mqar_long")]
    pairs = record["recipes"]["mqar"]["pairs"][-1]
    fig, axes = plt.subplots(figsize=(WIDTH, 1.5 + 0.45 * len(entries)), layout="constrained")
    axes.axvline(100 / pairs, color=COLORS["muted"], linewidth=1.2, linestyle=(0, (2, 2)), zorder=0)
    for i, e in enumerate(entries):
        color, _, marker = LOOKS[e["mixer"]]
        # The same seeds on both sides, should the longer training have fewer.
        both = (short[e["mixer"], e["size"]]["values"][: len(e["values"])], e["values"])
        means = [100 * sum(values) / len(values) for values in both]
        axes.plot(means, [i, i], color=color, linewidth=1.2, alpha=0.6)
        for values, mean, fill, y in zip(both, means, (PALETTE["white"], color), (i - 0.22, i + 0.22)):
            axes.plot([100 * v for v in values], [y] * len(values), "|", color=color, markersize=7)
            axes.plot(mean, i, marker, color=color, markerfacecolor=fill, markersize=9)
    for count, fill in zip(steps, (PALETTE["white"], PALETTE["black"])):
        axes.plot([], [], "o", color=PALETTE["black"], markerfacecolor=fill, label=f"{count:,} steps")
    axes.set_yticks(range(len(entries)), labels=[MIXERS[e["mixer"]].label for e in entries])
    axes.set(xlabel=f"recall of {pairs} pairs, %", xlim=(0, 104), ylim=(len(entries) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def losses(record: dict[str, Any], beside: Sequence[tuple[str, float]] = ()) -> Figure:
    """Bits a byte on held-out text for each mixer at equal parameters: a mark for each seed, a bar at the mean.

    ``beside``: name and bits a byte of what is no neural network, drawn as upright lines.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    entries = sorted(summary(record, "language"), key=lambda e: e["mean"])
    fig, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.42 * len(entries)), layout="constrained")
    for name, bits in beside:
        axes.axvline(bits, color=COLORS["muted"], linewidth=1.2, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            name, (bits, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", color=COLORS["muted"], fontsize=10.5,
        )  # fmt: skip
    for i, e in enumerate(entries):
        color, dash, marker = LOOKS[e["mixer"]]
        seeds = [v / math.log(2) for v in e["values"]]
        fill = color if dash else PALETTE["white"]
        axes.plot(seeds, [i] * len(seeds), marker, color=color, markerfacecolor=fill, markersize=7, alpha=0.8)
        axes.plot([sum(seeds) / len(seeds)] * 2, [i - 0.3, i + 0.3], color=color)
    axes.set_yticks(range(len(entries)), labels=[MIXERS[e["mixer"]].label for e in entries])
    axes.set(xlabel="bits a byte on held-out text (lower is better)", ylim=(len(entries) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    return fig
