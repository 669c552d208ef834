"""Pictures of two-bit codes: a key before and after the transform, distance against product, energy by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CODES = ("vermillion", "orange", "sky", "blue")  # codes 0 .. 3
_HATCHES = ("xx", "//", "", "..")


def uneven(count: int, dim: int = 64, spread: float = 1.5, seed: int = 0) -> torch.Tensor:
    """``[count, dim]`` float64 vectors with channels of unequal energy, of mean square 1."""
    g = torch.Generator().manual_seed(seed)
    energy = torch.exp(spread * torch.randn(dim, generator=g, dtype=torch.float64))
    x = energy / energy.square().mean().sqrt() * torch.randn(count, dim, generator=g, dtype=torch.float64)
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def codes_picture(t: float = 0.67) -> Figure:
    """One key, its channels as bars by code: as it is, and after the Hadamard transform.

    Args:
        t: thresholds at -t, 0 and t. 0.67 halves each side of a normal distribution of deviation 1.
    """
    import matplotlib.pyplot as plt

    from effattn_lab.sparse.codes import bucketize, hadamard

    key = uneven(1)[0]
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(2, 1, figsize=(8.6, 4.6), sharex=True, layout="constrained")
        for axis, x, name in zip(axes, (key, hadamard(key)), ("a key $k$", "transformed, $kH$")):
            codes = bucketize(x, (-t, 0.0, t))
            share = float(x.square().topk(6).values.sum() / x.square().sum())
            for code in range(4):
                at = (codes == code).nonzero()[:, 0]
                axis.bar(
                    at.numpy(), x[at].numpy(), color=style.PALETTE[_CODES[code]], hatch=_HATCHES[code],
                    edgecolor="white", linewidth=0.3, label=f"code {code}: {len(at)}",
                )  # fmt: skip
            for level in (-t, 0.0, t):
                axis.axhline(
                    level, color=style.COLORS["text"], linewidth=0.8, linestyle="--" if level else "-"
                )
            axis.set_title(f"{name}: six channels hold {share:.0%} of its energy", loc="left")
            axis.legend(ncols=4, fontsize=8.5, loc="upper right")
            axis.set_ylim(-max(1.2, 1.15 * float(x.abs().max())), 1.5 * max(1.2, float(x.abs().max())))
        fig.supxlabel("coordinate", fontsize=11.5)
        fig.supylabel("value", fontsize=11.5)
    plt.close(fig)
    return fig


def distance_picture(count: int = 1500, t: float = 2.7) -> Figure:
    """Product against L1 distance of codes for random keys: of one length, and of many lengths.

    Keys share a part of 0 to 0.8 with the query; t as multiples of a coordinate's deviation, here 4.
    """
    import matplotlib.pyplot as plt

    from effattn_lab.sparse.codes import bucketize, hadamard, l1_naive

    x = 4 * uneven(count + 1, 128, 1.0, seed=1)
    q = x[:1]
    g = torch.Generator().manual_seed(3)
    near = 0.8 * torch.rand(count, 1, generator=g, dtype=torch.float64)
    k = near * q + (1 - near.square()).sqrt() * x[1:]
    k = 4 * k / k.square().mean(dim=-1, keepdim=True).sqrt()
    lengths = torch.exp(0.6 * torch.randn(count, 1, generator=g, dtype=torch.float64))
    levels = (-t, 0.0, t)
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.7), layout="constrained")
        for axis, keys, name in zip(axes, (k, lengths * k), ("keys of one length", "keys of many lengths")):
            product = (keys @ q.T)[:, 0] / 128**0.5
            d = l1_naive(bucketize(hadamard(q), levels), bucketize(hadamard(keys), levels))
            best = product.topk(64).indices
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[d.double().add(torch.rand(count, generator=g) * 0.5).topk(64, largest=False).indices] = (
                True
            )
            hits = int(chosen[best].sum())
            axis.plot(
                d.numpy(),
                product.numpy(),
                "o",
                color=style.PALETTE["sky"],
                markersize=3,
                alpha=0.7,
                label="keys",
            )
            axis.plot(
                d[best], product[best], "^", color=style.PALETTE["vermillion"], markersize=5, label="64 best"
            )
            edge = float(d[chosen].max()) + 0.5
            axis.axvline(edge, color=style.COLORS["text"], linestyle="--", linewidth=1)
            axis.set_title(f"{name}: {hits} of 64 found")
            axis.set_xlabel("L1 distance of codes")
        axes[0].set_ylabel("score $q\\cdot k/\\sqrt{D}$")
        axes[0].legend(loc="upper right")
    plt.close(fig)
    return fig


def energy_picture(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Figure:
    """Share of a key's energy in its largest channels, before and after the transform: one panel a layer.

    Args:
        layers: name → (energy before, energy after), each ``[D]``, mean squares by channel.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(
            1, len(layers), figsize=(3.1 * len(layers), 3.3), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (name, parts) in zip(axes[0], layers.items()):
            looks = (("as they are", "-", "vermillion"), ("transformed", "--", "blue"))
            for x, (label, dash, color) in zip(parts, looks):
                share = (x.sort(descending=True).values / x.sum()).cumsum(0)
                axis.plot(
                    range(1, len(x) + 1), share, dash, color=style.PALETTE[color], label=label, linewidth=2
                )
            dim = len(parts[0])
            axis.plot([0, dim], [0, 1], ":", color=style.COLORS["muted"], label="all alike")
            axis.set_title(name)
        axes[0, 0].set_ylabel("share of energy")
        axes[0, -1].legend(loc="lower right", fontsize=9)
        fig.supxlabel("channels, largest first", fontsize=11.5)
    plt.close(fig)
    return fig


def time_picture(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Milliseconds of full attention, of a whole step and of its four parts, against the length.

    Args:
        rows: one a length: ``seqlen``, ``full``, ``step``, ``encode``, ``estimate``, ``select``, ``attend``; and
            perhaps ``read``, what merely reading keys and values takes.
    """
    import matplotlib.pyplot as plt

    looks = (
        ("full", "full attention", "-", "o", "black", 2.4),
        ("read", "reading K and V", "-.", "+", "grey", 1.8),
        ("step", "whole step", "-", "s", "vermillion", 2.4),
        ("estimate", "scan of the codes", "--", "^", "blue", 1.4),
        ("select", "select", "--", "v", "green", 1.4),
        ("encode", "code of the query", ":", "D", "orange", 1.4),
        ("attend", "attend", ":", "x", "purple", 1.4),
    )
    with plt.rc_context(style.rc()):
        fig, axis = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
        seqlens = [row["seqlen"] for row in rows]
        for part, label, dash, marker, color, width in looks:
            if part not in rows[0]:
                continue
            values = [row[part] for row in rows]
            axis.plot(
                seqlens, values, dash, marker=marker, markersize=5, linewidth=width,
                color=style.PALETTE[color], label=label,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(seqlens, [f"{int(n) / 1024:g}K" for n in seqlens])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="tokens in the cache", ylabel="milliseconds a step")
        fig.legend(fontsize=9, loc="outside right upper")
    plt.close(fig)
    return fig
