"""Elastic Attention around a trained softmax layer: the layer stays as it is, a router chooses each head's mode.

In training both modes are computed for every head and blended, as the method asks. In evaluation too: this is the
layer to read and to train with; the kernel of the same slug computes one mode a head.

Source: Tang et al. 2026 (Elastic Attention), sections 3.1 to 3.3; decoding as in its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.models.softmax_layer import KVCache, SoftmaxAttention, rope
from effattn_lab.sparse.elastic import AttentionRouter, Route, elastic_attention
from effattn_lab.sparse.static_patterns import dense_mask, sinks_and_window


class ElasticAttention(nn.Module):
    """A mixer ``[B, N, M] -> [B, N, M]``: the attention layer it was given, some heads full and some sparse.

    The router sees the keys before RoPE. It decides once, on the prompt; what follows a prompt (:meth:`step`, or
    :meth:`forward` with a state) reads the whole cache with every head, as the released code does.

    Args:
        attention: a trained layer. Its weights are used, not copied.
        boundary: tokens that the router pools at either end. Default 100.
        sinks, window: of the sparse mode. Defaults 128 and 1024.

    Attributes:
        fixed: None, or a decision ``[Hkv]`` or ``[B, Hkv]`` that replaces the router's: 1 for full, 0 for sparse.
        route: what the router said of the last prompt; None before, and where ``fixed`` decided.
        temperature, generator: of the router's noise, in training mode.
    """

    def __init__(
        self, attention: SoftmaxAttention, *, boundary: int = 100, sinks: int = 128, window: int = 1024
    ) -> None:
        super().__init__()
        self.pattern = sinks_and_window(sinks, window)  # says what is wrong with either
        self.attention = attention
        self.router = AttentionRouter(attention.head_dim, boundary=boundary)
        self.fixed: torch.Tensor | None = None
        self.route: Route | None = None
        self.temperature = 1.0
        self.generator: torch.Generator | None = None

    def forward(
        self, x: torch.Tensor, state: KVCache | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, KVCache]:
        """A prompt ``x [B, N, M]``; with a ``state`` what follows one, by full attention."""
        if state is not None:
            return self.attention(x, state, return_state=return_state)
        q, k, v = self._project(x)
        full = self._decide(k)
        layer = self.attention
        if layer.positions:
            q, k = rope(q, 0, layer.base), rope(k, 0, layer.base)
        out = elastic_attention(q, k, v, full, full_mode=self._dense, sparse_mode=self._few)
        y = self.output(out)
        return (y, KVCache(k, v)) if return_state else y

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What every query head gives in full and in sparse mode, ``[B, Hq, N, D]`` each; nothing is decided."""
        q, k, v = self._project(x)
        if self.attention.positions:
            q, k = rope(q, 0, self.attention.base), rope(k, 0, self.attention.base)
        return self._dense(q, k, v), self._few(q, k, v)

    def output(self, heads: torch.Tensor) -> torch.Tensor:
        """The output projection: ``[B, Hq, N, D]`` to ``[B, N, M]``."""
        y: torch.Tensor = self.attention.o_proj(heads.transpose(1, 2).flatten(2))
        return y

    def step(self, state: KVCache | None, x: torch.Tensor) -> tuple[torch.Tensor, KVCache]:
        """One token after the prompt: ``x [B, 1, M]``; every head reads the whole cache."""
        return self.attention.step(state, x)

    def _decide(self, k: torch.Tensor) -> torch.Tensor:
        """``[B, Hkv]``, 1 for full; ``k`` before RoPE."""
        if self.fixed is None:
            self.route = self.router(k, temperature=self.temperature, generator=self.generator)
            return self.route.full
        self.route = None
        fixed = self.fixed.to(k)
        if fixed.shape not in (k.shape[:2], k.shape[1:2]):
            raise ValueError(
                f"fixed: expected shape {tuple(k.shape[1:2])} or {tuple(k.shape[:2])}, got {tuple(fixed.shape)}"
            )
        return fixed.expand(k.shape[:2])

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of a prompt before RoPE."""
        layer, width = self.attention, self.attention.q_proj.in_features
        if x.dim() != 3 or x.shape[2] != width or x.shape[1] == 0:
            raise ValueError(f"x: expected shape [B, N, {width}] with N at least 1, got {tuple(x.shape)}")
        return (
            layer.q_proj(x).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2),
            layer.k_proj(x).unflatten(-1, (layer.num_kv_heads, layer.head_dim)).transpose(1, 2),
            layer.v_proj(x).unflatten(-1, (layer.num_kv_heads, layer.value_dim)).transpose(1, 2),
        )

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, *self._grouped(k, v), is_causal=True)

    def _few(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen = dense_mask(self.pattern, q.shape[2], k.shape[2], device=q.device)
        return F.scaled_dot_product_attention(q, *self._grouped(k, v), attn_mask=seen)

    def _grouped(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = self.attention.num_heads // self.attention.num_kv_heads
        return repeat_kv(k, groups), repeat_kv(v, groups)
