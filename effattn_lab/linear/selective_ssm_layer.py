"""Mamba-1's block as a layer that trains and decodes: projection, short convolution, selective scan, gate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.linear._selective_ssm_inputs import RULES, Rule
from effattn_lab.linear.selective_ssm import selective_scan_chunked, selective_scan_step
from effattn_lab.linear.selective_ssm_conv import causal_conv1d, causal_conv1d_step


class MambaState(NamedTuple):
    """What a layer remembers: ``conv [B, E, W - 1]``, its last inputs, and ``ssm [B, E, S]``, at least
    float32."""

    conv: torch.Tensor
    ssm: torch.Tensor


class Mamba(nn.Module):
    """Mamba-1's mixer, ``[B, N, M] -> [B, N, M]``; causal, no positions.

    ``[x, z] = W_in x``; x through a causal convolution and SiLU; ``[dt, B, C] = W_x x``;
    ``delta = softplus(W_dt dt + b)``; ``out = W_out (scan(x, delta, A, B, C, D) silu(z))``. Parameter names are
    mamba_ssm's and transformers', so that a checkpoint's mixer loads with ``load_state_dict``.

    It has no heads: each of the ``E = expand M`` channels is one, with a value of size 1. ``num_heads`` is
    there so that the layer can be put where attention stands, and changes nothing; ``num_kv_heads``,
    ``head_dim`` and ``value_dim`` must be left out. Neither does it want an MLP behind it: with ``expand = 2``
    it holds about ``6 M^2`` parameters where attention holds ``4 M^2``; see
    :func:`effattn_lab.linear.selective_ssm_cost.layer_parameters` for equal sizes.

    Args:
        width: M, model width.
        num_heads: accepted and ignored.
        state_size: S, hidden numbers a channel. Default 16.
        conv_width: W, tokens that the convolution sees. Default 4; 1 mixes nothing.
        expand: inner channels E over M. Default 2.
        dt_rank: width of the bottleneck in front of delta. Default ``ceil(M / 16)``.
        dt_min, dt_max: at the start softplus(bias) is spread log-uniformly between them. Default 0.001 and 0.1.
        chunk_size: of the parallel form. Default 64.
        selective: delta, B and C depend on the token. False: they are parameters of each channel, delta
        ``[E]``, B and
            C ``[E, S]``; then the scan is a convolution, as in S4D. To see what selection is worth. Default
            True.
        recompute: see :func:`effattn_lab.linear.selective_ssm.selective_scan_chunked`. Default False: faster,
            and at the sizes that train on a CPU memory does not bind.
        rule: how the input enters, "euler" (all released models, default) or "zoh" (the paper's equation 4), see
            :func:`effattn_lab.linear.selective_ssm.discretize`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        state_size: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        chunk_size: int = 64,
        recompute: bool = False,
        selective: bool = True,
        rule: Rule = "euler",
    ) -> None:
        super().__init__()
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            if value is not None:
                raise ValueError(f"{name}: expected None, since Mamba has no heads, got {value!r}")
        dt_rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        sizes = {
            "width": width, "num_heads": num_heads, "state_size": state_size, "conv_width": conv_width,
            "expand": expand, "dt_rank": dt_rank, "chunk_size": chunk_size,
        }  # fmt: skip
        for name, size in sizes.items():
            check_positive_int(name, size)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min: expected 0 < dt_min <= dt_max ({dt_max!r}), got {dt_min!r}")
        self.width, self.state_size, self.conv_width, self.dt_rank = width, state_size, conv_width, dt_rank
        self.channels, self.chunk_size, self.recompute = expand * width, chunk_size, recompute
        self.rule: Rule = rule
        inner = self.channels
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.selective = selective
        if selective:
            self.x_proj = nn.Linear(inner, dt_rank + 2 * state_size, bias=False)
            self.dt_proj = nn.Linear(dt_rank, inner)
            nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        else:
            self.B, self.C = (
                nn.Parameter(torch.ones(inner, state_size)),
                nn.Parameter(torch.randn(inner, state_size)),
            )
            self.dt_bias = nn.Parameter(torch.empty(inner))
        bias = self.dt_proj.bias if selective else self.dt_bias
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_size + 1)).repeat(inner, 1))  # S4D-real
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            dt = torch.exp(torch.empty(inner).uniform_(math.log(dt_min), math.log(dt_max))).clamp(min=1e-4)
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        # As in mamba_ssm; an optimizer that looks for the mark leaves these out of weight decay.
        for parameter in (self.A_log, self.D, bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    @property
    def state_elements(self) -> int:
        """Numbers that decoding keeps, a sequence: ``E (S + W - 1)``."""
        return self.channels * (self.state_size + self.conv_width - 1)

    def forward(
        self, x: torch.Tensor, state: MambaState | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, MambaState]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, state)`` to go on decoding
        from."""
        u, z = self._split(x)
        conv, ssm = (None, None) if state is None else state
        u, conv = causal_conv1d(
            u,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            activation="silu",
            initial_state=conv,
            return_state=True,
        )
        out, ssm = selective_scan_chunked(
            *self._scan_inputs(u, z), initial_state=ssm, return_state=True,
            chunk_size=self.chunk_size, recompute=self.recompute, rule=self.rule,
        )  # fmt: skip
        out = self.out_proj(out.transpose(1, 2))
        return (out, MambaState(conv, ssm)) if return_state else out

    def step(self, state: MambaState | None, x: torch.Tensor) -> tuple[torch.Tensor, MambaState]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], new state)``; the numbers of :meth:`forward`."""
        u, z = self._split(x)
        conv, ssm = (None, None) if state is None else state
        u, conv = causal_conv1d_step(conv, u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        out, ssm = selective_scan_step(ssm, *self._scan_inputs(u, z), rule=self.rule)
        return self.out_proj(out.transpose(1, 2)), MambaState(conv, ssm)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``u`` and ``z``, both ``[B, E, N]``."""
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"x: expected shape [B, N, {self.width}], got {tuple(x.shape)}")
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        return u, z

    def _scan_inputs(
        self, u: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
               torch.Tensor, bool]:  # fmt: skip
        """Everything that depends on the token comes from the convolved input, through one narrow
        projection."""
        A = -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log)
        if not self.selective:
            B, C = (x[None, :, :, None].expand(len(u), -1, -1, u.shape[2]) for x in (self.B, self.C))
            return u, torch.zeros_like(u), A, B, C, self.D, z, self.dt_bias, True
        dt, B, C = self.x_proj(u.transpose(1, 2)).split(
            [self.dt_rank, self.state_size, self.state_size], dim=-1
        )
        delta = (dt @ self.dt_proj.weight.T).transpose(1, 2)
        return u, delta, A, B.transpose(1, 2), C.transpose(1, 2), self.D, z, self.dt_proj.bias, True

    def deltas(self, x: torch.Tensor) -> torch.Tensor:
        """The steps that the layer takes, to look at: ``x [B, N, M]`` to ``[B, E, N]``, all positive."""
        u, z = self._split(x)
        u = causal_conv1d(u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        inputs = self._scan_inputs(u, z)
        return F.softplus(inputs[1] + inputs[7][:, None])
