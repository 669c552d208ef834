"""Exercises on speculative decoding: the tokens that a round yields, and what a node of a token tree may see."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._linearized_llm_rounds import EXACT, FROM_SCRATCH
from effattn_lab.exercises.making import mutants

# ---- expected tokens ---------------------------------------------------------------------------------------


def expected_tokens(alpha: torch.Tensor, gamma: int) -> torch.Tensor:
    """Mean tokens of a round with gamma drafts, each accepted with probability alpha [N] -> [N]."""
    powers = torch.arange(gamma + 1, dtype=alpha.dtype)
    return (alpha[:, None] ** powers).sum(dim=1)


def _tokens_inputs(rng: np.random.Generator) -> list[Case]:
    def rates(n: int, low: float = 0.05, high: float = 0.95) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, n)).float()

    return [
        Case("one draft", {"alpha": rates(9), "gamma": 1}),
        Case("several drafts", {"alpha": rates(9), "gamma": 4}),
        Case("several drafts", {"alpha": rates(5, 0.5, 0.99), "gamma": 7}),
        Case("no draft", {"alpha": rates(4), "gamma": 0}),
        Case("never and always", {"alpha": torch.tensor([0.0, 1.0]), "gamma": 5}),
    ]


def _tokens_mutant(fault: str, alpha: torch.Tensor, gamma: int, guard: bool = True) -> torch.Tensor:
    guard = guard and fault != "no guard"
    top, first = gamma, 0
    if fault == "no bonus":
        top = gamma - 1
    elif fault == "drafts only":
        first = 1
    elif fault == "one more":
        top = gamma + 1
    elif fault == "independent":
        return 1 + gamma * alpha
    elif fault == "endless":
        one = alpha == 1
        closed = 1 / (1 - torch.where(one, 0.0, alpha))
        return torch.where(one, float(gamma + 1), closed) if guard else 1 / (1 - alpha)
    elif fault == "all accepted":
        return 1 + gamma * alpha**gamma
    if guard:
        powers = torch.arange(first, top + 1, dtype=alpha.dtype)
        return (alpha[:, None] ** powers).sum(dim=1)
    return (alpha**first - alpha ** (top + 1)) / (1 - alpha)


EXPECTED_TOKENS = Exercise(
    id="linear/linearized_llm/expected_tokens",
    title="tokens that a round yields",
    signature="expected_tokens(alpha [N], gamma) -> tokens [N]",
    outputs=(Output("tokens", "alpha"),),
    make_inputs=_tokens_inputs,
    reference=lambda alpha, gamma: (expected_tokens(alpha, gamma),),
    solution=expected_tokens,
    from_scratch=FROM_SCRATCH,
    properties={
        "one draft": "With one draft: one token always, a second one with probability alpha.",
        "several drafts": "The i-th draft counts only if all before it were accepted: probability alpha^i.",
        "no draft": "Without drafts a round is an ordinary step: one token.",
        "never and always": "alpha = 0 gives 1, alpha = 1 gives gamma + 1. The closed form is 0/0 at 1.",
    },
    tolerance=Tolerance(
        1e-5, 0.0, "a sum of at most 8 positive float32 terms: a few roundings of 6e-8 each."
    ),
    loose={
        "several drafts": Tolerance(
            1e-4, 0.0, "the closed form loses digits at alpha near 1: 1 - 0.99 has 5 left."
        )
    },
    mutants=mutants(
        _tokens_mutant,
        {
            "no bonus": "The token of the target at the end is missing: after gamma accepted drafts there is one "
            "more, since the pass has given its distribution.",
            "drafts only": "These are the accepted drafts alone; each round adds one token of the target's own.",
            "one more": "One term too many: gamma drafts give powers 0 to gamma.",
            "independent": "gamma times alpha counts drafts as if each were judged by itself; a draft behind a "
            "rejected one is lost.",
            "endless": "1 / (1 - alpha) is the limit of infinitely many drafts; there are gamma of them.",
            "all accepted": "Only the case that all drafts are accepted is counted; a part of them is worth "
            "something too.",
            "no guard": "At alpha = 1 the closed form is 0/0. Write the sum, or treat that case by itself.",
        },
        unguarded=True,
    ),
    hints=(
        "The mean of a whole number of at least 1 is the sum over i of the probability that it exceeds i.",
        "A round yields more than i tokens if the first i drafts were all accepted: 1 + alpha + ... + alpha^gamma.",
        "powers = torch.arange(gamma + 1, dtype=alpha.dtype)\n(alpha[:, None] ** powers) ... summed along dim 1.",
    ),
)


# ---- the tree's mask ---------------------------------------------------------------------------------------


def tree_mask(parents: torch.Tensor, context: int) -> torch.Tensor:
    """Who sees whom: parents int64 [T] -> bool [T, context + T]."""
    nodes = len(parents)
    seen = torch.eye(nodes, dtype=torch.bool)
    for n in range(1, nodes):
        seen[n] |= seen[parents[n]]
    return torch.cat([torch.ones(nodes, context, dtype=torch.bool), seen], dim=1)


def _tree(rng: np.random.Generator, nodes: int) -> torch.Tensor:
    return torch.tensor([-1, *(int(rng.integers(0, n)) for n in range(1, nodes))])


def _mask_inputs(rng: np.random.Generator) -> list[Case]:
    fan = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 3, 3, 4])
    deep = torch.tensor([-1, 0, 0, 1, 3, 2, 4, 6, 5, 7])
    return [
        Case("a chain is the causal mask", {"parents": torch.arange(7) - 1, "context": 0}),
        Case("siblings do not see each other", {"parents": fan, "context": 0}),
        Case("all ancestors are seen", {"parents": deep, "context": 0}),
        Case("all ancestors are seen", {"parents": _tree(rng, 24), "context": 0}),
        Case("the context is seen", {"parents": _tree(rng, 9), "context": 5}),
        Case("the root alone", {"parents": torch.tensor([-1]), "context": 2}),
    ]


def _mask_mutant(fault: str, parents: torch.Tensor, context: int) -> torch.Tensor:
    nodes = len(parents)
    seen = torch.eye(nodes, dtype=torch.bool)
    depth = torch.zeros(nodes, dtype=torch.int64)
    for n in range(1, nodes):
        seen[n] |= seen[parents[n]]
        depth[n] = depth[parents[n]] + 1
    past = torch.ones(nodes, context, dtype=torch.bool)
    if fault == "causal":
        seen = torch.ones(nodes, nodes, dtype=torch.bool).tril()
    elif fault == "parent only":
        seen = torch.eye(nodes, dtype=torch.bool)
        for n in range(1, nodes):
            seen[n, parents[n]] = True
    elif fault == "not itself":
        seen = seen & ~torch.eye(nodes, dtype=torch.bool)
    elif fault == "descendants":
        seen = seen.T.contiguous()
    elif fault == "by depth":
        seen = (depth[:, None] > depth) | torch.eye(nodes, dtype=torch.bool)
    elif fault == "no root":
        seen = seen.clone()
        seen[1:, 0] = False
    elif fault == "no context":
        past = torch.zeros(nodes, context, dtype=torch.bool)
    if fault == "context behind":
        return torch.cat([seen, past], dim=1)
    return torch.cat([past, seen], dim=1)


TREE_MASK = Exercise(
    id="linear/linearized_llm/tree_mask",
    title="what a node of a token tree may see",
    signature="tree_mask(parents [T], context) -> mask [T, context + T]",
    outputs=(Output("mask", "bool"),),
    make_inputs=_mask_inputs,
    reference=lambda parents, context: (tree_mask(parents, context).double(),),  # False 0, True 1
    solution=tree_mask,
    from_scratch=FROM_SCRATCH,
    properties={
        "a chain is the causal mask": "In a chain every earlier node is an ancestor: the lower triangle, diagonal "
        "included.",
        "siblings do not see each other": "Nodes with the same parent are alternatives: only one of them will be in "
        "the text.",
        "all ancestors are seen": "Parent, grandparent and so on up to the root, and the node itself.",
        "the context is seen": "The context's columns come first, and every node sees all of them.",
        "the root alone": "One node: it sees the context and itself.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _mask_mutant,
        {
            "causal": "That is the causal mask of the stored order: siblings, which exclude each other, see each "
            "other.",
            "parent only": "Only the parent is seen. The row of the parent holds its ancestors: take it over.",
            "not itself": "A node must see itself, as in causal attention.",
            "descendants": "Rows and columns are exchanged: nodes see their descendants, that is the future.",
            "by depth": "Everything that lies higher is seen, also on other branches.",
            "no root": "The root is an ancestor of every node.",
            "no context": "The context is hidden; it belongs to every path.",
            "context behind": "The context's keys stand before the tree's: its columns come first.",
        },
    ),
    hints=(
        "A node's ancestors are its parent's ancestors and itself. Parents come before their children.",
        "Begin with the identity. For n = 1, 2, ... let row n take over the row of its parent. The context is a "
        "block of True in front.",
        "seen = torch.eye(T, dtype=torch.bool)\nfor n in range(1, T):\n    seen[n] |= ...\n"
        "torch.cat([torch.ones(T, context, dtype=torch.bool), seen], dim=1)",
    ),
)
