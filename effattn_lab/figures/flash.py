"""Pictures of the flash chapter. Each function returns a Matplotlib figure; numbers are computed, not typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effattn_lab.figures.style import COLORS, PALETTE, WIDTH, rc
from effattn_lab.foundations import cost_model
from effattn_lab.full.flash import tile_step
from effattn_lab.measure.roofline import gpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = {"color": COLORS["text"], "linewidth": 1.0}


def _new(
    rows: int = 1, cols: int = 1, *, height: float, width: float = WIDTH, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure in the book's style."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    return plt.subplots(rows, cols, figsize=(width, height), layout="constrained", **kwargs)


def _box(ax: Axes, x: float, y: float, w: float, h: float, color: str, label: str, **kwargs: Any) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=COLORS["text"], linewidth=0.9, **kwargs))
    if label:
        back = {"facecolor": color, "edgecolor": "none", "pad": 1.5} if "hatch" in kwargs else None
        ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=11, bbox=back)


def memory_path() -> Figure:
    """What crosses the border between main memory and the chip: three kernels against one."""
    fig, axes = _new(1, 2, height=4.3)
    tint = {"q": "#9CC9E3", "k": "#F5D48A", "v": "#8FD3BD", "o": "#E6BFD3", "s": "#F0A988"}
    for ax, title in zip(axes, ("Three kernels", "One kernel")):
        ax.set(xlim=(0, 10), ylim=(0, 10))
        ax.axis("off")
        ax.set_title(title)
        ax.axhspan(5.4, 10, color="#F4F4F4", zorder=0)
        ax.axhspan(0, 3.7, color="#E3F1FA", zorder=0)
        ax.text(0.15, 9.45, "HBM: gigabytes", fontsize=10.5, color=COLORS["text"])
        ax.text(0.15, 0.25, "one SM: kilobytes", fontsize=10.5, color=COLORS["text"])

    def arrow(ax: Axes, x: float, up: bool, color: str = COLORS["text"], width: float = 1.6) -> None:
        y0, y1 = (3.75, 5.35) if up else (5.35, 3.75)
        ax.annotate(
            "", (x, y1), (x, y0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": width}
        )

    left, right = axes
    for x, name, key in ((0.2, "Q", "q"), (1.35, "K", "k"), (7.1, "V", "v"), (8.6, "O", "o")):
        _box(left, x, 5.7, 0.95, 3.2, tint[key], name)
    for x, name in ((2.6, "S\nN×N"), (4.85, "P\nN×N")):
        _box(left, x, 5.7, 2.0, 3.2, tint["s"], name, hatch="//")
    for x, w, name in ((0.3, 2.9, "QKᵀ"), (3.7, 2.5, "softmax"), (6.7, 2.9, "PV")):
        _box(left, x, 1.2, w, 1.9, PALETTE["white"], name)
    for x, up, heavy in (
        (0.7, False, False),
        (1.8, False, False),
        (2.9, True, True),
        (4.1, False, True),
        (5.5, True, True),
        (6.75, False, True),
        (7.6, False, False),
        (9.1, True, False),
    ):
        arrow(left, x, up, COLORS["hbm"] if heavy else COLORS["text"], 3.2 if heavy else 1.4)

    for x, name, key in ((0.3, "Q", "q"), (2.0, "K", "k"), (3.3, "V", "v"), (7.0, "O", "o")):
        _box(right, x, 5.7, 1.0, 3.2, tint[key], name)
        if name != "O":
            _box(right, x, 8.0 if name == "Q" else 6.1, 1.0, 0.6, PALETTE["white"], "")
    _box(right, 8.6, 5.7, 0.45, 3.2, tint["o"], "L")
    for x, up in ((0.8, False), (2.5, False), (3.8, False), (7.5, True), (8.8, True)):
        arrow(right, x, up)
    for x, w, name, key in ((0.3, 1.0, "$Q_i$", "q"), (2.0, 1.0, "$K_j$", "k"), (3.3, 1.0, "$V_j$", "v")):
        _box(right, x, 1.5, w, 1.3, tint[key], name)
    _box(right, 4.7, 1.5, 1.4, 1.3, tint["s"], "$S_{ij}$", hatch="//")
    _box(right, 6.4, 1.5, 3.2, 1.3, "#FBF6C9", "m, ℓ, acc")
    return fig


def online_row(block: int = 6, seed: int = 3) -> Figure:
    """One row of scores read in blocks: the largest so far climbs, and each climb shrinks what was gathered."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.6 * torch.randn(24, generator=generator) + torch.linspace(-1, 1.4, 24)
    m_i, l_i, acc = torch.full((1,), -torch.inf), torch.zeros(1), torch.zeros(1, 1)
    tops, kept, added = [], [], []
    for s in scores.split(block):
        before = l_i.item()
        alpha = torch.exp(m_i - torch.maximum(m_i, s.max())).item()
        m_i, l_i, acc = tile_step(m_i, l_i, acc, s[None], torch.ones(len(s), 1))
        tops.append(m_i.item())
        kept.append((before, before * alpha))
        added.append(l_i.item() - before * alpha)

    fig, (top, low) = _new(2, 1, height=5.0, gridspec_kw={"height_ratios": [1.15, 1]})
    top.vlines(range(24), scores.min() - 0.4, scores, color=COLORS["score"], linewidth=5)
    top.plot(range(24), scores, "o", color=COLORS["compute"], label="score s")
    for j, m in enumerate(tops):
        top.plot(
            [j * block - 0.5, (j + 1) * block - 0.5],
            [m, m],
            color=COLORS["hbm"],
            linestyle="--",
            label="m after the block" if j == 0 else None,
        )
        top.axvline((j + 1) * block - 0.5, color=COLORS["muted"], linewidth=0.8)
    top.set(
        ylabel="score", xlim=(-0.5, 23.5), ylim=(scores.min() - 0.4, max(tops) + 1.9), xlabel="key index j"
    )
    top.legend(loc="upper left", ncols=2)
    x = np.arange(len(tops))
    low.bar(
        x - 0.22,
        [b for b, _ in kept],
        0.36,
        color=PALETTE["light"],
        edgecolor=COLORS["muted"],
        hatch="//",
        label="ℓ before the block",
    )
    low.bar(x + 0.18, [k for _, k in kept], 0.36, color=COLORS["flash"], label="kept: α ℓ")
    low.bar(
        x + 0.18, added, 0.36, bottom=[k for _, k in kept], color=COLORS["key"], label="added by the block"
    )
    plate = {"facecolor": PALETTE["white"], "edgecolor": "none", "pad": 1.5}
    for j, (b, k) in enumerate(kept):
        low.text(j + 0.18, k + added[j] + 0.06, f"{k + added[j]:.2f}", ha="center", fontsize=10.5)
        if b:
            low.text(j - 0.22, b / 2, f"α\n{k / b:.2f}", ha="center", va="center", fontsize=10.5, bbox=plate)
    top_l = max(k + a for (_, k), a in zip(kept, added))
    low.set(
        ylabel="sum ℓ", xticks=x, ylim=(0, top_l * 1.55), xticklabels=[f"block {j}" for j in range(len(tops))]
    )
    low.grid(axis="x", visible=False)
    low.legend(loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.4)
    return fig


