"""Pictures of the chapter and the lab on sinks and windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {
    "cache": "positions inside the cache",
    "text": "positions of the text",
    "far": "sinks 65,000 tokens away",
}
_MARKS = {"cache": "o-", "text": "s--", "far": "^-."}


def cache(sinks: int = 4, budget: int = 8, newest: int = 9) -> Figure:
    """Two moments of a cache: what is kept, where it stood in the text and where it stands now."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    colors = {"sink": style.PALETTE["orange"], "recent": style.PALETTE["sky"], "gone": style.PALETTE["light"]}
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 3.6), layout="constrained")
        for ax, last in zip(axes, (newest, newest + 4)):
            place = 0
            for token in range(newest + 5):
                if token > last:
                    break
                kept = token < sinks or last - token < budget - sinks
                kind = "sink" if token < sinks else "recent" if kept else "gone"
                hatch = "//" if kind == "sink" else ""
                box = Rectangle((token, 0), 0.94, 0.9, hatch=hatch, facecolor=colors[kind], linewidth=0.8)
                box.set_edgecolor(style.COLORS["text"])
                ax.add_patch(box)
                label = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if hatch else None
                ax.text(token + 0.47, 0.45, str(token), ha="center", va="center", bbox=label)
                if kept:
                    ax.text(
                        token + 0.47,
                        -0.3,
                        str(place),
                        ha="center",
                        va="center",
                        color=style.PALETTE["vermillion"],
                    )
                    place += 1
            ax.text(-0.2, 0.45, "in the text", ha="right", va="center", fontsize=10)
            ax.text(
                -0.2,
                -0.3,
                "in the cache",
                ha="right",
                va="center",
                fontsize=10,
                color=style.PALETTE["vermillion"],
            )
            ax.set_title(f"token {last} is read", fontsize=11)
            ax.set(xlim=(-2.6, newest + 5.1), ylim=(-0.7, 1.0))
            ax.axis("off")
    return fig


def sinks(record: Mapping[str, Any]) -> Figure:
    """Perplexity against the number of sinks, for each count of positions; full attention as a line."""
    import matplotlib.pyplot as plt

    rows: Sequence[Mapping[str, Any]] = record["rows"]
    full = next(r["perplexity"] for r in rows if r["budget"] is None)
    none = next(r["perplexity"] for r in rows if r["budget"] is not None and r["sinks"] == 0)
    counts = sorted({r["sinks"] for r in rows if r["budget"] is not None})
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.8), layout="constrained")
        for where, color in zip(("cache", "text", "far"), style.CYCLE):
            found = {
                r["sinks"]: r["perplexity"]
                for r in rows
                if r["positions"] == where and r["budget"] is not None
            }
            found[0] = none
            # Two of the curves lie on each other: the first is drawn wide, with hollow marks.
            wide = {"linewidth": 5, "markersize": 11, "markerfacecolor": "white", "alpha": 0.7}
            look = wide if where == "cache" else {}
            ys = [found[s] for s in counts]
            ax.plot(range(len(counts)), ys, _MARKS[where], color=color, label=_NAMES[where], **look)
        ax.axhline(full, color=style.COLORS["text"], linestyle=":", label="full attention")
        ax.set(yscale="log", xlabel="sinks", ylabel="perplexity")
        ax.set_xticks(range(len(counts)), [str(s) for s in counts])
        low, high = ax.get_ylim()
        ticks = [y for y in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= y <= high]
        ax.set_yticks(ticks, [f"{y:,}" for y in ticks])
        ax.minorticks_off()
        ax.legend()
    plt.close(fig)
    return fig


def runs(record: Mapping[str, Any]) -> Figure:
    """Loss along the text: full attention, no sinks, four sinks."""
    import matplotlib.pyplot as plt

    width, budget = record["run"], record["budget"]
    wanted = (
        ("full attention", None, 0, "text"),
        ("no sinks", budget, 0, "text"),
        ("4 sinks", budget, 4, "cache"),
    )
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.6), layout="constrained")
        for (label, size, count, where), color, dash in zip(wanted, style.CYCLE, ("-", "--", "-")):
            row = next(
                r for r in record["rows"] if (r["budget"], r["sinks"], r["positions"]) == (size, count, where)
            )
            # Eight runs of 16 tokens a point: single words are noise.
            means = [np.mean(row["runs"][a : a + 8]) for a in range(0, len(row["runs"]), 8)]
            at = [width * (8 * a + 4) for a in range(len(means))]
            ax.plot(at, means, dash, marker="o", markersize=4, color=color, label=label)
        ax.axvline(budget, color=style.COLORS["text"], linestyle=":")
        ax.set(xlabel="token", ylabel="nats a token", ylim=(0, None))
        ax.legend()
    return fig


def layers(found: Sequence[Mapping[str, float]]) -> Figure:
    """Attention mass on the first tokens, and the length of the first value, by layer."""
    import matplotlib.pyplot as plt

    x = np.arange(len(found))
    with plt.rc_context(style.rc()):
        fig, (top, low) = plt.subplots(2, 1, figsize=(style.WIDTH, 4.8), sharex=True, layout="constrained")
        top.bar(
            x,
            [100 * r["mass"] for r in found],
            color=style.PALETTE["sky"],
            label="tokens 0 to 3 (1 to 3 add under 1 %)",
        )
        top.bar(
            x, [100 * r["token_0"] for r in found], color=style.PALETTE["blue"], hatch="//",
            edgecolor="white", linewidth=0, label="token 0",
        )  # fmt: skip
        top.set(ylabel="% of the weight")
        top.legend()
        low.plot(x, [r["value"] for r in found], "o-", color=style.COLORS["value"])
        low.axhline(1, color=style.COLORS["text"], linestyle=":")
        low.set(xlabel="layer", ylabel="length of value 0\nover the median", ylim=(0, None))
    plt.close(fig)
    return fig
