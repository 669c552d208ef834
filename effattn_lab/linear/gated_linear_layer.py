"""Gated linear attention as a layer: RetNet's retention, Mamba-2's SSD, GLA and RWKV-6's time mix, by one argument.

All are projections, a recurrence with decay, a norm of each head, an output gate and a projection. What one model
has and another has not stands in a class of its own here; the recurrence is the same function for all four.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.gated_linear import gated_linear_chunked, gated_linear_step
from effattn_lab.linear.gates import GLAGate, RetNetGate, RWKV6Gate, SSDGate, _heads
from effattn_lab.linear.rwkv import rwkv6_chunked, rwkv6_step

Gate = Literal["retnet", "ssd", "gla", "rwkv6"]
CONV = 4  # taps of Mamba-2's convolution


class GatedLinearState(NamedTuple):
    """What the layer remembers between calls.

    ``S [B, Hkv, K, V]``: the recurrence's state. ``tail [B, n, channels]``: the last inputs, 3 for Mamba-2's
    convolution, 1 for RWKV-6's token shift, none else. ``position``: tokens seen, for RetNet's rotation.
    """

    S: torch.Tensor
    tail: torch.Tensor
    position: int


class Sizes(NamedTuple):
    """Width and heads of a layer, as :class:`GatedLinear` has them."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


class Projected(NamedTuple):
    """What the recurrence gets: ``q``, ``k``, ``v``, ``g``; the output gate's input ``z [B, N, H V]``; the rest that
    one model needs: a ``skip [B, H, N, V]`` added to what the heads read, and the next ``tail``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    z: torch.Tensor
    skip: torch.Tensor | None
    tail: torch.Tensor


class _Inputs(nn.Module):
    """What one model does before the recurrence, and the norm it has after it."""

    scale: float | None = None
    tail: tuple[int, int] = (0, 1)  # tokens and channels that are kept of the past

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def norm(self) -> nn.Module:
        return _HeadNorm(nn.RMSNorm(self.sizes.value_dim))


class _Projections(_Inputs):
    """GLA and RetNet: four linear maps and a gate."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.q_proj = nn.Linear(sizes.width, sizes.num_heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(sizes.width, sizes.num_kv_heads * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(sizes.width, sizes.num_kv_heads * sizes.value_dim, bias=False)
        self.z_proj = nn.Linear(sizes.width, sizes.num_heads * sizes.value_dim, bias=False)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s = self.sizes
        q, k = _heads(self.q_proj(x), s.num_heads), _heads(self.k_proj(x), s.num_kv_heads)
        return q, k, _heads(self.v_proj(x), s.num_kv_heads)


class _GLA(_Projections):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.gate = GLAGate(sizes.width, sizes.num_kv_heads, sizes.head_dim)

    def forward(self, x: torch.Tensor, tail: torch.Tensor, position: int) -> Projected:
        return Projected(*self.qkv(x), self.gate(x), self.z_proj(x), None, tail)


class _RetNet(_Projections):
    """Queries and keys are turned by an angle that grows with the position: the recurrence's decay made complex."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        if sizes.head_dim % 2:
            raise ValueError(f'head_dim: expected an even number for gate="retnet", got {sizes.head_dim}')
        self.gate = RetNetGate(sizes.num_kv_heads)

    def norm(self) -> nn.Module:
        return _HeadNorm(nn.RMSNorm(self.sizes.value_dim, elementwise_affine=False))

    def forward(self, x: torch.Tensor, tail: torch.Tensor, position: int) -> Projected:
        q, k, v = self.qkv(x)
        half = self.sizes.head_dim // 2
        angles = 10000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64, device=x.device)
        turn = torch.arange(position, position + x.shape[1], device=x.device)[:, None] * angles  # [N, K / 2]
        q, k = (_rotate(y, turn) for y in (q, k))
        return Projected(q, k, v, self.gate(x), self.z_proj(x), None, tail)


class _SSD(_Inputs):
    """Mamba-2's block: one B and C for all heads, a causal convolution of 4 taps on x, B and C, dt, the skip D."""

    scale = 1.0

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        if sizes.num_kv_heads != sizes.num_heads:
            raise ValueError(
                f'num_kv_heads: expected num_heads ({sizes.num_heads}) for gate="ssd", where all heads share one '
                f"query and one key, got {sizes.num_kv_heads}"
            )
        self.inner = sizes.num_heads * sizes.value_dim
        channels = self.inner + 2 * sizes.head_dim
        self.tail = (CONV - 1, channels)
        self.z_proj = nn.Linear(sizes.width, self.inner, bias=False)
        self.xbc_proj = nn.Linear(sizes.width, channels, bias=False)
        self.conv = nn.Conv1d(channels, channels, CONV, groups=channels)
        self.gate = SSDGate(sizes.width, sizes.num_heads)
        self.D = nn.Parameter(torch.ones(sizes.num_heads))

    def norm(self) -> nn.Module:
        return _GatedNorm(self.inner)

    def forward(self, x: torch.Tensor, tail: torch.Tensor, position: int) -> Projected:
        s = self.sizes
        xbc = torch.cat([tail.to(x.dtype), self.xbc_proj(x)], dim=1)
        mixed = F.silu(self.conv(xbc.transpose(1, 2)).transpose(1, 2))
        value, k, q = mixed.split([self.inner, s.head_dim, s.head_dim], dim=-1)
        v = _heads(value, s.num_heads)
        g, dt = self.gate(x)
        q, k = (y[:, None].expand(-1, s.num_heads, -1, -1) for y in (q, k))
        skip = self.D[:, None, None] * v
        v = (v * dt[..., None]).to(x.dtype)
        return Projected(q, k, v, g, self.z_proj(x), skip, xbc[:, xbc.shape[1] - (CONV - 1) :])


