"""A short causal convolution, by itself and as a gated mixer: how a token sees its neighbours without attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time, ``y_t = sum_j w_j x_{t-j}``, one filter a channel.

    Args:
        width: M channels.
        kernel_size: taps, at least 1: j = 0..kernel_size - 1.

    Its state are the last ``kernel_size - 1`` inputs, ``[B, kernel_size - 1, M]``. Starts as the identity, so that a
    block with it begins as the block without it.
    """

    def __init__(self, width: int, kernel_size: int = 3) -> None:
        super().__init__()
        check_positive_int("width", width)
        check_positive_int("kernel_size", kernel_size)
        self.width, self.kernel_size = width, kernel_size
        weight = torch.randn(width, kernel_size) * 0.02
        weight[:, 0] += 1.0
        self.weight = nn.Parameter(weight)

    @property
    def state_elements(self) -> int:
        """Numbers kept for each sequence."""
        return (self.kernel_size - 1) * self.width

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``x [B, N, M]`` to ``[B, N, M]``; the tail of inputs to go on from with ``return_state``."""
        if x.dim() != 3 or x.shape[2] != self.width or x.shape[1] == 0:
            raise ValueError(
                f"x: expected shape [B, N, {self.width}] with N at least 1, got {tuple(x.shape)}"
            )
        taps = self.kernel_size - 1
        if state is None:
            state = x.new_zeros(x.shape[0], taps, self.width)
        whole = torch.cat([state, x], dim=1)
        length = x.shape[1]
        # A sum of shifted copies: for so few taps faster on a CPU than a grouped convolution, forward and backward.
        out = self.weight[:, 0] * x
        for j in range(1, self.kernel_size):
            out = out + self.weight[:, j] * whole[:, taps - j : taps - j + length]
        tail = whole[:, whole.shape[1] - taps :]
        return (out, tail) if return_state else out

    def step(self, state: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token, ``x [B, 1, M]``; the numbers of :meth:`forward`."""
        out = self.forward(x, state, return_state=True)
        assert isinstance(out, tuple)
        return out


class GatedConvolution(nn.Module):
    """A gated short convolution, ``(conv(x) * silu(x W)) U``: mixes neighbours, remembers nothing beyond its taps.

    Args:
        width: M.
        kernel_size: taps of the convolution. Default 3.

    Source: the first layer of the recall models in Arora et al. 2024 (Based). There the gate has no SiLU; with it our
    small models learn recall in half the steps.
    """

    def __init__(self, width: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = ShortConvolution(width, kernel_size)
        self.gate = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    @property
    def state_elements(self) -> int:
        """Numbers kept for each sequence."""
        return self.conv.state_elements

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``x [B, N, M]`` to ``[B, N, M]``."""
        out, tail = self.conv.step(state, x)
        out = self.o_proj(out * F.silu(self.gate(x)))
        return (out, tail) if return_state else out

    def step(self, state: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token, ``x [B, 1, M]``; the numbers of :meth:`forward`."""
        out = self.forward(x, state, return_state=True)
        assert isinstance(out, tuple)
        return out
