"""A Llama-shaped model with its KV cache, as speculation needs it: append tokens or a tree, then take some back.

A rejected draft must leave no trace. With a KV cache that is easy, positions are rows and rows are dropped
(:meth:`CachedModel.keep`). A recurrent state has no rows: there the state before the drafts is kept and the accepted
tokens are run again, or the state after each draft is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from effattn_lab.linear.speculative_tree import depths, tree_mask


class CachedModel:
    """``model`` (or its first ``layers`` layers) with a cache of its own, batch 1. Weights are shared, not copied.

    Args:
        model: a transformers LlamaForCausalLM. layers: default all.
    """

    def __init__(self, model: Any, layers: int | None = None) -> None:
        from transformers import DynamicCache

        self.model = model
        self.base = _headless(model.model, layers)
        self.cache = DynamicCache(config=self.base.config)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def layer_parameters(self) -> int:
        """Weights of the layers in use."""
        return sum(p.numel() for p in self.base.layers.parameters())

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> torch.Tensor:
        """Run ``tokens [n]`` behind what is cached, append them, return the last layer's output ``[n, M]``, no norm.

        With ``parents`` the tokens are a tree: each sees the cache and its ancestors, at position length + depth.
        """
        if tokens.dim() != 1 or tokens.dtype != torch.int64 or len(tokens) == 0:
            raise ValueError(
                f"tokens: expected int64 [n], n at least 1, got {tokens.dtype} {tuple(tokens.shape)}"
            )
        extra: dict[str, Any] = {}
        if parents is not None:
            extra["position_ids"] = (self.length + depths(parents))[None]
            extra["attention_mask"] = self._additive(tree_mask(parents, self.length))
        out = self.base(input_ids=tokens[None], past_key_values=self.cache, use_cache=True, **extra)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> torch.Tensor:
        """Next-token logits ``[n, V]`` after each of ``tokens``; appends them to the cache."""
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(self.hidden(tokens, parents)))
        return logits.float()

    def keep(self, rows: int | Sequence[int]) -> None:
        """Drop cached tokens: keep the first ``rows``, or the rows listed (in the order of the text)."""
        chosen = slice(rows) if isinstance(rows, int) else torch.tensor(list(rows))
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4:
                layer.keys, layer.values = layer.keys[:, :, chosen], layer.values[:, :, chosen]

    def _additive(self, mask: torch.Tensor) -> torch.Tensor:
        dtype = self.model.lm_head.weight.dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None]


def _headless(base: Any, layers: int | None) -> Any:
    """A view of the LlamaModel ``base`` with its first layers and no final norm."""
    view = copy.copy(base)
    view._modules = dict(base._modules)  # a shallow copy would share the table and change the original
    view.norm = torch.nn.Identity()
    if layers is not None:
        view.config = copy.copy(base.config)
        view.config.num_hidden_layers = layers
        view.layers = base.layers[:layers]
    return view
