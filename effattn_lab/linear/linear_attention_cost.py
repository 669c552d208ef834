"""What linear attention costs: state, FLOPs and bytes of each form, and the length from which it is cheaper.

Numbers and sympy symbols alike, conventions of :mod:`effattn_lab.foundations.cost_model`: a multiply-add is two
FLOPs. The normaliser counts as one more value column, so ``Dv + 1`` stands for ``Dv`` throughout; the feature map
and the division are left out, as softmax's exponentials are there. All is per layer, for one sequence.
"""

from __future__ import annotations

from effattn_lab.foundations.cost_model import Number, visible_pairs


def state_elements(num_kv_heads: Number, feature_dim: Number, value_dim: Number) -> Number:
    """Numbers in the state: ``Hkv (d_phi Dv + d_phi)``, for any length."""
    return num_kv_heads * feature_dim * (value_dim + 1)


def state_bytes(
    num_kv_heads: Number, feature_dim: Number, value_dim: Number, state_itemsize: Number = 4
) -> Number:
    """Bytes of the state; it is kept in float32 (4 bytes), since it is a long sum."""
    return state_itemsize * state_elements(num_kv_heads, feature_dim, value_dim)


def quadratic_flops(
    num_heads: Number,
    seqlen_q: Number,
    seqlen_k: Number,
    feature_dim: Number,
    value_dim: Number,
    causal: bool = False,
) -> Number:
    """The reference, visible pairs only: a weight (``2 d_phi``) and its value (``2 (Dv + 1)``) for each pair."""
    pairs = visible_pairs(seqlen_q, seqlen_k, causal)
    return 2 * num_heads * pairs * (feature_dim + value_dim + 1)


def recurrent_flops(num_heads: Number, seqlen: Number, feature_dim: Number, value_dim: Number) -> Number:
    """Token by token: a write and a read of the state, ``4 d_phi (Dv + 1)`` each token. One head a state."""
    return 4 * num_heads * seqlen * feature_dim * (value_dim + 1)


def chunked_flops(
    num_heads: Number, seqlen: Number, feature_dim: Number, value_dim: Number, chunk_size: Number = 64
) -> Number:
    """Causal chunks: the recurrence's work, and ``2 C (d_phi + Dv + 1)`` a token inside the chunk, mask included.

    The masked half of a chunk's square is computed too: a matrix unit has no use for triangles.
    """
    inside = 2 * num_heads * seqlen * chunk_size * (feature_dim + value_dim + 1)
    return recurrent_flops(num_heads, seqlen, feature_dim, value_dim) + inside


def chunked_bytes(
    num_heads: Number,
    seqlen: Number,
    feature_dim: Number,
    value_dim: Number,
    chunk_size: Number = 64,
    itemsize: Number = 2,
) -> Number:
    """Main-memory bytes of the two-pass causal forward: keys and values twice, queries and outputs once, and each
    chunk's state written by the first pass and read by the second, in the dtype of the inputs."""
    tokens = seqlen * (3 * feature_dim + 3 * value_dim)  # Q, 2 K, 2 V, O
    states = 2 * seqlen / chunk_size * feature_dim * (value_dim + 1)
    return num_heads * itemsize * (tokens + states)


def step_bytes(
    num_heads: Number,
    num_kv_heads: Number,
    feature_dim: Number,
    value_dim: Number,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Bytes of one decode step: the state read and written, the token's q, k, v read and its output written."""
    token = num_heads * (feature_dim + value_dim) + num_kv_heads * (feature_dim + value_dim)
    return 2 * state_bytes(num_kv_heads, feature_dim, value_dim, state_itemsize) + itemsize * token


def step_flops(num_heads: Number, num_kv_heads: Number, feature_dim: Number, value_dim: Number) -> Number:
    """FLOPs of one decode step: a write for each key-value head, a read for each query head."""
    return 2 * (num_heads + num_kv_heads) * feature_dim * (value_dim + 1)


def crossover_flops(
    head_dim: Number,
    feature_dim: Number | None = None,
    value_dim: Number | None = None,
    chunk_size: Number = 64,
) -> Number:
    """Length at which causal softmax attention and the chunked form take equally many FLOPs.

    A softmax token sees ``(N + 1) / 2`` keys on average, ``2 (D + Dv)`` FLOPs each; a chunked token takes
    ``4 d_phi (Dv + 1) + 2 C (d_phi + Dv + 1)`` whatever N. Equal at ``N = that / (D + Dv) - 1``.
    """
    feature_dim = head_dim if feature_dim is None else feature_dim
    value_dim = head_dim if value_dim is None else value_dim
    return chunked_flops(1, 1, feature_dim, value_dim, chunk_size) / (head_dim + value_dim) - 1


def crossover_cache(
    head_dim: Number,
    feature_dim: Number | None = None,
    value_dim: Number | None = None,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Length at which the KV cache is as large as the state: ``d_phi (Dv + 1) / (D + Dv)`` at equal precision."""
    feature_dim = head_dim if feature_dim is None else feature_dim
    value_dim = head_dim if value_dim is None else value_dim
    return state_bytes(1, feature_dim, value_dim, state_itemsize) / (itemsize * (head_dim + value_dim))


def crossover_step(
    head_dim: Number,
    feature_dim: Number | None = None,
    value_dim: Number | None = None,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Length from which a decode step moves fewer bytes: the cache is read, the state read *and* written.

    Twice :func:`crossover_cache`.
    """
    return 2 * crossover_cache(head_dim, feature_dim, value_dim, itemsize, state_itemsize)
