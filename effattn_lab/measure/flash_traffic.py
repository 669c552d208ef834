"""What the four flash kernels should move, by formula, and what they do move, counted.

Notation: ``N_q, N_k`` lengths, ``D`` head dimension, ``e`` bytes an element, ``b_m, b_n`` the tile.
Log-sum-exp and delta are fp32 (4 bytes). Everything is per query head unless said otherwise, then times
``B Hq``. ``K`` is the number of keys that all query tiles together read, tiles outside the causal triangle
left out: `keys_read`. ``R`` is the same with the roles exchanged, `queries_read`.

==========  ==============================  ==============================================
kernel      loads                           stores
==========  ==============================  ==============================================
fwd         ``e D (N_q + 2 K)``             ``e D N_q + 4 N_q``
preprocess  ``e D 2 N_q``                   ``4 N_q``
dkdv        ``R (2 e D + 8)``               (per *key* head: loads and stores ``2 e D N_k``)
dq          ``e D (2 N_q + 2 K) + 8 N_q``   ``e D N_q``
==========  ==============================  ==============================================
"""

from __future__ import annotations

from typing import Any

from effattn_lab.foundations.cost_model import flash_tiled_bytes, keys_read


def queries_read(seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, causal: bool = False) -> int:
    """Query rows that the key tiles of one head read together, tiles no key can be seen from left out.

    The tile of keys that begins at ``n`` is seen from query ``n - (seqlen_k - seqlen_q)`` on. Its program starts
    at the query tile that holds this row and goes on to the end.
    """
    total = 0
    for start_n in range(0, seqlen_k, block_n):
        first = max(0, start_n - (seqlen_k - seqlen_q)) if causal else 0
        total += max(0, seqlen_q - first // block_m * block_m)
    return total


def preprocess_bytes(batch: int, num_heads: int, seqlen_q: int, head_dim: int, itemsize: int = 2) -> int:
    """``delta = rowsum(o * do)``: O and dO read once, one fp32 number a row written."""
    return batch * num_heads * seqlen_q * (2 * itemsize * head_dim + 4)


def dkdv_bytes(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    itemsize: int = 2,
    *,
    block_m: int,
    block_n: int,
    causal: bool = False,
) -> int:
    """K, V read and dK, dV written once per *key* head; Q, dO, lse, delta re-read by each key tile they see."""
    once = num_kv_heads * 4 * seqlen_k * head_dim * itemsize
    streamed = (
        num_heads * queries_read(seqlen_q, seqlen_k, block_m, block_n, causal) * (2 * itemsize * head_dim + 8)
    )
    return batch * (once + streamed)


def dq_bytes(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    itemsize: int = 2,
    *,
    block_m: int,
    block_n: int,
    causal: bool = False,
) -> int:
    """Q, dO, lse, delta read and dQ written once; K and V re-read by every query tile, for each query head."""
    del num_kv_heads  # a group's query heads read the same keys, each for itself
    once = seqlen_q * (3 * itemsize * head_dim + 8)
    streamed = 2 * itemsize * head_dim * keys_read(seqlen_q, seqlen_k, block_m, block_n, causal)
    return batch * num_heads * (once + streamed)


def rows(
    *,
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 200,
    seqlen_k: int = 256,
    head_dim: int = 64,
    dtype: str = "fp16",
    causal: bool = True,
) -> list[dict[str, Any]]:
    """Run forward and backward once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, causal: the case. The standard one has
            ragged ends, grouped heads and more keys than queries, so that no term of a formula is idle.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels.flash import architecture, choose_tiles, flash_attention

        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, length: int) -> torch.Tensor:
            return (
                torch.randn(batch, heads, length, head_dim, generator=generator)
                .to(names[dtype])
                .requires_grad_()
            )

        q, k, v = draw(num_heads, seqlen_q), draw(num_kv_heads, seqlen_k), draw(num_kv_heads, seqlen_k)
        flash_attention(q, k, v, causal=causal).sum().backward()

    tiles = choose_tiles(head_dim, names[dtype], architecture(q.device))
    itemsize = q.element_size()
    case = (batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, itemsize)

    def blocks(tile: Any) -> dict[str, int]:
        return {"block_m": tile.block_m, "block_n": tile.block_n}

    formulas = {
        "_flash_fwd_kernel": flash_tiled_bytes(*case, **blocks(tiles.fwd), causal=causal),
        "_flash_bwd_preprocess_kernel": preprocess_bytes(batch, num_heads, seqlen_q, head_dim, itemsize),
        "_flash_bwd_dkdv_kernel": dkdv_bytes(*case, **blocks(tiles.dkdv), causal=causal),
        "_flash_bwd_dq_kernel": dq_bytes(*case, **blocks(tiles.dq), causal=causal),
    }
    used = {
        "_flash_fwd_kernel": tiles.fwd,
        "_flash_bwd_dkdv_kernel": tiles.dkdv,
        "_flash_bwd_dq_kernel": tiles.dq,
    }
    out = []
    for name, formula in formulas.items():
        measured = traffic.by_kernel[name]
        out.append(
            {
                "kernel": name,
                "measured_bytes": measured.bytes,
                "formula_bytes": formula,
                "flops": measured.flops,
                "ratio": round(measured.bytes / formula, 4),
                "loads_bytes": measured.loads_bytes,
                "stores_bytes": measured.stores_bytes,
                "tile": f"{used[name].block_m}x{used[name].block_n}" if name in used else "",
                "batch": batch,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "seqlen_q": seqlen_q,
                "seqlen_k": seqlen_k,
                "head_dim": head_dim,
                "dtype": dtype,
                "causal": causal,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
