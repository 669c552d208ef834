"""What attention costs: FLOPs, bytes, arithmetic intensity, roofline.

Plain arithmetic, so that every function takes numbers and sympy symbols alike. A multiply-add counts as two
FLOPs. Softmax's exponentials are left out of the FLOP counts (the field's convention): they run on other units.
``itemsize`` is bytes per element (2 for fp16 and bf16). Source of the counts: Dao et al. 2022, 2023; the roofline
is Williams, Waterman, Patterson 2009.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

Number = Any  # int, float or a sympy expression: the formulas are the same


def visible_pairs(seqlen_q: Number, seqlen_k: Number, causal: bool = False) -> Number:
    """Number of (query, key) pairs that attention evaluates, under the offset rule.

    Full: ``Nq * Nk``. Causal: query i sees ``Nk - Nq + i + 1`` keys, in all ``Nq * (Nk - (Nq - 1) / 2)`` when
    ``Nq <= Nk``; with more queries than keys the first ``Nq - Nk`` see none, which leaves ``Nk (Nk + 1) / 2``
    (symbols cannot be compared: for them ``Nq <= Nk`` is assumed).
    """
    if not causal:
        return seqlen_q * seqlen_k
    if isinstance(seqlen_q, Real) and isinstance(seqlen_k, Real):
        seqlen_q = min(seqlen_q, seqlen_k)
    if isinstance(seqlen_q, int) and isinstance(seqlen_k, int):
        return seqlen_q * (2 * seqlen_k - seqlen_q + 1) // 2
    return seqlen_q * (2 * seqlen_k - seqlen_q + 1) / 2


def attention_flops(
    batch: Number,
    num_heads: Number,
    seqlen_q: Number,
    seqlen_k: Number,
    head_dim: Number,
    causal: bool = False,
) -> Number:
    """FLOPs of ``Q K^T`` and ``P V``: ``4 D`` for each visible pair of each query head."""
    return 4 * batch * num_heads * head_dim * visible_pairs(seqlen_q, seqlen_k, causal)


def attention_backward_flops(
    batch: Number,
    num_heads: Number,
    seqlen_q: Number,
    seqlen_k: Number,
    head_dim: Number,
    causal: bool = False,
) -> Number:
    """FLOPs of the backward pass with recomputation: five products against two, 2.5 times the forward."""
    return 5 * attention_flops(batch, num_heads, seqlen_q, seqlen_k, head_dim, causal) / 2


def naive_bytes(
    batch: Number,
    num_heads: Number,
    num_kv_heads: Number,
    seqlen_q: Number,
    seqlen_k: Number,
    head_dim: Number,
    itemsize: Number = 2,
) -> Number:
    """Main-memory bytes of attention in three kernels: ``S = Q K^T``, ``P = softmax(S)``, ``O = P V``.

    Q, K, V are read once, O written once; S and P are each written by one kernel and read by the next.
    """
    matrices = 4 * batch * num_heads * seqlen_q * seqlen_k  # S and P, written and read
    rest = _qkvo_elements(batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim)
    return itemsize * (matrices + rest)


def flash_bytes(
    batch: Number,
    num_heads: Number,
    num_kv_heads: Number,
    seqlen_q: Number,
    seqlen_k: Number,
    head_dim: Number,
    itemsize: Number = 2,
) -> Number:
    """The least that fused attention can move: Q, K, V read once, O and the fp32 log-sum-exp written once."""
    lse = 4 * batch * num_heads * seqlen_q
    return itemsize * _qkvo_elements(batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim) + lse


def _qkvo_elements(
    batch: Number,
    num_heads: Number,
    num_kv_heads: Number,
    seqlen_q: Number,
    seqlen_k: Number,
    head_dim: Number,
) -> Number:
    return batch * head_dim * (2 * num_heads * seqlen_q + 2 * num_kv_heads * seqlen_k)


def keys_read(seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, causal: bool = False) -> int:
    """Key rows that one head's tiled forward pass reads, added up over its query tiles.

    Without a mask every query tile reads all ``seqlen_k`` rows. Causal: tile ``i`` stops after the key tile that
    holds the last key its last query sees; the ragged last tile counts its real rows.
    """
    total = 0
    for start in range(0, seqlen_q, block_m):
        last_query = min(start + block_m, seqlen_q) - 1
        end = min(seqlen_k, max(0, last_query + seqlen_k - seqlen_q + 1)) if causal else seqlen_k
        tiles = -(-end // block_n)
        total += min(tiles * block_n, seqlen_k)
    return total


def flash_tiled_bytes(
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
    """Bytes that the tiled forward kernel loads and stores, before any cache helps.

    Per query head: Q read once, O written once, the fp32 log-sum-exp written once, and K and V read again by
    every query tile, visible tiles only. Query heads of one group read the same keys separately, so
    ``num_kv_heads`` does not lower this count (it is in the signature because caches make it matter).
    """
    del num_kv_heads
    per_head = (
        itemsize * head_dim * (2 * seqlen_q + 2 * keys_read(seqlen_q, seqlen_k, block_m, block_n, causal))
    )
    return batch * num_heads * (per_head + 4 * seqlen_q)


def kv_cache_bytes(
    num_layers: Number,
    num_kv_heads: Number,
    head_dim: Number,
    seqlen: Number,
    batch: Number = 1,
    itemsize: Number = 2,
) -> Number:
    """Bytes of the key-value cache: ``2 * layers * Hkv * D`` elements for each token of each sequence."""
    return 2 * num_layers * num_kv_heads * head_dim * seqlen * batch * itemsize


def mla_cache_bytes(
    num_layers: Number,
    latent_dim: Number,
    rope_dim: Number,
    seqlen: Number,
    batch: Number = 1,
    itemsize: Number = 2,
) -> Number:
    """Bytes of a multi-head latent attention cache: one latent and one RoPE key a token, for all heads."""
    return num_layers * (latent_dim + rope_dim) * seqlen * batch * itemsize


def decode_flops(batch: Number, num_heads: Number, seqlen_k: Number, head_dim: Number) -> Number:
    """Attention FLOPs of one decode step of one layer: one query a sequence, ``4 N D`` per query head."""
    return attention_flops(batch, num_heads, 1, seqlen_k, head_dim)


def decode_bytes(
    batch: Number,
    num_heads: Number,
    num_kv_heads: Number,
    seqlen_k: Number,
    head_dim: Number,
    itemsize: Number = 2,
) -> Number:
    """Bytes of that step: the cache is read once; the query and the output (the small term) once each."""
    return itemsize * _qkvo_elements(batch, num_heads, num_kv_heads, 1, seqlen_k, head_dim)


def mla_decode_flops(
    batch: Number, num_heads: Number, seqlen_k: Number, latent_dim: Number, rope_dim: Number
) -> Number:
    """Attention FLOPs of one MLA decode step of one layer, weights absorbed: every head on the one shared latent.

    A score takes ``latent_dim + rope_dim`` multiply-adds, the weighted sum ``latent_dim`` (DeepSeek-AI 2024, app. C).
    """
    return 2 * batch * num_heads * seqlen_k * (2 * latent_dim + rope_dim)


def linear_flops(tokens: Number, params: Number) -> Number:
    """FLOPs of the dense layers: two a parameter and token."""
    return 2 * tokens * params


def linear_bytes(params: Number, itemsize: Number = 2) -> Number:
    """Bytes of reading the weights once, whatever the batch."""
    return params * itemsize


def intensity(flops: Number, nbytes: Number) -> Number:
    """Arithmetic intensity, FLOPs per byte moved."""
    return flops / nbytes


def ridge(peak_flops: Number, bandwidth: Number) -> Number:
    """The intensity at which memory and arithmetic take equally long: ``peak_flops / bandwidth`` (FLOP/byte)."""
    return peak_flops / bandwidth


def roofline_time(flops: float, nbytes: float, peak_flops: float, bandwidth: float) -> float:
    """Lower bound on the time in seconds: the slower of the arithmetic (FLOP/s) and the traffic (bytes/s)."""
    return max(flops / peak_flops, nbytes / bandwidth)
