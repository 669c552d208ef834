"""The delta rule, forward, in three passes: transform (all chunks at once), states (one after the other), outputs.

Chunk ``c`` holds the tokens ``c C .. c C + C``. With ``c_a`` the log decay summed from the chunk's start to token a,
``Gamma_ab = exp(c_a - c_b)``, and ``S`` the state that the chunk finds:

    transform   (I + L) [U, W] = beta [V, exp(c) K],  L = strictly lower part of beta (Gamma * K K^T)
    states      X = U - W S,   S' = exp(c_C) S + (exp(c_C - c) K)^T X
    outputs     O = scale (exp(c) Q S + (Gamma * Q K^T) X)

The first pass also writes c (``prefix``) and ``c_C - c`` (``suffix``), so that the others need no scan of their
own. The suffix is summed from the end, where it counts most, not taken as a difference.

Rows past the end read as zeros: key, value, beta and log decay 0 write nothing and forget nothing. Log decays are
kept in base 2, and cut at -150: ``2^-150`` is 0 in fp32 already, and sums over a token that forgets all keep digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot
from ._linear_attention_fwd import load_rows, load_state, store_rows, store_state


@triton.jit
def _load_gate(ptr, first, rows, seqlen, stride_n):
    """One number a token in fp32, 0 past the end."""
    ptrs = ptr + tl.cast(first, tl.int64) * stride_n + rows * stride_n
    return tl.load(ptrs, mask=first + rows < seqlen, other=0.0).to(tl.float32)


@triton.jit
def _load_decay(ptr, first, rows, seqlen, stride_n):
    """Log decays in base 2."""
    return tl.maximum(_load_gate(ptr, first, rows, seqlen, stride_n) * LOG2E, -150.0)


@triton.jit
def _sum_decay(ptr, first, rows, seqlen, stride_n):
    """Log decays of a block: from its beginning to each token, from there to its end, and in all."""
    decay = _load_decay(ptr, first, rows, seqlen, stride_n)
    return tl.cumsum(decay), tl.cumsum(decay, 0, reverse=True) - decay, tl.sum(decay)


@triton.jit
def _store_decay(prefix_ptr, suffix_ptr, prefix, suffix, first, rows, seqlen):
    tl.store(prefix_ptr + first + rows, prefix, mask=first + rows < seqlen)
    tl.store(suffix_ptr + first + rows, suffix, mask=first + rows < seqlen)


@triton.jit
def _unit_lower_inverse(lower, rows):
    """``(I + lower)^-1`` of a strictly lower triangular ``[16, 16]`` tile, in fp32, by forward substitution.

    After step j, row j is final, and all rows below have had it taken out. ``(I - L)(I + L^2)(I + L^4)(I + L^8)``
    would be matrix products only, but the powers grow where keys are alike: with 16 equal keys L^8 holds 3,432 for
    beta 1 and 878,592 for beta 2, and what is left of it all in the end is at most 2.
    """
    here = rows[:, None] == rows[None, :]
    inverse = tl.where(here, 1.0, 0.0)
    for j in range(0, 15):
        row = tl.sum(tl.where(rows[:, None] == j, inverse, 0.0), 0)
        column = tl.sum(tl.where(rows[None, :] == j, lower, 0.0), 1)
        inverse -= column[:, None] * row[None, :]
    return inverse


@triton.jit
def _mix(gram, beta, decay_i, decay_j, GATED: tl.constexpr):
    """A block of L from one of ``K K^T``: what token j's write changes in the answer that token i corrects.

    ``decay_i`` is summed from the beginning of i's block, ``decay_j`` up to there.
    """
    if GATED:
        gram *= tl.exp2(tl.minimum(decay_i[:, None] + decay_j[None, :], 0.0))
    return gram * beta[:, None]


@triton.jit
def _diagonal(gram, beta, decay, rows, GATED: tl.constexpr):
    """A block of L on the diagonal, and its inverse."""
    lower = _mix(gram, beta, decay, -decay, GATED)
    return _unit_lower_inverse(tl.where(rows[:, None] > rows[None, :], lower, 0.0), rows)


@triton.jit
def _delta_rule_transform_kernel(
    k_ptr, v_ptr, beta_ptr, g_ptr, w_ptr, u_ptr, prefix_ptr, suffix_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bn,
    stride_gb, stride_gh, stride_gn,
    num_heads, seqlen,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """U and W of one chunk. Grid: (chunks, batch * key heads). CHUNK is 16, 32 or 64: one, two or four blocks of 16.

    Block forward substitution: ``U_i = T_i (R_i - sum_{j<i} L_ij U_j)``, with ``T_i`` the inverse of the i-th block
    on the diagonal of ``I + L``. Only those are ever inverted, and only in registers; L never reaches memory.
    """
    chunk = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    beta_ptr += batch * stride_bb + head * stride_bh
    g_ptr += batch * stride_gb + head * stride_gh
    w_ptr += pair * seqlen * K
    u_ptr += pair * seqlen * V
    prefix_ptr += pair * seqlen
    suffix_ptr += pair * seqlen
    rows = tl.arange(0, 16)
    first0 = chunk * CHUNK
    first1, first2, first3 = first0 + 16, first0 + 32, first0 + 48

    # Blocks of K K^T: g_ij for i >= j.
    g00 = tl.zeros([16, 16], tl.float32)
    if CHUNK > 16:
        g10 = tl.zeros([16, 16], tl.float32)
        g11 = tl.zeros([16, 16], tl.float32)
    if CHUNK > 32:
        g20 = tl.zeros([16, 16], tl.float32)
        g21 = tl.zeros([16, 16], tl.float32)
        g22 = tl.zeros([16, 16], tl.float32)
        g30 = tl.zeros([16, 16], tl.float32)
        g31 = tl.zeros([16, 16], tl.float32)
        g32 = tl.zeros([16, 16], tl.float32)
        g33 = tl.zeros([16, 16], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        cols = start_k + tl.arange(0, BLOCK_K)
        k0 = load_rows(k_ptr, first0, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
        g00 += dot(k0, tl.trans(k0))
        if CHUNK > 16:
            k1 = load_rows(k_ptr, first1, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
            g10 += dot(k1, tl.trans(k0))
            g11 += dot(k1, tl.trans(k1))
        if CHUNK > 32:
            k2 = load_rows(k_ptr, first2, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
            g20 += dot(k2, tl.trans(k0))
            g21 += dot(k2, tl.trans(k1))
            g22 += dot(k2, tl.trans(k2))
            k3 = load_rows(k_ptr, first3, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
            g30 += dot(k3, tl.trans(k0))
            g31 += dot(k3, tl.trans(k1))
            g32 += dot(k3, tl.trans(k2))
            g33 += dot(k3, tl.trans(k3))

    element = k_ptr.dtype.element_ty
    b0 = _load_gate(beta_ptr, first0, rows, seqlen, stride_bn)
    # d_i: log decay from the beginning of block i, r_i: from there to its end, e_i: of the whole block.
    d0, r0, e0 = b0, b0, 0.0
    if GATED:
        d0, r0, e0 = _sum_decay(g_ptr, first0, rows, seqlen, stride_gn)
    t00 = cast(_diagonal(g00, b0, d0, rows, GATED), element)
    if CHUNK > 16:
        b1 = _load_gate(beta_ptr, first1, rows, seqlen, stride_bn)
        d1, r1, e1 = b1, b1, 0.0
        if GATED:
            d1, r1, e1 = _sum_decay(g_ptr, first1, rows, seqlen, stride_gn)
        t11 = cast(_diagonal(g11, b1, d1, rows, GATED), element)
        l10 = cast(_mix(g10, b1, d1, r0, GATED), element)
    if CHUNK > 32:
        b2 = _load_gate(beta_ptr, first2, rows, seqlen, stride_bn)
        b3 = _load_gate(beta_ptr, first3, rows, seqlen, stride_bn)
        d2, r2, e2 = b2, b2, 0.0
        d3, r3, e3 = b3, b3, 0.0
        if GATED:
            d2, r2, e2 = _sum_decay(g_ptr, first2, rows, seqlen, stride_gn)
            d3, r3, e3 = _sum_decay(g_ptr, first3, rows, seqlen, stride_gn)
        t22 = cast(_diagonal(g22, b2, d2, rows, GATED), element)
        t33 = cast(_diagonal(g33, b3, d3, rows, GATED), element)
        l20 = cast(_mix(g20, b2, d2, r0 + e1, GATED), element)
        l21 = cast(_mix(g21, b2, d2, r1, GATED), element)
        l30 = cast(_mix(g30, b3, d3, r0 + e1 + e2, GATED), element)
        l31 = cast(_mix(g31, b3, d3, r1 + e2, GATED), element)
        l32 = cast(_mix(g32, b3, d3, r2, GATED), element)

    if GATED:
        if CHUNK > 16:
            r0 += e1
            d1 += e0
        if CHUNK > 32:
            r0 += e2 + e3
            r1 += e2 + e3
            r2 += e3
            d2 += e0 + e1
            d3 += e0 + e1 + e2
        _store_decay(prefix_ptr, suffix_ptr, d0, r0, first0, rows, seqlen)
        if CHUNK > 16:
            _store_decay(prefix_ptr, suffix_ptr, d1, r1, first1, rows, seqlen)
        if CHUNK > 32:
            _store_decay(prefix_ptr, suffix_ptr, d2, r2, first2, rows, seqlen)
            _store_decay(prefix_ptr, suffix_ptr, d3, r3, first3, rows, seqlen)

    for start_v in range(0, V, BLOCK_V):
        cols = start_v + tl.arange(0, BLOCK_V)
        y0 = load_rows(v_ptr, first0, rows, seqlen, stride_vn, cols, stride_vd, V, BLOCK_V)
        x0 = cast(dot(t00, cast(y0.to(tl.float32) * b0[:, None], element)), element)
        store_rows(u_ptr, x0, first0, rows, seqlen, cols, V)
        if CHUNK > 16:
            y1 = load_rows(v_ptr, first1, rows, seqlen, stride_vn, cols, stride_vd, V, BLOCK_V)
            x1 = y1.to(tl.float32) * b1[:, None] - dot(l10, x0)
            x1 = cast(dot(t11, cast(x1, element)), element)
            store_rows(u_ptr, x1, first1, rows, seqlen, cols, V)
        if CHUNK > 32:
            y2 = load_rows(v_ptr, first2, rows, seqlen, stride_vn, cols, stride_vd, V, BLOCK_V)
            x2 = y2.to(tl.float32) * b2[:, None] - dot(l20, x0) - dot(l21, x1)
            x2 = cast(dot(t22, cast(x2, element)), element)
            store_rows(u_ptr, x2, first2, rows, seqlen, cols, V)
            y3 = load_rows(v_ptr, first3, rows, seqlen, stride_vn, cols, stride_vd, V, BLOCK_V)
            x3 = y3.to(tl.float32) * b3[:, None] - dot(l30, x0) - dot(l31, x1) - dot(l32, x2)
            x3 = cast(dot(t33, cast(x3, element)), element)
            store_rows(u_ptr, x3, first3, rows, seqlen, cols, V)

    if GATED:  # the keys ask the state as it is by then
        b0 *= tl.exp2(d0)
        if CHUNK > 16:
            b1 *= tl.exp2(d1)
        if CHUNK > 32:
            b2 *= tl.exp2(d2)
            b3 *= tl.exp2(d3)
    for start_k in range(0, K, BLOCK_K):
        cols = start_k + tl.arange(0, BLOCK_K)
        y0 = load_rows(k_ptr, first0, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
        x0 = cast(dot(t00, cast(y0.to(tl.float32) * b0[:, None], element)), element)
        store_rows(w_ptr, x0, first0, rows, seqlen, cols, K)
        if CHUNK > 16:
            y1 = load_rows(k_ptr, first1, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
            x1 = y1.to(tl.float32) * b1[:, None] - dot(l10, x0)
            x1 = cast(dot(t11, cast(x1, element)), element)
            store_rows(w_ptr, x1, first1, rows, seqlen, cols, K)
        if CHUNK > 32:
            y2 = load_rows(k_ptr, first2, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
            x2 = y2.to(tl.float32) * b2[:, None] - dot(l20, x0) - dot(l21, x1)
            x2 = cast(dot(t22, cast(x2, element)), element)
            store_rows(w_ptr, x2, first2, rows, seqlen, cols, K)
            y3 = load_rows(k_ptr, first3, rows, seqlen, stride_kn, cols, stride_kd, K, BLOCK_K)
            x3 = y3.to(tl.float32) * b3[:, None] - dot(l30, x0) - dot(l31, x1) - dot(l32, x2)
            x3 = cast(dot(t33, cast(x3, element)), element)
            store_rows(w_ptr, x3, first3, rows, seqlen, cols, K)


@triton.jit
def _begin(
    ptr, pair, cols, offs_v, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    INITIAL: tl.constexpr,
):  # fmt: skip
    """A block of the state before the first token; rows past K are zeros, and stay so."""
    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if INITIAL:
        ptrs = ptr + pair * (K * V) + (cols[:, None] * V + offs_v[None, :])
        s += tl.load(ptrs, mask=(cols[:, None] < K) & (offs_v[None, :] < V), other=0.0)
    return s


@triton.jit
def _ask(
    states_ptr, border, w_ptr, s, first, rows, seqlen, cols, offs_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, element: tl.constexpr,
):  # fmt: skip
    """Store a block of the state at a border, and return its part of ``W S``."""
    rounded = cast(s, element)
    store_state(states_ptr, rounded, border, cols, offs_v, K, V)
    ptrs = w_ptr + tl.cast(first, tl.int64) * K + (rows[:, None] * K + cols[None, :])
    here = first + rows < seqlen
    if K % BLOCK_K == 0:
        w = tl.load(ptrs, mask=here[:, None], other=0.0)
    else:
        w = tl.load(ptrs, mask=here[:, None] & (cols[None, :] < K), other=0.0)
    return dot(w, rounded)


@triton.jit
def _delta_rule_states_kernel(
    k_ptr, w_ptr, u_ptr, prefix_ptr, suffix_ptr, x_ptr, states_ptr, s0_ptr, sT_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    num_heads, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATED: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """What each token writes, and the state at every border. Grid: (tiles of V, batch * key heads).

    A program walks all chunks. ``X = U - W S`` sums over all of K, so it holds all rows of its columns, in up to four
    blocks of BLOCK_K: without matrix cores a thread keeps a row of each operand of a product, and 128 are too many.
    """
    pid_v = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    k_ptr += batch * stride_kb + head * stride_kh
    prefix_ptr += pair * seqlen
    suffix_ptr += pair * seqlen
    w_ptr += pair * seqlen * K
    u_ptr += pair * seqlen * V
    x_ptr += pair * seqlen * V
    states_ptr += pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    cols0 = tl.arange(0, BLOCK_K)
    cols1, cols2, cols3 = cols0 + BLOCK_K, cols0 + 2 * BLOCK_K, cols0 + 3 * BLOCK_K
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    element = k_ptr.dtype.element_ty

    s0 = _begin(s0_ptr, pair, cols0, offs_v, K, V, BLOCK_K, BLOCK_V, INITIAL)
    if K > BLOCK_K:
        s1 = _begin(s0_ptr, pair, cols1, offs_v, K, V, BLOCK_K, BLOCK_V, INITIAL)
    if K > 2 * BLOCK_K:
        s2 = _begin(s0_ptr, pair, cols2, offs_v, K, V, BLOCK_K, BLOCK_V, INITIAL)
        s3 = _begin(s0_ptr, pair, cols3, offs_v, K, V, BLOCK_K, BLOCK_V, INITIAL)
    for c in range(0, num_chunks):
        first = c * CHUNK
        u = load_rows(u_ptr, first, rows, seqlen, V, offs_v, 1, V, BLOCK_V)
        x = u.to(tl.float32)  # [CHUNK, BLOCK_V]
        x -= _ask(states_ptr, c, w_ptr, s0, first, rows, seqlen, cols0, offs_v, K, V, BLOCK_K, element)
        if K > BLOCK_K:
            x -= _ask(states_ptr, c, w_ptr, s1, first, rows, seqlen, cols1, offs_v, K, V, BLOCK_K, element)
        if K > 2 * BLOCK_K:
            x -= _ask(states_ptr, c, w_ptr, s2, first, rows, seqlen, cols2, offs_v, K, V, BLOCK_K, element)
            x -= _ask(states_ptr, c, w_ptr, s3, first, rows, seqlen, cols3, offs_v, K, V, BLOCK_K, element)
        store_rows(x_ptr, x, first, rows, seqlen, offs_v, V)
        if GATED:
            kept = tl.load(suffix_ptr + first + rows, mask=first + rows < seqlen, other=0.0)
            x *= tl.exp2(kept)[:, None]  # what the chunk's end still has of each write
            decay = tl.exp2(tl.load(prefix_ptr + tl.minimum(first + CHUNK, seqlen) - 1))
            s0 *= decay
            if K > BLOCK_K:
                s1 *= decay
            if K > 2 * BLOCK_K:
                s2 *= decay
                s3 *= decay
        x = cast(x, element)
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, cols0, stride_kd, K, BLOCK_K)
        s0 += dot(tl.trans(k), x)
        if K > BLOCK_K:
            k = load_rows(k_ptr, first, rows, seqlen, stride_kn, cols1, stride_kd, K, BLOCK_K)
            s1 += dot(tl.trans(k), x)
        if K > 2 * BLOCK_K:
            k = load_rows(k_ptr, first, rows, seqlen, stride_kn, cols2, stride_kd, K, BLOCK_K)
            s2 += dot(tl.trans(k), x)
            k = load_rows(k_ptr, first, rows, seqlen, stride_kn, cols3, stride_kd, K, BLOCK_K)
            s3 += dot(tl.trans(k), x)
    if FINAL:
        store_state(sT_ptr, s0, pair, cols0, offs_v, K, V)
        if K > BLOCK_K:
            store_state(sT_ptr, s1, pair, cols1, offs_v, K, V)
        if K > 2 * BLOCK_K:
            store_state(sT_ptr, s2, pair, cols2, offs_v, K, V)
            store_state(sT_ptr, s3, pair, cols3, offs_v, K, V)


@triton.jit
def _delta_rule_outputs_kernel(
    q_ptr, k_ptr, x_ptr, prefix_ptr, states_ptr, o_ptr, scale,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    num_heads, groups, seqlen, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """``O = scale (exp(c) Q S + (Gamma * Q K^T) X)``. Grid: (chunks, tiles of V, batch * heads)."""
    chunk = tl.program_id(0)
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    kv_head = head // groups
    kv_pair = batch * (num_heads // groups) + kv_head
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    prefix_ptr += kv_pair * seqlen
    x_ptr += kv_pair * seqlen * V
    states_ptr += kv_pair * num_chunks * (K * V)
    rows = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    a = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        q = load_rows(q_ptr, first, rows, seqlen, stride_qn, offs_k, stride_qd, K, BLOCK_K)
        s = load_state(states_ptr, chunk, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        acc += dot(q, s)  # [CHUNK, BLOCK_V]
        k = load_rows(k_ptr, first, rows, seqlen, stride_kn, offs_k, stride_kd, K, BLOCK_K)
        a += dot(q, tl.trans(k))  # [CHUNK, CHUNK]
    below = rows[:, None] >= rows[None, :]  # a token reads after its own write
    if GATED:
        decay = tl.load(prefix_ptr + first + rows, mask=first + rows < seqlen, other=0.0)
        acc *= tl.exp2(decay)[:, None]
        # Masked before exponentiating: above the diagonal the exponent is positive.
        a *= tl.exp2(tl.where(below, decay[:, None] - decay[None, :], float("-inf")))
    else:
        a = tl.where(below, a, 0.0)
    x = load_rows(x_ptr, first, rows, seqlen, V, offs_v, 1, V, BLOCK_V)
    acc += dot(cast(a, x.dtype), x)
    store_rows(o_ptr + pair * seqlen * V, acc * scale, first, rows, seqlen, offs_v, V)
