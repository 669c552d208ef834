"""Linear attention, forward: a pass over the keys that leaves a state at every chunk border, and a pass that reads.

Chunk ``c`` holds the query rows ``c C .. c C + C`` and the keys ``offset + c C .. offset + c C + C``. Causal:
``offset = seqlen_k - seqlen_q``, so a chunk's queries and keys stand at the same positions; keys of *early* chunks
(``c < 0``) come before every query. Not causal: ``offset = seqlen_k``, so that all keys are early, and every query
reads the one state at border 0. Rows that do not exist read as zeros, which are neutral in every sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import cast, dot


@triton.jit
def load_rows(
    ptr, first, rows, seqlen, stride_n, cols, stride_d, DIM: tl.constexpr, BLOCK: tl.constexpr,
    LEAN: tl.constexpr = False,
):  # fmt: skip
    """Rows ``first + rows`` and columns ``cols`` of a ``[seqlen, DIM]`` matrix; 0 where there is none.

    LEAN: ``first`` is never negative; a check that cannot fail is not compiled in.
    """
    # The base moves in int64, as a scalar; offsets inside the tile are small and stay int32.
    ptrs = ptr + tl.cast(first, tl.int64) * stride_n + (rows[:, None] * stride_n + cols[None, :] * stride_d)
    here = first + rows < seqlen
    if not LEAN:
        here = here & (first + rows >= 0)
    if DIM % BLOCK == 0:
        tile = tl.load(ptrs, mask=here[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=here[:, None] & (cols[None, :] < DIM), other=0.0)
    return tile


@triton.jit
def store_rows(
    ptr, tile, first, rows, seqlen, cols, DIM: tl.constexpr,
    LEAN: tl.constexpr = False,
):  # fmt: skip
    """The existing part of a tile, into a contiguous ``[seqlen, DIM]`` matrix, in the pointer's dtype.

    LEAN: ``first`` is never negative, and the columns do not overrun DIM.
    """
    ptrs = ptr + tl.cast(first, tl.int64) * DIM + (rows[:, None] * DIM + cols[None, :])
    here = (first + rows < seqlen)[:, None]
    if not LEAN:
        here = ((first + rows >= 0) & (first + rows < seqlen))[:, None] & (cols[None, :] < DIM)
    tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=here)


@triton.jit
def load_state(
    ptr, border, offs_k, offs_v, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A ``[BLOCK_K, BLOCK_V]`` tile of the ``[K, V]`` state at a border."""
    ptrs = ptr + tl.cast(border, tl.int64) * (K * V) + (offs_k[:, None] * V + offs_v[None, :])
    if (K % BLOCK_K == 0) and (V % BLOCK_V == 0):
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(offs_k[:, None] < K) & (offs_v[None, :] < V), other=0.0)
    return tile


@triton.jit
def store_state(
    ptr, tile, border, offs_k, offs_v, K: tl.constexpr, V: tl.constexpr, LEAN: tl.constexpr = False
):  # fmt: skip
    """A tile of the state, in the pointer's dtype. LEAN: it does not overrun K or V."""
    ptrs = ptr + tl.cast(border, tl.int64) * (K * V) + (offs_k[:, None] * V + offs_v[None, :])
    if LEAN:
        tl.store(ptrs, cast(tile, ptr.dtype.element_ty))
    else:
        tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=(offs_k[:, None] < K) & (offs_v[None, :] < V))


