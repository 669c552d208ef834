"""Pictures of the chapter on linear attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effattn_lab.figures import style
from effattn_lab.foundations import cost_model
from effattn_lab.linear import linear_attention_cost as cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _box(
    ax: Axes, x: float, y: float, w: float, h: float, color: str, label: str, hatch: str = "", below: str = ""
) -> None:
    from matplotlib.patches import Rectangle

    edge = style.COLORS["text"]
    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=edge, hatch=hatch, linewidth=1.0))
    box = {"facecolor": style.PALETTE["white"], "edgecolor": "none", "pad": 1.5} if hatch else None
    ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", bbox=box)
    if below:
        ax.text(x + w / 2, y - 0.22, below, ha="center", va="top", fontsize=10)


def two_orders() -> Figure:
    """The same three factors, multiplied from the left and from the right."""
    import matplotlib.pyplot as plt

    colors = style.COLORS
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, (top, low) = plt.subplots(2, 1, figsize=(style.WIDTH, 5.0), layout="constrained")
        for ax in (top, low):
            ax.set_xlim(-0.2, 11.4)
            ax.set_ylim(-0.9, 3.3)
            ax.set_aspect("equal")
            ax.axis("off")
        top.set_title("(φ(Q) φ(K)ᵀ) V: every pair has a number")
        _box(top, 0.2, 0, 0.7, 3, colors["query"] + "55", "φQ", below="N × F")
        _box(top, 1.4, 2.3, 3, 0.7, colors["key"] + "66", "φKᵀ", below="F × N")
        top.text(4.9, 1.5, "=", ha="center", va="center", fontsize=15)
        _box(top, 5.4, 0, 3, 3, colors["score"] + "66", "weights", hatch="//", below="N × N")
        _box(top, 8.8, 0, 0.7, 3, colors["value"] + "55", "V", below="N × Dᵥ")
        top.text(9.85, 1.5, "=", ha="center", va="center", fontsize=15)
        _box(top, 10.2, 0, 0.7, 3, colors["output"] + "66", "O", below="N × Dᵥ")
        low.set_title("φ(Q) (φ(K)ᵀ V): no pair is ever visited")
        _box(low, 0.2, 2.3, 3, 0.7, colors["key"] + "66", "φKᵀ", below="F × N")
        _box(low, 3.5, 0, 0.7, 3, colors["value"] + "55", "V", below="N × Dᵥ")
        low.text(4.65, 1.5, "=", ha="center", va="center", fontsize=15)
        _box(low, 5.1, 1.15, 0.7, 0.7, colors["state"], "S", below="F × Dᵥ")
        arrow = {"arrowstyle": "->", "color": colors["text"]}
        low.annotate("", (7.0, 1.5), xytext=(6.1, 1.5), arrowprops=arrow)
        _box(low, 7.4, 0, 0.7, 3, colors["query"] + "55", "φQ", below="N × F")
        _box(low, 8.5, 2.3, 0.7, 0.7, colors["state"], "S")
        low.text(9.75, 1.5, "=", ha="center", va="center", fontsize=15)
        _box(low, 10.2, 0, 0.7, 3, colors["output"] + "66", "O", below="N × Dᵥ")
    return fig


def state_growth(head_dim: int = 64) -> Figure:
    """Bytes that one head keeps, against the length: a cache in 16 bits, states in float32."""
    import matplotlib.pyplot as plt

    lengths = np.geomspace(16, 131_072, 200)
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.9), layout="constrained")
        cache = 2 * 2 * head_dim * lengths
        ax.plot(lengths, cache / 1024, color=style.COLORS["naive"], label="softmax: keys and values, 16 bits")
        kinds = [
            (f"elu + 1, {head_dim} features", head_dim, "-"),
            (f"Hedgehog, {2 * head_dim} features", 2 * head_dim, "--"),
            ("Taylor of 16 dimensions, 273 features", 273, "-."),
        ]
        for (name, features, dash), color in zip(kinds, style.CYCLE[2:] + style.CYCLE[:1]):
            size = float(cost.state_bytes(1, features, head_dim))
            at = size / (4 * head_dim)
            ax.plot(lengths, np.full_like(lengths, size / 1024), dash, color=color, label=name)
            ax.plot([at], [size / 1024], "o", color=color)
            ax.annotate(
                f"{at:.0f}", (at, size / 1024), xytext=(-3, 5), textcoords="offset points", ha="right"
            )
        ax.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="KiB a head")
        ax.set_title("what one head remembers")
        ax.legend(loc="upper left")
    return fig


def chunk_tradeoff(dim: int = 64) -> Figure:
    """FLOPs and bytes a token against the chunk size, for the two-pass form in 16 bits."""
    import matplotlib.pyplot as plt

    sizes = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    flops = [float(cost.chunked_flops(1, 1, dim, dim, int(c))) / 1e3 for c in sizes]
    nbytes = [float(cost.chunked_bytes(1, int(c), dim, dim, int(c))) / c / 1e3 for c in sizes]
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 3.5), layout="constrained")
        left.plot(sizes, flops, "o-", color=style.COLORS["compute"])
        right.plot(sizes, nbytes, "s-", color=style.COLORS["memory"])
        for ax, title, unit in ((left, "work", "kFLOP a token"), (right, "traffic", "kB a token")):
            ax.axvline(64, linestyle=":", color=style.COLORS["text"], linewidth=1.3)
            ax.set(xscale="log", yscale="log", xlabel="chunk size C", ylabel=unit)
            ax.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
            low, high = ax.get_ylim()
            ticks = [y for y in (1, 2, 5, 10, 20, 50, 100, 200) if low <= y <= high]
            ax.set_yticks(ticks, [str(y) for y in ticks])
            ax.minorticks_off()
            ax.set_title(title)
    return fig


def capacity(features: Sequence[int] = (32, 64, 128)) -> Figure:
    """Error of reading back one of n stored values, against n, with the prediction n / F."""
    import matplotlib.pyplot as plt

    from effattn_lab.figures.linear_attention_lab import capacity as measured

    counts = np.unique(np.geomspace(2, 512, 18).astype(int))
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 3.7), layout="constrained")
        for f, mark, color in zip(features, ("o", "s", "^"), style.CYCLE):
            ax.plot(counts, measured(f, counts), mark, color=color, label=f"{f} features, measured")
            ax.plot(counts, (counts - 1) / f, "-", color=color, linewidth=1.2)
        ax.axhline(1.0, linestyle=":", color=style.COLORS["text"], linewidth=1.3)
        ax.annotate("as large as the value itself", (2, 1.0), xytext=(0, 5), textcoords="offset points")
        ax.set(
            xscale="log", yscale="log", xlabel="pairs stored in one state", ylabel="squared error / value²"
        )
        ax.set_ylim(5e-3, 30)
        ax.set_title("reading back one of n pairs (lines: (n − 1) / F)")
        ax.legend(loc="lower right")
    return fig


def crossover(record: Mapping[str, Any]) -> Figure:
    """Softmax's time over linear attention's, measured on a CPU, beside the ratio of FLOPs or bytes.

    ``record``: :func:`effattn_lab.linear.linear_attention_bench.recorded`.
    """
    import matplotlib.pyplot as plt

    from effattn_lab.linear.linear_attention_bench import CHUNK, HEAD_DIM

    rows = record["rows"]
    lengths = np.array(sorted({row["seqlen"] for row in rows}))
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained", sharey=True)
        for name, mark, color in (("chunked", "o", style.CYCLE[0]), ("fla naive", "s", style.CYCLE[2])):
            found = [
                (r["seqlen"], r["vs_sdpa"]) for r in rows if r["implementation"] == name and r["vs_sdpa"]
            ]
            left.plot(*zip(*found), mark + "-", color=color, label=f"{name}, measured")
        flops = [
            cost_model.attention_flops(1, 1, int(n), int(n), HEAD_DIM, causal=True)
            / cost.chunked_flops(1, int(n), HEAD_DIM, HEAD_DIM, CHUNK)
            for n in lengths
        ]
        left.plot(lengths, flops, "--", color=style.COLORS["text"], linewidth=1.5, label="ratio of FLOPs")
        found = [(r["seqlen"], r["vs_sdpa"]) for r in rows if r["implementation"] == "step" and r["vs_sdpa"]]
        right.plot(*zip(*found), "^-", color=style.CYCLE[1], label="one step, measured")
        nbytes = [2 * HEAD_DIM * n * 4 / (2 * cost.state_bytes(1, HEAD_DIM, HEAD_DIM)) for n in lengths]
        right.plot(lengths, nbytes, "--", color=style.COLORS["text"], linewidth=1.5, label="ratio of bytes")
        for ax, title in ((left, "forward, N tokens"), (right, "decode, one token after N")):
            ax.axhline(1.0, linestyle=":", color=style.COLORS["text"], linewidth=1.2)
            ax.set(xscale="log", yscale="log", xlabel="N", title=title)
            ax.set_xticks([128, 1024, 8192, 32768], ["128", "1 k", "8 k", "32 k"])
            ax.minorticks_off()
            ax.legend(loc="upper left")
        left.set_ylabel("softmax / linear")
    return fig
