"""Token trees: several guesses for each place, all judged in one pass of the target.

A tree of T nodes is a tensor ``parents [T]`` with ``parents[0] = -1``, ``parents[n] < n``. Node 0, the root, is the
last token that is certain; every other node is a guess for the place after its parent. Node n stands at position
``context + depth(n)`` and may see the ``context`` tokens before the root and its own ancestors, nothing else: not its
siblings, although they lie between it and its ancestors in memory.

Three ways to judge, all exact: greedy; drawing the target's own token at each node and looking whether a child has it
(any tree, best for guesses that aren't random); and recursive rejection, where the children of a node were drawn from
a draft's distribution and are tried one after another.

Sources: Miao et al. 2024 (SpecInfer: tree, mask, multi-step sampling with replacement); Cai et al. 2024 (Medusa: one
fixed tree of top-k guesses); Jeon et al. 2024 (recursive rejection without replacement).
"""

from __future__ import annotations

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations.attention import attention
from effattn_lab.linear.speculative import (
    NO_TOKEN,
    _check_pair,
    _check_probs,
    _check_uniform,
    _residual,
    _sample,
)


def depths(parents: torch.Tensor) -> torch.Tensor:
    """Distance of each node from the root, int64 ``[T]``."""
    return ancestors(parents).sum(dim=1) - 1


def ancestors(parents: torch.Tensor) -> torch.Tensor:
    """Bool ``[T, T]``: is m on the path from the root to n, n included?"""
    check_parents(parents)
    seen = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    for n, parent in enumerate(parents.tolist()):
        if n:
            seen[n] |= seen[parent]
    return seen


def path(parents: torch.Tensor, node: int) -> list[int]:
    """Nodes from the root to ``node``, both included."""
    return [int(n) for n in ancestors(parents)[node].nonzero()[:, 0]]


