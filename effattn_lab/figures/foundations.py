"""Pictures of the two foundation chapters: attention itself, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from effattn_lab.figures import style
from effattn_lab.figures.style import COLORS, PALETTE
from effattn_lab.foundations import cost_model as cost
from effattn_lab.foundations.attention import visible
from effattn_lab.foundations.presets import MODELS, crossover_length
from effattn_lab.measure.roofline import GPUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches. Narrower than the text column: a phone shows the picture at 340 px, and text shrinks with it.
WIDTH = 5.6


def _cells(ax: Axes, values: np.ndarray, title: str, color: str, fmt: str = "{:.2f}") -> None:
    """A small matrix with its numbers written in; the stronger the tint, the larger the number."""
    from matplotlib.colors import LinearSegmentedColormap

    rows, cols = values.shape
    cmap = LinearSegmentedColormap.from_list("tint", ["white", color])
    span = max(float(np.abs(values).max()), 1e-9)
    ax.imshow(np.abs(values) / span * 0.55, cmap=cmap, vmin=0, vmax=1)
    for i in range(rows):
        for j in range(cols):
            ax.text(j, i, fmt.format(values[i, j]).replace("-", "−"), ha="center", va="center", fontsize=11)
    ax.set_xticks(np.arange(cols + 1) - 0.5, labels=[], minor=False)
    ax.set_yticks(np.arange(rows + 1) - 0.5, labels=[], minor=False)
    ax.tick_params(length=0)
    ax.grid(color=PALETTE["grey"], linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(True)
    ax.set_title(title, fontsize=11.5, loc="center")


def one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Figure:
    """The four steps of attention on one head small enough to check by hand.

    Args:
        q: ``[1, 1, Nq, D]``. k, v: ``[1, 1, Nk, D]``; a few rows each.
    """
    style.use()
    scores = (q @ k.transpose(-1, -2))[0, 0] * q.shape[-1] ** -0.5
    probs = torch.softmax(scores, dim=-1)
    out = probs @ v[0, 0]
    widths = [scores.shape[1], probs.shape[1], out.shape[1]]
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.4), width_ratios=widths, layout="constrained")
    _cells(axes[0], scores.numpy(), "scores\n$S=QK^\\top/\\sqrt{D}$", COLORS["score"])
    _cells(axes[1], probs.numpy(), "weights\n$P=\\mathrm{softmax}(S)$", COLORS["query"])
    _cells(axes[2], out.numpy(), "output\n$O=PV$", COLORS["output"])
    for ax, label in ((axes[0], "key $j$"), (axes[1], "key $j$"), (axes[2], "channel")):
        ax.set_xlabel(label)
    axes[0].set_ylabel("query $i$")
    return fig


def logit_scale(dims: tuple[int, ...] = (4, 16, 64, 256, 1024), keys: int = 128, seed: int = 0) -> Figure:
    """Largest softmax weight against head dimension, with and without the factor ``1/sqrt(D)``."""
    style.use()
    rng = torch.Generator().manual_seed(seed)
    plain, scaled = [], []
    for dim in dims:
        q, k = torch.randn(500, 1, dim, generator=rng), torch.randn(500, keys, dim, generator=rng)
        s = (q @ k.transpose(-1, -2))[:, 0]
        plain.append(torch.softmax(s, -1).amax(-1).mean().item())
        scaled.append(torch.softmax(s * dim**-0.5, -1).amax(-1).mean().item())
    fig, ax = plt.subplots(figsize=(WIDTH, 3.3), layout="constrained")
    ax.semilogx(dims, plain, "o-", base=2, color=COLORS["bad"])
    ax.semilogx(dims, scaled, "s--", base=2, color=COLORS["good"])
    ax.text(dims[2], plain[2] - 0.13, "no scale: one key takes all", color=COLORS["bad"])
    ax.text(
        dims[1], scaled[1] + 0.05, r"scaled by $1/\sqrt{D}$: the same at every $D$", color=PALETTE["green"]
    )
    ax.set(xlabel="head dimension D", ylabel=f"largest of {keys} weights", ylim=(0, 1.02))
    ax.set_xticks(dims, labels=[str(d) for d in dims])
    return fig


def _mask(ax: Axes, keep: np.ndarray, title: str, *, good: bool | None = None) -> None:
    rows, cols = keep.shape
    tone = COLORS["query"] if good is None or good else COLORS["bad"]
    for i in range(rows):
        for j in range(cols):
            on = bool(keep[i, j])
            face = tone if on else COLORS["masked"]
            ax.add_patch(plt.Rectangle((j, i), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
            if on:
                ax.plot(j + 0.5, i + 0.5, "o", color="white", markersize=4)
    ax.set(xlim=(0, cols), ylim=(rows, 0), aspect="equal")
    ax.set_xticks(np.arange(cols) + 0.5, labels=[str(j) for j in range(cols)])
    ax.set_yticks(np.arange(rows) + 0.5, labels=[str(i) for i in range(rows)])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11.5, loc="center")


def offset_masks(seqlen_q: int = 2, seqlen_k: int = 6) -> Figure:
    """The causal mask aligned bottom-right (the offset rule) and top-left, for a few new queries on a cache."""
    style.use()
    right = visible(seqlen_q, seqlen_k, causal=True).numpy()
    left = np.tril(np.ones((seqlen_q, seqlen_k), dtype=bool))
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.1), layout="constrained")
    _mask(axes[0], right, "bottom-right", good=True)
    _mask(axes[1], left, "top-left", good=False)
    for ax in axes:
        ax.set_xlabel("key $j$")
    axes[0].set_yticks(
        np.arange(seqlen_q) + 0.5, labels=[f"{i}  (at {i + seqlen_k - seqlen_q})" for i in range(seqlen_q)]
    )
    axes[0].set_ylabel("query $i$")
    return fig


def mask_gallery(n: int = 6, window: int = 3) -> Figure:
    """Four masks: causal, causal window, two-sided window, and more queries than keys."""
    style.use()
    cases: list[tuple[str, Any]] = [
        ("causal", visible(n, n, causal=True)),
        (f"causal, W = {window}", visible(n, n, causal=True, window_size=window)),
        (f"two-sided, W = {window}", visible(n, n, window_size=window)),
        (f"{n} queries, {n - 2} keys", visible(n, n - 2, causal=True)),
    ]
    fig, axes = plt.subplots(2, 2, figsize=(WIDTH * 0.85, WIDTH * 0.85), layout="constrained")
    for ax, (title, keep) in zip(axes.flat, cases):
        _mask(ax, keep.numpy(), title)
        ax.set_xlabel("key $j$")
        ax.set_ylabel("query $i$")
    last = axes.flat[3]
    for row in range(2):
        last.text((n - 2) / 2, row + 0.5, "sees no key", ha="center", va="center", fontsize=11)
    return fig


def gqa_map(num_heads: int = 8, num_kv_heads: int = 2) -> Figure:
    """Which key-value head each query head reads: neighbours share (``h // g``)."""
    style.use()
    group = num_heads // num_kv_heads
    looks = [("-", COLORS["key"]), ("--", COLORS["value"]), ("-.", COLORS["output"]), (":", COLORS["query"])]
    fig, ax = plt.subplots(figsize=(WIDTH, 2.3), layout="constrained")
    for h in range(num_heads):
        kv = h // group
        x = (kv + 0.5) * group - 0.5
        dash, color = looks[kv % len(looks)]
        ax.plot([h, x], [0.86, 0.14], dash, color=color, linewidth=2)
        box = {"boxstyle": "round", "fc": "white", "ec": COLORS["query"]}
        ax.text(h, 1, f"Q{h}", ha="center", va="center", bbox=box)
    for kv in range(num_kv_heads):
        box = {"boxstyle": "round", "fc": "white", "ec": looks[kv % len(looks)][1]}
        ax.text((kv + 0.5) * group - 0.5, 0, f"K{kv}, V{kv}", ha="center", va="center", bbox=box)
    ax.set(xlim=(-0.6, num_heads - 0.4), ylim=(-0.2, 1.2))
    ax.axis("off")
    return fig


def flop_share() -> Figure:
    """Share of a forward pass's FLOPs that attention takes, against prompt length, for two models."""
    style.use()
    n = np.logspace(2, 6, 200)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for name, color, dash in (("SmolLM2-135M", COLORS["bad"], "--"), ("Llama-3-8B", COLORS["query"], "-")):
        star = crossover_length(MODELS[name])
        ax.semilogx(n, 100 * n / (n + star), dash, color=color, label=name)
        ax.plot(star, 50, "o", color=color)
        side, nudge = ("right", (-14, 12)) if name.startswith("Smol") else ("left", (14, -14))
        ax.annotate(f"{name}\n50 % at {star:,.0f}", (star, 50), xytext=nudge, textcoords="offset points",
                    color=color, ha=side, va="center")  # fmt: skip
    ax.set(
        xlabel="prompt length N (tokens)",
        ylabel="attention's share of FLOPs (%)",
        ylim=(0, 100),
        xlim=(100, 1e6),
    )
    return fig


def operations(seqlen: int = 8192, head_dim: int = 128) -> list[tuple[str, float]]:
    """(name, FLOP/byte at 16 bits) of the operations that the chapter places on the roofline, lowest first.

    Attention has 32 query heads (DeepSeek-V3's MLA: 128 heads on a latent of 512 + 64); dense layers are those of
    Llama-3-8B, weights only.
    """

    def decode(kv_heads: int) -> float:
        flops = cost.decode_flops(1, 32, seqlen, head_dim)
        return cost.intensity(flops, cost.decode_bytes(1, 32, kv_heads, seqlen, head_dim))

    params = MODELS["Llama-3-8B"].layer_params
    shape = (1, 32, 32, seqlen, seqlen, head_dim)
    square = cost.attention_flops(1, 32, seqlen, seqlen, head_dim)
    triangle = cost.attention_flops(1, 32, seqlen, seqlen, head_dim, causal=True)
    mla = cost.mla_decode_flops(1, 128, seqlen, 512, 64) / cost.mla_cache_bytes(1, 512, 64, seqlen)
    ops = [
        ("decode MHA", decode(32)),
        ("decode GQA, g = 4", decode(8)),
        ("decode MQA, 32 heads", decode(1)),
        ("decode MLA, 128 heads", mla),
        ("prefill, naive", square / cost.naive_bytes(*shape)),
        ("prefill, flash, causal", triangle / cost.flash_bytes(*shape)),
    ]
    dense = cost.linear_bytes(params)
    ops += [(f"dense layers, batch {b}", cost.linear_flops(b, params) / dense) for b in (1, 64, 512)]
    return sorted(ops, key=lambda op: op[1])


def roofline(gpus: tuple[str, ...] = ("A100", "H100")) -> Figure:
    """Roofs of two GPUs above, and below on the same axis where real operations stand."""
    style.use()
    ops = operations()
    looks = [("--", COLORS["bad"]), ("-", COLORS["query"])]
    x = np.logspace(-0.5, 4, 300)
    fig, (ax, lane) = plt.subplots(
        2, 1, figsize=(WIDTH, 6.4), sharex=True, height_ratios=[1.0, 1.05], layout="constrained"
    )
    for name, (dash, color) in zip(gpus, looks):
        gpu = GPUS[name]
        ax.loglog(x, np.minimum(gpu.fp16_tflops, x * gpu.bandwidth / 1e12), dash, color=color)
        for op, value in ops:
            shape = "D" if "dense" in op else "o"
            ax.plot(
                value, min(gpu.fp16_tflops, value * gpu.bandwidth / 1e12), shape, color=color, markersize=5
            )
        for panel in (ax, lane):
            panel.axvline(gpu.ridge, color=color, linestyle=dash, linewidth=1.1)
        upper = gpu is GPUS[gpus[-1]]
        ax.text(9000, gpu.fp16_tflops * (1.25 if upper else 0.72), f"{name}: {gpu.fp16_tflops:.0f} TFLOP/s",
                color=color, ha="right", va="bottom" if upper else "top")  # fmt: skip
        lane.text(gpu.ridge * (1.12 if upper else 0.9), -0.75, f"ridge {gpu.ridge:.0f}", color=color,
                  ha="left" if upper else "right", va="center")  # fmt: skip
    ax.set(ylabel="attainable TFLOP/s", ylim=(0.6, 2500))
    for row, (name, value) in enumerate(ops):
        lane.plot(value, row, "D" if "dense" in name else "o", color=COLORS["text"])
        x_text, side = (value * 0.8, "right") if value > 30 else (value * 1.25, "left")
        label = f"({value:.0f})  {name}" if side == "right" else f"{name}  ({value:.0f})"
        box = {"fc": "white", "ec": "none", "pad": 0.6}
        lane.text(x_text, row, label, ha=side, va="center", fontsize=10.5, bbox=box)
    lane.set(
        ylim=(len(ops) - 0.4, -1.3), yticks=[], xlabel="arithmetic intensity (FLOP/byte)", xlim=(0.6, 1e4)
    )
    lane.spines["left"].set_visible(False)
    lane.grid(axis="y", visible=False)
    return fig


def memory_levels(gpu: str = "A100", on_chip_tbs: float = 19.0) -> Figure:
    """Size and bandwidth of on-chip memory against main memory.

    Args:
        gpu: key of ``GPUS``.
        on_chip_tbs: bandwidth of all shared memory together, TB/s (Dao et al. 2022 give 19 for A100).
    """
    style.use()
    chip = GPUS[gpu]
    shared_mb = chip.sms * chip.shared_kib * 1024 / 1e6
    big, fast = chip.memory_gb * 1e3 / shared_mb, on_chip_tbs * 1e12 / chip.bandwidth
    levels = [
        ("shared memory,\nall SMs together", shared_mb, on_chip_tbs, COLORS["sram"], "o"),
        ("main memory (HBM)", chip.memory_gb * 1e3, chip.bandwidth / 1e12, COLORS["hbm"], "s"),
    ]
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    ax.plot([x[1] for x in levels], [x[2] for x in levels], ":", color=COLORS["muted"])
    for name, size, speed, color, mark in levels:
        side, nudge = ("left", (14, 6)) if mark == "o" else ("right", (-14, -10))
        ax.plot(size, speed, mark, color=color, markersize=13)
        ax.annotate(name, (size, speed), xytext=nudge, textcoords="offset points", ha=side, va="center")
    middle = (shared_mb * big**0.5, chip.bandwidth / 1e12 * fast**0.5)
    ax.annotate(f"{big:,.0f} times larger,\n{fast:.0f} times slower", middle, xytext=(8, 8),
                textcoords="offset points", color=COLORS["muted"])  # fmt: skip
    ax.set(
        xscale="log", yscale="log", xlabel="size (MB)", ylabel="bandwidth (TB/s)", xlim=(8, 3e5), ylim=(1, 30)
    )
    ticks = [1, 2, 5, 10, 20]
    ax.set_yticks(ticks, labels=[str(t) for t in ticks])
    ax.set_xticks([10, 100, 1e3, 1e4, 1e5], labels=["10", "100", "1,000", "10,000", "100,000"])
    ax.minorticks_off()
    return fig


def decode_time(model: str = "Llama-3-8B", gpu: str = "H100") -> Figure:
    """Least time of a decode step at batch 1: weights (flat) and KV cache (a line), MHA against GQA against MQA."""
    style.use()
    shape, chip = MODELS[model], GPUS[gpu]
    n = np.linspace(0, 131_072, 9)
    floor = cost.linear_bytes(shape.read_params) / chip.bandwidth * 1e3
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    ax.axhspan(0, floor, color=COLORS["masked"])
    ax.text(4096, floor * 0.45, f"reading the weights: {floor:.1f} ms", va="center")
    kinds = (("MHA", shape.num_heads, ":"), ("GQA", shape.num_kv_heads, "-"), ("MQA", 1, "--"))
    for (label, heads, dash), color in zip(kinds, (COLORS["bad"], COLORS["query"], COLORS["good"])):
        kv = cost.kv_cache_bytes(shape.num_layers, heads, shape.head_dim, n) / chip.bandwidth * 1e3
        ax.plot(n, floor + kv, dash, color=color)
        ax.annotate(f"{label}: {heads} KV", (n[-1], floor + kv[-1]), color=color, va="center",
                    xytext=(6, 0), textcoords="offset points")  # fmt: skip
    ax.set_xticks(n[::2], labels=["0", *(f"{int(i) // 1024}K" for i in n[2::2])])
    ax.set(
        xlabel="tokens in the cache",
        ylabel="least time per token (ms)",
        ylim=(0, None),
        xlim=(0, n[-1] * 1.2),
    )
    return fig
