"""Exercise: the convolution unfolded along the paths of a token tree."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._linearized_llm_parts import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal


def unfold(weight: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """Walk from each node to the root, then on into the verified text; the lag counts the steps."""
    heads, lags = weight.shape
    nodes = len(parents)
    out = torch.zeros(heads, nodes, lags - 1 + nodes, dtype=weight.dtype)
    for a in range(nodes):
        lag, node = 0, a
        while node >= 0 and lag < lags:
            out[:, a, lags - 1 + node] = weight[:, lag]
            lag, node = lag + 1, int(parents[node])
        for column in range(lags - 2, -1, -1):  # the last verified value first
            if node < 0 and lag < lags:
                out[:, a, column] = weight[:, lag]
                lag += 1
    return out


def _depths(parents: torch.Tensor) -> list[int]:
    depth: list[int] = []
    for p in parents.tolist():
        depth.append(0 if p < 0 else depth[p] + 1)
    return depth


def _reference(weight: torch.Tensor, parents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (_build("", weight, parents),)


def _build(fault: str, weight: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """Entry by entry, from depths and ancestors."""
    heads, lags = weight.shape
    nodes, depth = len(parents), _depths(parents)
    line: list[set[int]] = []
    for a, p in enumerate(parents.tolist()):
        line.append({a} | (line[p] if p >= 0 else set()))
    out = torch.zeros(heads, nodes, lags - 1 + nodes, dtype=weight.dtype)
    for a in range(nodes):
        for column in range(lags - 1 + nodes):
            n = column - (lags - 1)  # a node, or -m: m before the root
            if n < 0:
                lag = depth[a] - n
                if fault == "as stored":
                    lag = a - n
                if fault == "context from the node":
                    lag = -n
                if fault == "context one off":
                    lag = depth[a] - n - 1
                if fault == "context reversed":
                    lag = depth[a] + column + 1
                if fault == "no context":
                    continue
            else:
                lag = depth[a] - depth[n]
                if fault == "as stored":
                    lag = a - n
                if fault == "index distance":
                    lag = a - n
                related = n in line[a]
                if fault == "siblings seen":
                    related = lag > 0 or n == a
                if fault == "as stored":
                    related = n <= a
                if fault == "children instead":
                    related, lag = a in line[n], depth[n] - depth[a]
                if fault == "itself missing" and n == a:
                    continue
                if fault == "parent alone" and n not in (a, int(parents[a])):
                    continue
                if not related:
                    continue
            if 0 <= lag < lags:
                out[:, a, column] = weight[:, lag]
    return out


def _inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, parents: list[int], lags: int, heads: int = 2) -> Case:
        return Case(name, {"weight": normal(rng, heads, lags), "parents": torch.tensor(parents)})

    def random_tree(nodes: int) -> list[int]:
        return [-1, *(int(rng.integers(0, a)) for a in range(1, nodes))]

    return [
        case("equals the walk to the root", [-1, 0, 0, 1, 1, 2, 3, 4, 6, 8], 5),
        case("a chain", [-1, 0, 1, 2, 3], 4),
        case("a root alone", [-1], 6),
        case("a fan of siblings", [-1, 0, 0, 0, 0], 3),
        case("fewer lags than the tree is deep", [-1, 0, 1, 1, 2, 3, 4], 2),
        case("one lag", [-1, 0, 0, 1], 1),
        case("any tree", random_tree(12), 6),
    ]


UNFOLD = Exercise(
    id="linear/linearized_llm/unfold",
    title="the convolution along every path of a tree",
    signature="unfold(weight [H, L], parents [T] int64) -> M [H, T, L - 1 + T]",
    outputs=(Output("M", "weight"),),
    make_inputs=_inputs,
    reference=_reference,
    solution=unfold,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the walk to the root": "Row a: weight[0] at a itself, weight[1] at its parent, and so on to "
        "the root, "
        "then into the verified values, the last one first.",
        "a chain": "A tree without branches is a line: M is the band matrix.",
        "a root alone": "Node 0 sees itself and the L - 1 verified values.",
        "a fan of siblings": "Siblings do not see each other, though they are neighbours in memory.",
        "fewer lags than the tree is deep": "After L steps the walk ends, also inside the tree.",
        "one lag": "L = 1: no verified value is read, and every node reads itself alone.",
        "any tree": "parents[a] < a holds for every node but the root, and nothing else is known.",
    },
    tolerance=Tolerance(0.0, 0.0, "entries are copied, not computed."),
    mutants=mutants(
        _build,
        {
            "as stored": "The distance is that of the indices: a node reads its neighbour in memory, which is "
            "mostly a "
            "sibling. That is the plain convolution on the list of nodes.",
            "siblings seen": "Nodes that are no ancestors are read too: depth alone does not say who is on the path.",
            "index distance": "The right nodes, at the wrong lag: the distance between two nodes of a path is the "
            "difference of their depths, not of their indices.",
            "children instead": "A node reads its descendants: the walk goes from the node to the root.",
            "itself missing": "The node does not read itself: lag 0.",
            "parent alone": "The walk stops at the parent: it goes on to the root.",
            "context from the node": "The verified values are read as if every node came right after them. A node of "
            "depth d is d further away.",
            "context one off": "The verified values are one lag too near: the last of them is one before the root.",
            "context reversed": "The verified values are in reverse order: the last column before the nodes is the "
            "latest.",
            "no context": "The walk ends at the root: it goes on into the verified text.",
        },
    ),
    hints=(
        "Walk from node a to the root, parents[node] by parents[node], and count the steps: the count is the lag.",
        "Node n stands in column L - 1 + n. When the root is passed, the walk goes on to columns L - 2, L - 3, ..., "
        "until L lags are used up.",
        "for a in range(T):\n    lag, node = 0, a\n    while node >= 0 and lag < L:\n"
        "        M[:, a, L - 1 + node] = weight[:, lag]\n        lag, node = lag + 1, int(parents[node])\n"
        "    if node < 0:\n        for m in range(1, L - lag + 1):  # m before the root\n"
        "            M[:, a, L - 1 - m] = weight[:, lag + m - 1]",
    ),
)
