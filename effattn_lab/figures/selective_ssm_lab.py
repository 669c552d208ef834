"""The experiment and the picture of the selective-scan lab: remember the last capital letter of a real text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from effattn_lab.linear.selective_ssm_layer import Mamba
    from effattn_lab.tasks.language import ByteText

LETTERS = 26


def capitals(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bytes ``[n, N]``: the last capital letter up to each, 0..25, or -100 before the first; and how long
    ago it was."""
    position = torch.arange(ids.shape[1])
    last = torch.where((ids >= 65) & (ids <= 90), position, -1).cummax(dim=1).values
    letter = ids.gather(1, last.clamp(min=0)) - 65
    return letter.masked_fill(last < 0, -100), position - last


class Reader(nn.Module):
    """An embedding, one mixer, a linear map: ``ids [n, N]`` to scores of letters ``[n, N, 26]``. No MLP, no
    residual: what is known about earlier bytes has been carried by the mixer's state."""

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        self.embed, self.mixer = nn.Embedding(256, mixer.width), mixer
        self.head = nn.Linear(mixer.width, LETTERS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.embed(ids)))


def learn(
    reader: Reader, text: ByteText, *, rounds: int, examples: int = 32, length: int = 128, lr: float = 1e-2
) -> list[float]:
    """Train on windows of the text, new ones each round; the cross-entropy of each, in bits."""
    optimizer = torch.optim.Adam(reader.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=rounds, pct_start=0.1)
    rng, losses = np.random.default_rng(0), []
    for _ in range(rounds):
        ids = text.batch(examples, length, rng).inputs
        loss = F.cross_entropy(reader(ids).flatten(0, 1), capitals(ids)[0].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / np.log(2))
    return losses


@torch.no_grad()
def recall(reader: Reader, ids: torch.Tensor, edges: tuple[int, ...] = (0, 4, 16, 64)) -> list[float]:
    """Share of right answers on ``ids [n, N]``, by how many bytes ago the letter was: up to each of
    ``edges``."""
    want, age = capitals(ids)
    right = reader(ids).argmax(-1) == want
    found = []
    for low, high in zip((-1, *edges), edges):
        inside = (age > low) & (age <= high) & (want >= 0)
        found.append(float(right[inside].double().mean()))
    return found


def commonest(ids: torch.Tensor, edges: tuple[int, ...] = (0, 4, 16, 64)) -> list[float]:
    """What :func:`recall` would be for a reader that always answers the letter which is right most often."""
    want, age = capitals(ids)
    best = torch.bincount(want[want >= 0], minlength=LETTERS).argmax()
    return [
        float((want[inside] == best).double().mean())
        for inside in ((age > low) & (age <= high) & (want >= 0) for low, high in zip((-1, *edges), edges))
    ]


@torch.no_grad()
def kept(mixer: Mamba, x: torch.Tensor) -> torch.Tensor:
    """Share of each channel's longest-lived state that survives a token, ``exp(delta max_s A)``: ``x [1, N,
    M]`` to ``[E, N]``."""
    slowest = -torch.exp(mixer.A_log).min(dim=1).values
    return torch.exp(mixer.deltas(x)[0] * slowest[:, None])


def steps_picture(text: str, share: torch.Tensor) -> Figure:
    """What each character does to the state.

    Args:
        text: N characters. share: ``[E, N]`` of :func:`kept`; the channels are sorted by their mean.
    """
    import matplotlib.pyplot as plt

    rows = share[share.mean(dim=1).argsort()]
    with plt.rc_context(style.rc()):
        fig, (top, bottom) = plt.subplots(
            2, 1, figsize=(9.4, 4.6), layout="constrained", sharex=True, height_ratios=(3, 1.4)
        )
        image = top.imshow(rows, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        top.set_ylabel("channels")
        top.set_yticks([])
        top.grid(False)
        fig.colorbar(image, ax=top, label="share of the state kept", pad=0.01)
        colors = [style.CYCLE[1] if c.isupper() else style.CYCLE[0] for c in text]
        bottom.bar(range(len(text)), 1 - rows.mean(dim=0), color=colors)
        bottom.set_ylabel("renewed, mean")
        names = {" ": "␣", "\n": "↵"}
        bottom.set_xticks(range(len(text)), [names.get(c, c) for c in text], fontsize=10)
        bottom.tick_params(axis="x", length=0)
        bottom.grid(False, axis="x")
        bottom.set_xlabel("characters of the text (capitals in another colour)")
    plt.close(fig)
    return fig
