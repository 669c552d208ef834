"""What the elastic kernel should move, by formula, and what it does move, counted.

Notation: ``N_q, N_k`` lengths, ``D`` head dimension, ``e`` bytes an element, ``b_m, b_n`` the tile, ``M = ceil(N_q /
b_m)`` tiles of queries. ``K_h`` is the number of keys that a head's tiles read together: `keys_read` of a causal pass
for a full head, `sparse_keys_read` for a sparse one. Modes are int32, the log-sum-exp fp32. Per query head:

=======  ==================================  ======================
kernel   loads                               stores
=======  ==================================  ======================
fwd      ``e D (N_q + 2 K_h) + 4 M``         ``e D N_q + 4 N_q``
=======  ==================================  ======================

Two launches with gathered heads move, besides, each Q and O twice more and K and V once more in and out:
`gather_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effattn_lab.foundations.cost_model import keys_read


def sparse_keys_read(
    seqlen_q: int, seqlen_k: int, sinks: int, window: int, *, block_m: int, block_n: int
) -> int:
    """Key rows that one sparse head reads: for each tile of queries those that hold a sink or a part of the window.

    A tile that holds both is read once; the last tile counts its real rows.
    """
    total, offset = 0, seqlen_k - seqlen_q
    for start in range(0, seqlen_q, block_m):
        first, last = start + offset, min(start + block_m, seqlen_q) - 1 + offset
        end = min(seqlen_k, max(0, last + 1))
        begin = min(max(0, first - window + 1), end)
        tiles = set(range(begin // block_n, -(-end // block_n))) if end > begin else set()
        tiles |= set(range(-(-min(sinks, end) // block_n)))
        total += sum(min(block_n, seqlen_k - t * block_n) for t in tiles)
    return total


def forward_bytes(
    full: Sequence[Sequence[bool]],
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    itemsize: int = 2,
    *,
    sinks: int,
    window: int,
    block_m: int,
    block_n: int,
) -> int:
    """Bytes of one launch; ``full[b][h]`` says which *query* heads of which prompt read everything."""
    tiles = -(-seqlen_q // block_m)
    dense = keys_read(seqlen_q, seqlen_k, block_m, block_n, causal=True)
    few = sparse_keys_read(seqlen_q, seqlen_k, sinks, window, block_m=block_m, block_n=block_n)
    heads = [mode for prompt in full for mode in prompt]
    keys = sum(dense if mode else few for mode in heads)
    once = len(heads) * (2 * itemsize * head_dim * seqlen_q + 4 * seqlen_q + 4 * tiles)
    return once + 2 * itemsize * head_dim * keys


def gather_bytes(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    itemsize: int = 2,
) -> int:
    """What the two-launch way adds: Q, K, V copied into tensors of their kind and O copied back, read and written."""
    rows = 2 * num_heads * seqlen_q + 2 * num_kv_heads * seqlen_k
    return 2 * batch * rows * head_dim * itemsize


def rows(
    *,
    batch: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 150,
    seqlen_k: int = 180,
    head_dim: int = 40,
    sinks: int = 5,
    window: int = 40,
    dtype: str = "fp16",
) -> list[dict[str, Any]]:
    """Run one launch, counted, and set its bytes beside the formula. Every second KV head is full, prompts differ.

    Args:
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, sinks, window: the case. The standard one has
            ragged ends, grouped heads and more keys than queries, so that no term is idle.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._tiles import architecture
        from effattn_kernels.elastic import choose_tile, elastic_attention

        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, length: int) -> torch.Tensor:
            return torch.randn(batch, heads, length, head_dim, generator=generator).to(names[dtype])

        q, k, v = draw(num_heads, seqlen_q), draw(num_kv_heads, seqlen_k), draw(num_kv_heads, seqlen_k)
        modes = (torch.arange(batch)[:, None] + torch.arange(num_kv_heads)) % 2 == 0
        elastic_attention(q, k, v, modes, sinks=sinks, window=window)

    tile = choose_tile(head_dim, names[dtype], architecture(q.device))
    per_query_head = modes.repeat_interleave(num_heads // num_kv_heads, dim=1).tolist()
    formula = forward_bytes(
        per_query_head, seqlen_q, seqlen_k, head_dim, q.element_size(),
        sinks=sinks, window=window, block_m=tile.block_m, block_n=tile.block_n,
    )  # fmt: skip
    measured = traffic.by_kernel["_elastic_fwd_kernel"]
    return [
        {
            "kernel": "_elastic_fwd_kernel",
            "measured_bytes": measured.bytes,
            "formula_bytes": formula,
            "flops": measured.flops,
            "ratio": round(measured.bytes / formula, 4),
            "loads_bytes": measured.loads_bytes,
            "stores_bytes": measured.stores_bytes,
            "launches": measured.launches,
            "tile": tile.label,
            "batch": batch,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "head_dim": head_dim,
            "sinks": sinks,
            "window": window,
            "dtype": dtype,
            "mode": effattn_kernels.MODE,
        }
    ]
