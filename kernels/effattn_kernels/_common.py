"""What the flash kernels share: typed casts and dots, the mask, and the tile ranges.

Three positions are used throughout. Query row ``i`` of ``seqlen_q`` stands at *position*
``i + seqlen_k - seqlen_q`` among the keys, so that the last query meets the last key
(bottom-right alignment); a negative position sees no key under a causal mask.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# exp(x) = 2^(x / ln 2). The GPU has an instruction for 2^x only, so the kernels multiply the
# softmax scale by 1/ln 2 once and work in base 2 throughout. Who asks for the log-sum-exp gets it times ln 2.
LOG2E = tl.constexpr(1.4426950408889634)  # 1 / ln 2

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes"))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x.to(dtype)`` with round-to-nearest-even, in both modes.

    The interpreter keeps bf16 as raw 16-bit integers and cuts the low bits off when it converts,
    which doubles the error. Adding half a unit in the last place first makes the cut a rounding. The low bits go
    here: of a zero they would make a number without an exponent, which the interpreter does not cut.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """``a @ b`` with fp32 accumulation.

    "ieee": fp32 inputs are multiplied as fp32. The default would round them to TF32 (10 bits of
    mantissa), eight times faster on an A100 and wrong in the fourth digit. It does not touch fp16 and bf16.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:  # NumPy would multiply the raw bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_tile(
    ptrs, offs_n, seqlen, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """Load a ``[rows, BLOCK_D]`` tile; what lies past the sequence or past HEAD_DIM reads as 0.

    Zeros are neutral: a padded column adds nothing to a dot product. The checks that cannot fail are not compiled in.
    """
    if CHECK_ROWS:
        if BLOCK_D == HEAD_DIM:
            tile = tl.load(ptrs, mask=offs_n[:, None] < seqlen, other=0.0)
        else:
            tile = tl.load(ptrs, mask=(offs_n[:, None] < seqlen) & (offs_d[None, :] < HEAD_DIM), other=0.0)
    else:
        if BLOCK_D == HEAD_DIM:  # noqa: SIM108
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def store_tile(ptrs, tile, offs_n, seqlen, offs_d, HEAD_DIM: tl.constexpr):
    """Store the rows and columns of a ``[rows, BLOCK_D]`` tile that exist, in the pointer's dtype."""
    mask = (offs_n[:, None] < seqlen) & (offs_d[None, :] < HEAD_DIM)
    tl.store(ptrs, cast(tile, ptrs.dtype.element_ty), mask=mask)


@triton.jit
def visible(pos, key, seqlen_k, window_size, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which query position sees which key. ``pos`` and ``key`` broadcast against each other."""
    see = key < seqlen_k
    if CAUSAL:
        see = see & (key <= pos)
    if WINDOW:
        see = see & (key > pos - window_size)
        if not CAUSAL:
            see = see & (key < pos + window_size)
    return see


@triton.jit
def key_tiles(
    start_m, seqlen_q, seqlen_k, window_size,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The key tiles that the queries ``start_m .. start_m + BLOCK_M`` need: ``(full, num_full, edge, num_edge)``.

    Full tiles: every query sees every key, nothing is masked. Edge tiles: some query sees some key, so they
    are masked. All others are never loaded. See `tile_start` for where the tiles of each kind begin.
    """
    first = start_m + seqlen_k - seqlen_q  # position of the tile's first query
    last = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q  # and of its last
    lo, hi = 0, seqlen_k  # keys that some query sees
    full_lo, full_hi = 0, seqlen_k  # keys that every query sees
    if CAUSAL:
        hi = tl.minimum(hi, last + 1)
        full_hi = tl.minimum(full_hi, first + 1)
    if WINDOW:
        lo = tl.maximum(lo, first - window_size + 1)
        full_lo = tl.maximum(full_lo, last - window_size + 1)
        if not CAUSAL:
            hi = tl.minimum(hi, last + window_size)
            full_hi = tl.minimum(full_hi, first + window_size)
    return _whole_tiles(lo, hi, full_lo, full_hi, BLOCK_N)


@triton.jit
def query_tiles(
    start_n, seqlen_q, seqlen_k, window_size,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`key_tiles` from the other side: the query tiles that need the keys ``start_n .. start_n + BLOCK_N``."""
    first = start_n - (seqlen_k - seqlen_q)  # the first key, counted in query rows
    last = tl.minimum(start_n + BLOCK_N, seqlen_k) - 1 - (seqlen_k - seqlen_q)
    lo, hi = 0, seqlen_q
    full_lo, full_hi = 0, seqlen_q
    if CAUSAL:
        lo = tl.maximum(lo, first)
        full_lo = tl.maximum(full_lo, last)
    if WINDOW:
        hi = tl.minimum(hi, last + window_size)
        full_hi = tl.minimum(full_hi, first + window_size)
        if not CAUSAL:
            lo = tl.maximum(lo, first - window_size + 1)
            full_lo = tl.maximum(full_lo, last - window_size + 1)
    return _whole_tiles(lo, hi, full_lo, full_hi, BLOCK_M)


@triton.jit
def _whole_tiles(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Round the visible range outwards and the full range inwards to whole tiles, and count them."""
    lo = lo // BLOCK * BLOCK
    hi = (tl.maximum(hi, lo) + BLOCK - 1) // BLOCK * BLOCK
    full_lo = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    full_hi = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    num_full = tl.maximum(full_hi - full_lo, 0) // BLOCK
    num_edge = (hi - lo) // BLOCK - num_full
    return full_lo, num_full, lo, num_edge


@triton.jit
def tile_start(t, full, num_full, edge, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where the ``t``-th full tile, or (MASKED) the ``t``-th edge tile, begins.

    Edge tiles lie before the full ones (a window's far edge) and after them (the diagonal, the ragged end).
    One loop takes both, hopping over the full tiles: an online softmax does not care in which order it reads.
    """
    if MASKED:
        start = edge + t * BLOCK
        start += tl.where((start >= full) & (num_full > 0), num_full * BLOCK, 0)
    else:
        start = full + t * BLOCK
    return start
