"""XAttention and MoBA: choose whole blocks of keys by a cheap score, then attend exactly inside them.

XAttention is applied to a trained model's prefill: blocks of queries choose, by sums along antidiagonals. MoBA is
trained with: every query chooses, by the mean key of each block. Both return plain softmax over what was chosen.

Source: Xu et al. 2025 (XAttention) with the selection of its released code; Lu et al. 2025 (MoBA), section 2.
"""

from __future__ import annotations

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import attention, repeat_kv
from effattn_lab.full.flash import merge
from effattn_lab.sparse.block_list import block_list_attention, causal_block_list

NEG_INF = float("-inf")


def antidiagonal_scores(
    q: torch.Tensor, k: torch.Tensor, *, stride: int = 8, scale: float | None = None
) -> torch.Tensor:
    """One score for each ``S x S`` tile of the score matrix: the sum along its antidiagonal, over S.

    ``T_nm = scale / S sum_a q_(nS + S - 1 - a) . k_(mS + a)``: rows are laid side by side, queries in reverse, and
    one product of width ``S D`` gives all tiles at 1/S of the work of all scores. An antidiagonal meets every column
    and every other slash of its tile.

    Args:
        q: ``[B, Hq, N, D]``.
        k: ``[B, Hkv, N, D]``.
        stride: S. Default 8. A last tile that sticks out counts what it has.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, ceil(N / S), ceil(N / S)]`` in at least float32, unmasked.
    """
    check_positive_int("stride", stride)
    _check_prefill(q, k, k)
    dtype = torch.promote_types(q.dtype, torch.float32)
    rest = -q.shape[2] % stride
    queries, keys = (torch.nn.functional.pad(x.to(dtype), (0, 0, 0, rest)) for x in (q, k))
    wide_q = queries.unflatten(2, (-1, stride)).flip(3).flatten(3)
    wide_k = repeat_kv(keys.unflatten(2, (-1, stride)).flatten(3), q.shape[1] // k.shape[1])
    return resolve_scale(scale, q.shape[3]) / stride * (wide_q @ wide_k.transpose(-1, -2))


def xattention_scores(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int = 128, stride: int = 8, scale: float | None = None
) -> torch.Tensor:
    """How much weight each block of queries is estimated to give each block of keys.

    Softmax over the tiles of a row that are not in the future, then the sum over the tiles of a block:
    ``A_IJ = sum_(n in I) sum_(m in J) softmax_(m <= n)(T_n)_m``. A row of blocks sums to ``block_size / stride``.

    Args:
        q, k, stride, scale: see :func:`antidiagonal_scores`.
        block_size: tokens a block, a multiple of the stride. Default 128.

    Returns:
        ``[B, Hq, n, n]`` with ``n = ceil(N / block_size)``; 0 above the diagonal.
    """
    check_positive_int("block_size", block_size)
    check_positive_int("stride", stride)
    if block_size % stride:
        raise ValueError(f"stride: expected a divisor of block_size {block_size}, got {stride}")
    tiles = antidiagonal_scores(q, k, stride=stride, scale=scale)
    n = tiles.shape[-1]
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    p = torch.softmax(tiles.masked_fill(future, NEG_INF), dim=-1)
    per = block_size // stride
    rest = -n % per
    p = torch.nn.functional.pad(p, (0, rest, 0, rest))
    return p.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum(dim=(3, 5))


def select_by_mass(scores: torch.Tensor, tau: float) -> torch.Tensor:
    """The fewest blocks that hold a share ``tau`` of each row's score, the first and the diagonal block given.

    These two count first; then blocks follow in descending order until the sum reaches ``tau`` of the row's total,
    the block that crosses it among them. Of equal blocks the earlier comes first.

    Args:
        scores: ``[B, Hq, n, n]``, at least 0, 0 above the diagonal.
        tau: from 0 to 1. 1 takes every block that is not in the future.

    Returns:
        bool ``[B, Hq, n, n]``.
    """
    if isinstance(tau, bool) or not 0 <= tau <= 1:
        raise ValueError(f"tau: expected a share from 0 to 1, got {tau!r}")
    n = scores.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()
    if tau == 1:  # rounding must not decide about the last of many small blocks
        return past.expand(scores.shape).clone()
    given = torch.eye(n, dtype=torch.bool, device=scores.device)
    given[:, 0] = True
    mass = scores.double()
    wanted = tau * mass.sum(dim=-1, keepdim=True)
    have = mass.masked_fill(~given, 0.0).sum(dim=-1, keepdim=True)
    rank = mass.masked_fill(given | ~past, -1.0)
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices
    sorted_mass = torch.gather(mass.masked_fill(given | ~past, 0.0), -1, order)
    before = have + sorted_mass.cumsum(dim=-1) - sorted_mass
    takes = torch.zeros_like(past.expand(scores.shape)).scatter(-1, order, before < wanted)
    return (takes | given) & past


def xattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tau: float = 0.9,
    block_size: int = 128,
    stride: int = 8,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal prefill over the blocks that :func:`select_by_mass` takes.

    A block of queries chooses together, so its later queries have a say in what its earlier ones read: fit for a
    prompt that is known whole, not for training.

    Args:
        q: ``[B, Hq, N, D]``.
        k, v: ``[B, Hkv, N, D]``.
        tau, block_size, stride, scale: see above.

    Returns:
        ``[B, Hq, N, D]``.
    """
    check_qkv(q, k, v)
    selected = select_by_mass(xattention_scores(q, k, block_size=block_size, stride=stride, scale=scale), tau)
    blocks = causal_block_list(selected, q.shape[2], block_size)
    return block_list_attention(q, k, v, blocks, scale=scale)[0]


def moba_selection(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int = 512, top_k: int = 3
) -> torch.Tensor:
    """MoBA's gate: each query's own block, and the ``top_k - 1`` blocks before it whose mean key fits best.

    The own block is taken without a score: its mean holds keys of the future. Means and products are in at least
    float32, unscaled.

    Args:
        q: ``[B, Hq, N, D]``.
        k: ``[B, Hkv, N, D]``, after RoPE, as the layer passes them.
        block_size: tokens a block. Default 512.
        top_k: blocks a query reads, its own among them. Default 3. Fewer where there are not so many before it.

    Returns:
        bool ``[B, Hq, N, ceil(N / block_size)]``. It carries no gradient.
    """
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        check_positive_int(name, value)
    _check_prefill(q, k, k)
    length = q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    means = torch.stack([x.to(dtype).mean(dim=2) for x in k.detach().split(block_size, dim=2)], dim=2)
    gate = q.detach().to(dtype) @ repeat_kv(means, q.shape[1] // k.shape[1]).transpose(-1, -2)
    own = torch.arange(length, device=q.device)[:, None] // block_size
    block = torch.arange(means.shape[2], device=q.device)
    gate = gate.masked_fill(block >= own, NEG_INF)
    best = torch.topk(gate, min(top_k - 1, means.shape[2]), dim=-1)
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best.indices, ~best.values.isneginf())
    return chosen | (block == own)


def moba_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 512,
    top_k: int = 3,
    scale: float | None = None,
) -> torch.Tensor:
    """The reference: softmax over the tokens of the chosen blocks that are not in the future.

    Args:
        q: ``[B, Hq, N, D]``.
        k, v: ``[B, Hkv, N, D]``.
        block_size, top_k: see :func:`moba_selection`.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, N, D]``.
    """
    check_qkv(q, k, v)
    chosen = moba_selection(q, k, block_size=block_size, top_k=top_k)
    keep = chosen.repeat_interleave(block_size, dim=-1)[..., : q.shape[2]]
    return attention(q, k, v, causal=True, mask=keep, scale=scale)


def moba_attention_grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 512,
    top_k: int = 3,
    scale: float | None = None,
) -> torch.Tensor:
    """The same numbers as a mixture of experts runs them: each block serves the queries that chose it.

    A query's own block is causal attention of its own; every other choice is a partial result with its log-sum-exp,
    and the parts are merged. No query meets a key that it did not choose.
    """
    check_qkv(q, k, v)
    chosen = moba_selection(q, k, block_size=block_size, top_k=top_k)
    scale = resolve_scale(scale, q.shape[3])
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    q_, k_, v_ = q.to(dtype), repeat_kv(k, groups).to(dtype), repeat_kv(v, groups).to(dtype)
    outs, lses = [], []
    for q_own, k_own, v_own in zip(*(x.split(block_size, dim=2) for x in (q_, k_, v_))):
        s = scale * q_own @ k_own.transpose(-1, -2)
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), NEG_INF)
        outs.append(torch.softmax(s, dim=-1) @ v_own)
        lses.append(torch.logsumexp(s, dim=-1))
    out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    for block, (k_b, v_b) in enumerate(zip(k_.split(block_size, dim=2), v_.split(block_size, dim=2))):
        asks = chosen[..., block].clone()
        asks[:, :, : (block + 1) * block_size] = (
            False  # the block's own queries are done, none before may ask
        )
        where = asks.nonzero(as_tuple=True)
        if not len(where[0]):
            continue
        s = scale * torch.einsum("xd,xnd->xn", q_[where], k_b[where[0], where[1]])
        part = torch.einsum("xn,xnd->xd", torch.softmax(s, dim=-1), v_b[where[0], where[1]])
        o_new, lse_new = merge(out[where], lse[where], part, torch.logsumexp(s, dim=-1))
        out, lse = out.index_put(where, o_new), lse.index_put(where, lse_new)
    return out.to(q.dtype)


def _check_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_qkv(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: expected as many queries as keys ({k.shape[2]}), got {q.shape[2]}")
