"""Where log decays come from: the gate parametrisations of RetNet, Mamba-2, GLA, RWKV-6 and RWKV-7.

Each is a module that maps a layer's input ``x [B, N, M]`` to ``g``, at most 0: ``[B, H, N]`` a head or
``[B, H, N, K]`` a channel. They differ in what the decay may depend on and in how far it may go:

========  ======================================  =========  =====================================
gate      log decay                               per        range of the decay
========  ======================================  =========  =====================================
retnet    ``log(1 - 2^(-5-h))``                   head       fixed: 0.969, 0.984, ... towards 1
ssd       ``-exp(A_log) softplus(x W + b)``       head       (0, 1)
gla       ``log sigmoid(x W1 W2 + b) / 16``       channel    (0, 1), the 16th root of a sigmoid
rwkv6     ``-exp(lambda + tanh(x A) B)``          channel    (0, 1), down to 0 in float32
rwkv7     ``-e^(-1/2) sigmoid(d + tanh(x A) B)``  channel    (0.545, 1)
========  ======================================  =========  =====================================
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[B, N, H K] -> [B, H, N, K]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def retnet_log_decay(num_heads: int) -> torch.Tensor:
    """``log(1 - 2^(-5-h))`` for h = 0 .. num_heads - 1, float64: half-lives of 22, 44, 88, ... tokens.

    Source: Sun et al. 2023, section 2.2 (the multi-scale decay as in the released code).
    """
    check_positive_int("num_heads", num_heads)
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64)))


class RetNetGate(nn.Module):
    """Constant decay a head: nothing to learn, nothing that depends on the token. ``[B, N, M] -> [B, H, N]``."""

    log_decay: torch.Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("log_decay", retnet_log_decay(num_heads).float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_decay[None, :, None].expand(x.shape[0], -1, x.shape[1])


class SSDGate(nn.Module):
    """Mamba-2: a step ``dt = softplus(x W + b)`` a head; decay ``exp(-exp(A_log) dt)``, and the value times dt.

    A token with dt near 0 neither writes nor forgets; a large dt does both. ``A ~ U(1, 16)``, b such that dt is
    log-uniform in [0.001, 0.1]. Source: Dao and Gu 2024, and the mamba_ssm code.

    Args:
        width: M. num_heads: H.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        dt = torch.exp(torch.rand(num_heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        dt = dt.clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(g [B, H, N], dt [B, H, N])``, both float32 at least."""
        dt = F.softplus(self.proj(x).to(torch.promote_types(x.dtype, torch.float32)) + self.dt_bias)
        dt = dt.transpose(1, 2)
        return -torch.exp(self.A_log)[:, None] * dt, dt


class GLAGate(nn.Module):
    """GLA: ``log sigmoid(x W1 W2 + b) / temperature``, low rank, a channel. ``[B, N, M] -> [B, H, N, K]``.

    A sigmoid forgets half at 0, far too fast for a memory; its 16th root, 4 %. Source: Yang et al. 2024, section 4.4.

    Args:
        width: M. num_heads, head_dim: H and K. rank: of ``W1 W2``, default 16. temperature: default 16.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, rank: int = 16, temperature: float = 16.0
    ) -> None:
        super().__init__()
        self.num_heads, self.temperature = num_heads, temperature
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, num_heads * head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _heads(F.logsigmoid(self.up(self.down(x))) / self.temperature, self.num_heads)


class RWKV6Gate(nn.Module):
    """RWKV-6: ``-exp(lambda + tanh(x A) B)``, a channel. ``[B, N, M] -> [B, H, N, K]``.

    No floor: ``lambda + ... = 4`` is a log decay of -55 a token. lambda begins between -6 and -1, slow channels first
    in each layer. Source: Peng et al. 2024, section 3; initial values as in RWKV-LM's first layer.

    Args:
        width: M. num_heads, head_dim: H and K. rank: of A and B, default 64, at most M.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, rank: int = 64) -> None:
        super().__init__()
        self.num_heads, rank = num_heads, min(rank, width)
        place = torch.arange(num_heads * head_dim) / max(1, num_heads * head_dim - 1)
        self.base = nn.Parameter(-6 + 5 * place**0.7)
        self.down = nn.Parameter(torch.zeros(width, rank))
        self.up = nn.Parameter(torch.empty(rank, num_heads * head_dim).uniform_(-0.01, 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _heads(-torch.exp(self.base + torch.tanh(x @ self.down) @ self.up), self.num_heads)


class RWKV7Gate(nn.Module):
    """RWKV-7: decay, learning rate and removal key of :func:`effattn_lab.linear.rwkv.rwkv7`.

    ``g = -e^(-1/2) sigmoid(d(x))``: a token keeps at least 54.5 % of a channel, which is what the erase is for.
    ``a = sigmoid(l(x))``, ``kappa = k * xi / |k * xi|`` and the write key ``k (1 + (a - 1) k_a)``, which writes less
    where it erases less. Source: Peng et al. 2025, section 4.

    Args:
        width: M. num_heads, head_dim: H and K. rank: of both low-rank maps, default 64, at most M.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, rank: int = 64) -> None:
        super().__init__()
        self.num_heads, rank, size = num_heads, min(rank, width), num_heads * head_dim
        place = torch.arange(size) / max(1, size - 1)
        self.base = nn.Parameter(-5.5 + 5 * place**0.85)
        self.down = nn.Parameter(torch.zeros(width, rank))
        self.up = nn.Parameter(torch.empty(rank, size).uniform_(-0.1, 0.1))
        self.rate_base = nn.Parameter(torch.zeros(size))
        self.rate_down = nn.Parameter(torch.zeros(width, rank))
        self.rate_up = nn.Parameter(torch.empty(rank, size).uniform_(-0.1, 0.1))
        self.xi = nn.Parameter(torch.full((num_heads, 1, head_dim), 0.85))
        self.k_a = nn.Parameter(torch.ones(num_heads, 1, head_dim))

    def forward(
        self, x: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``x [B, N, M]`` and keys ``k [B, H, N, K]`` to ``(g, a, kappa, write key)``, each ``[B, H, N, K]``."""
        g = -math.exp(-0.5) * torch.sigmoid(self.base + torch.tanh(x @ self.down) @ self.up)
        a = torch.sigmoid(self.rate_base + (x @ self.rate_down) @ self.rate_up)
        g, a = _heads(g, self.num_heads), _heads(a, self.num_heads)
        return g, a, F.normalize(k * self.xi, dim=-1), k * (1 + (a - 1) * self.k_a)
