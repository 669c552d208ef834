"""Pictures of the budget study: every point is a recorded run of SmolLM2, nothing is drawn by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effattn_lab.figures.style import COLORS, PALETTE, WIDTH, rc
from effattn_lab.sparse.budget_methods import BEST, LABELS, TOP
from effattn_lab.sparse.budget_record import masses, needles, perplexities

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour, dash and marker of each method, the same in every picture of this study.
LOOKS: dict[str, tuple[str, str, str]] = {
    "oracle": (PALETTE["black"], "-", "D"),
    "adamas": (PALETTE["blue"], "-", "o"),
    "adamas_raw": (PALETTE["sky"], ":", "o"),
    BEST: (PALETTE["blue"], "--", "P"),
    "quest": (PALETTE["green"], "-.", "s"),
    "snapkv": (PALETTE["purple"], "--", "^"),
    "h2o": (PALETTE["orange"], "--", "v"),
    "streaming": (PALETTE["vermillion"], ":", "X"),
}


def perplexity_against_budget(record: dict[str, Any]) -> Figure:
    """Perplexity of the tokens after the prompt against the tokens that a head reads a step."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    table = perplexities(record)
    full = next(row for row in table if row["method"] == "full")
    fig, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    axes.axhline(
        full["perplexity"],
        color=COLORS["muted"],
        linestyle=(0, (4, 2)),
        linewidth=1.4,
        zorder=1,
        label=f"full attention, {full['read']:,.0f} tokens",
    )
    for name, (color, dash, marker) in LOOKS.items():
        rows = sorted((r for r in table if r["method"] == name), key=lambda r: r["budget"])
        axes.plot(
            [r["read"] for r in rows],
            [r["perplexity"] for r in rows],
            dash,
            marker=marker,
            color=color,
            label=LABELS[name],
        )
    axes.set_yscale("log")
    _budgets(axes, sorted({r["budget"] for r in table if r["budget"]}))
    low, high = min(r["perplexity"] for r in table), max(r["perplexity"] for r in table)
    ticks = [
        t for t in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 25, 30, 40, 60) if low < t < 1.1 * high
    ]
    axes.set_yticks(ticks, labels=[str(t) for t in ticks])
    axes.set(xlabel="tokens read by a head in a step", ylabel="perplexity (lower is better)")
    axes.margins(y=0.12)
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def excess_by_token(record: dict[str, Any], budget: int) -> Figure:
    """Loss above full attention's at one budget: tokens that can be looked up far back, and all others."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    table = perplexities(record)
    full = next(row for row in table if row["method"] == "full")
    rows = [r for name in LOOKS for r in table if (r["method"], r["budget"]) == (name, budget)]
    fig, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    places, ends = np.arange(len(rows))[::-1], [0.0]
    for kind, shift, color, hatch, label in (
        ("far", 0.2, PALETTE["vermillion"], "//", f"the {full['far_tokens']} that can be looked up far back"),
        ("other", -0.2, PALETTE["sky"], "", f"the {full['tokens'] - full['far_tokens']} others"),
    ):
        extra = [row[kind] - full[kind] for row in rows]
        bars = axes.barh(
            places + shift,
            extra,
            height=0.36,
            color=color,
            hatch=hatch,
            edgecolor=PALETTE["white"],
            label=label,
        )
        axes.bar_label(bars, labels=[f"{x:.2f}".replace("-", "\u2212") for x in extra], padding=3)
        ends += extra
    axes.axvline(0, color=COLORS["muted"], linewidth=1)
    axes.set_yticks(places, labels=[LABELS[row["method"]] for row in rows])
    axes.set_xlabel(f"loss above full attention's, nats a token, budget {budget}")
    axes.grid(axis="y", visible=False)
    room = 0.14 * (max(ends) - min(ends))  # for the numbers
    axes.set_xlim(min(ends) - room, max(ends) + room)
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def needles_against_budget(record: dict[str, Any]) -> Figure:
    """Share of needles found against the budget: question after the text, and (hollow) in the prompt."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    table = needles(record)
    fig, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    full = next(r for r in table if r["method"] == "full" and r["late"])
    axes.axhline(full["score"], color=COLORS["muted"], linestyle=(0, (4, 2)), linewidth=1.4, zorder=1)
    axes.annotate(
        f"full attention ({full['samples']} samples)",
        (0.01, full["score"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color=COLORS["muted"],
    )
    lines = [(name, late) for late in (True, False) for name in LOOKS]
    lines = [line for line in lines if any((r["method"], r["late"]) == line for r in table)]
    for place, (name, late) in enumerate(lines):
        color, dash, marker = LOOKS[name]
        rows = sorted(
            (r for r in table if (r["method"], r["late"]) == (name, late)), key=lambda r: r["budget"]
        )
        # Many lines have the same values: each a step beside the other, so that all are seen.
        aside = 1.6 * (place - (len(lines) - 1) / 2)
        axes.plot(
            [r["budget"] for r in rows],
            [r["score"] + aside for r in rows],
            dash if late else "-",
            marker=marker,
            color=color,
            markerfacecolor=color if late else PALETTE["white"],
            linewidth=2.2 if late else 1.2,
            label=LABELS[name] + ("" if late else ", question in the prompt"),
        )
    _budgets(axes, sorted({r["budget"] for r in table if r["budget"]}))
    axes.set(
        xlabel="budget, tokens a head", ylabel="needles found, %", ylim=(-11, 112), yticks=range(0, 101, 25)
    )
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def mass_by_layer(record: dict[str, Any], budgets: Sequence[int] | None = None) -> Figure:
    """Share of the softmax that each method's choice holds, layer by layer: mean over heads."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    table = masses(record)
    budgets = budgets or sorted({r["budget"] for r in table})
    fig, panels = plt.subplots(
        len(budgets),
        1,
        figsize=(WIDTH, 2.1 + 2.3 * len(budgets)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, budget in zip(panels[:, 0], budgets):
        for name, (color, dash, _) in LOOKS.items():
            for row in table:
                if (row["method"], row["budget"]) == (name, budget):
                    mean = 100 * np.mean(row["mass"], axis=1)
                    label = LABELS[name] if axes is panels[0, 0] else None
                    axes.plot(range(len(mean)), mean, dash, color=color, label=label)
        axes.set_title(f"budget {budget}")
        axes.set(ylabel="softmax held, %", ylim=(0, 103))
    panels[-1, 0].set_xlabel("layer")
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def lost_by_head(
    record: dict[str, Any], budget: int, methods: Sequence[str] = ("adamas", "quest", "h2o")
) -> Figure:
    """What each head's choice misses of the most that so many keys can hold: oracle's mass minus the method's."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    table = {r["method"]: np.array(r["mass"]) for r in masses(record) if r["budget"] == budget}
    fig, panels = plt.subplots(
        1, len(methods), figsize=(WIDTH, 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    image = None
    for axes, name in zip(panels[0], methods):
        lost = 100 * (table["oracle"] - table[name])
        image = axes.imshow(lost, vmin=0, vmax=60, aspect="auto", cmap="cividis")
        axes.set_title(LABELS[name], fontsize=11.5)
        axes.set(xlabel="query head", xticks=range(0, lost.shape[1], 2))
        axes.grid(visible=False)
    panels[0, 0].set_ylabel("layer")
    assert image is not None
    fig.colorbar(
        image, ax=panels[0], label=f"softmax lost against the oracle, points, budget {budget}", extend="max"
    )
    return fig


def key_picture(record: dict[str, Any]) -> Figure:
    """What decides about two-bit codes of this model's keys: uneven channels, a constant part, uneven lengths."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    keys = record["keys"]
    layers = range(len(keys["spread"]))
    fig, (left, right) = plt.subplots(2, 1, figsize=(WIDTH, 6.2), sharex=True, layout="constrained")
    left.plot(layers, 100 * np.array(keys["top"]), ":o", color=PALETTE["sky"], label="keys as they are")
    left.plot(
        layers, 100 * np.array(keys["top_transformed"]), "-o", color=PALETTE["blue"], label="after Hadamard"
    )
    left.axhline(100 * keys["equal"], color=COLORS["muted"], linestyle=(0, (4, 2)), linewidth=1.4)
    left.annotate(
        "equal channels",
        (0, 100 * keys["equal"]),
        (0, -14),
        textcoords="offset points",
        color=COLORS["muted"],
    )
    left.set_title(f"Energy in the {TOP} strongest of {TOP / keys['equal']:.0f} channels")
    left.set(ylabel="%", ylim=(0, None))
    left.legend()
    right.plot(
        layers,
        100 * np.array(keys["constant"]),
        "-s",
        color=PALETTE["purple"],
        label="energy of the mean key",
    )
    right.plot(
        layers,
        100 * np.array(keys["norms"]),
        "--^",
        color=PALETTE["orange"],
        label="spread of lengths over their mean",
    )
    right.set_title("What all keys share, and how their lengths differ")
    right.set(xlabel="layer", ylabel="%", ylim=(0, None))
    right.legend()
    return fig


def _budgets(axes: Axes, budgets: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, labels=[f"{b:,}" for b in budgets])
    axes.minorticks_off()
