"""What ZeroS costs: state, FLOPs and bytes of each form, and the length from which a decode step is cheaper.

Numbers and sympy symbols alike, conventions of :mod:`effattn_lab.foundations.cost_model`: a multiply-add is two
FLOPs. Only products with a head dimension are counted: a token's scalars (its logit, exponential, coefficients) and
the C exponentials of its row inside a chunk are left out, as softmax's exponentials are there. Per layer, for one
sequence; the logits' own state is the sum of u, ``D`` numbers a head.
"""

from __future__ import annotations

from effattn_lab.foundations.cost_model import Number

SCALARS = 4  # E, P, t, m


def state_elements(num_kv_heads: Number, head_dim: Number, value_dim: Number) -> Number:
    """Numbers in the state: ``Hkv (3 D Dv + 4 + D)``, for any length. Linear attention: ``Hkv (D Dv + D)``."""
    return num_kv_heads * (3 * head_dim * value_dim + SCALARS + head_dim)


def state_bytes(
    num_kv_heads: Number, head_dim: Number, value_dim: Number, state_itemsize: Number = 4
) -> Number:
    """Bytes of the state; it is kept in float32 (4 bytes), since it holds long sums."""
    return state_itemsize * state_elements(num_kv_heads, head_dim, value_dim)


def recurrent_flops(num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number) -> Number:
    """Token by token with one head a state: ``13 D Dv`` a token.

    The outer product once (``D Dv``) and three sums it is added to, scaled (``6 D Dv``); three reads (``6 D Dv``).
    """
    return 13 * num_heads * seqlen * head_dim * value_dim


def chunked_flops(
    num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number, chunk_size: Number = 64
) -> Number:
    """Causal chunks: ``12 D Dv`` a token for three writes and three reads, and ``2 C (D + Dv)`` inside the chunk.

    The masked half of a chunk's square is computed too: a matrix unit has no use for triangles.
    """
    inside = 2 * chunk_size * (head_dim + value_dim)
    return num_heads * seqlen * (12 * head_dim * value_dim + inside)


def step_bytes(
    num_heads: Number,
    num_kv_heads: Number,
    head_dim: Number,
    value_dim: Number,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Bytes of one decode step: the state read and written, the token's q, k, v, u read and its output written."""
    token = num_heads * (head_dim + value_dim) + num_kv_heads * (2 * head_dim + value_dim)
    return 2 * state_bytes(num_kv_heads, head_dim, value_dim, state_itemsize) + itemsize * token


def materialized_scan_bytes(
    num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number, itemsize: Number = 4
) -> Number:
    """Bytes of *one* of the five ``[N, H, D, Dv]`` tensors that a scan by cumulative sums lays out, per sequence.

    The published code keeps k v^T, F, G, H and their mix: linear time, but memory linear in ``N D Dv``.
    """
    return itemsize * num_heads * seqlen * head_dim * value_dim


def crossover_flops(head_dim: Number, value_dim: Number | None = None, chunk_size: Number = 64) -> Number:
    """Length at which causal softmax attention and the chunked form take equally many FLOPs.

    A softmax token sees ``(N + 1) / 2`` keys on average, ``2 (D + Dv)`` FLOPs each. Equal at
    ``N = (12 D Dv + 2 C (D + Dv)) / (D + Dv) - 1``.
    """
    value_dim = head_dim if value_dim is None else value_dim
    return chunked_flops(1, 1, head_dim, value_dim, chunk_size) / (head_dim + value_dim) - 1


def crossover_cache(
    head_dim: Number,
    value_dim: Number | None = None,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Length at which the KV cache is as large as the state: about ``1.5 D`` tokens times the ratio of precisions."""
    value_dim = head_dim if value_dim is None else value_dim
    return state_bytes(1, head_dim, value_dim, state_itemsize) / (itemsize * (head_dim + value_dim))


def crossover_step(
    head_dim: Number,
    value_dim: Number | None = None,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Length from which a decode step moves fewer bytes: the cache is read, the state read *and* written.

    Twice :func:`crossover_cache`.
    """
    return 2 * crossover_cache(head_dim, value_dim, itemsize, state_itemsize)