class _RWKV6(_Inputs):
    """RWKV-6: every projection sees its own mix of the token and the one before, chosen by the token."""

    scale = 1.0

    def __init__(self, sizes: Sizes, rank: int = 32) -> None:
        super().__init__(sizes)
        if sizes.num_kv_heads != sizes.num_heads:
            raise ValueError(
                f'num_kv_heads: expected num_heads ({sizes.num_heads}) for gate="rwkv6", got {sizes.num_kv_heads}'
            )
        self.tail = (1, sizes.width)
        rank = min(rank, sizes.width)
        keys, values = sizes.num_heads * sizes.head_dim, sizes.num_heads * sizes.value_dim
        self.r_proj = nn.Linear(sizes.width, keys, bias=False)
        self.k_proj = nn.Linear(sizes.width, keys, bias=False)
        self.v_proj = nn.Linear(sizes.width, values, bias=False)
        self.z_proj = nn.Linear(sizes.width, values, bias=False)
        self.gate = RWKV6Gate(sizes.width, sizes.num_heads, sizes.head_dim)
        place = torch.arange(sizes.width) / sizes.width
        self.mix_in = nn.Parameter(1 - place)
        self.mix = nn.Parameter((1 - place).repeat(5, 1, 1, 1))  # for w, k, v, r, z
        self.mix_down = nn.Parameter(torch.zeros(sizes.width, 5 * rank))
        self.mix_up = nn.Parameter(torch.empty(5, rank, sizes.width).uniform_(-0.01, 0.01))
        zigzag = ((torch.arange(keys) + 1) % 3 - 1) * 0.1
        self.u = nn.Parameter((1 - torch.arange(keys) / max(1, keys - 1) + zigzag).view(sizes.num_heads, -1))

    def norm(self) -> nn.Module:
        return _GroupNorm(self.sizes)

    def forward(self, x: torch.Tensor, tail: torch.Tensor, position: int) -> Projected:
        shifted = torch.cat([tail.to(x.dtype), x], dim=1)[:, :-1] - x
        low = torch.tanh((x + shifted * self.mix_in) @ self.mix_down).unflatten(-1, (5, -1))
        mix = self.mix + torch.einsum("bnfr,frm->fbnm", low, self.mix_up)
        x_w, x_k, x_v, x_r, x_z = x + shifted * mix
        q, k, v = (_heads(p(y), self.sizes.num_heads) for p, y in
                   ((self.r_proj, x_r), (self.k_proj, x_k), (self.v_proj, x_v)))  # fmt: skip
        return Projected(q, k, v, self.gate(x_w), self.z_proj(x_z), None, x[:, -1:])


