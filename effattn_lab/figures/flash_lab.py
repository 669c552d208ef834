"""The numbers and pictures of the flash lab's experiment on a real model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error relative to the size of the wanted values: ``max |got - want| / rms(want)``; NaN stays NaN."""
    want = want.double()
    return float((got.double() - want).abs().max() / want.square().mean().sqrt())


def moves(q: torch.Tensor, k: torch.Tensor, block_k: int = 32) -> torch.Tensor:
    """How much the running maximum moves at each key tile.

    Args:
        q: ``[B, Hq, N, D]``. k: ``[B, Hkv, N, D]``, causal, same length.
        block_k: keys a tile.

    Returns:
        ``[rows, tiles]``: m_new - m_old in natural units for every query that sees all of the tile, NaN elsewhere
        and in the first tile.
    """
    from effattn_lab.foundations.attention import repeat_kv, visible

    n = q.shape[2]
    keys = repeat_kv(k, q.shape[1] // k.shape[1])
    scores = (q @ keys.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible(n, n, causal=True), float("-inf"))
    tiles = n // block_k
    best = scores[..., : tiles * block_k].unflatten(-1, (tiles, block_k)).amax(dim=-1)
    running = best.cummax(dim=-1).values
    change = torch.full_like(best, float("nan"))
    change[..., 1:] = running[..., 1:] - running[..., :-1]
    # Only tiles that the query sees whole: the diagonal tile holds fewer keys.
    whole = torch.arange(n)[:, None] >= (torch.arange(tiles) + 1) * block_k - 1
    return change.masked_fill(~whole, float("nan")).flatten(0, 2)


def move_rate(change: torch.Tensor, threshold: float = 0.0) -> np.ndarray:
    """Share of queries whose maximum moves by more than ``threshold`` at each tile.

    From the second tile on; the last tile is left out, as one query alone sees all of it.
    """
    seen = ~change.isnan()
    moved = (change > threshold) & seen
    return (moved.sum(dim=0) / seen.sum(dim=0).clamp(min=1)).numpy()[1:-1]


def errors_picture(errors: Mapping[str, float]) -> Figure:
    """Bars on a logarithmic axis: error of each way to compute the same attention."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    names = list(errors)
    with plt.rc_context(style.rc()):
        fig, ax = plt.subplots(figsize=(style.WIDTH, 0.42 * len(names) + 1.0), layout="constrained")
        values = [errors[n] if np.isfinite(errors[n]) else np.nan for n in names]
        colors = [
            style.COLORS["flash"] if "flash" in n or "kernel" in n else style.COLORS["naive"] for n in names
        ]
        hatches = ["" if "flash" in n or "kernel" in n else "//" for n in names]
        ax.barh(range(len(names)), values, color=colors, hatch=hatches, edgecolor=style.PALETTE["white"])
        ax.set_xscale("log")
        ax.set_xlim(1e-8, 10)
        ax.set_yticks(range(len(names)), names)  # also where the bar is missing
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_xlabel("largest error against float64 / rms of the output")
        for row, (name, value) in enumerate(zip(names, values)):
            text = f"{errors[name]:.1e}" if np.isfinite(value) else "overflow: NaN"
            ax.annotate(text, (value if np.isfinite(value) else 1e-8, row), xytext=(4, 0),
                        textcoords="offset points", va="center")  # fmt: skip
        white = style.PALETTE["white"]
        ax.legend(
            handles=[
                Patch(facecolor=style.COLORS["flash"], edgecolor=white, label="by tiles"),
                Patch(facecolor=style.COLORS["naive"], edgecolor=white, hatch="//", label="the plain formula"),
            ],
            loc="upper center", bbox_to_anchor=(0.3, -0.2), ncols=2,
        )  # fmt: skip
    plt.close(fig)
    return fig


def real_scores_picture(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    random: tuple[torch.Tensor, torch.Tensor],
    block_k: int = 32,
) -> Figure:
    """Left: where the attention mass goes, by key tile. Right: how often the running maximum moves.

    Args:
        layers: q, k of each layer, by name. random: q, k of normal numbers of the same shape.
    """
    import matplotlib.pyplot as plt

    from effattn_lab.foundations.attention import repeat_kv, visible

    marks = ["o", "s", "^", "D"]
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.7), layout="constrained")
        for (name, (q, k)), mark in zip({**layers, "random": random}.items(), marks):
            n = q.shape[2]
            scores = q @ repeat_kv(k, q.shape[1] // k.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
            p = torch.softmax(scores.masked_fill(~visible(n, n, causal=True), float("-inf")), dim=-1)
            # The last tile of queries: it sees every key tile.
            mass = p[0, :, -block_k:].unflatten(-1, (n // block_k, block_k)).sum(dim=-1).mean(dim=(0, 1))
            rate = move_rate(moves(q, k, block_k))
            kind = " " if name == "random" else "-"  # marks alone, as a dotted line runs through them
            left.plot(range(1, len(mass) + 1), mass, kind, marker=mark, markersize=4, label=name)
            right.plot(range(2, len(rate) + 2), rate, kind, marker=mark, markersize=4, label=name)
        tiles = np.arange(2, len(rate) + 2)
        right.plot(
            tiles, 1 / tiles, ":", color=style.COLORS["text"], linewidth=1.4, label="1 / tile", zorder=1
        )
        left.set_yscale("log")
        left.set_ylabel("share of attention mass (log scale)")
        left.set_title(f"where the last {block_k} queries look")
        right.set_ylabel("share of queries where m moves")
        right.set_ylim(0, None)
        right.set_title("how often m moves")
        for ax in (left, right):
            ax.set_xlabel(f"key tile ({block_k} keys)")
        right.set_xlabel(f"key tile ({block_k} keys)\nthe last is left out: one query sees it whole")
        right.legend()
    plt.close(fig)
    return fig
