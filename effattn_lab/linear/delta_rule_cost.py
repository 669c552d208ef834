"""What the delta rule costs: state, FLOPs and bytes of each form, and the length from which it is cheaper.

Numbers and sympy symbols alike, conventions of :mod:`effattn_lab.foundations.cost_model`: a multiply-add is two
FLOPs. Products with beta and single decays are left out: they are ``O(D)`` a token. One query head a state unless
said. All is per layer, for one sequence.
"""

from __future__ import annotations

from effattn_lab.foundations.cost_model import Number


def state_elements(num_kv_heads: Number, head_dim: Number, value_dim: Number) -> Number:
    """Numbers in the state: ``Hkv D Dv``, for any length. No key sums: nothing is divided."""
    return num_kv_heads * head_dim * value_dim


def state_bytes(
    num_kv_heads: Number, head_dim: Number, value_dim: Number, state_itemsize: Number = 4
) -> Number:
    """Bytes of the state; it is kept in float32 (4 bytes)."""
    return state_itemsize * state_elements(num_kv_heads, head_dim, value_dim)


def recurrent_flops(
    num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number, gated: bool = False
) -> Number:
    """Token by token: ask the state, write, read, ``2 D Dv`` each; a decay is ``D Dv`` more.

    Linear attention has no question to ask: ``4 D Dv``. Written as ``(I - beta k k^T) S + beta k v^T``, erasing and
    writing apart, it would be ``8 D Dv``.
    """
    return num_heads * seqlen * head_dim * value_dim * (6 + bool(gated))


def chunked_flops(
    num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number, chunk_size: Number = 64
) -> Number:
    """Chunks: ``6 D Dv`` for the state (``W S``, ``Q S``, ``K^T X``), and inside the chunk, a token,

    ``4 C D`` for ``K K^T`` and ``Q K^T``, ``C (D + Dv)`` for the triangular solve of ``[W, U]`` (half of a square
    product: substitution never touches the upper part), ``2 C Dv`` for the scores times X.
    """
    inside = chunk_size * (4 * head_dim + (head_dim + value_dim) + 2 * value_dim)
    return num_heads * seqlen * (6 * head_dim * value_dim + inside)


def chunked_bytes(
    num_heads: Number,
    seqlen: Number,
    head_dim: Number,
    value_dim: Number,
    chunk_size: Number = 64,
    itemsize: Number = 2,
) -> Number:
    """Main-memory bytes of the three-pass forward, gates aside: what each pass reads and writes once.

    Transform: K, V in, W, U out. States: K, W, U in, X and a state a chunk out. Outputs: Q, K, X, states in, O out.
    """
    tokens = seqlen * (
        6 * head_dim + 6 * value_dim
    )  # K thrice, W written and read, Q; V, U and X twice each, O
    states = 2 * seqlen / chunk_size * head_dim * value_dim
    return num_heads * itemsize * (tokens + states)


def sequential_steps(seqlen: Number, chunk_size: Number) -> Number:
    """Steps that wait for each other: ``N / C`` states, and within a chunk, all chunks at once, C substitutions.

    Least at ``C = sqrt(N)``; the recurrence has N.
    """
    return seqlen / chunk_size + chunk_size


def step_flops(num_heads: Number, num_kv_heads: Number, head_dim: Number, value_dim: Number) -> Number:
    """FLOPs of one decode step: question and write for each key-value head, a read for each query head."""
    return 2 * (num_heads + 2 * num_kv_heads) * head_dim * value_dim


def step_bytes(
    num_heads: Number,
    num_kv_heads: Number,
    head_dim: Number,
    value_dim: Number,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Bytes of one decode step: the state read and written, the token's q, k, v read, its output written."""
    token = num_heads * (head_dim + value_dim) + num_kv_heads * (head_dim + value_dim)
    return 2 * state_bytes(num_kv_heads, head_dim, value_dim, state_itemsize) + itemsize * token


def crossover_flops(head_dim: Number, value_dim: Number | None = None, chunk_size: Number = 64) -> Number:
    """Length at which causal softmax attention and the chunked form take equally many FLOPs.

    A softmax token sees ``(N + 1) / 2`` keys on average, ``2 (D + Dv)`` FLOPs each.
    """
    value_dim = head_dim if value_dim is None else value_dim
    return chunked_flops(1, 1, head_dim, value_dim, chunk_size) / (head_dim + value_dim) - 1


def crossover_step(
    head_dim: Number, value_dim: Number | None = None, itemsize: Number = 2, state_itemsize: Number = 4
) -> Number:
    """Length from which a decode step moves fewer bytes than reading a KV cache: the state is read *and* written."""
    value_dim = head_dim if value_dim is None else value_dim
    return 2 * state_bytes(1, head_dim, value_dim, state_itemsize) / (itemsize * (head_dim + value_dim))
