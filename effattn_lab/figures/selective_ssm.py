"""Pictures of the chapter on selective state spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = "Ada met Bob, who left Eve"  # capitals at 0, 8 and 22
_FIXED, _SHORT, _LONG = 0.12, 0.01, 4.0  # steps of a channel with A = -1
_HATCHES = ("", "///", "...")
_FACES = (style.PALETTE["sky"], style.PALETTE["orange"], style.PALETTE["green"])


def shares(steps: np.ndarray, marks: Sequence[int]) -> np.ndarray:
    """What is left of a write of size 1 at each of ``marks``, after every token: ``[marks, tokens]``; A = -1."""
    clock = np.cumsum(steps)
    token = np.arange(len(steps))
    return np.array([np.where(token >= m, np.exp(clock[m] - clock), 0.0) for m in marks])


def clocks() -> Figure:
    """One channel reads a line of text: a clock that ticks evenly, and one that the text itself winds."""
    import matplotlib.pyplot as plt

    capitals = [i for i, c in enumerate(TEXT) if c.isupper()]
    even = np.full(len(TEXT), _FIXED)
    chosen = np.full(len(TEXT), _SHORT)
    chosen[capitals] = _LONG
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(
            2, 2, figsize=(style.WIDTH, 3.9), layout="constrained", gridspec_kw={"height_ratios": [1, 1.7]}
        )
        for column, (name, steps) in enumerate((("fixed steps", even), ("chosen steps", chosen))):
            top, low = axes[:, column]
            top.bar(np.arange(len(TEXT)), np.minimum(steps, _LONG), color=style.PALETTE["blue"])
            top.set(ylim=(0, _LONG * 1.08), xticks=[], yticks=[0, 2, 4])
            top.set_title(name, fontsize=11)
            left = shares(steps, capitals)
            base = np.zeros(len(TEXT))
            for i, m in enumerate(capitals):
                low.bar(
                    np.arange(len(TEXT)), left[i], 1.0, bottom=base, color=_FACES[i], hatch=_HATCHES[i],
                    edgecolor=style.PALETTE["white"], linewidth=0, label=f"of {TEXT[m]}",
                )  # fmt: skip
                base += left[i]
            low.set(ylim=(0, 1.75), xticks=capitals, xlabel="characters read")
            low.set_xticklabels([TEXT[m] for m in capitals])
            for ax in (top, low):
                ax.set_xlim(-0.6, len(TEXT) - 0.4)
                ax.grid(False, axis="x")
        axes[0, 0].set_ylabel("step Δ")
        axes[1, 0].set_ylabel("in the state")
        axes[1, 0].legend(loc="upper right", ncols=3, fontsize=9.5, columnspacing=0.9, handletextpad=0.4)
    plt.close(fig)
    return fig


def rules() -> Figure:
    """What a step keeps and what it writes, exact and as released, against the step's length."""
    import matplotlib.pyplot as plt

    x = np.linspace(0, 3, 200)
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 2.9), layout="constrained")
        left.plot(x, np.exp(-x), color=style.CYCLE[0], label="exact, and the code")
        left.plot(x, 1 - x, "--", color=style.CYCLE[1], label="Euler")
        left.axhspan(-2.2, -1, color=style.PALETTE["light"])
        left.text(0.08, -1.72, "below −1: the state grows", fontsize=9.5)
        left.set(ylim=(-2.2, 1.1), ylabel="kept of the state")
        right.plot(x, 1 - np.exp(-x), color=style.CYCLE[0], label="exact (the paper)")
        right.plot(x, x, "--", color=style.CYCLE[1], label="Euler (the code)")
        right.set(ylim=(0, 3), ylabel="written, times |A|/(Bu)")
        for ax in (left, right):
            ax.set(xlabel="step, Δ|A|", xlim=(0, 3))
        left.legend(loc="upper right", fontsize=9.5)
        right.legend(loc="upper left", fontsize=9.5)
    plt.close(fig)
    return fig


def rounds(name: str, length: int) -> list[list[tuple[int, int]]]:
    """Which entries a scan combines, round by round: pairs ``(earlier, later)``, the result at the later place."""
    if name == "hillis-steele":
        steps = [1 << k for k in range((length - 1).bit_length())]
        return [[(i - step, i) for i in range(step, length)] for step in steps]
    if name == "blelloch":
        return _blelloch(list(range(length)))
    raise ValueError(f"name: expected 'hillis-steele' or 'blelloch', got {name!r}")


def _blelloch(places: list[int]) -> list[list[tuple[int, int]]]:
    """The recursion of `effattn_lab.linear.scans.scan_blelloch` on places instead of maps."""
    if len(places) <= 1:
        return []
    odd = places[1::2]
    up = [(places[2 * i], place) for i, place in enumerate(odd)]
    down = [(odd[i], place) for i, place in enumerate(places[2::2])]
    return [up, *_blelloch(odd), *([down] if down else [])]


def scans(length: int = 8) -> Figure:
    """Two parallel scans as networks: time runs down, a dot is a combination of two maps."""
    import matplotlib.pyplot as plt

    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 3.0), layout="constrained")
        for ax, name in zip(axes, ("hillis-steele", "blelloch")):
            found = rounds(name, length)
            for i in range(length):
                ax.plot([i, i], [0, len(found) + 0.3], color=style.COLORS["grid"], linewidth=1.2, zorder=1)
            for depth, pairs in enumerate(found):
                for early, late in pairs:
                    ax.plot([early, late], [depth, depth + 1], color=style.CYCLE[0], linewidth=1.5, zorder=2)
                    ax.plot(late, depth + 1, "o", color=style.CYCLE[1], markersize=6, zorder=3)
            work = sum(len(pairs) for pairs in found)
            ax.set_title(f"{name.title()}: {work} in {len(found)} rounds", fontsize=10.5)
            ax.set(xlim=(-0.5, length - 0.5), ylim=(5.4, -0.3), xticks=range(length), xlabel="token")
            ax.set(yticks=range(1, len(found) + 1))
            for side in ("left", "bottom"):
                ax.spines[side].set_visible(False)
            ax.tick_params(length=0)
        axes[0].set_ylabel("round")
    plt.close(fig)
    return fig


def letters(table: Sequence[dict[str, Any]]) -> Figure:
    """The recorded readers: share of right answers against the learning rate, mean of the seeds and each seed.

    Args:
        table: rows of :mod:`effattn_lab.linear.selective_ssm_letters`.
    """
    import matplotlib.pyplot as plt

    from effattn_lab.linear.selective_ssm_letters import far

    names = list(dict.fromkeys(row["reader"] for row in table))
    rates = sorted({row["rate"] for row in table})
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.HALF + 1.6, 3.2), layout="constrained")
        for i, name in enumerate(names):
            means = []
            for rate in rates:
                found = [100 * far(row) for row in table if (row["reader"], row["rate"]) == (name, rate)]
                means.append(sum(found) / len(found))
                spread = np.linspace(-0.012, 0.012, len(found)) + 0.02 * (i - 1)
                ax.plot(
                    rate * np.exp(spread), found, "osv"[i % 3], color=style.CYCLE[i], markersize=4, alpha=0.6
                )
            style_ = ("-", "--", "-.")[i % 3]
            ax.plot(rates, means, style_, marker="osv"[i % 3], color=style.CYCLE[i], label=name)
        ax.set(xscale="log", xlabel="learning rate", ylabel="right answers, %")
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.minorticks_off()
        ax.legend(loc="lower center", fontsize=9.5)
    plt.close(fig)
    return fig
