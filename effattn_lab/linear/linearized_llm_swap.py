"""Put linearized attention into layers of a LLaMA-like transformers model, such as SmolLM2, and take it out again.

``with linearized(model, [10, 11]) as layers: ...``. A layer takes over the projections of the attention it replaces;
convolution and global weight start at 0, so at first it is ReLU^2 attention inside groups. That computes another
function than softmax: the model must be trained again, as :mod:`effattn_lab.linear.linearized_llm_experiment` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from effattn_lab.foundations.attention import visible
from effattn_lab.linear.linearized_llm import LinearizedState
from effattn_lab.linear.linearized_llm_layer import LinearizedAttention


class SwappedAttention(nn.Module):
    """A `LinearizedAttention` where transformers expects a LLaMA attention; generation with a cache included.

    The state of a sequence is kept with the cache that the model passes along. Plain causal text only: padding, or
    more than one continuation of a cache (beams), raises ``ValueError``.
    """

    def __init__(self, inner: LinearizedAttention, layer_idx: int) -> None:
        super().__init__()
        self.inner, self.layer_idx = inner, layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        states: dict[int, LinearizedState] = {}
        if past_key_values is not None:
            if not hasattr(past_key_values, "linearized_states"):
                past_key_values.linearized_states = {}
            states = past_key_values.linearized_states
        state = states.get(self.layer_idx)
        if attention_mask is not None:
            seen = (0 if state is None else state.seen) + hidden_states.shape[1]
            keep = visible(hidden_states.shape[1], seen, causal=True, device=attention_mask.device)
            shown = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            if shown.shape[-2:] != keep.shape or not bool((shown == keep).all()):
                raise ValueError(
                    "attention_mask: expected none or the plain causal one (a linearized layer has no padding), "
                    f"got shape {tuple(attention_mask.shape)}"
                )
        out, states[self.layer_idx] = self.inner(hidden_states, state, return_state=True)
        return out, None


def rope_base(config: Any) -> float:
    """The base of a LLaMA-like configuration's rotary embedding, old spelling or new."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    base: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(base)


def from_attention(attention: nn.Module, config: Any, **options: Any) -> LinearizedAttention:
    """A `LinearizedAttention` with (copies of) the projections of a LLaMA attention.

    ``options``: ``group_size``, ``grouped``, ``conv_taps`` of the layer.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = LinearizedAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        rope_base=rope_base(config),
        **options,
    )
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old = getattr(attention, name)
            if old.bias is not None:
                raise ValueError(f"attention: expected projections without bias, got one in {name}")
            getattr(layer, name).weight.copy_(old.weight)
    return layer.to(old.weight.device, old.weight.dtype)


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Indices that :func:`linearized` takes in a model of ``depth`` layers; a ``ValueError`` names a wrong one."""
    for i in layers:
        if isinstance(i, bool) or not isinstance(i, int) or not 1 <= i < depth:
            raise ValueError(f"layers: expected integers from 1 to {depth - 1}, got {i!r}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected each once, got {list(layers)}")


@contextmanager
def linearized(
    model: Any, layers: Sequence[int], inner: Sequence[LinearizedAttention] | None = None, **options: Any
) -> Iterator[list[LinearizedAttention]]:
    """Inside the ``with`` block these layers of ``model`` are linearized; afterwards it is as it was.

    Args:
        model: a LLaMA-like causal language model of transformers.
        layers: indices. Not 0: transformers counts the tokens of a cache there.
        inner: layers to put in, made before. Default: new ones, with the model's own projections.
        options: of :func:`from_attention`.
    """
    blocks = model.model.layers
    check_layers(layers, len(blocks))
    before = {i: blocks[i].self_attn for i in layers}
    if inner is None:
        inner = [from_attention(before[i], model.config, **options) for i in layers]
    if len(inner) != len(layers):
        raise ValueError(f"inner: expected {len(layers)} layers, got {len(inner)}")
    try:
        for i, layer in zip(layers, inner):
            blocks[i].self_attn = SwappedAttention(layer, i)
        yield list(inner)
    finally:
        for i, attention in before.items():
            blocks[i].self_attn = attention
