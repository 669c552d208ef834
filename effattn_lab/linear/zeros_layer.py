"""ZeroS as layers that train and decode: projections, gates, logits, rotary positions, a norm for each head.

:class:`ZeroS` is linear in the length, :class:`ZeroSSoftmax` (ZeroS-SM) quadratic. Source: Lu et al. 2025; where the
paper is silent, the authors' code (norm without affine part, its epsilon, mu and tau zero at first). Two things of
that code are not followed: its rotary table is laid out for other pairs of channels than its rotation turns, and its
exponentials are measured from the maximum of the whole sequence, which decoding cannot know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.rotary import rotate
from effattn_lab.linear.zeros import zeros_chunked, zeros_sm, zeros_step
from effattn_lab.linear.zeros_state import ZeroSState
from effattn_lab.linear.zeros_weights import deviation_logits

LOGITS = ("deviation", "linear", "quadratic")
LENGTH_SCALES = ("none", "sqrt", "linear")


class ZeroSLayerState(NamedTuple):
    """State of the mechanism and the sum of ``u``, ``[B, Hkv, D]``, of which the deviation logits take a mean.

    With other logits the sum is not kept: ``[B, Hkv, 0]``.
    """

    mix: ZeroSState
    u_sum: torch.Tensor


class _Base(nn.Module):
    """What both layers share: projections of q, k, v and o, gates, rotary positions, the norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        gated: bool,
        zero_order: bool,
        rope: bool,
        norm: bool,
        norm_eps: float,
        length_scale: str,
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
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.value_dim = width // num_heads if value_dim is None else value_dim
        check_positive_int("head_dim", self.head_dim)
        check_positive_int("value_dim", self.value_dim)
        if length_scale not in LENGTH_SCALES:
            raise ValueError(
                f"length_scale: expected one of {', '.join(LENGTH_SCALES)}, got {length_scale!r}"
            )
        if not norm_eps > 0:
            raise ValueError(f"norm_eps: expected a number above 0, got {norm_eps!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.gated, self.zero_order, self.rope = gated, zero_order, rope
        self.norm, self.norm_eps, self.length_scale = norm, norm_eps, length_scale
        self.q_proj = nn.Linear(width, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.value_dim, width, bias=False)
        gates = 2 * gated + zero_order
        self.gate_proj = nn.Linear(width, gates * num_heads) if gates else None

    def _split(self, x: torch.Tensor, projection: nn.Linear, heads: int) -> torch.Tensor:
        return projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _heads(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = self.q_proj.in_features
        if x.dim() != 3 or x.shape[2] != width:
            raise ValueError(f"x: expected shape [B, N, {width}], got {tuple(x.shape)}")
        q, k = self._split(x, self.q_proj, self.num_heads), self._split(x, self.k_proj, self.num_kv_heads)
        if self.rope:
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, self._split(x, self.v_proj, self.num_kv_heads)

    def _gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``gate_1, gate_h, gate_0``, ``[B, H, N]``: sigmoid, sigmoid, tanh, as in the authors' code."""
        ones = torch.ones(x.shape[0], self.num_heads, x.shape[1], dtype=x.dtype, device=x.device)
        if self.gate_proj is None:
            return ones, ones, None
        raw = list(self._split(x, self.gate_proj, self.num_heads).unbind(-1))
        gate_0 = torch.tanh(raw.pop()) if self.zero_order else None
        gate_1, gate_h = (torch.sigmoid(g) for g in raw) if self.gated else (ones, ones)
        return gate_1, gate_h, gate_0

    def _merge(self, out: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``[B, Hq, N, Dv]`` to ``[B, N, M]``; token ``t = positions + 1`` has weights of size 1/t."""
        if self.length_scale != "none":
            power = 0.5 if self.length_scale == "sqrt" else 1.0
            out = out * ((positions + 1).to(out.dtype) ** power)[..., None]
        if self.norm:
            out = F.layer_norm(out, (self.value_dim,), eps=self.norm_eps)
        merged: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return merged


class ZeroS(_Base):
    """Causal multi-head ZeroS, ``[B, N, M] -> [B, N, M]``, linear in N. ``5 M^2`` parameters and the gates'.

    Args:
        width: M, model width.
        num_heads: Hq.
        num_kv_heads: Hkv, divides Hq; states and logits have this many heads. Default Hq.
        head_dim: D of queries, keys and u. Default ``width // num_heads``.
        value_dim: Dv. Default ``width // num_heads``.
        logits: "deviation" (:func:`~effattn_lab.linear.zeros_weights.deviation_logits`, the paper's), "linear"
            (``x w``, one number a head) or "quadratic" (``|u|^2 / D``). Default "deviation".
        gated: False: both gates are 1, so the weight is ``softmax - 1/t``. Default True.
        zero_order: keep the constant term, with a tanh gate. Default False.
        rope: rotary positions inside the cosine. Default True.
        norm: LayerNorm over each head's output, no affine part. Default True.
        norm_eps: its epsilon. Default 1e-5 as in the authors' code. At initialisation outputs have a variance far
            below that, so late positions start almost silent; 1e-12 or a ``length_scale`` mends it.
        length_scale: multiply the output of step t by 1 ("none"), ``sqrt(t)`` ("sqrt") or ``t`` ("linear") before
            the norm. Default "none".
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
        logits: str = "deviation",
        gated: bool = True,
        zero_order: bool = False,
        rope: bool = True,
        norm: bool = True,
        norm_eps: float = 1e-5,
        length_scale: str = "none",
        chunk_size: int = 64,
    ) -> None:
        super().__init__(
            width, num_heads, num_kv_heads, head_dim, value_dim,
            gated, zero_order, rope, norm, norm_eps, length_scale,
        )  # fmt: skip
        check_positive_int("chunk_size", chunk_size)
        if logits not in LOGITS:
            raise ValueError(f"logits: expected one of {', '.join(LOGITS)}, got {logits!r}")
        self.logits, self.chunk_size = logits, chunk_size
        u_dim = 1 if logits == "linear" else self.head_dim
        self.u_proj = nn.Linear(width, self.num_kv_heads * u_dim, bias=False)
        if logits == "deviation":
            self.mu = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_dim))
            self.tau = nn.Parameter(torch.zeros(self.num_kv_heads))

    @property
    def state_elements(self) -> int:
        """Numbers that one sequence keeps, whatever its length: three sums, four scalars a head, the sum of u."""
        u_sum = self.head_dim if self.logits == "deviation" else 0
        return self.num_kv_heads * (3 * self.head_dim * self.value_dim + 4 + u_sum)

    def forward(
        self, x: torch.Tensor, state: ZeroSLayerState | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ZeroSLayerState]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, state)`` to go on decoding from."""
        positions = self._positions(x, state)
        q, k, v = self._heads(x, positions)
        s, u_sum = self._logits(x, state)
        gate_1, gate_h, gate_0 = self._gates(x)
        out, mix = zeros_chunked(
            q, k, v, s, gate_1, gate_h,
            gate_0=gate_0, causal=True, chunk_size=self.chunk_size,
            initial_state=None if state is None else state.mix, return_state=True,
        )  # fmt: skip
        out = self._merge(out, positions)
        return (out, ZeroSLayerState(mix, u_sum)) if return_state else out

    def step(self, state: ZeroSLayerState | None, x: torch.Tensor) -> tuple[torch.Tensor, ZeroSLayerState]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], new state)``; the numbers of :meth:`forward`."""
        positions = self._positions(x, state)
        q, k, v = self._heads(x, positions)
        s, u_sum = self._logits(x, state)
        gate_1, gate_h, gate_0 = self._gates(x)
        out, mix = zeros_step(None if state is None else state.mix, q, k, v, s, gate_1, gate_h, gate_0=gate_0)
        return self._merge(out, positions), ZeroSLayerState(mix, u_sum)

    def _positions(self, x: torch.Tensor, state: ZeroSLayerState | None) -> torch.Tensor:
        """``[N]``, or ``[B, 1, N]`` after a state; the first token of a sequence is 0."""
        steps = torch.arange(x.shape[1], device=x.device)
        return steps if state is None else state.mix.t[:, :1, None] + steps

    def _logits(self, x: torch.Tensor, state: ZeroSLayerState | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``s [B, Hkv, N]`` and the sum of u after these tokens (empty where no mean is taken)."""
        u = self._split(x, self.u_proj, self.num_kv_heads)
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if self.logits == "linear":
            return u[..., 0], u[:, :, 0, :0]
        if self.logits == "quadratic":
            return u.square().sum(dim=-1) / self.head_dim, u[:, :, 0, :0]
        earlier = None if state is None else (state.u_sum, state.mix.t)
        after = u.sum(dim=2) if state is None else state.u_sum + u.sum(dim=2)
        return deviation_logits(u, self.mu, self.tau, before=earlier), after


class KVCache(NamedTuple):
    """Keys (turned by their positions) and values of all tokens so far, ``[B, Hkv, N, D]`` and ``[..., Dv]``."""

    k: torch.Tensor
    v: torch.Tensor


class ZeroSSoftmax(_Base):
    """ZeroS-SM: ordinary attention scores with zero-sum weights, ``[B, N, M] -> [B, N, M]``; quadratic, with a cache.

    Args:
        width, num_heads, num_kv_heads, head_dim, value_dim, gated, zero_order, rope: as in :class:`ZeroS`.
        cosine: multiply the weights by ``cos(q, k)``, see :func:`~effattn_lab.linear.zeros.zeros_sm`. Default False.
        norm, norm_eps, length_scale: as in :class:`ZeroS`; whether the paper keeps the norm here we could not
            confirm. Default True, 1e-5, "none".
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        cosine: bool = False,
        gated: bool = True,
        zero_order: bool = False,
        rope: bool = True,
        norm: bool = True,
        norm_eps: float = 1e-5,
        length_scale: str = "none",
    ) -> None:
        super().__init__(
            width, num_heads, num_kv_heads, head_dim, value_dim,
            gated, zero_order, rope, norm, norm_eps, length_scale,
        )  # fmt: skip
        self.cosine = cosine

    def forward(
        self, x: torch.Tensor, state: KVCache | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, KVCache]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, cache)``."""
        start = 0 if state is None else state.k.shape[2]
        positions = start + torch.arange(x.shape[1], device=x.device)
        q, k, v = self._heads(x, positions)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        gate_1, gate_h, gate_0 = self._gates(x)
        out = zeros_sm(q, k, v, gate_1, gate_h, gate_0=gate_0, causal=True, cosine=self.cosine)
        out = self._merge(out, positions)
        return (out, KVCache(k, v)) if return_state else out

    def step(self, state: KVCache | None, x: torch.Tensor) -> tuple[torch.Tensor, KVCache]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], longer cache)``."""
        out = self(x, state, return_state=True)
        return out[0], out[1]
