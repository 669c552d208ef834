"""The numbers and the pictures of the delta-rule lab's experiments: recall of real keys, and state tracking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v")
#: First and last token of each group, counted from the end: the last token has age 1.
AGES = ((1, 1), (2, 4), (5, 16), (17, 64), (65, 256), (257, 512))


def recall(
    S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rescale: bool = False
) -> dict[tuple[int, int], tuple[float, float]]:
    """What the state answers to the keys it was made of, by their age.

    Args:
        S: the state after all tokens ``[B, H, D, Dv]``. k, v: what was written, ``[B, H, N, D]``, ``[B, H, N, Dv]``.
        rescale: multiply the answers of each head by the one number that makes their squared error least.

    Returns:
        for each group of ages: mean cosine of answer and value, and mean length of their difference over that of the
        value (0: exact, 1: no better than answering nothing).
    """
    answer = k @ S
    if rescale:
        answer = answer * ((answer * v).sum(dim=(2, 3)) / answer.square().sum(dim=(2, 3)))[..., None, None]
    cosine = torch.cosine_similarity(answer, v, dim=-1)
    error = (answer - v).norm(dim=-1) / v.norm(dim=-1)
    n, found = k.shape[2], {}
    for young, old in AGES:
        ages = slice(max(0, n - old), n - young + 1)
        found[young, old] = (cosine[:, :, ages].mean().item(), error[:, :, ages].mean().item())
    return found


def recall_picture(rows: Mapping[str, Mapping[tuple[int, int], tuple[float, float]]]) -> Figure:
    """Left: cosine of answer and value by age. Right: relative error, logarithmic from 0.001 on."""
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.5), layout="constrained")
        for index, (name, found) in enumerate(rows.items()):
            x = np.arange(len(found))
            for axis, part in zip(axes, (0, 1)):
                y = [max(values[part], 1e-3) for values in found.values()]
                line = ":" if name == "sum, best length" else "-"  # on the left it lies upon the sum's
                axis.plot(x, y, line, marker=_MARKS[index], color=style.CYCLE[index], label=name)
        labels = [str(young) if young == old else f"{young}-{old}" for young, old in AGES]
        for axis, title in zip(axes, ("cosine of answer and value", "|answer - value| / |value|")):
            axis.set_xticks(np.arange(len(labels)), labels, rotation=30)
            axis.set_xlabel("age of the key (tokens)")
            axis.set_title(title)
        axes[0].set_ylim(0, 1.05)
        axes[1].set_yscale("log")
        axes[1].axhline(1, color=style.COLORS["text"], linestyle=":")
        axes[1].annotate(
            "answering 0", (len(AGES) - 1, 1), xytext=(0, 9), textcoords="offset points", ha="right"
        )
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plt.close(figure)
    return figure


def tracking_picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of right last answers by length, a panel a task; points are seeds, lines means; dotted: chance."""
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    with plt.rc_context(style.rc()):
        figure, axes = plt.subplots(
            1, len(tasks), figsize=(1.2 + 3.2 * len(tasks), 3.3), layout="constrained", squeeze=False
        )
        for axis, task in zip(axes[0], tasks):
            for index, mixer in enumerate(mixers):
                found = [row["answers"] for row in rows if (row["task"], row["mixer"]) == (task, mixer)]
                lengths = [int(length) for length in found[0]]
                # Beside each other, or the points of perfect mixers would hide each other.
                places = np.arange(len(lengths)) + 0.1 * (index - (len(mixers) - 1) / 2)
                values = np.array([list(answers.values()) for answers in found])
                color, mark = style.CYCLE[index], _MARKS[index]
                axis.plot(places, values.mean(axis=0), color=color, marker=mark, label=mixer)
                for one in values if len(values) > 1 else ():
                    axis.plot(places, one, color=color, marker=mark, linestyle="", alpha=0.35, markersize=4)
            axis.axhline(1 / 2 if task == "parity" else 1 / 6, color=style.COLORS["muted"], linestyle=":")
            axis.set_xticks(np.arange(len(lengths)), [str(n) for n in lengths])
            axis.set_ylim(0, 1.05)
            axis.set_xlabel("length asked (trained at 32)")
            axis.set_title(task)
        axes[0][0].set_ylabel("last answer right")
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(mixers))
        )
    plt.close(figure)
    return figure
