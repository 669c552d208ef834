"""Drafts that a laptop can make: look the text up in itself, count n-grams, leave the target early.

A draft answers ``propose(tokens, gamma, temperature, generator)`` with at most ``gamma`` guesses for what follows
``tokens`` and, where it drew them at random, the distributions it drew from. Guesses that aren't random have
``q = None``; the acceptance rule then sees q = 1 for the guess.

Sources: Saxena 2023 (prompt lookup); Elhoushi et al. 2024 (early exit of the target as its own draft); Belrose et al.
2023 (an affine map from a middle layer to the last, the "tuned lens"; here by least squares); Zhao et al. 2025 (a
draft that knows the frequent tokens only, since the output layer is most of its cost).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.linear.speculative_cache import CachedModel


@dataclass(frozen=True)
class Proposal:
    """Guesses, and for random ones the distributions ``q [len(tokens), V]`` that they were drawn from."""

    tokens: list[int]
    q: torch.Tensor | None = None


class Draft(Protocol):
    """What :func:`speculative_smollm2.speculate` asks of a draft."""

    name: str

    def propose(
        self, tokens: Sequence[int], gamma: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal: ...


class PromptLookup:
    """Finds the last ``n`` tokens earlier in the text and proposes what followed them there.

    The longest n from ``max_ngram`` down to 1 that occurs; of several places the latest. No model, no training, no
    cost; it lives on text that repeats itself: code, quotations, a document that is being edited or summed up.
    """

    name = "prompt lookup"

    def __init__(self, max_ngram: int = 3) -> None:
        check_positive_int("max_ngram", max_ngram)
        self.max_ngram = max_ngram

    def propose(
        self,
        tokens: Sequence[int],
        gamma: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        """At most ``gamma`` tokens, none where not even the last token occurred before."""
        known = list(tokens)
        for n in range(min(self.max_ngram, len(known) - 1), 0, -1):
            tail = known[-n:]
            for start in range(len(known) - n - 1, -1, -1):
                if known[start : start + n] == tail:
                    return Proposal(known[start + n : start + n + gamma])
        return Proposal([])


class NGram:
    """Counts of what followed each context of up to ``order - 1`` tokens in a text; backs off to shorter contexts.

    Args:
        text: token ids to count in. order: 3 for trigrams. vocab_size: V.
    """

    name = "n-gram"

    def __init__(self, text: Sequence[int], order: int = 3, *, vocab_size: int) -> None:
        check_positive_int("order", order)
        if len(text) < order:
            raise ValueError(f"text: expected at least order = {order} tokens, got {len(text)}")
        self.order, self.vocab_size = order, vocab_size
        self.table: dict[tuple[int, ...], Counter[int]] = {}
        words = [int(t) for t in text]
        for n in range(order):
            for i in range(n, len(words)):
                self.table.setdefault(tuple(words[i - n : i]), Counter())[words[i]] += 1

    def distribution(self, tokens: Sequence[int]) -> torch.Tensor:
        """``q [V]`` after ``tokens``: relative counts in the longest context that occurred."""
        q = torch.zeros(self.vocab_size)
        counts = self._counts(tokens)
        q[list(counts)] = torch.tensor([float(n) for n in counts.values()])
        return q / q.sum()

    def _counts(self, tokens: Sequence[int]) -> Counter[int]:
        for n in range(min(self.order - 1, len(tokens)), 0, -1):
            found = self.table.get(tuple(tokens[-n:]))
            if found:
                return found
        return self.table[()]

    def propose(
        self,
        tokens: Sequence[int],
        gamma: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        """The likeliest continuation at temperature 0, else one drawn from the counts (whatever the temperature)."""
        known, rows = list(tokens), []
        for _ in range(gamma):
            if temperature == 0:
                known.append(self._counts(known).most_common(1)[0][0])
                continue
            q = self.distribution(known)
            rows.append(q)
            known.append(int(torch.multinomial(q, 1, generator=generator)))
        return Proposal(known[len(tokens) :], torch.stack(rows) if rows else None)

    def tree(self, tokens: Sequence[int], branching: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A token tree behind ``tokens``: at depth d the ``branching[d]`` likeliest continuations of each node.

        Returns:
            tokens ``[T]``, the last known one first, and parents ``[T]``; fewer nodes where fewer continuations are
            known. Breadth first, likelier before less likely.
        """
        held, parents, level = [int(tokens[-1])], [-1], [(0, list(tokens))]
        for k in branching:
            check_positive_int("branching", k)
            below = []
            for node, known in level:
                for token, _ in self._counts(known).most_common(k):
                    below.append((len(held), [*known, token]))
                    held.append(token)
                    parents.append(node)
            level = below
        return torch.tensor(held), torch.tensor(parents)