def tile_classes(seqlen_q: int, seqlen_k: int, block_m: int, block_n: int) -> np.ndarray:
    """Kind of each tile under the causal offset rule: 0 skipped, 1 crosses the diagonal (masked), 2 full."""
    kinds = np.zeros((-(-seqlen_q // block_m), -(-seqlen_k // block_n)), dtype=int)
    offset = seqlen_k - seqlen_q
    for i in range(kinds.shape[0]):
        first, last = i * block_m + offset, min((i + 1) * block_m, seqlen_q) - 1 + offset
        for j in range(kinds.shape[1]):
            low, high = j * block_n, min((j + 1) * block_n, seqlen_k) - 1
            kinds[i, j] = 0 if low > last else 2 if high <= first else 1
    return kinds


def causal_tiles(tiles: int = 8) -> Figure:
    """Left: which tiles a causal kernel computes. Right: their share of all tiles, against length."""
    from matplotlib.patches import Rectangle

    fig, (left, right) = _new(1, 2, height=3.9, gridspec_kw={"width_ratios": [1, 1.2]})
    face = (PALETTE["white"], PALETTE["orange"], PALETTE["blue"])
    kinds = tile_classes(tiles * 64, tiles * 64, 64, 64)
    for i, row in enumerate(kinds):
        for j, kind in enumerate(row):
            left.add_patch(
                Rectangle(
                    (j, i),
                    1,
                    1,
                    facecolor=face[kind],
                    edgecolor=COLORS["muted"],
                    hatch="//" if kind == 1 else None,
                    linewidth=0.8,
                )
            )
    for kind, label in ((2, "full: no mask"), (1, "diagonal: masked"), (0, "skipped")):
        left.add_patch(
            Rectangle(
                (-9, -9),
                1,
                1,
                facecolor=face[kind],
                edgecolor=COLORS["muted"],
                label=label,
                hatch="//" if kind == 1 else None,
            )
        )
    left.set(xlim=(0, tiles), ylim=(tiles, 0), aspect="equal", xlabel="key tile", ylabel="query tile")
    left.set_xticks(np.arange(tiles) + 0.5, [str(t) for t in range(tiles)])
    left.set_yticks(np.arange(tiles) + 0.5, [str(t) for t in range(tiles)])
    left.tick_params(length=0)
    left.grid(False)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1.0))
    lengths = [2**p for p in range(6, 15)]
    for block, style in ((128, "o-"), (64, "s--")):
        share = [(tile_classes(n, n, block, 64) > 0).mean() for n in lengths]
        right.plot(lengths, share, style, label=f"{block} queries a tile")
    right.axhline(0.5, color=COLORS["muted"], linestyle=":", label="half")
    right.set(
        xscale="log", xlabel="sequence length N (tokens)", ylabel="share of tiles computed", ylim=(0.4, 1.04)
    )
    right.set_xticks(lengths[::2], [f"{n:,}" for n in lengths[::2]])
    right.minorticks_off()
    right.legend()
    return fig


def traffic_curves(head_dim: int = 128) -> Figure:
    """Bytes of one head's forward pass against length: naive, tiled, and the least possible."""
    fig, ax = _new(height=4.2)
    lengths = [2**p for p in range(8, 18)]
    sizes = (1, 1, 1)

    def mb(values: Sequence[float]) -> list[float]:
        return [v / 1e6 for v in values]

    naive = [cost_model.naive_bytes(*sizes, n, n, head_dim) for n in lengths]
    ax.plot(lengths, mb(naive), "o-", color=COLORS["naive"], label="naive: S and P out and back")
    for block_m, style in ((32, "^--"), (128, "s--")):
        tiled = [
            cost_model.flash_tiled_bytes(*sizes, n, n, head_dim, block_m=block_m, block_n=64) for n in lengths
        ]
        ax.plot(
            lengths,
            mb(tiled),
            style,
            color=COLORS["flash"] if block_m == 128 else PALETTE["sky"],
            label=f"tiled, {block_m} queries a tile",
        )
    least = [cost_model.flash_bytes(*sizes, n, n, head_dim) for n in lengths]
    ax.plot(lengths, mb(least), "-", color=COLORS["good"], label="each byte once")
    ax.set(xscale="log", yscale="log", xlabel="sequence length N (tokens)", ylabel="traffic of one head (MB)")
    ax.set_xticks(lengths[::3], [f"{n:,}" for n in lengths[::3]])
    ax.minorticks_off()
    ax.legend()
    return fig


def roofline_points(
    seqlen: int = 8192, head_dim: int = 128, num_heads: int = 32, gpu_name: str = "A100"
) -> Figure:
    """The same FLOPs at three intensities under one roof."""
    chip = gpu(gpu_name)
    fig, ax = _new(height=4.2)
    x = np.logspace(-1, 4.2, 200)
    ax.plot(x, np.minimum(chip.peak_flops, x * chip.bandwidth) / 1e12, color=COLORS["text"], linewidth=2)
    ax.axvline(chip.ridge, color=COLORS["muted"], linestyle=":", linewidth=1.2)
    ax.text(chip.ridge * 1.12, 0.12, f"ridge\n{chip.ridge:.0f} FLOP/B", color=COLORS["text"], fontsize=10.5)
    heads = (1, num_heads, num_heads)
    flops = cost_model.attention_flops(1, num_heads, seqlen, seqlen, head_dim)
    decode = cost_model.decode_flops(1, num_heads, seqlen, head_dim)
    points = (
        ("decode", decode, cost_model.decode_bytes(*heads, seqlen, head_dim), "D", COLORS["key"], (8, -16)),
        (
            "prefill, naive",
            flops,
            cost_model.naive_bytes(*heads, seqlen, seqlen, head_dim),
            "o",
            COLORS["naive"],
            (-10, 14),
        ),
        (
            "prefill, flash,\neach byte once",
            flops,
            cost_model.flash_bytes(*heads, seqlen, seqlen, head_dim),
            "s",
            COLORS["flash"],
            (-46, -42),
        ),
    )
    for label, work, moved, marker, color, shift in points:
        intensity = work / moved
        height = min(chip.peak_flops, intensity * chip.bandwidth) / 1e12
        ax.plot(intensity, height, marker, color=color, markersize=10)
        ax.annotate(
            f"{label}\n{intensity:,.0f} FLOP/B",
            (intensity, height),
            shift,
            textcoords="offset points",
            ha="left" if label == "decode" else "right" if "naive" in label else "left",
            fontsize=10.5,
        )
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(0.08, 1500),
        xlabel="arithmetic intensity (FLOP per byte of HBM traffic)",
        ylabel=f"attainable on {chip.name} (TFLOP/s)",
    )
    return fig


