"""Pictures of ZeroS: the parts of softmax, in four numbers and in a trained model; what a lost constant costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("constant 1/t", "first order", "higher orders")
_COLORS = (style.PALETTE["grey"], style.PALETTE["blue"], style.PALETTE["orange"])
_HATCHES = ("", "//", "..")

_FLOOR = 5e-5  # smaller errors are drawn here

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def parts_of_layer(q: torch.Tensor, k: torch.Tensor) -> Parts:
    """The three parts of a layer's causal attention weights, ``[B, Hq, N, N]`` each.

    q ``[B, Hq, N, D]``, k ``[B, Hkv, N, D]``, as a model's attention receives them.
    """
    from effattn_lab.foundations.attention import repeat_kv, visible
    from effattn_lab.linear.zeros_weights import expand_softmax

    keys = repeat_kv(k, q.shape[1] // k.shape[1])
    scores = (q @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return expand_softmax(scores, visible(q.shape[2], k.shape[2], causal=True, device=q.device))


def mass(parts: Parts) -> list[float]:
    """Sum of the absolute weights of each part, averaged over heads and the second half of the queries."""
    return [float(p[:, :, p.shape[2] // 2 :].abs().sum(dim=-1).mean()) for p in parts]


def expansion_picture(scores: Sequence[float] = (0.0, 0.3, -0.4, 1.6)) -> Figure:
    """softmax of a few scores, taken apart: three stacks of bars that add up to it."""
    import matplotlib.pyplot as plt

    from effattn_lab.linear.zeros_weights import expand_softmax

    s = torch.tensor(scores, dtype=torch.float64)
    parts = expand_softmax(s)
    shown = [("softmax", parts[0] + parts[1] + parts[2], style.PALETTE["black"], "")]
    shown += list(zip(PARTS, parts, _COLORS, _HATCHES))
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, 4, figsize=(8.6, 2.9), sharey=True, layout="constrained")
        for axis, (name, part, color, hatch), sign in zip(axes, shown, ("", "=", "+", "+")):
            values = part.numpy()
            axis.bar(range(len(scores)), values, color=color, hatch=hatch, edgecolor="white")
            axis.axhline(0, color=style.COLORS["text"], linewidth=0.9)
            axis.set_title(f"{sign} {name}" if sign else name, fontsize=11.5)
            axis.set_xticks(range(len(scores)), [f"{x:g}" for x in scores])
            axis.set_xlabel(f"sum {values.sum():.0f}" if abs(values.sum()) > 1e-9 else "sum 0")
        axes[0].set_ylabel("weight")
        fig.supxlabel("scores of four keys", fontsize=11.5)
    plt.close(fig)
    return fig


def cancel_picture(layers: Mapping[str, Parts], head: int = 0) -> Figure:
    """Left: each key of the last query, by first order and by the rest. Right: how large the parts are, by layer.

    Args:
        layers: name → `parts_of_layer`; the last one is drawn on the left.
        head: whose last query.
    """
    import matplotlib.pyplot as plt

    name, parts = list(layers.items())[-1]
    constant, first, rest = (p[0, head, -1].double().numpy() for p in parts)
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
        # The keys that softmax picks stand far above the rest: they are told, not drawn, so that the line shows.
        picked = first + rest + constant > 0.05
        reach = np.array([first[~picked].min(), first[~picked].max()])
        left.plot(reach, -reach - constant[0], color=style.COLORS["text"], linewidth=1.2, linestyle="--",
                  label="weight 0: first + rest = −1/t")  # fmt: skip
        left.scatter(first[~picked], rest[~picked], s=14, color=style.PALETTE["blue"], label="a key")
        left.set_title(f"the last query of head {head}, {name}")
        share = (first + rest + constant)[picked].sum()
        told = f"not shown: {picked.sum()} of {len(first)} keys,\nwith {share:.0%} of the weight"
        left.text(0.93, 0.84, told, transform=left.transAxes, ha="right", va="top")
        left.legend(loc="lower left")
        left.set(xlabel="first order", ylabel="higher orders")
        places = np.arange(len(layers))
        for i, (part, color, hatch) in enumerate(zip(PARTS, _COLORS, _HATCHES)):
            sizes = [mass(p)[i] for p in layers.values()]
            right.bar(
                places + 0.27 * (i - 1), sizes, 0.25, color=color, hatch=hatch, edgecolor="white", label=part
            )
        right.set_xticks(places, list(layers))
        right.set(ylabel="sum of absolute weights", title="how large the parts are")
        right.legend(loc="upper left")
    plt.close(fig)
    return fig


def results_picture(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Error of each mixer on the two tasks, all seeds: `effattn_lab.linear.zeros_experiment.summary`."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    tasks = (("contrast", "contrast (saying 0: 2)"), ("mean", "mean (saying 0: 1)"))
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.7), sharey=True, layout="constrained")
        places = np.arange(len(table))[::-1]
        for axis, (task, title) in zip(axes, tasks):
            for place, row in zip(places, table):
                middle, least, most = (max(x, _FLOOR) for x in row[task])
                color = style.PALETTE["vermillion"] if "ZeroS" in row["label"] else style.PALETTE["blue"]
                axis.plot([least, most], [place, place], color=color, linewidth=3, alpha=0.6)
                axis.plot([middle], [place], marker="o", color=color)
            axis.axvline(_FLOOR, color=style.PALETTE["grey"], linewidth=1, linestyle=":")
            axis.set(xscale="log", xlim=(3e-5, 4), xlabel="mean squared error (log scale)", title=title)
        axes[0].set_yticks(places, [row["label"] for row in table])
        known = [
            Line2D([], [], color=style.PALETTE["blue"], marker="o", linewidth=3, label="others"),
            Line2D([], [], color=style.PALETTE["vermillion"], marker="o", linewidth=3, label="ZeroS"),
            Line2D([], [], color=style.PALETTE["grey"], linewidth=1, linestyle=":", label="at or below 5e-5"),
        ]
        fig.legend(
            handles=known,
            loc="outside lower center",
            ncols=3,
            title="point: median of three seeds; bar: their range",
        )
    plt.close(fig)
    return fig
