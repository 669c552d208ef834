"""Decode with any cache of the book inside a pretrained model: one cache a layer, the model's own is switched off.

The prompt is read with full attention; from then on each token attends through its layer's cache. So perplexity and
answers of a method are those of the real model, position by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int
from effattn_lab.models import hf
from effattn_lab.sparse.cache import DecodeCache, FullCache

Make = Callable[[], DecodeCache]


def rope_base(model: Any) -> float:
    """The base of a model's rotary positions, which some caches must know."""
    config = model.config
    found = getattr(config, "rope_theta", None)
    if found is None:
        found = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if found is None:
        raise ValueError(f"model: expected a configuration with rope_theta, got {type(config).__name__}")
    return float(found)


class Decoder:
    """A pretrained model that reads its past through caches of the book.

    Args:
        model: a causal language model of transformers with rotary positions, batch size 1.
        make: gives a fresh cache; called once a layer and text.
        budget: tokens a head may read, see :meth:`effattn_lab.sparse.cache.DecodeCache.attend`. None: all kept.
        dense_layers: first layers that read everything whatever the budget. Default 0; Quest and Adamas take 2.
    """

    def __init__(self, model: Any, make: Make, budget: int | None = None, *, dense_layers: int = 0) -> None:
        if budget is not None:
            check_positive_int("budget", budget)
        layers = model.config.num_hidden_layers
        if (
            isinstance(dense_layers, bool)
            or not isinstance(dense_layers, int)
            or not 0 <= dense_layers <= layers
        ):
            raise ValueError(f"dense_layers: expected an integer from 0 to {layers}, got {dense_layers!r}")
        self.model, self.make, self.budget, self.dense_layers = model, make, budget, dense_layers
        self.caches: list[DecodeCache] = []
        self.length = 0

    def read(self) -> float:
        """Tokens that a query head read in the last step, as a mean over the layers that have a budget."""
        counted = self.caches[self.dense_layers :] or self.caches
        return sum(cache.read for cache in counted) / len(counted)

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Read a prompt ``[1, N]`` with full attention and fill the caches; logits ``[N, vocabulary]``."""
        layers = self.model.config.num_hidden_layers
        self.caches = [FullCache() if i < self.dense_layers else self.make() for i in range(layers)]
        self.length = 0

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            layer: int,
            causal: bool,
            scale: float | None,
        ) -> torch.Tensor:
            self.caches[layer].scale = scale
            self.caches[layer].prefill(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        return self._run(ids, attend)

    @torch.no_grad()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Read one more token ``[1, 1]`` through the caches; its logits ``[vocabulary]``."""

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            layer: int,
            causal: bool,
            scale: float | None,
        ) -> torch.Tensor:
            cache = self.caches[layer]
            cache.append(k, v)
            return cache.attend(q, None if layer < self.dense_layers else self.budget)

        if not self.caches:
            raise ValueError("step: expected a prompt read by prefill before, got none")
        return self._run(token, attend)[0]

    def _run(self, ids: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            raise ValueError(f"ids: expected one text [1, N], got shape {tuple(ids.shape)}")
        at = torch.arange(self.length, self.length + ids.shape[1], device=ids.device)[None]
        with hf.use(self.model, attend, "effattn_decode", with_layer=True):
            logits: torch.Tensor = self.model(ids, position_ids=at, use_cache=False).logits
        self.length += ids.shape[1]
        return logits[0]

    def generate(self, ids: torch.Tensor, max_new_tokens: int) -> list[int]:
        """Greedy continuation of a prompt ``[1, N]``, up to the end-of-text token, which is not returned."""
        check_positive_int("max_new_tokens", max_new_tokens)
        logits, new = self.prefill(ids)[-1], []
        end = self.model.config.eos_token_id
        for _ in range(max_new_tokens):
            token = int(logits.argmax())
            if token == end:
                break
            new.append(token)
            if len(new) < max_new_tokens:
                logits = self.step(torch.tensor([[token]], device=ids.device))
        return new


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood in nats a token over ``tokens`` tokens, with ``read`` tokens a head and step."""

    nats: float
    tokens: int
    read: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def loss_after(decoder: Decoder, ids: torch.Tensor, prompt: int) -> Loss:
    """How well the tokens after a prompt are predicted when each is read through the caches.

    Args:
        decoder: see :class:`Decoder`.
        ids: a text ``[1, N]``.
        prompt: tokens read at once, with full attention, from 1 to ``N - 2``.

    Returns:
        the loss over tokens ``prompt + 1 .. N - 1``: the first that a cache had a say in, up to the last.
    """
    check_positive_int("prompt", prompt)
    if prompt > ids.shape[1] - 2:
        raise ValueError(f"prompt: expected at most N - 2 = {ids.shape[1] - 2} tokens, got {prompt}")
    decoder.prefill(ids[:, :prompt])
    losses, read = [], 0.0
    for t in range(prompt, ids.shape[1] - 1):
        logits = decoder.step(ids[:, t : t + 1])
        losses.append(F.cross_entropy(logits.float()[None], ids[:, t + 1]).item())
        read += decoder.read()
    return Loss(sum(losses) / len(losses), len(losses), read / len(losses))
