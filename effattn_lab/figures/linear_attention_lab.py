"""The numbers and the picture of the linear-attention lab's experiment on a real model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Map = Callable[[torch.Tensor], torch.Tensor]
_MARKS = ("o", "s", "^", "D", "v")


def other_maps() -> dict[str, Map]:
    """Two maps of the book's table that imitate softmax more closely than elu + 1."""
    from effattn_lab.linear.feature_maps import FEATURE_MAPS

    return {"taylor": FEATURE_MAPS["taylor"], "hedgehog": FEATURE_MAPS["hedgehog"]}


def weights(q: torch.Tensor, k: torch.Tensor, phi: Map | None) -> torch.Tensor:
    """Causal attention weights ``[B, Hq, N, N]``, rows summing to 1; ``phi`` None: softmax's.

    q ``[B, Hq, N, D]``, k ``[B, Hkv, N, D]``.
    """
    from effattn_lab.foundations.attention import repeat_kv, visible

    n = q.shape[2]
    seen = visible(n, n, causal=True)
    keys = repeat_kv(k, q.shape[1] // k.shape[1])
    if phi is None:
        scores = (q @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    found = (phi(q) @ phi(keys).transpose(-1, -2)).masked_fill(~seen, 0.0)
    return found / found.sum(dim=-1, keepdim=True)


def effective_keys(q: torch.Tensor, k: torch.Tensor, maps: Mapping[str, Map]) -> dict[str, float]:
    """``exp(entropy)`` of the weights, averaged over heads and the second half of the queries; "softmax" first."""
    found = {}
    for name, phi in {"softmax": None, **maps}.items():
        p = weights(q, k, phi)[:, :, q.shape[2] // 2 :]
        entropy = -torch.special.xlogy(p, p).sum(dim=-1)
        found[name] = float(entropy.exp().mean())
    return found


def weights_picture(
    q: torch.Tensor,
    k: torch.Tensor,
    maps: Mapping[str, Map],
    rows: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Left: the last query's weights, largest first. Right: effective number of keys, by layer.

    Args:
        q, k: of the layer on the left, the last of ``rows``.
        maps: by name, besides softmax.
        rows: layer → map → `effective_keys`.
    """
    import matplotlib.pyplot as plt

    names = ["softmax", *maps]
    with plt.rc_context(style.rc()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
        n = q.shape[2]
        rank = np.arange(1, n + 1)
        at = [0, 1, 3, 9, 31, 99, n - 2]  # one marker a half decade
        for name, mark, color in zip(names, _MARKS, style.CYCLE):
            p = weights(q, k, None if name == "softmax" else maps[name])[0, :, -1]
            largest = p.sort(dim=-1, descending=True).values.mean(dim=0)
            left.plot(rank, largest, color=color, marker=mark, markevery=at, label=name)
            right.plot(
                range(len(rows)), [r[name] for r in rows.values()], marker=mark, color=color, label=name
            )
        left.axhline(1 / n, linestyle=":", color=style.COLORS["text"], linewidth=1.2)
        left.annotate("all equal", (1, 1 / n), xytext=(0, -14), textcoords="offset points")
        left.set(xscale="log", yscale="log", xlabel="rank of the key", ylabel="weight (log scale)")
        left.set_ylim(1e-6, 1.5)
        left.set_title(f"the last query of {list(rows)[-1]}")
        right.set_xticks(range(len(rows)), list(rows))
        right.set(yscale="log", ylabel="effective number of keys")
        right.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
        right.minorticks_off()
        right.set_title("how many keys a query listens to")
        right.legend(loc="lower left")
    plt.close(fig)
    return fig


def capacity(features: int, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean squared error of reading back each of n stored values from one state, relative to the values' size.

    Random unit keys without a map or a denominator: what is read is the value, and ``k . k_j`` of every other.
    """
    rng = torch.Generator().manual_seed(seed)
    errors = []
    for n in counts:
        keys = torch.nn.functional.normalize(torch.randn(int(n), features, generator=rng), dim=-1)
        values = torch.randn(int(n), features, generator=rng)
        read = keys @ (keys.T @ values)
        errors.append(float((read - values).square().mean()))
    return np.array(errors)
