"""What a linearized layer costs: state, FLOPs and bytes of its branches, and the length from which it is cheaper.

Conventions of :mod:`effattn_lab.foundations.cost_model`: numbers and sympy symbols alike, a multiply-add is two
FLOPs, one layer and one sequence. Lengths of q and k, ReLU and squares are left out, as exponentials are there.
"""

from __future__ import annotations

from effattn_lab.foundations.cost_model import Number


def state_elements(
    num_kv_heads: Number, head_dim: Number, value_dim: Number, group_size: Number, lags: Number
) -> Number:
    """``Hkv (D Dv + (G - 1)(D + Dv) + (L - 1) Dv)``: S, the open group at its fullest, the last values.

    A group of G is folded at once, so between two tokens at most G - 1 are open.
    """
    tail = max(lags - 1, 0) if isinstance(lags, int) else lags - 1
    return num_kv_heads * (
        head_dim * value_dim + (group_size - 1) * (head_dim + value_dim) + tail * value_dim
    )


def local_flops(
    num_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number, group_size: Number
) -> Number:
    """Inside the groups, whole tiles: ``2 G (D + Dv)`` a token; a matrix unit has no use for triangles."""
    return 2 * num_heads * seqlen * group_size * (head_dim + value_dim)


def global_flops(
    num_heads: Number, num_kv_heads: Number, seqlen: Number, head_dim: Number, value_dim: Number
) -> Number:
    """Between the groups: ``2 D Dv`` a token to write, for each key-value head, and to read, for each query head."""
    return 2 * (num_heads + num_kv_heads) * seqlen * head_dim * value_dim


def conv_flops(num_heads: Number, seqlen: Number, value_dim: Number, lags: Number) -> Number:
    """``2 L Dv`` a token: one weight for each lag, for all channels of a head."""
    return 2 * num_heads * seqlen * lags * value_dim


def conv_band_flops(
    num_heads: Number, seqlen: Number, value_dim: Number, lags: Number, chunk_size: Number
) -> Number:
    """The same by a band matrix ``[C, C + L - 1]``: its zeros are multiplied too."""
    return 2 * num_heads * seqlen * (chunk_size + lags - 1) * value_dim


def forward_flops(
    num_heads: Number,
    num_kv_heads: Number,
    seqlen: Number,
    head_dim: Number,
    value_dim: Number,
    group_size: Number = 64,
    lags: Number = 32,
) -> Number:
    """All three branches, the convolution lag by lag."""
    return (
        local_flops(num_heads, seqlen, head_dim, value_dim, group_size)
        + global_flops(num_heads, num_kv_heads, seqlen, head_dim, value_dim)
        + conv_flops(num_heads, seqlen, value_dim, lags)
    )


def crossover_flops(head_dim: Number, group_size: Number = 64, lags: Number = 32) -> Number:
    """Length from which causal softmax attention takes more FLOPs, ``Dv = D`` and a key head for each query head.

    A softmax token sees ``(N + 1) / 2`` keys on average, ``4 D`` FLOPs each, so N = 2 G + 2 D + L - 1.
    """
    per_token = forward_flops(1, 1, 1, head_dim, head_dim, group_size, lags)
    return per_token / (2 * head_dim) - 1


def crossover_cache(head_dim: Number, group_size: Number = 64, lags: Number = 32) -> Number:
    """Length at which a KV cache holds as many numbers as the state: ``D / 2 + G - 1 + (L - 1) / 2``."""
    return state_elements(1, head_dim, head_dim, group_size, lags) / (2 * head_dim)


def attention_bytes(
    num_heads: Number,
    num_kv_heads: Number,
    seqlen: Number,
    head_dim: Number,
    value_dim: Number,
    group_size: Number = 64,
    itemsize: Number = 2,
) -> Number:
    """What the two kernels of a forward pass without convolution ask for, in whole groups and tiles.

    For the states keys and values of all groups but the last; for the outputs queries, keys, values, a state and one
    alpha a group, and what is written.
    """
    groups = seqlen / group_size
    states = (seqlen - group_size) * (head_dim + value_dim) + groups * head_dim * value_dim
    outputs = 2 * seqlen * (head_dim + value_dim) + groups * head_dim * value_dim
    return itemsize * (num_kv_heads * states + num_heads * outputs) + 4 * num_heads * groups


def fused_conv_bytes(
    num_heads: Number,
    seqlen: Number,
    value_dim: Number,
    lags: Number,
    group_size: Number = 64,
    itemsize: Number = 2,
) -> Number:
    """What the convolution adds inside the attention kernel, for ``L - 1`` at most G.

    L weights a token, and the L - 1 values before each group but the first.
    """
    before = (seqlen / group_size - 1) * (lags - 1) * value_dim
    return itemsize * num_heads * (before + seqlen * lags)


def separate_conv_bytes(
    num_heads: Number,
    seqlen: Number,
    value_dim: Number,
    lags: Number,
    chunk_size: Number = 64,
    itemsize: Number = 2,
) -> Number:
    """In a kernel of its own: values read, outputs written, and an addition that reads both and writes one."""
    inside = fused_conv_bytes(num_heads, seqlen, value_dim, lags, chunk_size, itemsize)
    return inside + 5 * itemsize * num_heads * seqlen * value_dim
