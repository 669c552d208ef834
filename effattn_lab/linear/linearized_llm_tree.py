"""Convolution and groups on a tree of candidate tokens, so that one pass can verify many continuations.

Speculative decoding with a tree stores its nodes one after the other; a node's neighbour in memory is mostly a
sibling, not the token before it. A convolution as stored would mix the branches, and a node's group follows from its
*time*, not from its index. Both are put right here: a node sees what it would see if its path were the text.
Nodes ``0 .. T - 1``; ``parents[a] < a``, node 0 is the root (the token after what is verified) with parent -1. A node
of depth d stands at position ``seen + d``.
Source: You et al. 2024 (arXiv:2406.07368), unfolded convolution and time-based grouping, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.linearized_llm import LinearizedState, _prepare, _start, fold, unit
from effattn_lab.linear.linearized_llm_conv import check_tail, check_weight


def check_parents(parents: Sequence[int], nodes: int | None = None) -> list[int]:
    """``parents`` as a list; ``ValueError`` unless node 0 is the root and every node's parent comes before it."""
    parents = [int(p) for p in parents]
    if not parents or parents[0] != -1:
        raise ValueError(f"parents: expected -1 for the root, node 0, got {parents[:1]}")
    for a, p in enumerate(parents[1:], start=1):
        if not 0 <= p < a:
            raise ValueError(f"parents: expected a node before {a} as its parent, got {p}")
    if nodes is not None and len(parents) != nodes:
        raise ValueError(f"parents: expected an entry for each of the {nodes} nodes, got {len(parents)}")
    return parents


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node, 0 for the root."""
    parents, found = check_parents(parents), [0]
    for p in parents[1:]:
        found.append(found[p] + 1)
    return found


def ancestors(parents: Sequence[int]) -> torch.Tensor:
    """bool ``[T, T]``: row a is true at a and at every node on the way from it to the root."""
    parents = check_parents(parents)
    seen = torch.eye(len(parents), dtype=torch.bool)
    for a, p in enumerate(parents[1:], start=1):
        seen[a] |= seen[p]
    return seen


def unfold_matrix(weight: torch.Tensor, parents: Sequence[int]) -> torch.Tensor:
    """The convolution along every path as one matrix ``[H, T, L - 1 + T]``; it depends on the tree's shape alone.

    Columns: the last L - 1 verified values, oldest first, then the nodes. The lag between two nodes of a path is the
    difference of their depths; column ``L - 1 - m`` (m tokens before the root) lies ``depth + m`` back. Whatever is
    not an ancestor, or more than L - 1 back, is 0. (In image terms: ``im2col`` along the ancestors.)

    Args:
        weight: ``[H, L]``, by lag.
        parents: ``parents[a] < a``, -1 for node 0.
    """
    check_weight(weight, 1, weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu"))
    seen = ancestors(parents).to(weight.device)
    depth = torch.tensor(depths(parents), device=weight.device)
    lags = weight.shape[1]
    before = depth[:, None] + torch.arange(lags - 1, 0, -1, device=weight.device)  # [T, L - 1]
    lag = torch.cat([before, depth[:, None] - depth], dim=1)
    reached = torch.cat([torch.ones_like(before, dtype=torch.bool), seen], dim=1) & (lag < lags) & (lag >= 0)
    return torch.where(reached, weight[:, lag.clamp(0, lags - 1)], 0.0)


def tree_conv(
    v: torch.Tensor, weight: torch.Tensor, parents: Sequence[int], *, tail: torch.Tensor | None = None
) -> torch.Tensor:
    """Each node's masked convolution along its own path: :func:`unfold_matrix` times ``[tail ‖ v]``.

    Args:
        v: the nodes' values ``[B, Hkv, T, Dv]``.
        weight: ``[Hq, L]``, by lag.
        parents: the tree.
        tail: the last L - 1 verified values ``[B, Hkv, L - 1, Dv]``. Default: zeros.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of ``v``.
    """
    if not isinstance(v, torch.Tensor) or v.dim() != 4 or not v.is_floating_point():
        came = tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__
        raise ValueError(f"v: expected a floating-point tensor [B, H, T, D], got {came}")
    groups = check_weight(weight, v.shape[1], v.device)
    parents = check_parents(parents, v.shape[2])
    wide = torch.promote_types(v.dtype, torch.float32)
    tail = check_tail(tail, (*v.shape[:2], weight.shape[1] - 1, v.shape[3]), v.to(wide))
    window = repeat_kv(torch.cat([tail, v.to(wide)], dim=2), groups)
    return (unfold_matrix(weight.to(wide), parents) @ window).to(v.dtype)


def tree_attention(
    state: LinearizedState | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parents: Sequence[int],
    *,
    alpha: float | torch.Tensor = 1.0,
    conv_weight: torch.Tensor | None = None,
    group_size: int = 64,
    qk_norm: bool = True,
    forget_closed: bool = False,
) -> torch.Tensor:
    """Outputs of all nodes in one pass, each what token-by-token decoding along its path would give.

    Of what a node sees (the open group's tokens and its ancestors) those in its own group count with
    ``relu(q . k)^2``, those in an earlier group with ``alpha q . k``: a path that crosses a border has closed the
    group behind it, and that group is part of *its* state, not of the siblings'.

    Args:
        state: what was verified; None: nothing.
        q: ``[B, Hq, T, D]``; k: ``[B, Hkv, T, D]``; v: ``[B, Hkv, T, Dv]``, at positions ``seen + depth``.
        parents: the tree.
        alpha, conv_weight, group_size, qk_norm: as in
            :func:`~effattn_lab.linear.linearized_llm.linearized_attention`.
        forget_closed: what the released code does: a node beyond a border reads S without the group just closed.
            Not equal to decoding. Default False.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of ``q``. The state is left as it was; :func:`commit` takes the accepted path.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, alpha, conv_weight = _prepare(q, k, v, alpha, conv_weight, group_size, qk_norm)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: expected as many nodes as k ({k.shape[2]}), got {q.shape[2]}")
    parents = check_parents(parents, k.shape[2])
    state = _start(state, k, v, conv_weight, group_size, name="state")
    repeat, opened = q.shape[1] // k.shape[1], state.k.shape[2]
    position = opened + torch.tensor(
        depths(parents), device=q.device
    )  # counted from the open group's first token
    group = torch.cat([torch.zeros(opened, dtype=torch.long, device=q.device), position // group_size])
    seen = torch.cat(
        [
            torch.ones(len(parents), opened, dtype=torch.bool, device=q.device),
            ancestors(parents).to(q.device),
        ],
        dim=1,
    )
    own = position[:, None] // group_size
    keys, values = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
    scores = q @ repeat_kv(keys, repeat).transpose(-1, -2)  # [B, Hq, T, open + T]
    weights = torch.where(seen & (group == own), scores.relu().square(), 0.0)
    if not forget_closed:
        weights = weights + alpha * torch.where(seen & (group < own), scores, 0.0)
    out = weights @ repeat_kv(values, repeat) + alpha * (q @ repeat_kv(state.S, repeat))
    if conv_weight is not None:
        out = out + tree_conv(v, conv_weight, parents, tail=state.tail)
    return out.to(dtype)


def commit(
    state: LinearizedState | None,
    k: torch.Tensor,
    v: torch.Tensor,
    path: Sequence[int],
    *,
    num_lags: int = 0,
    group_size: int = 64,
    qk_norm: bool = True,
) -> LinearizedState:
    """The state after accepting the nodes of ``path``, from the root down, and none of the others.

    Args:
        state, k, v, group_size, qk_norm: as in :func:`tree_attention`.
        path: indices of nodes, each the parent of the next.
        num_lags: the convolution's L, 0 without one.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    index = torch.tensor(list(path), dtype=torch.long, device=k.device)
    k, v = k.to(wide)[:, :, index], v.to(wide)[:, :, index]
    weight = torch.zeros(1, num_lags, dtype=wide) if num_lags else None
    state = _start(state, k, v, weight, group_size, name="state")
    tail = torch.cat([state.tail, v], dim=2)
    tail = tail[:, :, tail.shape[2] - max(0, num_lags - 1) :]
    keys = torch.cat([state.k, unit(k) if qk_norm else k], dim=2)
    values = torch.cat([state.v, v], dim=2)
    return fold(LinearizedState(state.S, keys, values, tail, state.seen + len(index)), group_size)
