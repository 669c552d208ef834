"""Decays inside a chunk, for the kernels of gated linear attention: sums of log decays, and the levels of a pair.

``G_i`` is the sum of the log decays of a chunk up to token i, in base 2, from `_gated_linear_sums_kernel`. The weight
of key j for query i decays by ``2^(G_i - G_j)``. A decay a head is one matrix of those. A decay a channel stands
inside the product ``q_i . k_j`` and has to be split, and ``2^(-G_j)`` overflows. So each pair is split at a border
between j and i. Token indices in binary find it: the *level* of a pair is the top bit of ``i xor j``. At level l the
chunk is cut into pieces of ``2^l`` tokens; i is in the later, j in the earlier one of two neighbours. With R the sum
at the end of the earlier piece, ``2^(G_i - R)`` and ``2^(R - G_j)`` are both at most 1, and both are ``2^-|G - R|``.

As queries are only wanted in later pieces and keys in earlier ones, one tile ``x`` holds both, and ``x x^T`` all the
pairs of a level, twice: above the diagonal too. Backward the same: one product with x serves dQ and dK.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot
from ._linear_attention_fwd import load_rows

# 2^-185 = e^-128 is 0 in float32. A log decay below that, or -inf, changes nothing but the sums, which stay finite.
FLOOR = tl.constexpr(-128.0)


@triton.jit
def tile_of(pid, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """``(outer, tile)`` of a grid axis that counts the tiles of DIM inside something else. One tile costs nothing."""
    tiles: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    return pid // tiles, pid % tiles


@triton.jit
def pair_of(num_heads):
    """Which (batch, head) a program works on, from the grid's axes 1 and 2: no division on the GPU. int64."""
    return tl.program_id(2).to(tl.int64) * num_heads + tl.program_id(1)


