"""Linear attention as a layer that trains and decodes: projections, a feature map, heads."""

from __future__ import annotations

import torch
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.feature_maps import FEATURE_MAPS, FeatureMapLike, Hedgehog, resolve_feature_map
from effattn_lab.linear.linear_attention import (
    LinearState,
    linear_attention_chunked,
    linear_attention_step,
)


class LinearAttention(nn.Module):
    """Causal multi-head linear attention, ``[B, N, M] -> [B, N, M]``; no positions, no biases.

    Args:
        width: M, model width.
        num_heads: Hq.
        num_kv_heads: Hkv, divides Hq; the state has this many heads. Default Hq.
        head_dim: D of queries and keys. Default ``width // num_heads``. Small with "taylor".
        value_dim: Dv. Default ``width // num_heads``.
        feature_map: as in :func:`~effattn_lab.linear.linear_attention.linear_attention`, or "hedgehog-trained": a
            matrix a head, for queries and for keys. Default "elu".
        normalize: divide by the sum of weights. Without, each head's output goes through an RMSNorm instead, since it
            grows with the length. Default True.
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
        feature_map: FeatureMapLike = "elu",
        normalize: bool = True,
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
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.value_dim = width // num_heads if value_dim is None else value_dim
        check_positive_int("head_dim", self.head_dim)
        check_positive_int("value_dim", self.value_dim)
        check_positive_int("chunk_size", chunk_size)
        self.num_heads, self.num_kv_heads, self.chunk_size = num_heads, num_kv_heads, chunk_size
        self.normalize = normalize
        self.map_q: nn.Module | None = None
        self.map_k: nn.Module | None = None
        self.feature_map = feature_map
        if feature_map == "hedgehog-trained":
            # The modules map first; the mechanism then gets features.
            self.map_q, self.map_k = Hedgehog(num_heads, self.head_dim), Hedgehog(num_kv_heads, self.head_dim)
            self.feature_map = None
        else:
            resolve_feature_map(feature_map, normalize)
            if isinstance(feature_map, nn.Module):
                raise ValueError(
                    f"feature_map: expected one of {', '.join(FEATURE_MAPS)}, hedgehog-trained or a function, "
                    f"got the module {type(feature_map).__name__}"
                )
        self.q_proj = nn.Linear(width, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.value_dim, width, bias=False)
        self.norm = nn.Identity() if normalize else nn.RMSNorm(self.value_dim)

    def forward(
        self, x: torch.Tensor, state: LinearState | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, LinearState]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, state)`` to go on decoding from."""
        q, k, v = self._heads(x)
        out, state = linear_attention_chunked(
            q,
            k,
            v,
            feature_map=self.feature_map,
            causal=True,
            scale=self.head_dim**-0.5,
            normalize=self.normalize,
            chunk_size=self.chunk_size,
            initial_state=state,
            return_state=True,
        )
        out = self._merge(out)
        return (out, state) if return_state else out

    def step(self, state: LinearState | None, x: torch.Tensor) -> tuple[torch.Tensor, LinearState]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], new state)``; the numbers of :meth:`forward`."""
        q, k, v = self._heads(x)
        out, state = linear_attention_step(
            state,
            q,
            k,
            v,
            feature_map=self.feature_map,
            scale=self.head_dim**-0.5,
            normalize=self.normalize,
        )
        return self._merge(out), state

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = self.q_proj.in_features
        if x.dim() != 3 or x.shape[2] != width:
            raise ValueError(f"x: expected shape [B, N, {width}], got {tuple(x.shape)}")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim)).transpose(1, 2)
        if self.map_q is not None and self.map_k is not None:
            q, k = self.map_q(q), self.map_k(k)
        return q, k, v

    def _merge(self, out: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.norm(out).transpose(1, 2).flatten(2))
