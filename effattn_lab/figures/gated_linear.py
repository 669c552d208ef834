"""Pictures of the chapter on linear attention with decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style
from effattn_lab.linear.decay import segment_sums
from effattn_lab.linear.gates import retnet_log_decay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOKENS = 24


def _gates() -> dict[str, np.ndarray]:
    """Log decays of 24 tokens by name: none, RetNet's head 0 made shorter, a gate that closes twice."""
    fixed = np.full(_TOKENS, -0.15)
    gate = np.full(_TOKENS, -0.01)
    gate[[8, 17]] = -4.0
    return {"no decay": np.zeros(_TOKENS), "fixed decay (RetNet)": fixed, "decay by token (SSD)": gate}


def masks() -> Figure:
    """Three masks of decays as grey squares, and the log decay of each token above them."""
    import matplotlib.pyplot as plt

    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, axes = plt.subplots(
            2, 3, figsize=(style.WIDTH, 3.6), layout="constrained", gridspec_kw={"height_ratios": [1, 3]}
        )
        for column, (name, g) in enumerate(_gates().items()):
            top, low = axes[:, column]
            top.bar(np.arange(_TOKENS), np.exp(g), color=style.PALETTE["sky"])
            top.set(ylim=(0, 1.05), xlim=(-0.5, _TOKENS - 0.5), xticks=[], yticks=[0, 1])
            top.set_title(name, fontsize=10.5)
            mask = segment_sums(torch.tensor(g)).exp().numpy()
            low.imshow(mask, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            low.set(xticks=[0, 8, 16], yticks=[0, 8, 16], xlabel="key")
        axes[0, 0].set_ylabel("kept")
        axes[1, 0].set_ylabel("query")
    return fig


def levels(tokens: int = 16) -> Figure:
    """The level of each pair: the top bit of ``i xor j``; the diagonal has none."""
    import matplotlib.pyplot as plt

    top = int(np.log2(tokens))
    with plt.rc_context({**style.rc(), "axes.grid": False}):
        fig, ax = plt.subplots(figsize=(style.HALF + 0.9, style.HALF + 0.4), layout="constrained")
        for i in range(tokens):
            for j in range(i + 1):
                level = (i ^ j).bit_length() - 1
                face = style.PALETTE["white"] if level < 0 else style.CYCLE[level % len(style.CYCLE)] + "99"
                ax.add_patch(
                    plt.Rectangle(
                        (j - 0.5, i - 0.5),
                        1,
                        1,
                        facecolor=face,
                        edgecolor=style.COLORS["grid"],
                        linewidth=0.6,
                    )
                )
                ax.text(j, i, "·" if level < 0 else str(level), ha="center", va="center", fontsize=8.5)
        ax.set(xlim=(-0.5, tokens - 0.5), ylim=(tokens - 0.5, -0.5), xlabel="key j", ylabel="query i")
        ax.set(xticks=range(0, tokens, 4), yticks=range(0, tokens, 4))
        ax.set_aspect("equal")
        ax.set_title(f"{top} levels for {tokens} tokens", fontsize=11)
    return fig


def reach() -> Figure:
    """Weight that is left after m tokens, for RetNet's heads; and what noise of random pairs is left behind."""
    import matplotlib.pyplot as plt

    m = np.geomspace(1, 20_000, 200)
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 3.1), layout="constrained")
        for i, h in enumerate((0, 2, 4, 7)):
            g = float(retnet_log_decay(8)[h])
            line = ("-", "--", "-.", ":")[i]
            left.plot(m, np.exp(g * m), line, color=style.CYCLE[i], label=f"head {h}")
            # Random unit keys of D channels: each other pair adds a variance of 1 / D, decayed twice.
            noise = np.sqrt((1 - np.exp(2 * g * m)) / (1 - np.exp(2 * g)) / 128)
            right.plot(m, noise, line, color=style.CYCLE[i], label=f"head {h}")
        right.plot(m, np.sqrt(m / 128), color=style.CYCLE[6], linewidth=1.2, label="no decay")
        left.set(xscale="log", xlabel="tokens since it was written", ylabel="weight left", ylim=(0, 1.05))
        left.set_title("the signal", fontsize=11)
        right.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="noise (signal at first: 1)")
        right.set_title("the noise (D = 128)", fontsize=11)
        left.legend(loc="lower left", fontsize=9.5)
        right.legend(loc="upper left", fontsize=9.5)
    return fig
