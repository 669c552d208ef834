"""The numbers and the picture of the gated-linear lab's experiment on a real model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style
from effattn_lab.foundations.attention import repeat_kv, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^")


def softmax_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal softmax weights ``[B, Hq, N, N]``; q ``[B, Hq, N, D]``, k ``[B, Hkv, N, D]``."""
    n = q.shape[2]
    scores = (q @ repeat_kv(k, q.shape[1] // k.shape[1]).transpose(-1, -2)) * q.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~visible(n, n, causal=True), float("-inf")), dim=-1)


def by_distance(weights: torch.Tensor) -> np.ndarray:
    """Mean weight at distance 0, 1, ... N / 2 - 1, over all heads and the second half of the queries."""
    n = weights.shape[-1]
    half = n // 2
    late = weights[0, :, half:].mean(dim=0)  # [N - half, N]
    rows = torch.arange(half, n)[:, None]
    return late.gather(1, rows - torch.arange(half)).mean(dim=0).double().numpy()


def first_token(weights: torch.Tensor) -> float:
    """Mean weight of the very first token, over all heads and the second half of the queries."""
    n = weights.shape[-1]
    return float(weights[0, :, n // 2 :, 0].mean())


def decay_by_distance(g: float, size: int) -> np.ndarray:
    """The same for a fixed log decay ``g`` < 0 whose weights every query normalises over the tokens it sees.

    Mean over the queries ``size .. 2 size - 1`` of a text of ``2 size`` tokens, at distance 0, 1, ... size - 1.
    """
    first = -np.expm1(g) / -np.expm1(g * (np.arange(size, 2 * size) + 1))  # the weight at distance 0
    return np.exp(g * np.arange(size)) * first.mean()


def distance_picture(profiles: Mapping[str, np.ndarray], log_decays: Mapping[str, float]) -> Figure:
    """Left: weight against distance, softmax layers and fixed decays. Right: share of the weight farther back.

    Args:
        profiles: by layer, `by_distance`.
        log_decays: by name, of heads with a fixed decay; drawn by `decay_by_distance`.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
        size = len(next(iter(profiles.values())))
        distance = np.arange(size)
        curves = [(name, p, "-") for name, p in profiles.items()]
        curves += [(name, decay_by_distance(g, size), "--") for name, g in log_decays.items()]
        for i, (name, p, line) in enumerate(curves):
            color = style.CYCLE[i % len(style.CYCLE)]
            mark = _MARKS[i % len(_MARKS)] if line == "-" else None
            left.plot(
                distance + 1, p, line, color=color, marker=mark, markevery=[0, 1, 3, 9, 31, 99], label=name
            )
            # Of all the weight of a query, so what it spends beyond the picture counts as farther back.
            right.plot(distance + 1, 1 - p.cumsum(), line, color=color, label=name)
        left.set(
            xscale="log",
            yscale="log",
            xlabel="distance to the key, tokens, plus 1",
            ylabel="weight (log scale)",
        )
        left.set_ylim(1e-5, 1)
        left.set_title("where the weight goes")
        right.set(
            xscale="log", xlabel="distance to the key, tokens, plus 1", ylabel="share of the weight beyond"
        )
        right.set_ylim(0, 1)
        right.set_title("how much lies farther back")
        left.legend(loc="lower left")
    plt.close(fig)
    return fig


def forgetting(
    mask: Callable[[torch.Tensor], torch.Tensor], half_life: float | None
) -> Callable[..., torch.Tensor]:
    """Softmax attention whose weights decay with the distance, and are normalised again: ``fn(q, k, v, ...)``.

    Args:
        mask: log decays ``[B, H, N]`` to the mask of decays ``[B, H, N, N]``.
        half_life: tokens after which a weight has halved; None: plain softmax.
    """

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        p = softmax_weights(q, k)
        if half_life is not None:
            p = p * mask(torch.full((1, 1, q.shape[2]), -np.log(2) / half_life))
            p = p / p.sum(dim=-1, keepdim=True)
        return p @ repeat_kv(v, q.shape[1] // k.shape[1])

    return attend