def tree_mask(parents: torch.Tensor, context: int = 0) -> torch.Tensor:
    """What each node may see: bool ``[T, context + T]``, all of the context and its ancestors.

    A chain (``parents = [-1, 0, 1, ...]``) gives the causal mask of the last T positions.
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 0:
        raise ValueError(f"context: expected an integer of at least 0, got {context!r}")
    return torch.nn.functional.pad(ancestors(parents), (context, 0), value=True)


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parents: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of all nodes at once, each along its own path.

    Args:
        q: ``[B, Hq, T, D]``. k, v: ``[B, Hkv, context + T, D]``, the context's first. parents: ``[T]``.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, D]``; row n is what causal attention gives for the sequence context + path(n).
    """
    nodes = len(parents)
    if q.dim() != 4 or q.shape[2] != nodes or k.dim() != 4 or k.shape[2] < nodes:
        raise ValueError(
            f"parents: expected one for each of the queries, and as many keys or more; got {nodes} parents, "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    return attention(q, k, v, scale=scale, mask=tree_mask(parents, k.shape[2] - nodes))


# ---- judging a tree ----------------------------------------------------------------------------------------


def verify_tree_greedy(
    best: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
) -> tuple[list[int], int]:
    """Walk down from the root as long as a child holds the target's most probable token.

    Args:
        best: int64 ``[T]``, the target's argmax after each node. tokens: int64 ``[T]``, what each node holds.
        parents: ``[T]``.

    Returns:
        nodes of the accepted path, the root first, and the next token. The round yields ``len(nodes)`` tokens: the
        accepted guesses (the root was certain before) and the next one.
    """
    check_parents(parents)
    _check_nodes(parents, best=best, tokens=tokens)
    return _walk(best.tolist(), tokens.tolist(), parents.tolist())


def verify_tree(
    p: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, u: torch.Tensor
) -> tuple[list[int], int]:
    """Draw the target's token at each node and walk down as long as a child holds it.

    The tokens that come out are draws from the target by construction, whatever the tree, if the tree was chosen
    without looking at ``u``. A child x is thereby accepted with probability ``p(x)``: for guesses that aren't random
    (top-k of a head, prompt lookup) that is what recursive rejection comes to, too.

    Args:
        p: ``[T, V]``, the target's distribution after each node. u: ``[T]``, uniform in [0, 1).
        tokens, parents, returns: as :func:`verify_tree_greedy`.
    """
    check_parents(parents)
    _check_nodes(parents, tokens=tokens)
    _check_probs("p", p)
    _check_rows("p", p, parents)
    _check_uniform("u", u, (len(parents),))
    return _walk(_sample(p, u).tolist(), tokens.tolist(), parents.tolist())


def verify_tree_rejection(
    p: torch.Tensor,
    q: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    u_accept: torch.Tensor,
    u_final: torch.Tensor,
) -> tuple[list[int], int]:
    """Recursive rejection down a tree whose nodes' children were drawn from ``q`` without replacement.

    Args:
        p, q: ``[T, V]``, the target's and the draft's distribution after each node (``q`` of a leaf isn't read).
        tokens, parents: ``[T]``; children in the order in which they were drawn.
        u_accept: ``[T]``, uniform, one for each node as a candidate (the root's isn't read). u_final: ``[]``.

    Returns:
        as :func:`verify_tree_greedy`.
    """
    check_parents(parents)
    _check_nodes(parents, tokens=tokens)
    _check_pair(p, q)
    _check_rows("p", p, parents)
    _check_uniform("u_accept", u_accept, (len(parents),))
    _check_uniform("u_final", u_final, ())
    above, node, nodes = parents.tolist(), 0, [0]
    while True:
        children = [n for n, parent in enumerate(above) if parent == node]
        candidates, u = tokens[children][None], u_accept[children][None]
        which, left = _try(p[node][None], q[node][None], candidates, u, replacement=False)
        if int(which) == len(children):
            return nodes, int(_sample(left[0], u_final))
        node = children[int(which)]
        nodes.append(node)


def draw_candidates(q: torch.Tensor, u: torch.Tensor, *, replacement: bool = False) -> torch.Tensor:
    """Draw k candidates from ``q``, one after another.

    Args:
        q: ``[B, V]``. u: ``[B, k]``, uniform in [0, 1).
        replacement: may a token come twice? Default False: each draw is from ``q`` without those before it.

    Returns:
        int64 ``[B, k]``; :data:`NO_TOKEN` from where ``q`` has nothing left.
    """
    _check_probs("q", q)
    _check_uniform("u", u, (len(q), u.shape[-1]))
    found = []
    for i in range(u.shape[1]):
        empty = ~(q > 0).any(dim=-1)
        token = _sample(q, u[:, i])
        found.append(token.masked_fill(empty, NO_TOKEN))
        q = q if replacement else _without(q, token)
    return torch.stack(found, dim=1)


def verify_candidates(
    p: torch.Tensor,
    q: torch.Tensor,
    candidates: torch.Tensor,
    u_accept: torch.Tensor,
    u_final: torch.Tensor,
    *,
    replacement: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Try k candidates for one place of each of B sequences; the token that comes out has distribution ``p``.

    Candidate i is accepted with probability ``min(1, p_i(x)/q_i(x))``. If not, ``p_{i+1}`` is the residual of
    ``p_i, q_i``, and ``q_{i+1}`` is what the next candidate was drawn from: ``q_i`` without x, normalised (with
    ``replacement``: ``q`` again). After the last rejection the token is drawn from ``p_{k+1}``.

    Args:
        p, q: ``[B, V]``. candidates: int64 ``[B, k]``, as from :func:`draw_candidates`; NO_TOKEN is passed over.
        u_accept: ``[B, k]``, u_final: ``[B]``, uniform in [0, 1).
        replacement: how the candidates were drawn. Default False.

    Returns:
        tokens int64 ``[B]``, and which candidate each is, int64 ``[B]`` (k: none of them).
    """
    _check_pair(p, q)
    if candidates.dtype != torch.int64 or candidates.dim() != 2 or len(candidates) != len(p):
        raise ValueError(
            f"candidates: expected int64 [{len(p)}, k], got {candidates.dtype} {tuple(candidates.shape)}"
        )
    _check_uniform("u_accept", u_accept, tuple(candidates.shape))
    _check_uniform("u_final", u_final, (len(p),))
    which, left = _try(p, q, candidates, u_accept, replacement)
    taken = torch.nn.functional.pad(candidates, (0, 1)).gather(1, which[:, None])[:, 0]
    return torch.where(which < candidates.shape[1], taken, _sample(left, u_final)), which


def _try(
    p: torch.Tensor, q: torch.Tensor, candidates: torch.Tensor, u: torch.Tensor, replacement: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(which candidate is accepted, k for none; what is left of p)."""
    k = candidates.shape[1]
    which = torch.full_like(candidates[:, 0], k) if k else torch.zeros(len(p), dtype=torch.int64)
    for i in range(k):
        x = candidates[:, i]
        open_ = (which == k) & (x != NO_TOKEN)
        x = x.clamp(min=0)[:, None]
        p_x, q_x = p.gather(1, x)[:, 0], q.gather(1, x)[:, 0]
        if bool((open_ & ~(q_x > 0)).any()):
            raise ValueError(
                f"candidates: expected tokens that q can draw, got one at place {i} where q is 0"
            )
        accept = open_ & (u[:, i] * q_x < p_x)
        which = which.masked_fill(accept, i)
        rejected = (open_ & ~accept)[:, None]
        p, q = (
            torch.where(rejected, _residual(p, q), p),
            q if replacement else torch.where(rejected, _without(q, x[:, 0]), q),
        )
    return which, p


def _without(q: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``q [B, V]`` without one token each, normalised; zeros where nothing is left."""
    q = q.scatter(1, token[:, None], 0.0)
    total = q.sum(dim=1, keepdim=True)
    return q / torch.where(total > 0, total, 1.0)


def _walk(chosen: list[int], tokens: list[int], parents: list[int]) -> tuple[list[int], int]:
    nodes = [0]
    while True:
        node = nodes[-1]
        child = next(
            (n for n, parent in enumerate(parents) if parent == node and tokens[n] == chosen[node]), None
        )
        if child is None:
            return nodes, chosen[node]
        nodes.append(child)


def top_k_tree(branching: tuple[int, ...]) -> torch.Tensor:
    """``parents`` of a tree whose nodes at depth d have ``branching[d]`` children each, in breadth-first order."""
    parents, level = [-1], [0]
    for k in branching:
        check_positive_int("branching", k)
        below = list(range(len(parents), len(parents) + k * len(level)))
        parents += [n for n in level for _ in range(k)]
        level = below
    return torch.tensor(parents)


def check_parents(parents: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``parents`` is a tree: int64 ``[T]``, -1 first, then always an earlier node."""
    if not isinstance(parents, torch.Tensor) or parents.dtype != torch.int64 or parents.dim() != 1:
        got = (
            f"{parents.dtype} {tuple(parents.shape)}"
            if isinstance(parents, torch.Tensor)
            else type(parents).__name__
        )
        raise ValueError(f"parents: expected int64 [T], got {got}")
    given = parents.tolist()
    if not given or given[0] != -1 or any(not 0 <= parent < n for n, parent in enumerate(given) if n):
        raise ValueError(f"parents: expected -1, then for each node an earlier one, got {given}")


def _check_nodes(parents: torch.Tensor, **tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != torch.int64 or x.shape != parents.shape:
            raise ValueError(f"{name}: expected int64 {tuple(parents.shape)}, got {x.dtype} {tuple(x.shape)}")


def _check_rows(name: str, x: torch.Tensor, parents: torch.Tensor) -> None:
    if x.dim() != 2 or len(x) != len(parents):
        raise ValueError(f"{name}: expected [T, V] with T = {len(parents)}, got {tuple(x.shape)}")
