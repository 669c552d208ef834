"""What a static pattern costs: visible pairs in closed form, FLOPs, keys a decode step reads, keys to keep.

Per head, causal unless said. Conventions of :mod:`effattn_lab.foundations.cost_model`.
"""

from __future__ import annotations

from effattn_lab._validate import check_positive_int


def pair_flops(pairs: int, head_dim: int) -> int:
    """``4 D`` FLOPs a visible pair: a score and its share of the output."""
    return 4 * head_dim * pairs


def window_pairs(seqlen: int, window: int) -> int:
    """The last ``window`` keys, itself among them: ``N w - w (w - 1) / 2``, for w up to N."""
    w = min(window, seqlen)
    return seqlen * w - w * (w - 1) // 2


def sinks_and_window_pairs(seqlen: int, sinks: int, window: int) -> int:
    """The window's pairs, and for query i the sinks that the window has left behind, ``min(s, i - w + 1)``."""
    behind = max(0, seqlen - window)  # queries whose window does not begin at 0
    full = max(0, behind - sinks)  # of these, queries that see all sinks outside their window
    rising = behind - full
    return window_pairs(seqlen, window) + rising * (rising + 1) // 2 + full * sinks


def strided_pairs(seqlen: int, stride: int) -> int:
    """Sparse Transformer's union head: ``l + 1`` local keys, and ``floor(i / l)`` columns of which one is local."""
    columns = sum(max(0, i // stride - 1) for i in range(seqlen))
    return window_pairs(seqlen, stride + 1) + columns


def fixed_pairs(seqlen: int, stride: int, summary: int) -> int:
    """A block's own triangle, and ``c`` summary cells of every block before."""
    blocks, rest = divmod(seqlen, stride)
    own = blocks * stride * (stride + 1) // 2 + rest * (rest + 1) // 2
    before = stride * blocks * (blocks - 1) // 2 + rest * blocks  # (query, earlier block) pairs
    return own + summary * before


def dilated_pairs(seqlen: int, segment: int, rate: int) -> int:
    """LongNet's pattern at offset 0: a triangle of ``w / r`` rows in each segment."""
    blocks, rest = divmod(seqlen, segment)
    a, b = -(-segment // rate), -(-rest // rate)
    return blocks * a * (a + 1) // 2 + b * (b + 1) // 2


def longformer_pairs(seqlen: int, window: int, global_tokens: int = 0) -> int:
    """Both directions: ``w / 2`` to either side, and whole rows and columns for global tokens at the beginning."""
    half = window // 2
    band = seqlen * (2 * half + 1) - half * (half + 1) if half < seqlen else seqlen**2
    g = min(global_tokens, seqlen)
    everywhere = 2 * g * seqlen - g * g
    inside = sum(min(seqlen - 1, t + half) - max(0, t - half) + 1 for t in range(g))
    # Pairs of the band that lie in a global row or column: both, less the corner counted twice.
    corner = sum(max(0, min(g - 1, t + half) - max(0, t - half) + 1) for t in range(g))
    return band + everywhere - (2 * inside - corner)


def best_stride(seqlen: int, summary: int = 1) -> float:
    """The stride that reads the fewest keys at the end of the sequence: ``l + c N / l`` is least at ``sqrt(c N)``."""
    check_positive_int("seqlen", seqlen)
    check_positive_int("summary", summary)
    return float((summary * seqlen) ** 0.5)