@triton.jit
def _linear_attention_states_kernel(
    k_ptr, v_ptr, states_ptr, weight_ptr, z_ptr,
    s0_ptr, z0_ptr, s0_size_ptr, sT_ptr, zT_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, seqlen_k, offset, num_early, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr, LEAN: tl.constexpr, TRACK_Z: tl.constexpr, SCALED: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """State and key sum at every border. Grid: (tiles of V, tiles of K, batch * key heads); each walks all chunks.

    The running sum stays in registers, in fp32. What is stored is its copy in the dtype of the inputs, since the
    reader's matrix product would round it to that anyway. fp16 ends at 65504, which a sum over a long sequence
    passes: with SCALED the copy is the mean, ``S / weight``.
    """
    pid_v = tl.program_id(0)
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)  # int64: batch * stride can pass 2^31 elements
    batch, head = pair // num_heads, pair % num_heads
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    states_ptr += pair * num_chunks * (K * V)
    z_ptr += pair * num_chunks * K
    weight_ptr += pair * num_chunks
    rows = tl.arange(0, CHUNK)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    keep_z = (offs_k < K) & (pid_v == 0)  # one tile of V writes the key sums

    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_K], tl.float32)
    size = 0.0
    if INITIAL:
        s += load_state(s0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        z += tl.load(z0_ptr + pair * K + offs_k, mask=offs_k < K, other=0.0)
        size = tl.load(s0_size_ptr + pair)
    if EARLY:
        for c in range(0, num_early):
            first = offset + (c - num_early) * CHUNK
            k = load_rows(k_ptr, first, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K)
            v = load_rows(v_ptr, first, rows, seqlen_k, stride_vn, offs_v, stride_vd, V, BLOCK_V)
            s += dot(tl.trans(k), v)
            if TRACK_Z:
                z += tl.sum(k.to(tl.float32), 0)
    for c in range(0, num_chunks):
        first = offset + c * CHUNK
        if SCALED:
            weight = tl.maximum(first, 1).to(tl.float32) + size  # never less than the keys behind the border
            store_state(states_ptr, s / weight, c, offs_k, offs_v, K, V)
            tl.store(weight_ptr + c, weight, mask=(pid_v == 0) & (pid_k == 0))
        else:
            store_state(states_ptr, s, c, offs_k, offs_v, K, V, LEAN)
        k = load_rows(k_ptr, first, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K, LEAN)
        v = load_rows(v_ptr, first, rows, seqlen_k, stride_vn, offs_v, stride_vd, V, BLOCK_V, LEAN)
        s += dot(tl.trans(k), v)  # [BLOCK_K, BLOCK_V]
        if TRACK_Z:
            tl.store(z_ptr + c * K + offs_k, z, mask=keep_z)
            z += tl.sum(k.to(tl.float32), 0)
    if FINAL:
        store_state(sT_ptr, s, pair, offs_k, offs_v, K, V)
        tl.store(zT_ptr + pair * K + offs_k, z, mask=keep_z)


@triton.jit
def _linear_attention_outputs_kernel(
    q_ptr, k_ptr, v_ptr, states_ptr, weight_ptr, z_ptr, o_ptr, den_ptr, scale, eps,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, groups, seqlen_q, seqlen_k, offset, num_borders,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """``O = (Q S + tril(Q K^T) V) / (Q z + rowsum tril(Q K^T) + eps)``. Grid: (chunks, tiles of V, batch * heads)."""
    chunk = tl.program_id(0)
    pid_v = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    kv_head = head // groups
    kv_pair = batch * (num_heads // groups) + kv_head
    border = chunk if CAUSAL else 0
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    states_ptr += kv_pair * num_borders * (K * V)
    z_ptr += kv_pair * num_borders * K
    rows = tl.arange(0, CHUNK)
    first_q, first_k = chunk * CHUNK, offset + chunk * CHUNK
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    a = tl.zeros([CHUNK, CHUNK], tl.float32)
    den = tl.zeros([CHUNK], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        q = load_rows(q_ptr, first_q, rows, seqlen_q, stride_qn, offs_k, stride_qd, K, BLOCK_K, LEAN)
        s = load_state(states_ptr, border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        acc += dot(q, s)  # [CHUNK, BLOCK_V]
        if NORMALIZE:
            z = tl.load(z_ptr + border * K + offs_k, mask=offs_k < K, other=0.0)
            den += tl.sum(q.to(tl.float32) * z[None, :], 1)
        if CAUSAL:
            k = load_rows(k_ptr, first_k, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K, LEAN)
            a += dot(q, tl.trans(k))  # [CHUNK, CHUNK]
    if SCALED:
        acc *= tl.load(weight_ptr + kv_pair * num_borders + border)
    if CAUSAL:
        a = tl.where(rows[:, None] >= rows[None, :], a, 0.0)
        v = load_rows(v_ptr, first_k, rows, seqlen_k, stride_vn, offs_v, stride_vd, V, BLOCK_V, LEAN)
        acc += dot(cast(a, v.dtype), v)
    if NORMALIZE:
        if CAUSAL:
            den += tl.sum(a, 1)
        den = den * scale + eps
        # A query that sees no key: 0 / 0 without eps. Its output is 0.
        factor = tl.where(den == 0.0, 0.0, scale / tl.where(den == 0.0, 1.0, den))
        tl.store(
            den_ptr + pair * seqlen_q + first_q + rows,
            factor,
            mask=(first_q + rows < seqlen_q) & (pid_v == 0),
        )
        acc *= factor[:, None]
    else:
        acc *= scale
    store_rows(o_ptr + pair * seqlen_q * V, acc, first_q, rows, seqlen_q, offs_v, V, LEAN)
