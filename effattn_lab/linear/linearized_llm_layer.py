"""Linearized attention as a layer that trains, decodes and verifies: projections, positions, groups, convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.linearized_llm import (
    LinearizedState,
    linearized_attention_chunked,
    linearized_attention_step,
)
from effattn_lab.linear.linearized_llm_cost import state_elements
from effattn_lab.linear.linearized_llm_tree import commit, depths, tree_attention
from effattn_lab.linear.rotary import rotate


class LinearizedAttention(nn.Module):
    """Causal attention with ReLU^2 inside groups, linear attention between them, and a convolution; no biases.

    Args:
        width: M, model width.
        num_heads: Hq.
        num_kv_heads: Hkv, divides Hq; the state has this many heads. Default Hq.
        head_dim: D of queries and keys. Default ``width // num_heads``. Even, if there are rotary positions.
        value_dim: Dv. Default ``width // num_heads``.
        group_size: G. Default 64.
        grouped: the branch between the groups, weighted by one learned number that starts at 0. Default True.
        conv_taps: L, lags of the convolution, its weights start at 0; 0: none. Default 32.
        rope_base: rotary position embedding on q and k with this base, halves rotated as in LLaMA. Default None: no
            positions.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        group_size: int = 64,
        grouped: bool = True,
        conv_taps: int = 32,
        rope_base: float | None = None,
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
        check_positive_int("group_size", group_size)
        if isinstance(conv_taps, bool) or not isinstance(conv_taps, int) or conv_taps < 0:
            raise ValueError(f"conv_taps: expected an integer of at least 0, got {conv_taps!r}")
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number with rope_base, got {self.head_dim}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.group_size, self.rope_base = group_size, rope_base
        self.q_proj = nn.Linear(width, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.value_dim, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(())) if grouped else None
        self.conv_weight = nn.Parameter(torch.zeros(num_heads, conv_taps)) if conv_taps else None

    @property
    def state_elements(self) -> int:
        """Numbers in the state of one sequence, with the group as full as it gets between two tokens."""
        lags = 0 if self.conv_weight is None else self.conv_weight.shape[1]
        return int(state_elements(self.num_kv_heads, self.head_dim, self.value_dim, self.group_size, lags))

    def forward(
        self, x: torch.Tensor, state: LinearizedState | None = None, *, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, LinearizedState]:
        """A whole sequence at once: ``x [B, N, M]`` to ``[B, N, M]``, or ``(out, state)`` to go on decoding from."""
        q, k, v = self._heads(x, _start(state) + torch.arange(x.shape[1], device=x.device))
        out, state = linearized_attention_chunked(
            q, k, v, **self._options(), initial_state=state, return_state=True
        )
        out = self._merge(out)
        return (out, state) if return_state else out

    def step(self, state: LinearizedState | None, x: torch.Tensor) -> tuple[torch.Tensor, LinearizedState]:
        """One token: ``x [B, 1, M]`` to ``(out [B, 1, M], new state)``; the numbers of :meth:`forward`."""
        q, k, v = self._heads(x, torch.tensor([_start(state)], device=x.device))
        out, state = linearized_attention_step(state, q, k, v, **self._options())
        return self._merge(out), state

    def verify(
        self, state: LinearizedState | None, x: torch.Tensor, parents: Sequence[int]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """A tree of tokens ``x [B, T, M]``: ``(out [B, T, M], what :meth:`accept` needs)``. The state stays."""
        q, k, v = self._heads(x, _start(state) + torch.tensor(depths(parents), device=x.device))
        return self._merge(tree_attention(state, q, k, v, parents, **self._options())), (k, v)

    def accept(
        self, state: LinearizedState | None, kv: tuple[torch.Tensor, torch.Tensor], path: Sequence[int]
    ) -> LinearizedState:
        """The state after the nodes of ``path``, from the root down."""
        lags = 0 if self.conv_weight is None else self.conv_weight.shape[1]
        return commit(state, *kv, path, num_lags=lags, group_size=self.group_size)

    def _options(self) -> dict:
        alpha = 0.0 if self.alpha is None else self.alpha
        return {"alpha": alpha, "conv_weight": self.conv_weight, "group_size": self.group_size}

    def _heads(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = self.q_proj.in_features
        if x.dim() != 3 or x.shape[2] != width:
            raise ValueError(f"x: expected shape [B, N, {width}], got {tuple(x.shape)}")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim)).transpose(1, 2)
        if self.rope_base is not None:
            q, k = (rotate(y, positions, base=self.rope_base) for y in (q, k))
        return q, k, v

    def _merge(self, out: torch.Tensor) -> torch.Tensor:
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _start(state: LinearizedState | None) -> int:
    return 0 if state is None else state.seen
