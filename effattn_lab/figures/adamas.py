"""Pictures of two-bit codes: a key before and after the transform, distance against product, energy by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
                looks: Any = {"color": style.PALETTE[_CODES[code]], "hatch": _HATCHES[code]}
                looks |= {"edgecolor": "white", "linewidth": 0.3}
                axis.bar(at.numpy(), x[at].numpy(), **looks)
                # For the legend: no bars would leave a patch without a look.
                axis.bar([0], [0], label=f"code {code}: {len(at)}", **looks)
            for level in (-t, 0.0, t):
                axis.axhline(
                    level, color=style.COLORS["text"], linewidth=0.8, linestyle="--" if level else "-",
                    label=f"±{t:g}" if level > 0 else None,
                )  # fmt: skip
            axis.set_title(f"{name}: six channels hold {share:.0%} of its energy", loc="left")
            axis.legend(ncols=5, fontsize=8.5, loc="upper right")
            axis.set_ylim(-max(1.2, 1.15 * float(x.abs().max())), 1.5 * max(1.2, float(x.abs().max())))
        fig.supxlabel("coordinate", fontsize=11.5)
        fig.supylabel("value", fontsize=11.5)
    plt.close(fig)
    return fig


def choices_picture(budget: int = 32, page: int = 8) -> Figure:
    """One row of 128 keys and what four rules read of it: sinks and a window, pages, codes, the oracle.

    Random keys, twelve of them related to the query and scattered over the text, the first four liked by every query.
    """
    import matplotlib.pyplot as plt

    from effattn_lab.sparse.adamas import code_distances, encode, select_nearest
    from effattn_lab.sparse.quest import page_bounds, page_scores, select_pages

    n, dim = 128, 64
    g = torch.Generator().manual_seed(5)
    q = uneven(1, dim, 1.0, seed=4).float()
    k = torch.randn(n, dim, generator=g)
    relevant = torch.randperm(n - 8, generator=g)[:12] + 4
    part = torch.cat([torch.full((4,), 0.6), 0.45 + 0.3 * torch.rand(12, generator=g)])[:, None]
    at = torch.cat([torch.arange(4), relevant])
    k[at] = part * q + (1 - part.square()).sqrt() * k[at]
    k = k / k.square().mean(-1, keepdim=True).sqrt()
    a = torch.softmax((k @ q[0]) * dim**-0.5, dim=0)
    q4, k4 = q.view(1, 1, 1, dim), k.view(1, 1, n, dim)
    codes = (encode(x, thresholds=(-0.67, 0.0, 0.67)) for x in (q4, k4))
    pages = select_pages(page_scores(q4, *page_bounds(k4, page)), budget // page)[0, 0]
    chosen = {
        "StreamingLLM": torch.cat([torch.arange(4), torch.arange(n - budget + 4, n)]),
        f"Quest, pages of {page}": (pages[:, None] * page + torch.arange(page)).flatten(),
        "Adamas": select_nearest(code_distances(*codes), budget)[0, 0],
        "oracle": a.topk(budget).indices,
    }
    with plt.rc_context(style.rc()):
        fig, axes = plt.subplots(
            len(chosen), 1, figsize=(8.6, 4.6), sharex=True, sharey=True, layout="constrained"
        )
        for axis, (name, index) in zip(axes, chosen.items()):
            read = torch.zeros(n, dtype=torch.bool)
            read[index] = True
            for keep, color, label in ((~read, "grey", "passed over"), (read, "blue", "read")):
                where = keep.nonzero()[:, 0]
                axis.bar(where.numpy(), a[where].numpy(), 0.9, color=style.PALETTE[color], label=label)
            axis.plot(
                index.numpy(), torch.full((len(index),), -0.012).numpy(), "s", markersize=2.6,
                color=style.PALETTE["blue"], clip_on=False,
            )  # fmt: skip
            axis.set_title(
                f"{name}: {len(index)} tokens hold {float(a[index].sum()):.1%} of the weight", loc="left"
            )
            axis.set_ylim(-0.02, 1.1 * float(a.max()))
        axes[0].legend(ncols=2, fontsize=8.5, loc="upper center")
        fig.supxlabel("token", fontsize=11.5)
        fig.supylabel("softmax weight", fontsize=11.5)
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
