"""What a Mamba-1 layer costs: parameters, state, FLOPs and bytes of each form of the scan.

Numbers and sympy symbols alike, conventions of :mod:`effattn_lab.foundations.cost_model`. ``E`` inner channels,
``S`` hidden numbers a channel, ``N`` tokens, ``itemsize`` bytes an input element; A, D, the bias and states are
float32. An exponential, a softplus or a SiLU counts as one FLOP, named where it matters: GPUs do few of them a
cycle.
"""

from __future__ import annotations

from effattn_lab.foundations.cost_model import Number


def layer_parameters(
    width: Number,
    state_size: Number = 16,
    conv_width: Number = 4,
    expand: Number = 2,
    dt_rank: Number | None = None,
) -> Number:
    """Parameters of :class:`effattn_lab.linear.selective_ssm_layer.Mamba`; about ``3 expand M^2``."""
    rank = -(-width // 16) if dt_rank is None else dt_rank
    inner = expand * width
    projections = 3 * inner * width + inner * (rank + 2 * state_size) + inner * (rank + 1)
    return projections + inner * (conv_width + 1) + inner * state_size + inner


def state_elements(channels: Number, state_size: Number = 16, conv_width: Number = 4) -> Number:
    """Numbers kept while decoding, for any length: ``E S`` of the scan and ``E (W - 1)`` of the convolution."""
    return channels * (state_size + conv_width - 1)


def state_bytes(
    channels: Number,
    state_size: Number = 16,
    conv_width: Number = 4,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Bytes of it: the scan's state in float32, the convolution's cache in the dtype of the inputs."""
    return channels * (state_itemsize * state_size + itemsize * (conv_width - 1))


def scan_flops(channels: Number, seqlen: Number, state_size: Number = 16) -> Number:
    """The sequential scan: 7 FLOPs a token, channel and state, exponential included, and 6 a token and channel.

    ``delta A``, ``exp``, times ``h``, ``(delta u) B``, plus, times ``C``, plus; then ``delta u``, skip (2), gate
    (2), softplus.
    """
    return channels * seqlen * (7 * state_size + 6)


def scan_exponentials(channels: Number, seqlen: Number, state_size: Number = 16) -> Number:
    """``exp(delta A)`` alone: S a token and channel. A GPU does 16 a cycle and multiprocessor, where it does 128
    FMAs."""
    return channels * seqlen * state_size


def materialized_bytes(
    channels: Number, seqlen: Number, state_size: Number = 16, itemsize: Number = 4
) -> Number:
    """Plain tensor code: ``A_bar``, ``B_bar u`` and ``h`` of ``[N, E, S]`` each written once and read once."""
    return 6 * itemsize * channels * seqlen * state_size


def fused_bytes(channels: Number, seqlen: Number, state_size: Number = 16, itemsize: Number = 2) -> Number:
    """A kernel that keeps the state on chip: u, delta, z read, the output written, B and C read once.

    Nothing of size ``N E S`` is left. A, D, the bias and the state are read once a sequence: not counted.
    """
    return itemsize * seqlen * (4 * channels + 2 * state_size)


def chunk_states_bytes(
    channels: Number, seqlen: Number, state_size: Number = 16, chunk_size: Number = 64
) -> Number:
    """Border states in float32 that training keeps, one every ``chunk_size`` tokens, instead of all N."""
    return 4 * channels * state_size * seqlen / chunk_size


def step_bytes(
    channels: Number, state_size: Number = 16, itemsize: Number = 2, state_itemsize: Number = 4
) -> Number:
    """One decode step of the scan: the state read and written; u, delta, z, B, C read; the output written."""
    return 2 * state_itemsize * channels * state_size + itemsize * (4 * channels + 2 * state_size)


def crossover_cache(
    state_size: Number = 16,
    conv_width: Number = 4,
    expand: Number = 2,
    itemsize: Number = 2,
    state_itemsize: Number = 4,
) -> Number:
    """Length at which the KV cache of full attention, ``2 M`` numbers a token, is as large as this layer's
    state."""
    return state_bytes(expand, state_size, conv_width, itemsize, state_itemsize) / (2 * itemsize)