def two_tricks(spread: float = 4.0, seed: int = 0) -> Figure:
    """FlashAttention-4: an origin that may lag, and a cubic in place of the exponential unit."""
    from effattn_lab.full.flash_tricks import exp2_cubic

    generator = torch.Generator().manual_seed(seed)
    s = spread * torch.randn(48, generator=generator).numpy() + np.linspace(-8, 10, 48)
    top = np.maximum.accumulate(s.reshape(12, 4).max(axis=1))
    lag, origin = [], -np.inf
    for t in top:
        origin = t if t > origin + 8 else origin
        lag.append(origin)
    fig, (left, right) = _new(1, 2, height=3.9)
    x = np.arange(13)
    left.stairs(
        top, x, baseline=None, color=COLORS["naive"], linestyle="--", linewidth=2.2, label="maximum so far"
    )
    left.stairs(lag, x, baseline=None, color=COLORS["flash"], linewidth=2.2, label="origin used")
    left.fill_between(
        np.repeat(x, 2)[1:-1],
        np.repeat(lag, 2),
        np.repeat(lag, 2) + 8,
        color=COLORS["flash"],
        alpha=0.12,
        label="origin + 8",
    )
    left.set(
        xlabel="key tile",
        xticks=range(0, 13, 3),
        ylabel="score (log2 units)",
        ylim=(min(lag) - 2, max(top) + 14),
    )
    left.set_title("The origin may lag")
    left.legend(loc="upper left")
    f = torch.linspace(0, 0.99999, 400, dtype=torch.float64)
    error = (exp2_cubic(f) / torch.exp2(f) - 1).numpy()
    right.plot(f, error * 1e5, color=COLORS["flash"])
    right.axhline(0, color=COLORS["muted"], linewidth=0.8)
    right.set(xlabel="fraction f", ylabel="relative error (units of 1e-5)")
    right.set_title("A cubic for $2^f$")
    return fig