class EarlyExit:
    """The first ``layers`` layers of the target, an affine map to its last hidden state, and its own output layer.

    Args:
        model: a LlamaForCausalLM. layers: L, below the target's.
        exit_map: ``(A [M, M], b [M])`` from :func:`fit_exit`; None reads the middle layer as if it were the last.
        vocab: the tokens the draft knows, int64 ``[K]``; default all. The others have q = 0, which costs acceptance
            and no exactness.
    """

    name = "early exit"

    def __init__(
        self,
        model: Any,
        layers: int,
        exit_map: tuple[torch.Tensor, torch.Tensor] | None = None,
        vocab: torch.Tensor | None = None,
    ) -> None:
        check_positive_int("layers", layers)
        if layers >= model.config.num_hidden_layers:
            raise ValueError(
                f"layers: expected fewer than the target's {model.config.num_hidden_layers}, got {layers}"
            )
        self.lm = CachedModel(model, layers)
        self.exit_map, self.vocab = exit_map, vocab
        self.norm, weight = model.model.norm, model.lm_head.weight
        self.vocab_size = len(weight)
        self.weight = weight if vocab is None else weight[vocab].contiguous()
        self.seen: list[int] = []

    def parameters_read(self) -> int:
        """Weights that one drafted token reads (the embedding's one row is left out)."""
        width = self.weight.shape[1]
        extra = 0 if self.exit_map is None else width * (width + 1)
        return self.lm.layer_parameters() + self.weight.numel() + extra

    def propose(
        self,
        tokens: Sequence[int],
        gamma: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        """Runs the layers over what is new in ``tokens``, then gamma - 1 single tokens."""
        known = list(tokens)
        same = 0
        while same < min(len(self.seen), len(known) - 1) and self.seen[same] == known[same]:
            same += 1
        self.lm.keep(same)
        rows, new = [], known[same:]
        for _ in range(gamma):
            logits = self._logits(self.lm.hidden(torch.tensor(new))[-1])
            if temperature == 0:
                new = [int(logits.argmax()) if self.vocab is None else int(self.vocab[logits.argmax()])]
            else:
                q = torch.softmax(logits / temperature, dim=-1)
                if self.vocab is not None:
                    q = torch.zeros(self.vocab_size).scatter(0, self.vocab, q)
                rows.append(q)
                new = [int(torch.multinomial(q, 1, generator=generator))]
            known += new
        self.seen = known[: self.lm.length]
        return Proposal(known[len(tokens) :], torch.stack(rows) if rows else None)

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.exit_map is not None:
            matrix, offset = self.exit_map
            hidden = hidden @ matrix + offset
        logits: torch.Tensor = self.weight @ self.norm(hidden)
        return logits.float()


@torch.no_grad()
def fit_exit(
    model: Any, layers: int, ids: torch.Tensor, ridge: float = 1e-2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from the hidden state after ``layers`` layers to the last one, over real text.

    ``min sum_t |x_t A + b - y_t|^2 / rms(y_t)^2 + ridge``: each token counts alike, since the norm that follows
    divides by ``rms(y)``. The first 4 positions of each row are left out: their states are huge and carry no text.

    Args:
        ids: int64 ``[rows, N]``. ridge: relative to the mean size of a feature. Default 1e-2.

    Returns:
        ``A [M, M]`` and ``b [M]``.
    """
    early, full = CachedModel(model, layers), CachedModel(model)
    xs, ys = [], []
    for row in ids:
        early.keep(0)
        full.keep(0)
        xs.append(early.hidden(row)[4:])
        ys.append(full.hidden(row)[4:])
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    weight = y.square().mean(dim=1, keepdim=True).rsqrt()
    x = torch.cat([x, torch.ones_like(weight)], dim=1) * weight
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found = torch.linalg.solve(gram, x.T @ (y * weight)).float()
    return found[:-1], found[-1]
