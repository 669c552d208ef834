"""Decode with any cache of the book inside a pretrained model: one cache a layer, the model's own is switched off.

The prompt is read with full attention; from then on each token attends through its layer's cache. So perplexity and
answers of a method are those of the real model, position by position.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Prompt:
    """A text read once with full attention, from which any number of caches can be filled.

    Attributes:
        layers: q ``[1, Hq, N, D]``, k and v ``[1, Hkv, N, D]`` of each layer, after RoPE.
        scale: of the scores, as the model has it.
        logits: ``[N, vocabulary]``, or the last row alone ``[1, vocabulary]``.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    scale: float | None
    logits: torch.Tensor

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    def first(self, n: int) -> Prompt:
        """Its first n tokens: what comes later changed nothing of them. Logits are kept if all were."""
        check_positive_int("n", n)
        if n > self.length:
            raise ValueError(f"n: expected at most the {self.length} tokens of the prompt, got {n}")
        layers = tuple((q[:, :, :n], k[:, :, :n], v[:, :, :n]) for q, k, v in self.layers)
        return Prompt(
            layers, self.scale, self.logits[:n] if len(self.logits) == self.length else self.logits[:0]
        )


@torch.no_grad()
def read_prompt(model: Any, ids: torch.Tensor, *, all_logits: bool = False) -> Prompt:
    """Run the model over ``ids [1, N]`` with full attention and keep what each layer's attention got."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scales = set()

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, causal: bool, scale: float | None
    ) -> torch.Tensor:
        seen.append((q, k, v))
        scales.add(scale)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    _check_ids(ids, 1)
    logits = _run(model, ids, 0, attend, 0 if all_logits else 1)
    return Prompt(tuple(seen), scales.pop(), logits[0])


def _check_ids(ids: torch.Tensor, rows: int) -> None:
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < 1:
        texts = "one text [1, N]" if rows == 1 else f"{rows} texts [{rows}, N]"
        raise ValueError(f"ids: expected {texts}, got shape {tuple(ids.shape)}")


def _run(
    model: Any, ids: torch.Tensor, begin: int, attend: Callable[..., torch.Tensor], keep: int = 0
) -> torch.Tensor:
    """Logits ``[B, N, vocabulary]``, or of the last ``keep``, of tokens at positions from ``begin``."""
    at = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)
    with hf.use(model, attend, "effattn_decode", with_layer=True):
        logits: torch.Tensor = model(ids, position_ids=at, use_cache=False, logits_to_keep=keep).logits
    return logits


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
        self._reads: list[float] = []

    def read(self) -> float:
        """Tokens that a query head read in the last call, as a mean over its tokens and the layers with a budget."""
        counted = self._reads[self.dense_layers :] or self._reads
        return sum(counted) / len(counted)

    def start(self, prompt: Prompt) -> None:
        """Fill fresh caches with a prompt."""
        self.caches = []
        for i, (q, k, v) in enumerate(prompt.layers):
            cache = FullCache() if i < self.dense_layers else self.make()
            cache.scale = prompt.scale
            cache.prefill(q, k, v)
            self.caches.append(cache)
        self.length = prompt.length

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Read a prompt ``[1, N]`` with full attention and fill the caches; logits ``[N, vocabulary]``."""
        prompt = read_prompt(self.model, ids, all_logits=True)
        self.start(prompt)
        return prompt.logits

    def fork(self, budget: int | None) -> Decoder:
        """A decoder that goes on from the same state with a budget of its own; neither sees what the other does."""
        other = Decoder(self.model, self.make, budget, dense_layers=self.dense_layers)
        # Caches put new tensors in the place of old ones, they don't write into them.
        other.caches, other.length = [copy.copy(cache) for cache in self.caches], self.length
        return other

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Read one more token ``[1, 1]`` through the caches; its logits ``[vocabulary]``."""
        return self.steps(token)[0]

    def steps(self, ids: torch.Tensor) -> torch.Tensor:
        """Read given tokens ``[1, n]`` one after the other through the caches; logits ``[n, vocabulary]``.

        The numbers of n calls of :meth:`step`, but the weights are read once: a layer's token t depends on its
        tokens up to t alone, so each layer can go through all of them before the next begins.
        """
        return steps_together([self], ids)[0]

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache, out, read = self.caches[layer], [], 0.0
        for t in range(q.shape[2]):
            cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            out.append(cache.attend(q[:, :, t : t + 1], None if layer < self.dense_layers else self.budget))
            read += cache.read
        self._reads.append(read / q.shape[2])
        return torch.cat(out, dim=2)

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


@torch.no_grad()
def steps_together(decoders: Sequence[Decoder], ids: torch.Tensor) -> torch.Tensor:
    """:meth:`Decoder.steps` of several decoders of one model in one pass: for the price of reading the weights once.

    Args:
        decoders: of the same model, with equally many tokens read.
        ids: ``[len(decoders), n]``, a row for each.

    Returns:
        ``[len(decoders), n, vocabulary]``.
    """
    if not decoders:
        raise ValueError("decoders: expected at least one, got none")
    if not all(d.caches for d in decoders):
        raise ValueError("step: expected a prompt read by prefill before, got none")
    first = decoders[0]
    if any(d.model is not first.model or d.length != first.length for d in decoders):
        lengths = sorted({d.length for d in decoders})
        raise ValueError(f"decoders: expected one model and one length, got lengths {lengths}")
    _check_ids(ids, len(decoders))

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, causal: bool, scale: float | None
    ) -> torch.Tensor:
        rows = [d._attend(layer, q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i, d in enumerate(decoders)]
        return torch.cat(rows)

    for d in decoders:
        d._reads = []
    logits = _run(first.model, ids, first.length, attend)
    for d in decoders:
        d.length += ids.shape[1]
    return logits


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
    decoder.start(read_prompt(decoder.model, ids[:, :prompt]))
    logits = decoder.steps(ids[:, prompt:-1])
    nats = F.cross_entropy(logits.float(), ids[0, prompt + 1 :]).item()
    return Loss(nats, len(logits), decoder.read())
