"""XAttention's scores: products along antidiagonals, and the weight of whole blocks without the map of all tiles.

The softmax over the tiles of a row needs its maximum and its sum, known only at the row's end. So the first kernel
leaves one number for each row of tiles and block, ``L_nJ = log sum_(m in J) e^(T_nm)``; with that the row's total is
``log sum_J e^(L_nJ)``, and the block's weight ``A_IJ = sum_(n in I) e^(L_nJ - total_n)``: the second kernel. What
lies between is ``block_size / stride`` times smaller than the map, and no product is computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, dot


@triton.jit
def _block_sparse_antidiagonal_kernel(
    q_ptr, k_ptr, out_ptr, sm_scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    num_heads, groups, seqlen, tiles, per, columns, steps,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """``T [B, Hq, tiles, tiles]``, or with SUMS ``L [B, Hq, tiles, blocks * PARTS]`` in log2 units.

    Grid: (tiles of columns, tiles of rows, batch * query heads). With SUMS the columns are laid out in groups of
    WIDTH, PARTS groups a block, so that a block of ``per`` tiles begins at a group; what is left of its last group is
    masked. Programs whose columns all lie in the future end at once and leave their part of L unwritten. ``steps`` is
    ``STRIDE ceil(HEAD_DIM / BLOCK_K)``, an argument so that no compiler unrolls the loop.
    """
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_K - 1) // BLOCK_K
    start_n = tl.program_id(0) * BLOCK_N
    start_m = tl.program_id(1) * BLOCK_M
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    tile_m, tile_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = start_m + tile_m  # [BLOCK_M], tiles of queries
    if SUMS:
        group = start_n // WIDTH
        first = group // PARTS * per + group % PARTS * WIDTH  # no column is before this tile
        if first >= start_m + BLOCK_M:
            return
        groups_n = (start_n + tile_n) // WIDTH
        inner = groups_n % PARTS * WIDTH + (start_n + tile_n) % WIDTH  # place inside its block
        cols = groups_n // PARTS * per + inner  # [BLOCK_N], tiles of keys
        real = (inner < per) & (cols < tiles)
    else:
        first = start_n
        cols = start_n + tile_n
        real = cols < tiles

    q_ptr += batch * stride_qb + head * stride_qh + tl.cast(start_m, tl.int64) * STRIDE * stride_qn
    k_ptr += batch * stride_kb + head // groups * stride_kh + tl.cast(first, tl.int64) * STRIDE * stride_kn
    q_ptrs = q_ptr + tile_m[:, None] * (STRIDE * stride_qn)
    k_ptrs = k_ptr + (cols - first)[:, None] * (STRIDE * stride_kn)
    tile_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(0, steps):
        a = t // CHUNKS
        offs_d = t % CHUNKS * BLOCK_K + tile_k
        back = STRIDE - 1 - a  # down the keys, up the queries
        see_q = (rows * STRIDE + back < seqlen)[:, None]
        see_k = (real & (cols * STRIDE + a < seqlen))[:, None]
        if HEAD_DIM % BLOCK_K != 0:
            see_q = see_q & (offs_d < HEAD_DIM)[None, :]
            see_k = see_k & (offs_d < HEAD_DIM)[None, :]
        q = tl.load(q_ptrs + (back * stride_qn + offs_d[None, :] * stride_qd), mask=see_q, other=0.0)
        k = tl.load(k_ptrs + (a * stride_kn + offs_d[None, :] * stride_kd), mask=see_k, other=0.0)
        acc += dot(q, tl.trans(k))

    out_ptr += pair * tiles * columns
    at = rows.to(tl.int64)[:, None] * columns
    if SUMS:
        s = acc * (sm_scale * LOG2E / STRIDE)
        s = tl.where(real[None, :] & (cols[None, :] <= rows[:, None]), s, float("-inf"))
        s = tl.reshape(s, [BLOCK_M, BLOCK_N // WIDTH, WIDTH])
        top = tl.max(s, 2)
        origin = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(s - origin[:, :, None]), 2)
        out = tl.where(total == 0.0, float("-inf"), origin + tl.log2(tl.where(total == 0.0, 1.0, total)))
        offs_g = start_n // WIDTH + tl.arange(0, BLOCK_N // WIDTH)
        tl.store(
            out_ptr + at + offs_g[None, :], out, mask=(rows < tiles)[:, None] & (offs_g < columns)[None, :]
        )
    else:
        out = acc * (sm_scale / STRIDE)
        tl.store(out_ptr + at + cols[None, :], out, mask=(rows < tiles)[:, None] & real[None, :])


@triton.jit
def _block_sparse_mass_kernel(
    lse_ptr, out_ptr, tiles, per, blocks,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """``A_IJ`` from ``L``: one program a row of blocks, ``ROWS >= per``. Grid: (blocks, batch * query heads)."""
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    columns = blocks * PARTS
    tile_r, tile_j = tl.arange(0, ROWS), tl.arange(0, BLOCK_J)
    rows = block * per + tile_r  # [ROWS], tiles of queries
    real = (tile_r < per) & (rows < tiles)
    lse_ptr += pair * tiles * columns
    at = rows.to(tl.int64)[:, None] * columns

    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    end = (block + 1) * PARTS
    for g in range(0, end, BLOCK_J):
        offs_g = g + tile_j
        # What was never written lies in the future: the group begins after the row.
        begins = offs_g // PARTS * per + offs_g % PARTS * WIDTH
        mask = real[:, None] & (offs_g < end)[None, :] & (begins[None, :] <= rows[:, None])
        x = tl.load(lse_ptr + at + offs_g[None, :], mask=mask, other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - origin) + tl.sum(tl.exp2(x - origin[:, None]), 1)
        m_i = m_new
    # Every real row sees its own tile. The maximum is subtracted and the sum divided by, apart: their logarithm
    # together would be rounded at the size of the scores, and with it every weight of the row.
    m_i = tl.where(real, m_i, 0.0)
    share = 1.0 / tl.where(real, l_i, 1.0)

    out_ptr += (pair * blocks + block) * blocks
    for j in range(0, blocks, BLOCK_J):
        offs_j = j + tile_j
        mass = tl.zeros([BLOCK_J], tl.float32)
        for part in range(0, PARTS):
            begins = offs_j * per + part * WIDTH
            mask = real[:, None] & (offs_j <= block)[None, :] & (begins[None, :] <= rows[:, None])
            x = tl.load(lse_ptr + at + (offs_j * PARTS + part)[None, :], mask=mask, other=float("-inf"))
            mass += tl.sum(tl.exp2(x - m_i[:, None]) * share[:, None], 0)
        tl.store(out_ptr + offs_j, mass, mask=offs_j < blocks)
