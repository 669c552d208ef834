"""The loop of speculative decoding on a real model with a KV cache, and what is counted along the way.

The last known token is not cached: each pass of the target runs it together with the drafts behind it, so that one
pass gives the distribution before each draft and after the last. Afterwards the cache keeps what was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.linear import speculative as spec
from effattn_lab.linear.speculative_cache import CachedModel
from effattn_lab.linear.speculative_cost import expected_tokens
from effattn_lab.linear.speculative_drafts import Draft, Proposal
from effattn_lab.linear.speculative_tree import verify_tree, verify_tree_greedy

Propose = Callable[[list[int]], Proposal]
MakeTree = Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Generation:
    """New tokens, and (drafts proposed, drafts accepted) of each pass of the target."""

    tokens: list[int] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of the target yields on average: ``1 + mean accepted``."""
        return 1 + sum(accepted for _, accepted in self.rounds) / len(self.rounds)


def speculate(
    model: Any,
    draft: Draft,
    prompt: Sequence[int],
    max_new_tokens: int,
    gamma: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """Generate with drafts; at temperature 0 the target's greedy text, else samples of the target.

    Args:
        model: a transformers LlamaForCausalLM, such as ``smollm2.load().model``. draft: see :class:`Draft`.
        prompt: token ids, at least one. max_new_tokens: at least 1. gamma: drafts asked for each round, at least 0.
        temperature: of the target and, where the draft has one, of the draft. generator: for temperature > 0.

    Returns:
        :class:`Generation`; ``tokens`` ends at max_new_tokens, ``rounds`` counts the last round whole.
    """
    known = _checked(prompt, max_new_tokens, temperature)
    if isinstance(gamma, bool) or not isinstance(gamma, int) or gamma < 0:
        raise ValueError(f"gamma: expected an integer of at least 0, got {gamma!r}")
    target, done = _prefilled(model, known), Generation()
    while len(done.tokens) < max_new_tokens:
        proposal = draft.propose(known, gamma, temperature, generator) if gamma else Proposal([])
        start = target.length
        logits = target.logits(torch.tensor([known[-1], *proposal.tokens]))
        new = judge(logits, proposal, temperature, generator)
        target.keep(start + len(new))
        known += new
        done.tokens += new
        done.rounds.append((len(proposal.tokens), len(new) - 1))
    del done.tokens[max_new_tokens:]
    return done


def judge(
    logits: torch.Tensor, proposal: Proposal, temperature: float, generator: torch.Generator | None = None
) -> list[int]:
    """Tokens of one round: the accepted drafts and one of the target's. ``logits [len(drafts) + 1, V]``."""
    drafts = torch.tensor(proposal.tokens, dtype=torch.int64)[None]
    if temperature == 0:
        tokens, accepted = spec.verify_greedy(logits.argmax(dim=-1)[None], drafts)
    else:
        p = torch.softmax(logits / temperature, dim=-1)
        q = spec.one_hot(drafts[0], p.shape[-1]) if proposal.q is None else proposal.q
        u = torch.rand(len(p), generator=generator)
        tokens, accepted = spec.verify(p[None], q[None], drafts, u[None, :-1], u[-1:])
    return [int(t) for t in tokens[0, : int(accepted) + 1]]


def speculate_tree(
    model: Any,
    make_tree: MakeTree,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """The same with a token tree each round, ``make_tree(tokens) -> (tokens [T], parents [T])``, root = last token.

    The pass runs all nodes under the tree mask; the cache then keeps the rows of the accepted path.
    """
    known = _checked(prompt, max_new_tokens, temperature)
    target, done = _prefilled(model, known), Generation()
    while len(done.tokens) < max_new_tokens:
        tokens, parents = make_tree(known)
        start = target.length
        logits = target.logits(tokens, parents)
        if temperature == 0:
            nodes, following = verify_tree_greedy(logits.argmax(dim=-1), tokens, parents)
        else:
            p = torch.softmax(logits / temperature, dim=-1)
            nodes, following = verify_tree(p, tokens, parents, torch.rand(len(p), generator=generator))
        target.keep([*range(start), *(start + n for n in nodes)])
        new = [int(tokens[n]) for n in nodes[1:]] + [following]
        known += new
        done.tokens += new
        done.rounds.append((len(tokens) - 1, len(nodes) - 1))
    del done.tokens[max_new_tokens:]
    return done


def replay(draft: Draft, prompt: Sequence[int], text: Sequence[int], gamma: int) -> Generation:
    """The rounds that greedy speculation would take, from the target's greedy ``text`` alone.

    At temperature 0 the text doesn't depend on the drafts, so it is generated once and every draft and gamma is
    counted against it without another pass of the target. Rounds that run past the end of ``text`` aren't counted.
    """
    known, at, done = list(prompt), 0, Generation()
    while at < len(text):
        guesses = draft.propose(known, gamma, 0.0, None).tokens if gamma else []
        if at + len(guesses) >= len(text):
            break
        accepted = 0
        while accepted < len(guesses) and guesses[accepted] == text[at + accepted]:
            accepted += 1
        done.rounds.append((len(guesses), accepted))
        new = list(text[at : at + accepted + 1])
        done.tokens += new
        known += new
        at += len(new)
    return done


def summary(rounds: Sequence[tuple[int, int]], gamma: int) -> dict[str, float]:
    """What the rounds show beside what the formula says.

    Returns:
        ``alpha``: accepted over judged drafts (a round judges its accepted drafts and the one rejected), the
        maximum-likelihood estimate if all drafts are alike; ``coverage``: share of rounds with any draft;
        ``tokens_per_pass``; ``predicted``: ``1 + coverage (expected_tokens(alpha, gamma) - 1)``.
    """
    accepted = sum(a for _, a in rounds)
    judged = sum(min(n, a + 1) for n, a in rounds)
    coverage = sum(n > 0 for n, _ in rounds) / len(rounds)
    alpha = accepted / judged if judged else 0.0
    return {
        "rounds": len(rounds),
        "alpha": alpha,
        "coverage": coverage,
        "tokens_per_pass": 1 + accepted / len(rounds),
        "predicted": 1 + coverage * (expected_tokens(alpha, gamma) - 1),
    }


def _checked(prompt: Sequence[int], max_new_tokens: int, temperature: float) -> list[int]:
    known = [int(t) for t in prompt]
    if not known:
        raise ValueError("prompt: expected at least one token, got none")
    check_positive_int("max_new_tokens", max_new_tokens)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature >= 0:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
    return known


def _prefilled(model: Any, known: list[int]) -> CachedModel:
    target = CachedModel(model)
    if len(known) > 1:
        target.hidden(torch.tensor(known[:-1]))
    return target
