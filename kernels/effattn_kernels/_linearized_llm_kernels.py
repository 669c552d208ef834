"""The kernels of linearized attention: states between groups, outputs with the convolution inside, convolution alone.

A convolution that all channels of a head share is a band matrix: ``y = T v`` with ``T_{t, j} = w_{t - j}``. So it
needs no loop over lags: inside the group T is *added* to the matrix of attention weights before their one product
with V, and only the ``L - 1`` values before the group cost a product of their own. Group ``c`` holds the positions
``c G .. c G + G``; query row ``i`` stands at position ``i + offset``. Rows that do not exist read as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import cast, dot
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state

EPS2 = tl.constexpr(1e-12)  # the square of the least length that a query or key is divided by


@triton.jit
def unit_rows(x, NORM: tl.constexpr):
    """Rows divided by their lengths, in the dtype they came in; the tile must hold whole rows."""
    if NORM:
        wide = x.to(tl.float32)
        wide *= tl.rsqrt(tl.maximum(tl.sum(wide * wide, 1), EPS2))[:, None]
        x = cast(wide, x.dtype)
    return x


@triton.jit
def _store_before(
    states_ptr, s, group, first_group, seen, offs_k, offs_v, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Keep ``s`` as the state before ``group``. EARLY: only if some query stands in it or later."""
    if SCALED:
        s = s / tl.maximum(group * GROUP + seen, 1).to(tl.float32)
    ptrs = (
        states_ptr
        + tl.cast(group - first_group, tl.int64) * (K * V)
        + (offs_k[:, None] * V + offs_v[None, :])
    )
    if WHOLE and not EARLY:
        tl.store(ptrs, cast(s, states_ptr.dtype.element_ty))
    else:
        here = (offs_k[:, None] < K) & (offs_v[None, :] < V) & (group >= first_group)
        tl.store(ptrs, cast(s, states_ptr.dtype.element_ty), mask=here)


