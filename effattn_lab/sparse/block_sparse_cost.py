"""What choosing blocks costs: FLOPs of the choice and of the attention after it, tokens and bytes of a decode step.

Per query head, causal, ``N`` tokens, head dimension ``D``, unless said. A product of two vectors is ``2 D`` FLOPs, a
visible pair ``4 D``: a score and its share of the output. Softmax and sorting are not counted.
Conventions of :mod:`effattn_lab.foundations.cost_model`.
"""

from __future__ import annotations

from statistics import NormalDist

from effattn_lab._validate import check_positive_int
from effattn_lab.sparse.nsa import Blocks


def full_flops(seqlen: int, head_dim: int) -> int:
    """Causal attention without a choice: ``4 D N (N + 1) / 2``."""
    check_positive_int("seqlen", seqlen)
    return 2 * head_dim * seqlen * (seqlen + 1)


def antidiagonal_flops(seqlen: int, head_dim: int, stride: int = 8) -> int:
    """XAttention's scores: ``S`` products for each ``S x S`` tile on or below the diagonal, about ``N^2 D / S``."""
    check_positive_int("stride", stride)
    tiles = -(-seqlen // stride)
    return stride * 2 * head_dim * (tiles * (tiles + 1) // 2)


def pooled_flops(seqlen: int, head_dim: int, block_size: int = 64) -> int:
    """Mean query times mean key, one product a pair of blocks: about ``N^2 D / B^2``, and ``2 N D`` for the means."""
    check_positive_int("block_size", block_size)
    blocks = -(-seqlen // block_size)
    return 2 * head_dim * (blocks * (blocks + 1) // 2) + 2 * seqlen * head_dim


def expected_hit_rate(delta: float, size: int, share: float = 0.125) -> float:
    """How often a mean key finds the block of one key that stands out, in a text of many blocks.

    ``Phi(delta / sqrt(B) - z)``: the key's score is ``delta`` deviations of a score above the others', a block has
    ``size`` keys, and ``z`` is what a ``share`` of the standard normal exceeds, the share of blocks that are taken.
    """
    check_positive_int("size", size)
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    normal = NormalDist()
    return normal.cdf(delta / size**0.5 - normal.inv_cdf(1 - share))


def xattention_flops(seqlen: int, head_dim: int, density: float, stride: int = 8) -> float:
    """Scores, and attention over a share ``density`` of the causal pairs."""
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"density: expected a share above 0 and up to 1, got {density!r}")
    return antidiagonal_flops(seqlen, head_dim, stride) + density * full_flops(seqlen, head_dim)


def moba_gate_flops(seqlen: int, head_dim: int, block_size: int = 512) -> int:
    """Each query times the mean key of each block before its own: about ``N^2 D / B``; ``N D`` for the means."""
    check_positive_int("block_size", block_size)
    blocks, rest = divmod(seqlen, block_size)
    products = block_size * (blocks * (blocks - 1) // 2) + rest * blocks
    return 2 * head_dim * products + seqlen * head_dim


def moba_pairs(seqlen: int, block_size: int = 512, top_k: int = 3) -> int:
    """Pairs inside the own block up to the query, and ``B`` for each of up to ``k - 1`` blocks before."""
    check_positive_int("block_size", block_size)
    check_positive_int("top_k", top_k)
    total = 0
    for block in range(-(-seqlen // block_size)):
        own = min(block_size, seqlen - block * block_size)
        total += own * (own + 1) // 2 + own * min(top_k - 1, block) * block_size
    return total


def moba_flops(seqlen: int, head_dim: int, block_size: int = 512, top_k: int = 3) -> int:
    """Gate and attention."""
    pairs = moba_pairs(seqlen, block_size, top_k)
    return moba_gate_flops(seqlen, head_dim, block_size) + 4 * head_dim * pairs


def moba_decode_bytes(
    seqlen: int, head_dim: int, block_size: int = 512, top_k: int = 3, itemsize: int = 2
) -> int:
    """A step that keeps the gate (the paper's generation is full): a mean a block, keys and values of k blocks."""
    check_positive_int("block_size", block_size)
    read = min(seqlen, top_k * block_size)
    return itemsize * head_dim * (-(-seqlen // block_size) + 2 * read)


def nsa_compressed(seqlen: int, blocks: Blocks | None = None) -> int:
    """Whole compressed blocks of a text: ``floor((N - l) / d) + 1``."""
    blocks = blocks or Blocks()
    return max(0, (seqlen - blocks.length) // blocks.stride + 1)


def nsa_tokens(seqlen: int, count: int = 16, window: int = 512) -> int:
    """Keys that a decode step of NSA reads, with the paper's l, d and l': compressed, selected, window."""
    blocks = Blocks(count=count, window=window)
    fine = min(seqlen, blocks.count * blocks.select)
    return nsa_compressed(seqlen, blocks) + fine + min(seqlen, blocks.window)


def nsa_pairs(seqlen: int, blocks: Blocks | None = None) -> tuple[int, int, int]:
    """Pairs of a prefill in the compressed, the selected and the window branch."""
    blocks = blocks or Blocks()
    coarse = sum(nsa_compressed(t + 1, blocks) for t in range(seqlen))
    fine = 0
    for t in range(seqlen):
        own, inside = divmod(t, blocks.select)
        fine += min(blocks.count - 1, own) * blocks.select + inside + 1
    w = min(blocks.window, seqlen)
    return coarse, fine, seqlen * w - w * (w - 1) // 2


def nsa_decode_bytes(
    seqlen: int, head_dim: int, count: int = 16, window: int = 512, itemsize: int = 2
) -> int:
    """Keys and values of :func:`nsa_tokens`, once a KV head, since its query heads share their blocks."""
    return 2 * itemsize * head_dim * nsa_tokens(seqlen, count, window)


def full_decode_bytes(seqlen: int, head_dim: int, itemsize: int = 2) -> int:
    """Every key and value, once a KV head."""
    check_positive_int("seqlen", seqlen)
    return 2 * itemsize * head_dim * seqlen


def vertical_slash_flops(seqlen: int, head_dim: int, columns: int, slashes: int, last: int = 64) -> int:
    """MInference: the last ``last`` queries times all keys, then at most ``columns + slashes`` pairs a query."""
    for name, value in (("columns", columns), ("slashes", slashes), ("last", last)):
        check_positive_int(name, value)
    pairs = sum(min(t + 1, columns + slashes) for t in range(seqlen))
    return 2 * head_dim * min(last, seqlen) * seqlen + 4 * head_dim * pairs