@triton.jit
def head_offset(stride_b, stride_h, head):
    """Where a head's matrix begins. int64: batch * stride can pass 2^31 elements."""
    return tl.program_id(2).to(tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_columns(ptr, first, rows, seqlen, stride_n, cols, stride_d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """`load_rows`, transposed: ``[BLOCK, rows]``. A product's second factor then needs no move between threads."""
    ptrs = ptr + tl.cast(first, tl.int64) * stride_n + (rows[None, :] * stride_n + cols[:, None] * stride_d)
    here = (first + rows < seqlen)[None, :]
    if DIM % BLOCK != 0:
        here = here & (cols[:, None] < DIM)
    return tl.load(ptrs, mask=here, other=0.0)


@triton.jit
def load_state_columns(
    ptr, border, offs_k, offs_v, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """`load_state`, transposed: ``[BLOCK_V, BLOCK_K]``."""
    ptrs = ptr + tl.cast(border, tl.int64) * (K * V) + (offs_k[None, :] * V + offs_v[:, None])
    if (K % BLOCK_K == 0) and (V % BLOCK_V == 0):
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(offs_k[None, :] < K) & (offs_v[:, None] < V), other=0.0)
    return tile


@triton.jit
def _gated_linear_sums_kernel(
    g_ptr, sums_ptr, low_ptr,
    stride_gb, stride_gh, stride_gn: tl.constexpr, stride_gd, num_heads, seqlen, num_chunks,
    GK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``G`` of every chunk, fp32 ``[chunks * CHUNK, GK]``; GK is 1 for a decay a head.

    Grid: (chunks * tiles of GK, heads, batch). Rows past the end are kept too: their decay is 1, their sum the
    last one, so that readers take whole chunks and the last row of each is what the chunk has done in all.
    A difference of two sums keeps of small decays what the larger ones leave: next to -3200, four digits. EXACT
    (fp32 inputs) sums eighths and the rest apart: eighths are exact in fp32, the rest is small.
    """
    chunk, tile = tile_of(tl.program_id(0), GK, BLOCK_K)
    pair = pair_of(num_heads)
    g_ptr += head_offset(stride_gb, stride_gh, tl.program_id(1))
    first = chunk * CHUNK
    rows = tl.arange(0, CHUNK)
    cols = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    g = load_rows(g_ptr, first, rows, seqlen, stride_gn, cols, stride_gd, GK, BLOCK_K, True)
    g = tl.maximum(g.to(tl.float32), FLOOR) * LOG2E
    ptrs = (pair * num_chunks + chunk) * (CHUNK * GK) + (rows[:, None] * GK + cols[None, :])
    here = cols[None, :] < GK
    if EXACT:
        high = tl.floor(g * 8.0) * 0.125
        tl.store(low_ptr + ptrs, tl.cumsum(g - high, 0), mask=here)
        g = high
    tl.store(sums_ptr + ptrs, tl.cumsum(g, 0), mask=here)


@triton.jit
def load_sums(sums_ptr, low_ptr, rows, cols, K: tl.constexpr, BLOCK_K: tl.constexpr,
              PER_CHANNEL: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """G of the rows ``rows`` of the chunk that the pointers stand at: ``(sums, low)``, ``[rows, BLOCK_K or 1]``."""
    if PER_CHANNEL:  # noqa: SIM108
        ptrs = rows[:, None] * K + cols[None, :]
    else:
        ptrs = rows[:, None]
    if PER_CHANNEL and K % BLOCK_K != 0:
        sums = tl.load(sums_ptr + ptrs, mask=cols[None, :] < K, other=0.0)
        low = tl.load(low_ptr + ptrs, mask=cols[None, :] < K, other=0.0) if EXACT else sums
    else:
        sums = tl.load(sums_ptr + ptrs)
        low = tl.load(low_ptr + ptrs) if EXACT else sums
    return sums, low


@triton.jit
def decay_between(sums, low, sums_from, low_from, EXACT: tl.constexpr):
    """``2^(G - G_from)``. Above a diagonal it may be infinite: select there, do not multiply by 0."""
    exponent = sums - sums_from
    if EXACT:
        exponent += low - low_from
    return tl.exp2(exponent)


@triton.jit
def decay_from_border(sums, low, EXACT: tl.constexpr):
    """``2^G``: what the state that the chunk found has gone through."""
    if EXACT:
        sums += low
    return tl.exp2(sums)


@triton.jit
def level_factors(sums, low, sums_ptr, low_ptr, rows, cols, level,
                  K: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """``2^-|G - R|`` of a level, and which rows are in a later piece ``[rows, 1]``."""
    border = ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1
    at, at_low = load_sums(sums_ptr, low_ptr, border, cols, K, BLOCK_K, True, EXACT)
    exponent = sums - at
    if EXACT:
        exponent += low - at_low
    return tl.exp2(-tl.abs(exponent)), (((rows >> level) & 1) == 1)[:, None]


@triton.jit
def pair_level(rows):
    """``i xor j`` ``[rows, rows]``: its top bit is the level of a pair."""
    return rows[:, None] ^ rows[None, :]


@triton.jit
def add_channel_scores(a, q, k, sums, low, sums_ptr, low_ptr, rows, cols, K: tl.constexpr, BLOCK_K: tl.constexpr,
                       LEVELS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Add a tile of channels to the scores ``a [rows, rows]``; it is symmetric, and one triangle means something."""
    different = pair_level(rows)
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    a += tl.where(different == 0, own[:, None], 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        f, late = level_factors(sums, low, sums_ptr, low_ptr, rows, cols, level, K, BLOCK_K, EXACT)
        x = cast(tl.where(late, q, k).to(tl.float32) * f, q.dtype)
        a += tl.where((different >> level) == 1, dot(x, tl.trans(x)), 0.0)
    return a


@triton.jit
def for_product(state, dtype: tl.constexpr):
    """A state for a product with rows of ``dtype``: ``(tile, size)``, the product to be multiplied by size.

    States of fp16 inputs are kept in fp32, since a long sum can pass 65504; what a product gets is divided by its
    largest entry first.
    """
    size = 1.0
    if dtype == tl.float16:
        size = tl.max(tl.max(tl.abs(state), 1), 0)
        size = tl.where(size == 0.0, 1.0, size)
        state = (state / size).to(dtype)
    return state, size
