"""What a gated recurrence costs: state, FLOPs and bytes, a decay a head against a decay a channel.

Numbers and sympy symbols alike; a multiply-add is two FLOPs, an exponential is counted apart. All is per layer, for
one sequence and as many key-value heads as heads.
"""

from __future__ import annotations

import math

from effattn_lab.foundations.cost_model import Number


def state_elements(num_kv_heads: Number, head_dim: Number, value_dim: Number) -> Number:
    """Numbers in the state: ``Hkv K V``. No key sum: there is no denominator."""
    return num_kv_heads * head_dim * value_dim


def state_bytes(
    num_kv_heads: Number, head_dim: Number, value_dim: Number, state_itemsize: Number = 4
) -> Number:
    """Bytes of the state, kept in float32."""
    return state_itemsize * state_elements(num_kv_heads, head_dim, value_dim)


def recurrent_flops(num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number) -> Number:
    """Token by token: ``K V`` to decay the state, ``2 K V`` to write, ``2 K V`` to read."""
    return 5 * num_heads * seqlen * head_dim * value_dim


def chunked_flops(
    num_heads: Number,
    seqlen: Number,
    head_dim: Number,
    value_dim: Number,
    chunk_size: Number = 64,
    per_channel: bool = False,
) -> Number:
    """Matrix products of the chunked form: ``2 C (K + V) + 4 K V`` a token with a decay a head.

    With a decay a channel the halving computes the scores below the diagonal only, ``K (C - 1)`` in the place of
    ``2 C K``, plus ``2 K`` on it; C a power of two.
    """
    scores = head_dim * (chunk_size - 1) + 2 * head_dim if per_channel else 2 * chunk_size * head_dim
    per_token = scores + 2 * chunk_size * value_dim + 4 * head_dim * value_dim
    return num_heads * seqlen * per_token


def exponentials(
    num_heads: int, seqlen: int, head_dim: int, chunk_size: int = 64, per_channel: bool = False
) -> float:
    """Exponentials of the chunked form: ``C + 2`` a token with a decay a head, ``K (log2 C + 2)`` a channel.

    With one for each pair and channel it would be ``C K / 2``.
    """
    per_token = head_dim * (math.log2(chunk_size) + 2) if per_channel else chunk_size + 2
    return num_heads * seqlen * per_token


def step_bytes(
    num_heads: Number,
    num_kv_heads: Number,
    head_dim: Number,
    value_dim: Number,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
    per_channel: bool = False,
) -> Number:
    """Bytes of one decode step: state read and written, q, k, v and the float32 decay read, the output written."""
    token = (num_heads + num_kv_heads) * (head_dim + value_dim) * itemsize
    decay = 4 * num_kv_heads * (head_dim if per_channel else 1)
    return 2 * state_bytes(num_kv_heads, head_dim, value_dim, state_itemsize) + token + decay


def step_flops(num_heads: Number, num_kv_heads: Number, head_dim: Number, value_dim: Number) -> Number:
    """FLOPs of one decode step: decay and write for each key-value head, read for each query head."""
    return (3 * num_kv_heads + 2 * num_heads) * head_dim * value_dim


def cache_length(
    num_kv_heads: Number,
    head_dim: Number,
    value_dim: Number,
    cached_elements: Number,
    itemsize: Number = 2,
    state_itemsize: Number = 2,
) -> Number:
    """Tokens of KV cache that are as large as the state; ``cached_elements`` a token and layer, ``2 M`` as a rule."""
    return state_bytes(num_kv_heads, head_dim, value_dim, state_itemsize) / (itemsize * cached_elements)


def half_life(log_decay: float) -> float:
    """Tokens after which a weight has halved: ``ln 2 / -g``."""
    if not log_decay < 0:
        raise ValueError(f"log_decay: expected a number below 0, got {log_decay!r}")
    return math.log(2) / -log_decay


def tokens_until(log_decay: float, weight: float) -> float:
    """Tokens after which a weight has fallen to ``weight`` of itself, in (0, 1)."""
    if not 0 < weight < 1:
        raise ValueError(f"weight: expected a number between 0 and 1, got {weight!r}")
    return half_life(log_decay) * -math.log2(weight)
