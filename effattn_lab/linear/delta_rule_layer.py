"""DeltaNet and Gated DeltaNet as a layer that trains and decodes: short convolutions, unit keys, beta, decay."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.delta_rule import delta_rule_chunked, delta_rule_step, l2_normalize


class DeltaRuleState(NamedTuple):
    """What the layer remembers of a sequence, whatever its length.

    ``S [B, Hkv, D, Dv]``, float32 at least; ``conv [B, conv_width - 1, Hq D + Hkv D + Hkv Dv]``, the projections of
    the last tokens, which the convolutions still see.
    """

    S: torch.Tensor
    conv: torch.Tensor


class DeltaRule(nn.Module):
    """Causal multi-head delta rule, ``[B, N, M] -> [B, N, M]``; no positions, no biases.

    q, k, v are linear, then a causal depthwise convolution over the last ``conv_width`` tokens, then SiLU; **q and k
    are scaled to length 1 here**, which keeps the state from exploding whatever the input; ``beta = sigmoid(W x)``.
    Every head's output goes through an RMSNorm. As in flash-linear-attention's DeltaNet and GatedDeltaNet.

    Args:
        width: M, model width.
        num_heads: Hq.
        num_kv_heads: Hkv, divides Hq; the state, beta and the decay have this many heads. Default Hq.
        head_dim: D of queries and keys. Default ``width // num_heads``.
        value_dim: Dv. Default ``width // num_heads``.
        gated: Gated DeltaNet: the state decays by ``exp(-exp(A) softplus(W x + b))`` a token, and the normed output
            is multiplied by ``silu(W x)``. Default False.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1). Default False.
        conv_width: tokens that a convolution sees, its own included; 1 sees only its own, 0 leaves it out. Default 4.
        chunk_size: C of the parallel form. Default 64.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        gated: bool = False,
        allow_neg_eigval: bool = False,
        conv_width: int = 4,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_positive_int("width", width)
        check_positive_int("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive_int("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads ({num_heads}), got {num_kv_heads}"
            )
        if width % num_heads and (head_dim is None or value_dim is None):
            raise ValueError(f"num_heads: expected a divisor of width ({width}), got {num_heads}")
        if conv_width != 0:
            check_positive_int("conv_width", conv_width)
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.value_dim = width // num_heads if value_dim is None else value_dim
        check_positive_int("head_dim", self.head_dim)
        check_positive_int("value_dim", self.value_dim)
        check_positive_int("chunk_size", chunk_size)
        self.width, self.num_heads, self.num_kv_heads = width, num_heads, num_kv_heads
        self.gated, self.allow_neg_eigval = bool(gated), bool(allow_neg_eigval)
        self.conv_width, self.chunk_size = conv_width, chunk_size
        self.sizes = (
            num_heads * self.head_dim,
            num_kv_heads * self.head_dim,
            num_kv_heads * self.value_dim,
        )
        self.qkv_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.sizes), conv_width)) if conv_width else None
        if self.conv is not None:  # nn.Conv1d's own: uniform up to one over the root of what a channel sees
            nn.init.uniform_(self.conv, -(conv_width**-0.5), conv_width**-0.5)
        self.beta_proj = nn.Linear(width, num_kv_heads, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.o_proj = nn.Linear(num_heads * self.value_dim, width, bias=False)
        if self.gated:
            self.decay_proj = nn.Linear(width, num_kv_heads, bias=False)
            self.gate_proj = nn.Linear(width, num_heads * self.value_dim, bias=False)
            # Mamba-2's: rates up to 16, steps of 0.001 to 0.1: at first, heads remember for very different times.
            self.A_log = nn.Parameter(torch.empty(num_kv_heads).uniform_(1e-4, 16).log())
            step = torch.empty(num_kv_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
            self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True  # type: ignore[attr-defined]

    @property
    def state_elements(self) -> int:
        """Numbers that a sequence leaves in this layer: ``Hkv D Dv``, and the convolutions' last tokens."""
        tail = max(0, self.conv_width - 1) * sum(self.sizes)
        return self.num_kv_heads * self.head_dim * self.value_dim + tail

    def forward(
        self, x: torch.Tensor, state: DeltaRuleState | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, DeltaRuleState]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, state)`` to go on decoding from."""
        q, k, v, beta, g, tail = self._inputs(x, state)
        out, s = delta_rule_chunked(
            q,
            k,
            v,
            beta,
            g,
            initial_state=None if state is None else state.S,
            return_state=True,
            chunk_size=self.chunk_size,
        )
        out = self._merge(out, x)
        return (out, DeltaRuleState(s, tail)) if return_state else out

    def step(self, state: DeltaRuleState | None, x: torch.Tensor) -> tuple[torch.Tensor, DeltaRuleState]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], new state)``; the numbers of :meth:`forward`."""
        q, k, v, beta, g, tail = self._inputs(x, state)
        out, s = delta_rule_step(None if state is None else state.S, q, k, v, beta, g)
        return self._merge(out, x), DeltaRuleState(s, tail)

    def _inputs(
        self, x: torch.Tensor, state: DeltaRuleState | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """q, k of length 1, v, beta, g, and the tokens that the next call's convolutions see."""
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"x: expected shape [B, N, {self.width}], got {tuple(x.shape)}")
        if state is not None and (not isinstance(state, tuple) or len(state) != 2):
            raise ValueError(
                f"state: expected a DeltaRuleState (S, conv) or None, got {type(state).__name__}"
            )
        mixed = self.qkv_proj(x)
        tail = mixed[:, :0]
        if self.conv is not None:
            channels, width = self.conv.shape
            shape = (x.shape[0], width - 1, channels)
            before = mixed.new_zeros(shape) if state is None else state.conv
            if tuple(before.shape) != shape:
                raise ValueError(f"state: expected conv of shape {shape}, got {tuple(before.shape)}")
            seen = torch.cat([before, mixed], dim=1)  # zeros stand left of the first token: nothing leaks
            tail = seen[:, seen.shape[1] - (width - 1) :]
            mixed = F.conv1d(seen.mT, self.conv[:, None], groups=channels).mT
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, heads in zip(
                F.silu(mixed).split(self.sizes, dim=-1),
                (self.num_heads, self.num_kv_heads, self.num_kv_heads),
            )
        )
        beta = torch.sigmoid(self.beta_proj(x)).transpose(1, 2)
        if self.allow_neg_eigval:
            beta = 2 * beta
        g = None
        if self.gated:
            g = -self.A_log.exp() * F.softplus(self.decay_proj(x).float() + self.dt_bias)
            g = g.transpose(1, 2)
        return l2_normalize(q), l2_normalize(k), v, beta, g, tail

    def _merge(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(out).transpose(1, 2).flatten(2)
        if self.gated:
            out = out * F.silu(self.gate_proj(x))
        return self.o_proj(out)