class _HeadNorm(nn.Module):
    """Each head normalised by itself, then the gate: ``norm(o) * silu(z)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, out: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.inner(out)
        return normed.transpose(1, 2).flatten(2) * F.silu(z)


class _GatedNorm(nn.Module):
    """Mamba-2: the gate first, then one RMSNorm over all heads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.RMSNorm(size, eps=1e-5)

    def forward(self, out: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.inner(out.transpose(1, 2).flatten(2) * F.silu(z))


class _GroupNorm(nn.Module):
    """RWKV-6: LayerNorm of each head, ``eps = 64e-5``, an affine map of all channels, the gate."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.inner = nn.GroupNorm(sizes.num_heads, sizes.num_heads * sizes.value_dim, eps=64e-5)

    def forward(self, out: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        tokens = out.transpose(1, 2).flatten(2)
        return self.inner(tokens.flatten(0, 1)).view_as(tokens) * F.silu(z)


_INPUTS: dict[str, type[_Inputs]] = {"retnet": _RetNet, "ssd": _SSD, "gla": _GLA, "rwkv6": _RWKV6}


class GatedLinear(nn.Module):
    """Causal multi-head linear attention with decay, ``[B, N, M] -> [B, N, M]``.

    Args:
        width: M, model width.
        num_heads: Hq.
        gate: where the decay comes from, and with it the model: "retnet" (fixed a head, rotated q and k), "ssd"
            (Mamba-2: convolution, dt, skip, one query and key for all heads), "gla" (low rank, a channel), "rwkv6"
            (token shift, bonus). Default "gla".
        num_kv_heads: Hkv, divides Hq; "ssd" and "rwkv6" have as many as Hq. Default Hq.
        head_dim: K, of queries and keys (Mamba-2's state size). Default ``width // num_heads``.
        value_dim: V. Default ``width // num_heads``.
        chunk_size: C of the parallel form. Default 64.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        gate: Gate = "gla",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_positive_int("width", width)
        check_positive_int("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive_int("num_kv_heads", num_kv_heads)
        check_positive_int("chunk_size", chunk_size)
        if gate not in _INPUTS:
            raise ValueError(f"gate: expected one of {', '.join(_INPUTS)}, got {gate!r}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads ({num_heads}), got {num_kv_heads}"
            )
        if width % num_heads and (head_dim is None or value_dim is None):
            raise ValueError(f"num_heads: expected a divisor of width ({width}), got {num_heads}")
        head_dim = width // num_heads if head_dim is None else head_dim
        value_dim = width // num_heads if value_dim is None else value_dim
        check_positive_int("head_dim", head_dim)
        check_positive_int("value_dim", value_dim)
        self.sizes = Sizes(width, num_heads, num_kv_heads, head_dim, value_dim)
        self.gate_name, self.chunk_size = gate, chunk_size
        self.inputs: _Inputs = _INPUTS[gate](self.sizes)
        self.norm = self.inputs.norm()
        self.o_proj = nn.Linear(num_heads * value_dim, width, bias=False)

    @property
    def state_elements(self) -> int:
        """Numbers kept a sequence: the state, and the last inputs where the model looks back on them."""
        tokens, channels = self.inputs.tail
        s = self.sizes
        return s.num_kv_heads * s.head_dim * s.value_dim + tokens * channels

    def forward(
        self, x: torch.Tensor, state: GatedLinearState | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, GatedLinearState]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, state)`` to go on decoding from."""
        p, found, position = self._project(x, state)
        if isinstance(self.inputs, _RWKV6):
            out, S = rwkv6_chunked(
                p.q, p.k, p.v, p.g, self.inputs.u, chunk_size=self.chunk_size, initial_state=found
            )
        else:
            out, S = gated_linear_chunked(
                p.q, p.k, p.v, p.g, scale=self.inputs.scale, chunk_size=self.chunk_size,
                initial_state=found, return_state=True,
            )  # fmt: skip
        out = self._finish(out, p)
        return (out, GatedLinearState(S, p.tail, position)) if return_state else out

    def step(self, state: GatedLinearState | None, x: torch.Tensor) -> tuple[torch.Tensor, GatedLinearState]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], new state)``; the numbers of :meth:`forward`."""
        p, found, position = self._project(x, state)
        if isinstance(self.inputs, _RWKV6):
            out, S = rwkv6_step(found, p.q, p.k, p.v, p.g, self.inputs.u)
        else:
            out, S = gated_linear_step(found, p.q, p.k, p.v, p.g, scale=self.inputs.scale)
        return self._finish(out, p), GatedLinearState(S, p.tail, position)

    def _project(
        self, x: torch.Tensor, state: GatedLinearState | None
    ) -> tuple[Projected, torch.Tensor | None, int]:
        if x.dim() != 3 or x.shape[2] != self.sizes.width:
            raise ValueError(f"x: expected shape [B, N, {self.sizes.width}], got {tuple(x.shape)}")
        position = 0 if state is None else state.position
        tail = x.new_zeros(x.shape[0], *self.inputs.tail) if state is None else state.tail
        projected = self.inputs(x, tail, position)
        return projected, None if state is None else state.S, position + x.shape[1]

    def _finish(self, out: torch.Tensor, p: Projected) -> torch.Tensor:
        out = out if p.skip is None else out + p.skip
        return self.o_proj(self.norm(out, p.z))


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of channels of ``x [B, H, N, K]`` by ``turn [N, K / 2]`` radians."""
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
