"""What the block-sparse kernels should move, by formula, and what they do move, counted.

Notation: ``N_q, N_k`` lengths, ``D`` head dimension, ``e`` bytes an element, ``b_m x b_n`` the kernel's tile,
``L_m x L_n`` the list's. A program takes ``b_m`` queries; its line of the list names ``c`` tiles, which hold ``K``
keys (the last tile of all may stick out), and ``c'`` of which have a mask. Per query head, summed over the programs:

====  ======================================================================================  ================
fwd   loads ``e D N_q + sum (2 e D K + 4 + 8 c L_n / b_n + b_m L_n c' [+ b_m c L_n / b_n])``   ``e D N_q + 4 N_q``
====  ======================================================================================  ================

The bracket: one byte for each query and listed tile, where every query chooses for itself. The sums over ``2 e D K``
are all that grows with the budget; full attention has ``K = N_k`` in every program (causal: half of it).

XAttention, stride ``S``, blocks of ``B``; a program makes ``b_m x b_n`` antidiagonals from ``S`` times as many rows
of queries and keys. With ``P`` programs that are not wholly in the future, ``q_p`` and ``k_p`` rows in each:

======  =============================================  ==================================================
scores  loads ``e D sum_p (q_p + k_p)``                ``4 n_p g_p`` each: its rows of tiles, its blocks
mass    loads ``2 x 4`` for each row and block before  ``4 ceil(N / B)^2``
======  =============================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def fwd_bytes(
    blocks: Any,
    batch: int,
    num_heads: int,
    head_dim: int,
    itemsize: int = 2,
    *,
    block_m: int,
    block_n: int,
) -> int:
    """Bytes that ``block_list_attention`` loads and stores.

    Args:
        blocks: a block list, see :mod:`effattn_lab.sparse.block_list`.
        batch, num_heads, head_dim, itemsize: of the queries.
        block_m, block_n: the kernel's tile.
    """
    list_m, list_n = blocks.tiles.shape[1:]
    shape = (batch, num_heads, blocks.count.shape[2])
    count = blocks.count.expand(shape).long()
    listed = torch.arange(blocks.index.shape[3]) < count[..., None]
    index, tile = (x.expand(*shape, -1).long() for x in (blocks.index, blocks.tile))
    keys = ((blocks.seqlen_k - index * list_n).clamp(max=list_n) * listed).sum(dim=-1)
    masked = ((tile > 0) & listed).sum(dim=-1)
    parts = list_n // block_n
    line = 4 + 2 * itemsize * head_dim * keys + 8 * parts * count + block_m * list_n * masked
    if blocks.rows is not None:
        line = line + block_m * parts * count
    programs = torch.tensor([
        _cdiv(min(list_m, blocks.seqlen_q - begin), block_m) for begin in range(0, blocks.seqlen_q, list_m)
    ])  # fmt: skip
    once = batch * num_heads * blocks.seqlen_q * (2 * itemsize * head_dim + 4)
    return once + int((line * programs).sum())


def antidiagonal_bytes(
    pairs: int, seqlen: int, head_dim: int, itemsize: int = 2, *, stride: int, block_m: int, block_n: int
) -> int:
    """``antidiagonal_scores`` of ``pairs`` query heads, the map of all tiles stored."""
    tiles = _cdiv(seqlen, stride)
    rows = itemsize * head_dim * seqlen
    return pairs * (rows * _cdiv(tiles, block_n) + rows * _cdiv(tiles, block_m) + 4 * tiles * tiles)


def scores_bytes(
    pairs: int,
    seqlen: int,
    head_dim: int,
    itemsize: int = 2,
    *,
    stride: int,
    block_size: int,
    block_m: int,
    block_n: int,
) -> int:
    """The first kernel of ``xattention_scores``: products, and one number for each row of tiles and block."""
    tiles, per = _cdiv(seqlen, stride), block_size // stride
    width, _, groups = _groups(seqlen, block_size, per, block_n)
    total = 0
    for start_m in range(0, tiles, block_m):
        rows = min(block_m, tiles - start_m)
        queries = min(block_m * stride, seqlen - start_m * stride)
        for start in range(0, len(groups), block_n // width):
            here = groups[start : start + block_n // width]
            if here[0][0] >= start_m + block_m:
                continue
            keys = sum(max(0, min(seqlen, end * stride) - min(seqlen, begin * stride)) for begin, end in here)
            total += itemsize * head_dim * (queries + keys) + 4 * rows * len(here)
    return pairs * total


def mass_bytes(pairs: int, seqlen: int, *, stride: int, block_size: int, block_n: int) -> int:
    """The second: each row's numbers read twice, once for its total, once for the blocks' weights."""
    tiles, per = _cdiv(seqlen, stride), block_size // stride
    _, parts, groups = _groups(seqlen, block_size, per, block_n)
    reads = 0
    for row in range(tiles):
        reads += sum(begin <= row for begin, _ in groups[: (row // per + 1) * parts])
    return pairs * (8 * reads + 4 * (len(groups) // parts) ** 2)


def _groups(seqlen: int, block_size: int, per: int, block_n: int) -> tuple[int, int, list[tuple[int, int]]]:
    """``(width, groups a block, [(first tile, end)])``: how the columns lie in the kernel, see its docstring."""
    padded = 1 << (per - 1).bit_length()
    width = min(padded, block_n)

    def spans() -> Iterator[tuple[int, int]]:
        for block in range(_cdiv(seqlen, block_size)):
            for inner in range(0, padded, width):
                yield block * per + inner, block * per + max(inner, min(inner + width, per))

    return width, padded // width, list(spans())


def rows(
    *,
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 100,
    seqlen_k: int = 150,
    head_dim: int = 40,
    block_size: int = 64,
    stride: int = 4,
    dtype: str = "fp16",
) -> list[dict[str, Any]]:
    """Run each kernel once, counted, and set its bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim: the case. ``seqlen_q`` queries read sinks and a
            window; MoBA and the scores take ``seqlen_k`` of both.
        block_size, stride: of MoBA and XAttention; a block is a multiple of 32.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels

    from effattn_lab.measure.traffic import count
    from effattn_lab.sparse.block_list import block_list, per_query_block_list
    from effattn_lab.sparse.block_sparse import moba_selection
    from effattn_lab.sparse.static_patterns import sinks_and_window

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(names[dtype])

    q, k, v = draw(num_heads, seqlen_k), draw(num_kv_heads, seqlen_k), draw(num_kv_heads, seqlen_k)
    window = block_list(sinks_and_window(4, 40), seqlen_q, seqlen_k, block_m=64, block_n=64)
    chosen = moba_selection(q, k, block_size=block_size, top_k=2)
    moba = per_query_block_list(chosen, block_size, block_m=64, block_n=32)
    measured: list[tuple[str, Any]] = []
    with count():  # raises where nothing can be counted, before any kernel is imported
        from effattn_kernels import block_sparse as kernels
        from effattn_kernels._block_sparse_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
    for call in (
        lambda: kernels.block_list_attention(q[:, :, -seqlen_q:], k, v, window),
        lambda: kernels.block_list_attention(q, k, v, moba),
        lambda: kernels.antidiagonal_scores(q, k, stride=stride),
        lambda: kernels.xattention_scores(q, k, block_size=block_size, stride=stride),
    ):
        with count() as traffic:
            call()
        measured += traffic.by_kernel.items()

    tiles = choose_tiles(head_dim, names[dtype], architecture(q.device))
    fwd = {"block_m": tiles.fwd.block_m, "block_n": tiles.fwd.block_n}
    products = {"stride": stride, "block_m": tiles.scores.block_m, "block_n": tiles.scores.block_n}
    size, pairs = q.element_size(), batch * num_heads
    formulas = [
        ("sinks and window", fwd_bytes(window, batch, num_heads, head_dim, size, **fwd)),
        ("MoBA", fwd_bytes(moba, batch, num_heads, head_dim, size, **fwd)),
        ("all tiles", antidiagonal_bytes(pairs, seqlen_k, head_dim, size, **products)),
        ("blocks", scores_bytes(pairs, seqlen_k, head_dim, size, block_size=block_size, **products)),
        (
            "blocks",
            mass_bytes(pairs, seqlen_k, stride=stride, block_size=block_size, block_n=tiles.scores.block_n),
        ),
    ]
    out = []
    for (name, got), (what, formula) in zip(measured, formulas, strict=True):
        out.append(
            {
                "kernel": name,
                "what": what,
                "measured_bytes": got.bytes,
                "formula_bytes": formula,
                "flops": got.flops,
                "ratio": round(got.bytes / formula, 4),
                "loads_bytes": got.loads_bytes,
                "stores_bytes": got.stores_bytes,
                "batch": batch,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "seqlen_q": seqlen_q if what == "sinks and window" else seqlen_k,
                "seqlen_k": seqlen_k,
                "head_dim": head_dim,
                "dtype": dtype,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
