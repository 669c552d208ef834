"""The tiled forward pass, one tile at a time: a widget to step through it, and a picture for where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Step:
    """The state after a tile: ``m, l [rows]``, ``acc [rows, D]``, factor ``alpha [rows]``, row sums of ``p``."""

    query_tile: int
    key_tile: int
    m: np.ndarray
    l: np.ndarray
    acc: np.ndarray
    alpha: np.ndarray
    added: np.ndarray


@dataclass(frozen=True)
class Trace:
    """Every step of the tiled forward pass of one head, with its scores ``[Nq, Nk]`` (-inf where hidden)."""

    steps: list[Step]
    scores: np.ndarray
    block_q: int
    block_k: int


def trace(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    block_q: int = 4,
    block_k: int = 4,
) -> Trace:
    """Run the forward pass of one head, ``q [Nq, D]``, ``k, v [Nk, D]``, and keep the state after each tile."""
    from effattn_lab.foundations.attention import visible
    from effattn_lab.full.flash import tile_step

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions [N, D], got shape {tuple(x.shape)}")
    keep = visible(q.shape[0], k.shape[0], causal=causal)
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~keep, float("-inf"))
    steps = []
    for i in range(0, q.shape[0], block_q):
        rows = slice(i, i + block_q)
        m = torch.full_like(scores[rows, 0], float("-inf"))
        l, acc = torch.zeros_like(m), torch.zeros_like(q[rows])
        for j in range(0, k.shape[0], block_k):
            s = scores[rows, j : j + block_k]
            if torch.isneginf(s).all():
                continue  # above the diagonal: not visited
            before = m, l
            m, l, acc = tile_step(m, l, acc, s, v[j : j + block_k])
            alpha = torch.exp(before[0] - torch.where(torch.isneginf(m), torch.zeros_like(m), m))
            numbers = (x.numpy().copy() for x in (m, l, acc, alpha, l - alpha * before[1]))
            steps.append(Step(i // block_q, j // block_k, *numbers))
    return Trace(steps, scores.numpy(), block_q, block_k)


def _draw_scores(ax: Axes, t: Trace, upto: int) -> None:
    """Score matrix: tiles done, the current one framed, those to come pale, those never visited hatched grey."""
    from matplotlib.patches import Rectangle

    done = {(s.query_tile, s.key_tile) for s in t.steps[: upto + 1]}
    visited = {(s.query_tile, s.key_tile) for s in t.steps}
    finite = np.ma.masked_invalid(t.scores)
    # viridis, not the book's cividis: its middle is no grey, and grey is for what is not visited.
    image = ax.imshow(finite, cmap="viridis", aspect="equal")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    nq, nk = t.scores.shape
    for i in range(-(-nq // t.block_q)):
        for j in range(-(-nk // t.block_k)):
            corner = (j * t.block_k - 0.5, i * t.block_q - 0.5)
            width, height = min(t.block_k, nk - j * t.block_k), min(t.block_q, nq - i * t.block_q)
            if (i, j) not in visited:
                skipped = Rectangle(corner, width, height, hatch="////", linewidth=0)
                skipped.set(facecolor=style.COLORS["masked"], edgecolor=style.PALETTE["grey"])
                ax.add_patch(skipped)
            elif (i, j) not in done:
                ax.add_patch(Rectangle(corner, width, height, facecolor=style.PALETTE["white"], alpha=0.75))
            ax.add_patch(
                Rectangle(corner, width, height, fill=False, edgecolor=style.COLORS["grid"], linewidth=0.8)
            )
    now = t.steps[upto]
    corner = (now.key_tile * t.block_k - 0.5, now.query_tile * t.block_q - 0.5)
    width = min(t.block_k, nk - now.key_tile * t.block_k)
    height = min(t.block_q, nq - now.query_tile * t.block_q)
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=style.COLORS["bad"], linewidth=3))
    ax.set_xlabel("key j")
    ax.set_ylabel("query i")
    ax.set_title("scores")
    ax.grid(False)


def frame(t: Trace, step: int) -> Figure:
    """One step: the score tile being read, then m, l and acc of its query rows.

    Args:
        t: from `trace`.
        step: 0 for the first tile.
    """
    import matplotlib.pyplot as plt

    if not 0 <= step < len(t.steps):
        raise ValueError(f"step: expected 0 to {len(t.steps) - 1}, got {step!r}")
    now = t.steps[step]
    rows = now.query_tile * t.block_q + np.arange(len(now.m))
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(
            1, 4, figsize=(9.6, 3.2), width_ratios=[1.9, 0.8, 1.0, 1.2], layout="constrained"
        )
        _draw_scores(axes[0], t, step)
        axes[1].barh(rows, np.where(np.isfinite(now.m), now.m, 0), color=style.COLORS["query"])
        if now.key_tile:
            with np.errstate(divide="ignore"):
                before = now.m + np.log(now.alpha)
            mark = {"marker": "|", "s": 260, "color": style.COLORS["bad"], "zorder": 3}
            axes[1].scatter(before, rows, label="m before", **mark)
            axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), markerscale=0.6)
        axes[1].set_title("m")
        axes[1].set_xlabel("largest score so far")
        old = now.l - now.added
        axes[2].barh(
            rows, old, color=style.COLORS["state"], label="kept: alpha l", edgecolor=style.COLORS["text"]
        )
        axes[2].barh(rows, now.added, left=old, color=style.COLORS["score"], label="new: sum p", hatch="..")
        axes[2].set_title("l")
        axes[2].set_xlabel("sum of exp(s - m)")
        axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=1)
        for ax in axes[1:3]:
            ax.set_yticks(rows)
            ax.invert_yaxis()
        span = max(float(np.abs(s.acc).max()) for s in t.steps) or 1.0
        image = axes[3].imshow(now.acc, cmap="PuOr", vmin=-span, vmax=span, aspect="auto")
        axes[3].set_yticks(range(len(rows)), rows)
        axes[3].set_xlabel("value dimension")
        axes[3].set_title("acc")
        axes[3].grid(False)
        fig.colorbar(image, ax=axes[3])
        note = "state starts empty" if now.key_tile == 0 else f"m moved in {_moved(now)} of {len(rows)} rows"
        first = now.key_tile * t.block_k
        last = min(first + t.block_k, t.scores.shape[1]) - 1
        fig.suptitle(
            f"step {step + 1} of {len(t.steps)}: queries {rows[0]}–{rows[-1]}, keys {first}–{last}; {note}",
            fontsize=11.5,
        )
    plt.close(fig)
    return fig


def _moved(step: Step) -> int:
    """Rows whose maximum this tile moved, the first tile left out."""
    return int(((step.alpha < 1) & (step.alpha > 0)).sum())


def example(n: int = 16, head_dim: int = 8, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A small head with spread-out scores: q, k, v ``[n, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, head_dim, generator=generator) for _ in range(3))
    return 1.7 * q, k, v


def explorer(
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    block_q: int = 4,
    block_k: int = 4,
) -> Any:
    """Step through the tiles with a slider or the play button; a static frame where there are no widgets.

    Args:
        q, k, v: one head ``[N, D]``, small (up to 32 rows read well). Default: `example`.
        block_q, block_k: tile sizes.

    Returns:
        an ipywidgets box; with ``EFFATTN_STATIC`` set or without ipywidgets, the tile that moves m most.
    """
    if q is None or k is None or v is None:
        q, k, v = example()
    traces = {c: trace(q, k, v, causal=c, block_q=block_q, block_k=block_k) for c in (True, False)}
    # The step with most to see: the one where m moves in most rows.
    best = max(range(len(traces[True].steps)), key=lambda n: _moved(traces[True].steps[n]))
    if os.environ.get("EFFATTN_STATIC"):
        return frame(traces[True], best)
    try:
        import ipywidgets as widgets
        from IPython.display import display
    except ImportError:
        return frame(traces[True], best)

    causal = widgets.Checkbox(value=True, description="causal", indent=False)
    last = len(traces[True].steps) - 1
    # Counted from 1, as in the title of the picture.
    slider = widgets.IntSlider(
        value=best + 1, min=1, max=last + 1, description="step", continuous_update=False
    )
    play = widgets.Play(value=best + 1, min=1, max=last + 1, interval=900)
    widgets.jslink((play, "value"), (slider, "value"))
    picture = widgets.Output()

    def show(_: Any = None) -> None:
        steps = len(traces[causal.value].steps)
        slider.max = play.max = steps
        with picture:
            picture.clear_output(wait=True)
            display(frame(traces[causal.value], min(slider.value, steps) - 1))

    slider.observe(show, names="value")
    causal.observe(show, names="value")
    show()
    return widgets.VBox([widgets.HBox([play, slider, causal]), picture])
