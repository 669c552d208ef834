"""Pictures of the delta-rule chapter: a value written over, and how much one state recalls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v")


def overwrite() -> Figure:
    """One key, written four times: what a sum answers to it, and the delta rule with three rates."""
    import matplotlib.pyplot as plt

    values = [2.0, 5.0, 1.0, 3.0]
    answers: dict[str, list[float]] = {"sum (linear attention)": np.cumsum(values).tolist()}
    for beta in (0.5, 1.0, 1.5):
        answer, seen = 0.0, []
        for value in values:
            answer += beta * (value - answer)  # the state along a key of length 1
            seen.append(answer)
        answers[f"delta, beta {beta:g}"] = seen
    x = np.arange(1, len(values) + 1)
    with plt.rc_context(style.rc()):
        figure, axis = plt.subplots(figsize=(6.4, 3.3), layout="constrained")
        axis.step(
            [*(x - 0.5), x[-1] + 0.5], [*values, values[-1]], where="post",
            color=style.COLORS["text"], linestyle="--", label="value written last",
        )  # fmt: skip
        for index, (name, seen) in enumerate(answers.items()):
            axis.plot(x, seen, marker=_MARKS[index], color=style.CYCLE[index], label=name)
        axis.set_xticks(x)
        axis.set_xlabel("times that the key was written")
        axis.set_ylabel("answer to the key")
        figure.legend(loc="outside right center")
    plt.close(figure)
    return figure


def recalled(pairs: int, rewrites: int, delta: bool, *, dim: int = 64, repeats: int = 10) -> float:
    """Share of ``pairs`` random unit keys whose *last* value is nearest to the state's answer, of all ever written.

    Every key is written ``rewrites`` times with a new value; ``delta``: by the delta rule with beta 1, else added.
    """
    generator = torch.Generator().manual_seed(pairs * 100 + rewrites)
    right = 0.0
    for _ in range(repeats):
        keys = torch.randn(pairs, dim, generator=generator)
        keys = keys / keys.norm(dim=-1, keepdim=True)
        state = torch.zeros(dim, dim)
        written: list[torch.Tensor] = []
        for _ in range(rewrites):
            values = torch.randn(pairs, dim, generator=generator)
            values = values / values.norm(dim=-1, keepdim=True)
            written.insert(0, values)  # the last ones first
            if not delta:
                state = state + keys.T @ values
                continue
            for key, value in zip(keys, values):
                state = state + key[:, None] * (value - key @ state)[None]
        nearest = ((keys @ state) @ torch.cat(written).T).argmax(dim=-1)
        right += (nearest == torch.arange(pairs)).double().mean().item()
    return right / repeats


def capacity() -> Figure:
    """Left: pairs written once. Right: 16 pairs, each written again and again. Nothing here is trained."""
    import matplotlib.pyplot as plt

    once, again = (16, 32, 48, 64, 96, 128, 256), (1, 2, 4, 8)
    with plt.rc_context(style.rc()):
        figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), layout="constrained", sharey=True)
        for index, (name, delta) in enumerate((("sum", False), ("delta, beta 1", True))):
            line = {"marker": _MARKS[index], "color": style.CYCLE[index], "label": name}
            axes[0].plot(once, [recalled(n, 1, delta) for n in once], **line)
            axes[1].plot(again, [recalled(16, n, delta) for n in again], **line)
        labels = ("pairs, written once", "times that each of 16 is written")
        for axis, ticks, label in zip(axes, (once, again), labels):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.minorticks_off()
            axis.set_xlabel(label)
            axis.set_ylim(0, 1.05)
        axes[0].set_ylabel("last value is the nearest")
        axes[0].legend(loc="lower left")
    plt.close(figure)
    return figure
