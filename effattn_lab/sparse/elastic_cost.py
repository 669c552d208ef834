"""What Elastic Attention costs and can save at prefill, by formula. Decoding costs what it did.

A FLOP is a multiply or an add; sinks and a window hide nothing that a short text has.
"""

from __future__ import annotations

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations.cost_model import linear_flops
from effattn_lab.foundations.presets import ModelShape
from effattn_lab.sparse.static_patterns_cost import pair_flops, sinks_and_window_pairs


def read_share(seqlen: int, sinks: int = 128, window: int = 1024) -> float:
    """Pairs that a sparse head scores, as a share of the ``N (N + 1) / 2`` of a full one; 1 for short texts."""
    for name, value in (("seqlen", seqlen), ("window", window)):
        check_positive_int(name, value)
    if sinks < 0:
        raise ValueError(f"sinks: expected an integer of at least 0, got {sinks!r}")
    return sinks_and_window_pairs(seqlen, sinks, window) / (seqlen * (seqlen + 1) / 2)


def ideal_speedup(sparsity: float, seqlen: int, sinks: int = 128, window: int = 1024) -> float:
    """Attention FLOPs of all heads full over those with a share ``sparsity`` of them sparse.

    ``1 / ((1 - m) + m read_share)``: at most ``1 / (1 - m)``, and of attention alone; the rest of the model does not
    get faster.

    Args:
        sparsity: m, ``Omega_MSR``, from 0 to 1.
        seqlen: N.
        sinks, window: of the sparse mode. Defaults 128 and 1024.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a share from 0 to 1, got {sparsity!r}")
    return 1 / ((1 - sparsity) + sparsity * read_share(seqlen, sinks, window))


def prefill_flops(
    seqlen: int, num_heads: int, head_dim: int, sparsity: float, sinks: int = 128, window: int = 1024
) -> float:
    """Attention FLOPs of one layer, causal: ``4 D`` a visible pair, heads weighted by their mode."""
    check_positive_int("num_heads", num_heads)
    dense = pair_flops(seqlen * (seqlen + 1) // 2, head_dim) * num_heads
    return dense / ideal_speedup(sparsity, seqlen, sinks, window)


def prefill_speedup(
    sparsity: float, seqlen: int, model: ModelShape, sinks: int = 128, window: int = 1024
) -> float:
    """FLOPs of a whole prefill with all heads full over those with a share ``sparsity`` of them sparse.

    Projections and MLPs, ``2 N`` a weight of a layer, are in both; embedding, norms and the one output row are not
    counted.
    """
    rest = linear_flops(seqlen, model.layer_params)
    dense, mixed = (
        prefill_flops(seqlen, model.num_heads, model.head_dim, m, sinks, window) for m in (0.0, sparsity)
    )
    return float((rest + dense) / (rest + mixed))


def router_parameters(head_dim: int, expansion: int = 4) -> int:
    """Of one layer's router, biases included; shared by its heads: ``D -> eD -> D``, then ``D -> eD -> D -> 2``."""
    d, wide = head_dim, expansion * head_dim
    return 2 * (d * wide + wide + wide * d + d) + 2 * d + 2


def router_flops(num_kv_heads: int, head_dim: int, boundary: int = 100, expansion: int = 4) -> int:
    """One layer, one prompt: sums of ``2 boundary`` keys, two FLOPs a weight. The prompt's length is not in it."""
    weights = 4 * expansion * head_dim**2 + 2 * head_dim
    return num_kv_heads * (2 * boundary * head_dim + 2 * weights)
