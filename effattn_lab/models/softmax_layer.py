"""The baseline mixer: causal softmax attention with rotary positions and a cache that grows with every token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations.attention import repeat_kv, visible


class KVCache(NamedTuple):
    """Keys after rotation ``[B, Hkv, t, D]`` and values ``[B, Hkv, t, Dv]`` of the t tokens read so far."""

    k: torch.Tensor
    v: torch.Tensor


def rope(x: torch.Tensor, offset: int = 0, base: float = 10_000.0) -> torch.Tensor:
    """Rotate ``x [B, H, N, D]`` by its positions ``offset..offset + N - 1`` (Su et al. 2021), halves paired.

    Channel ``j`` turns together with ``j + D/2`` by ``position * base ** (-2j / D)``, so that a dot product of two
    rotated vectors depends on their distance alone. D is even. Angles are computed in float64.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even head_dim, got {x.shape[-1]}")
    speed = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    position = torch.arange(offset, offset + x.shape[-2], dtype=torch.float64, device=x.device)
    angle = position[:, None] * speed  # [N, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class SoftmaxAttention(nn.Module):
    """Causal multi-head softmax attention, ``[B, N, M] -> [B, N, M]``, with rotary positions; no biases.

    Args:
        width: M, model width.
        num_heads: Hq.
        num_kv_heads: Hkv, divides Hq. Default Hq.
        head_dim: D of queries and keys, even with ``positions``. Default ``width // num_heads``.
        value_dim: Dv. Default ``width // num_heads``.
        positions: rotate queries and keys. Default True.
        base: of the rotation's speeds. Default 10,000.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        positions: bool = True,
        base: float = 10_000.0,
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
        if positions and self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number to rotate, got {self.head_dim}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.positions, self.base = positions, base
        self.q_proj = nn.Linear(width, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.value_dim, width, bias=False)

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers that the cache grows by with each token of a sequence: ``Hkv * (D + Dv)``."""
        return self.num_kv_heads * (self.head_dim + self.value_dim)

    def forward(
        self, x: torch.Tensor, state: KVCache | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, KVCache]:
        """A whole sequence at once, or what follows on ``state``: ``x [B, N, M]`` to ``[B, N, M]``."""
        out, cache = self._mix(x, state)
        return (out, cache) if return_state else out

    def step(self, state: KVCache | None, x: torch.Tensor) -> tuple[torch.Tensor, KVCache]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], longer cache)``; the numbers of :meth:`forward`."""
        if x.dim() != 3 or x.shape[1] != 1:
            raise ValueError(f"x: expected one token [B, 1, {self.q_proj.in_features}], got {tuple(x.shape)}")
        return self._mix(x, state)

    def _mix(self, x: torch.Tensor, state: KVCache | None) -> tuple[torch.Tensor, KVCache]:
        width = self.q_proj.in_features
        if x.dim() != 3 or x.shape[2] != width or x.shape[1] == 0:
            raise ValueError(f"x: expected shape [B, N, {width}] with N at least 1, got {tuple(x.shape)}")
        past = 0 if state is None else state.k.shape[2]
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim)).transpose(1, 2)
        if self.positions:
            q, k = rope(q, past, self.base), rope(k, past, self.base)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        groups = self.num_heads // self.num_kv_heads
        # The offset rule: queries are the last positions. PyTorch's own causal flag means something else.
        mask = None
        if past and q.shape[2] > 1:
            mask = visible(q.shape[2], k.shape[2], causal=True, device=x.device)
        out = F.scaled_dot_product_attention(
            q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask, is_causal=past == 0
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), KVCache(k, v)