@triton.jit
def _linearized_llm_states_kernel(
    k_ptr, v_ptr, states_ptr, s0_ptr, sT_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, seqlen_k, lead, first_group, num_groups, num_sums, seen,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, EARLY: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """``S`` before each group from ``first_group`` on, in the dtype of the inputs. Grid: (tiles of V, key heads).

    fp16 ends at 65504, which a sum over a long text passes: SCALED divides by the number of tokens.
    """
    pid_v = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    states_ptr += pair * (num_groups - first_group) * (K * V)
    cols = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    WHOLE: tl.constexpr = (K % BLOCK_K == 0) & (V % BLOCK_V == 0)
    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if INITIAL:
        s += load_state(s0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
    for c in range(0, num_groups):
        # A masked store, not a branch: the compiler for Blackwell cannot pipeline a loop that branches on its sum.
        _store_before(states_ptr, s, c, first_group, seen, offs_k, offs_v, K, V, GROUP, SCALED, WHOLE, EARLY)
        # The last group's keys are in nobody's past: past num_sums nothing is loaded, and zeros are added.
        end = tl.where(c < num_sums, c * GROUP + GROUP, 0)
        for j in tl.static_range(0, GROUP, BLOCK_N):
            k = load_rows(k_ptr, c * GROUP + j, cols, end, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
            v = load_rows(
                v_ptr, c * GROUP + j + lead, cols, end + lead, stride_vn, offs_v, stride_vd, V, BLOCK_V, True
            )
            s += dot(tl.trans(unit_rows(k, NORM)), v)
    if FINAL:
        store_state(sT_ptr, s, pair, offs_k, offs_v, K, V)


@triton.jit
def _own_keys(
    q, k_ptr, v_ptr, w_ptr, j, rows, offs_k, offs_v, base, lead, end_k, stride_kn, stride_kd, stride_vn, stride_vd,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    LAGS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``(tril(relu(Q K^T)^2) + T) V`` over the keys ``j .. j + BLOCK_N`` of the group."""
    cols = j + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, base, cols, end_k, stride_kn, offs_k, stride_kd, K, BLOCK_K, True)
    a = tl.maximum(dot(q, tl.trans(unit_rows(k, NORM))), 0.0)
    lag = rows[:, None] - cols[None, :]
    a = tl.where(lag >= 0, a * a, 0.0)
    if LAGS > 0:
        a += tl.load(w_ptr + lag, mask=(lag >= 0) & (lag < LAGS), other=0.0).to(tl.float32)
    v = load_rows(v_ptr, base + lead, cols, end_k + lead, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
    return dot(cast(a, v.dtype), v)


@triton.jit
def _linearized_llm_outputs_kernel(
    q_ptr, k_ptr, v_ptr, states_ptr, w_ptr, alpha_ptr, o_ptr,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, groups, seqlen_q, seqlen_k, offset, lead, first_group, num_groups, seen,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    LAGS: tl.constexpr, BLOCK_L: tl.constexpr, GLOBAL: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """``O_g = (tril(relu(Q K^T)^2) + T) V + T' V_before + alpha Q S_g``. Grid: (groups * BLOCKS, tiles of V, heads).

    BLOCKS blocks of BLOCK_M queries make a group; each visits the group's keys up to its last query. V has ``lead``
    rows before the first key, for the convolution alone. BEFORE: the first group has rows
    without a query.
    """
    group = first_group + tl.program_id(0) // BLOCKS
    start = (tl.program_id(0) % BLOCKS) * BLOCK_M  # of this block, inside the group
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    kv_head = head // groups
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    states_ptr += (batch * (num_heads // groups) + kv_head) * (num_groups - first_group) * (K * V)
    w_ptr += head * LAGS
    base = group * GROUP
    end_q, end_k = tl.minimum(seqlen_q, base + GROUP - offset), tl.minimum(seqlen_k, base + GROUP)
    rows = start + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    q = load_rows(q_ptr, base - offset, rows, end_q, stride_qn, offs_k, stride_qd, K, BLOCK_K, not BEFORE)
    q = unit_rows(q, NORM)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if GLOBAL:
        s = load_state(states_ptr, group - first_group, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        alpha = tl.load(alpha_ptr + head)
        if SCALED:
            alpha *= tl.maximum(base + seen, 1).to(tl.float32)
        acc += dot(q, s) * alpha
    if LAGS > 1:  # noqa: SIM102  (the first is decided by the compiler)
        if start < LAGS - 1:  # values before the group that some row of this block reaches
            side = tl.arange(0, BLOCK_L) - BLOCK_L
            lag = rows[:, None] - side[None, :]
            t = tl.load(w_ptr + lag, mask=lag < LAGS, other=0.0)
            before = tl.where(start - side < LAGS, side, -base - lead - 1)  # none: before everything
            v = load_rows(
                v_ptr, base + lead, before, seqlen_k + lead, stride_vn, offs_v, stride_vd, V, BLOCK_V
            )
            acc += dot(cast(t, v.dtype), v)
    if BLOCKS == 1:  # one block a group: nothing to loop over, and no code for a pipeline
        for j in tl.static_range(0, GROUP, BLOCK_N):
            acc += _own_keys(
                q, k_ptr, v_ptr, w_ptr, j, rows, offs_k, offs_v, base, lead, end_k, stride_kn, stride_kd, stride_vn,
                stride_vd, K, V, BLOCK_K, BLOCK_V, BLOCK_N, LAGS, NORM,
            )  # fmt: skip
    else:
        for j in range(0, tl.minimum(start + BLOCK_M, GROUP), BLOCK_N):
            acc += _own_keys(
                q, k_ptr, v_ptr, w_ptr, j, rows, offs_k, offs_v, base, lead, end_k, stride_kn, stride_kd, stride_vn,
                stride_vd, K, V, BLOCK_K, BLOCK_V, BLOCK_N, LAGS, NORM,
            )  # fmt: skip
    store_rows(
        o_ptr + pair * seqlen_q * V,
        acc,
        base - offset,
        rows,
        end_q,
        offs_v,
        V,
        (not BEFORE) and (V % BLOCK_V == 0),
    )


@triton.jit
def _linearized_llm_conv_kernel(
    v_ptr, w_ptr, y_ptr,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, groups, seqlen_v, seqlen_y, offset,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LAGS: tl.constexpr, BLOCK_L: tl.constexpr,
    REVERSE: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """``y_t = sum_l w_l v_{t - l}``; REVERSE, its transpose: ``sum_l w_l v_{t + l}``, summed over REPEAT heads of v.

    Grid: (chunks of y, tiles of V, batch * heads of y). Row ``i`` of y stands at row ``i + offset`` of v.
    """
    start = tl.program_id(0) * CHUNK
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    rows, side = tl.arange(0, CHUNK), tl.arange(0, BLOCK_L)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    v_ptr += batch * stride_vb
    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for r in tl.static_range(0, REPEAT):
        other = head * REPEAT + r if REVERSE else head // groups  # head of v
        w = w_ptr + (other if REVERSE else head) * LAGS
        x_ptr = v_ptr + other * stride_vh
        lag = rows[None, :] - rows[:, None] if REVERSE else rows[:, None] - rows[None, :]
        t = tl.load(w + lag, mask=(lag >= 0) & (lag < LAGS), other=0.0)
        x = load_rows(x_ptr, start + offset, rows, seqlen_v, stride_vn, offs_v, stride_vd, V, BLOCK_V, True)
        acc += dot(cast(t, x.dtype), x)
        if LAGS > 1:
            if REVERSE:  # values after the chunk, of which the first LAGS - 1 count
                lag = CHUNK + side[None, :] - rows[:, None]
                near = tl.where(side < LAGS - 1, CHUNK + side, seqlen_v)
            else:
                lag = rows[:, None] + BLOCK_L - side[None, :]
                near = tl.where(side > BLOCK_L - LAGS, side - BLOCK_L, -start - offset - 1)
            t = tl.load(w + lag, mask=lag < LAGS, other=0.0)
            x = load_rows(x_ptr, start + offset, near, seqlen_v, stride_vn, offs_v, stride_vd, V, BLOCK_V)
            acc += dot(cast(t, x.dtype), x)
    store_rows(y_ptr + pair * seqlen_y * V, acc, start, rows, seqlen_y, offs_v, V, V % BLOCK_V == 0)


@triton.jit
def _linearized_llm_dweight_kernel(
    v_ptr, dy_ptr, parts_ptr,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_yb, stride_yh, stride_yn, stride_yd,
    num_heads, groups, seqlen_v, seqlen_y, offset,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LAGS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A chunk's part of ``dw_l = sum_t dy_t . v_{t - l}``: products of rows first, then sums along diagonals.

    Grid: (chunks of y, 1, batch * query heads).
    """
    start = tl.program_id(0) * CHUNK
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    v_ptr += batch * stride_vb + (head // groups) * stride_vh
    dy_ptr += batch * stride_yb + head * stride_yh
    rows, side = tl.arange(0, CHUNK), tl.arange(0, BLOCK_L)
    near = tl.where(side > BLOCK_L - LAGS, side - BLOCK_L, -start - offset - 1)
    own = tl.zeros([CHUNK, CHUNK], tl.float32)
    past = tl.zeros([CHUNK, BLOCK_L], tl.float32)
    for d in range(0, V, BLOCK_V):
        offs_v = d + tl.arange(0, BLOCK_V)
        dy = load_rows(dy_ptr, start, rows, seqlen_y, stride_yn, offs_v, stride_yd, V, BLOCK_V)
        x = load_rows(v_ptr, start + offset, rows, seqlen_v, stride_vn, offs_v, stride_vd, V, BLOCK_V)
        own += dot(dy, tl.trans(x))
        if LAGS > 1:
            x = load_rows(v_ptr, start + offset, near, seqlen_v, stride_vn, offs_v, stride_vd, V, BLOCK_V)
            past += dot(dy, tl.trans(x))
    parts_ptr += (pair * tl.num_programs(0) + tl.program_id(0)) * LAGS
    for l in range(0, LAGS):
        total = tl.sum(tl.where(rows[:, None] - rows[None, :] == l, own, 0.0))
        total += tl.sum(tl.where(rows[:, None] + BLOCK_L - side[None, :] == l, past, 0.0))
        tl.store(parts_ptr + l, total)
