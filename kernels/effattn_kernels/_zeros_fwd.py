"""ZeroS, forward: one pass over keys and values that leaves three states at every chunk border, and one that reads.

Chunks, borders and early keys as in `_linear_attention_fwd`. What the weights are mixed from, ``e^s``, ``s`` and 1,
is measured from the running maximum ``m``. A border holds not ``F, G, H`` but what the weights are made of there,

    A = F / E - H / t,    B = (G - (P / t) H) / t,    H / t,

the sums with weights ``softmax - 1/t``, ``(s - mean) / t`` and ``1/t``. The output takes ``A`` and ``B`` almost
whole and of ``H`` next to nothing, so rounding them to half precision costs little; from ``F, G, H`` themselves it
would take the small difference of three large terms, each rounded. Nor do they grow with the length, as a sum would,
which fp16 could not hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast, dot
from ._linear_attention_fwd import load_rows, load_state, store_rows

TINY = tl.constexpr(
    1.1754944e-38
)  # the smallest normal float32: a zero vector has no direction, and stays zero


@triton.jit
def _inverse_norm(squares):
    return tl.rsqrt(tl.maximum(squares, TINY))


@triton.jit
def _merge_sums(m_a, e_a, m_b, e_b):
    """Two sums of powers of 2, each measured from its own largest, as one."""
    m = tl.maximum(m_a, m_b)
    return m, e_a * tl.exp2(m_a - m) + e_b * tl.exp2(m_b - m)


@triton.jit
def _load_logits(ptr, first, rows, seqlen):
    """Logits of a chunk in fp32 and which of them exist; the others read as 0."""
    here = (first + rows >= 0) & (first + rows < seqlen)
    return tl.load(ptr + first + rows, mask=here, other=0.0).to(tl.float32), here


@triton.jit
def _store_state(
    ptr, tile, border, offs_k, offs_v, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A tile into the ``[K, V]`` state at a border, in the pointer's dtype; checks that cannot fail are left out."""
    ptrs = ptr + tl.cast(border, tl.int64) * (K * V) + (offs_k[:, None] * V + offs_v[None, :])
    if (K % BLOCK_K == 0) and (V % BLOCK_V == 0):
        tl.store(ptrs, cast(tile, ptr.dtype.element_ty))
    else:
        tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=(offs_k[:, None] < K) & (offs_v[None, :] < V))


@triton.jit
def _zeros_states_kernel(
    k_ptr, v_ptr, s_ptr, borders_ptr, scalars_ptr, inv_k_ptr,
    f0_ptr, g0_ptr, h0_ptr, e0_ptr, p0_ptr, t0_ptr, m0_ptr,
    fT_ptr, gT_ptr, hT_ptr, eT_ptr, pT_ptr, tT_ptr, mT_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, seqlen_k, offset, num_early, num_borders,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The three states at every border. Grid: (tiles of V, tiles of K, batch * key heads); each walks all chunks.

    All three are sums of ``k v^T / |k|`` with other weights: K and V are loaded once, and the keys scaled three
    times. Carried are ``f = E A = F - r H`` with the mean weight ``r = E / t``, ``g = t B = G - mean H``, and
    ``h = H``. When the means move to ``r'`` and ``mean'``, the past of ``f`` gains ``(r - r') H``: each sum takes in
    weights from which the mean is off already, so what half precision rounds is as small as the difference. The
    lengths of the keys are left behind for the other kernel.
    """
    pid_v = tl.program_id(0)
    pid_k = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)  # int64: batch * stride can pass 2^31 elements
    batch, head = pair // num_heads, pair % num_heads
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    s_ptr += pair * seqlen_k
    inv_k_ptr += pair * seqlen_k
    borders_ptr += pair * num_borders * (3 * K * V)
    scalars_ptr += pair * num_borders * 4
    rows = tl.arange(0, CHUNK)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    one = (pid_v == 0) & (pid_k == 0)  # one program writes the scalars

    f = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    g = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    h = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    e, mean, t = 0.0, 0.0, 0.0  # mean = P / t
    m = tl.load(s_ptr).to(tl.float32)  # the first logit: as good an origin as any
    if INITIAL:
        e, t = tl.load(e0_ptr + pair), tl.load(t0_ptr + pair)
        mean = tl.load(p0_ptr + pair) / tl.maximum(t, 1.0)
        m = tl.where(t > 0.0, tl.load(m0_ptr + pair), m)
        h += load_state(h0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        f += load_state(f0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V) - e / tl.maximum(t, 1.0) * h
        g += load_state(g0_ptr, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V) - mean * h
    for step in range(0, num_early + num_borders):
        border = step - num_early
        first = offset + border * CHUNK
        k = load_rows(k_ptr, first, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K)
        v = load_rows(v_ptr, first, rows, seqlen_k, stride_vn, offs_v, stride_vd, V, BLOCK_V)
        s, here = _load_logits(s_ptr, first, rows, seqlen_k)
        if border >= 0:
            inv_t = 1.0 / tl.maximum(t, 1.0)
            _store_state(
                borders_ptr,
                f * (1.0 / tl.where(t > 0.0, e, 1.0)),
                3 * border,
                offs_k,
                offs_v,
                K,
                V,
                BLOCK_K,
                BLOCK_V,
            )
            _store_state(borders_ptr, g * inv_t, 3 * border + 1, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
            _store_state(borders_ptr, h * inv_t, 3 * border + 2, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
            tl.store(scalars_ptr + border * 4, e, mask=one)
            tl.store(scalars_ptr + border * 4 + 1, mean, mask=one)
            tl.store(scalars_ptr + border * 4 + 2, t, mask=one)
            tl.store(scalars_ptr + border * 4 + 3, m, mask=one)
        wide = k.to(tl.float32)
        squares = tl.sum(wide * wide, 1)
        if K > BLOCK_K:
            # The length of k is that of the whole row, not of this tile.
            for start_k in range(0, K, BLOCK_K):
                if start_k != pid_k * BLOCK_K:
                    other = start_k + tl.arange(0, BLOCK_K)
                    part = load_rows(k_ptr, first, rows, seqlen_k, stride_kn, other, stride_kd, K, BLOCK_K)
                    part = part.to(tl.float32)
                    squares += tl.sum(part * part, 1)
        inv_k = _inverse_norm(squares)
        tl.store(inv_k_ptr + first + rows, inv_k, mask=here & one)
        s = s - m
        rise = tl.maximum(tl.max(tl.where(here, s, float("-inf")), 0), 0.0)
        s = tl.where(here, s - rise, 0.0)
        w = tl.where(here, tl.exp2(s * LOG2E), 0.0)
        fade = tl.exp2(-rise * LOG2E)
        seen = t + tl.sum(here.to(tl.float32), 0)
        inv_seen = 1.0 / tl.maximum(seen, 1.0)
        old_mean, old_e = mean - rise, fade * e  # measured from the new maximum
        mean = (old_mean * t + tl.sum(s, 0)) * inv_seen
        e = old_e + tl.sum(w, 0)
        f = fade * f + (old_e / tl.maximum(t, 1.0) - e * inv_seen) * h
        f += dot(tl.trans(cast(wide * ((w - e * inv_seen) * inv_k)[:, None], v.dtype)), v)
        g += (old_mean - mean) * h
        g += dot(tl.trans(cast(wide * ((s - mean) * inv_k)[:, None], v.dtype)), v)
        h += dot(tl.trans(cast(wide * inv_k[:, None], v.dtype)), v)
        t = seen
        m += rise
    if FINAL:
        _store_state(fT_ptr, f + e / tl.maximum(t, 1.0) * h, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        _store_state(gT_ptr, g + mean * h, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        _store_state(hT_ptr, h, pair, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V)
        tl.store(eT_ptr + pair, e, mask=one)
        tl.store(pT_ptr + pair, mean * t, mask=one)
        tl.store(tT_ptr + pair, t, mask=one)
        tl.store(mT_ptr + pair, m, mask=one)


@triton.jit
def _read_border(
    q, ptr, border, offs_k, offs_v, of_a, of_b, of_h, WITH_H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``of_a Q A + of_b Q B + of_h Q H / t``, a tile of K."""
    out = of_a[:, None] * dot(q, load_state(ptr, 3 * border, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V))
    out += of_b[:, None] * dot(q, load_state(ptr, 3 * border + 1, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V))
    if WITH_H:
        out += of_h[:, None] * dot(q, load_state(ptr, 3 * border + 2, offs_k, offs_v, K, V, BLOCK_K, BLOCK_V))
    return out


@triton.jit
def _zeros_outputs_kernel(
    q_ptr, k_ptr, v_ptr, s_ptr, gate1_ptr, gateh_ptr, gate0_ptr, borders_ptr, scalars_ptr, inv_k_ptr, o_ptr,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads, groups, seqlen_q, seqlen_k, offset, num_borders,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, ZEROTH: tl.constexpr,
):  # fmt: skip
    """What each query finds at its border, and inside its chunk. Grid: (chunks, tiles of V, batch * heads).

    Row a at step ``t``, with ``c = e^(m_0 - m_a)``: of the border it takes ``gate_h c E_0 / E_a`` of A,
    ``(gate_1 - gate_h) t_0 / t`` of B, and of ``H / t_0`` what makes all weights sum to zero. Inside the chunk
    ``R_ab = gate_h (e^(s_b - m_a) / E_a - 1/t) + (gate_1 - gate_h) (s_b - mean_a) / t``, held times ``E_a``: near 1
    for the largest logit, where ``R`` itself, of size 1/t, would leave fp16's range in a long sequence.
    """
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
    borders_ptr += kv_pair * num_borders * (3 * K * V)
    scalars_ptr += (kv_pair * num_borders + border) * 4
    rows = tl.arange(0, CHUNK)
    first_q, first_k = chunk * CHUNK, offset + chunk * CHUNK
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)

    # First Q K^T and the lengths of the queries. With one tile of K, q stays where it is for the reads below.
    offs_k = tl.arange(0, BLOCK_K)
    q = load_rows(q_ptr, first_q, rows, seqlen_q, stride_qn, offs_k, stride_qd, K, BLOCK_K)
    wide = q.to(tl.float32)
    qq = tl.sum(wide * wide, 1)
    if CAUSAL:
        k = load_rows(k_ptr, first_k, rows, seqlen_k, stride_kn, offs_k, stride_kd, K, BLOCK_K)
        a = dot(q, tl.trans(k))  # [CHUNK, CHUNK]
    for start_k in range(BLOCK_K, K, BLOCK_K):
        more = start_k + offs_k
        q_more = load_rows(q_ptr, first_q, rows, seqlen_q, stride_qn, more, stride_qd, K, BLOCK_K)
        wide = q_more.to(tl.float32)
        qq += tl.sum(wide * wide, 1)
        if CAUSAL:
            k = load_rows(k_ptr, first_k, rows, seqlen_k, stride_kn, more, stride_kd, K, BLOCK_K)
            a += dot(q_more, tl.trans(k))
    inv_q = _inverse_norm(qq)

    exists = first_q + rows < seqlen_q
    gates = pair * seqlen_q + first_q + rows
    gate_1 = tl.load(gate1_ptr + gates, mask=exists, other=0.0).to(tl.float32) * inv_q
    gate_h = tl.load(gateh_ptr + gates, mask=exists, other=0.0).to(tl.float32) * inv_q
    gate_0 = tl.zeros([CHUNK], tl.float32)
    if ZEROTH:
        gate_0 = tl.load(gate0_ptr + gates, mask=exists, other=0.0).to(tl.float32) * inv_q
    of_a, of_b, of_h = gate_h, gate_1 - gate_h, gate_0  # a query at the border: of H only what gate_0 keeps
    if CAUSAL:
        e_0, mean_0, t_0 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
        s, here = _load_logits(s_ptr + kv_pair * seqlen_k, first_k, rows, seqlen_k)
        inv_k = tl.load(inv_k_ptr + kv_pair * seqlen_k + first_k + rows, mask=here, other=0.0)
        s = tl.where(here, s - tl.load(scalars_ptr + 3), 0.0)
        # Rows up to this one: prefix scans, so that no later token touches them, not even by rounding.
        top, e = tl.associative_scan(
            (tl.where(here, s * LOG2E, -1e30), tl.where(here, 1.0, 0.0)), 0, _merge_sums
        )
        m_a = tl.maximum(top, 0.0)
        fade = tl.exp2(-m_a)
        e = fade * e_0 + e * tl.exp2(top - m_a)
        t = t_0 + (tl.maximum(first_k + rows + 1, 0) - tl.maximum(first_k, 0)).to(tl.float32)
        inv_t = 1.0 / tl.maximum(t, 1.0)
        mean = (mean_0 * t_0 + tl.cumsum(s, 0)) * inv_t
        inv_e = 1.0 / tl.where(t > 0.0, e, 1.0)  # a row that sees no key: 0
        beta = (gate_1 - gate_h) * inv_t
        gamma = (gate_0 - gate_h) * inv_t - beta * mean
        # Shares of the border in the sums at this row.
        share_e, share_t = fade * e_0 * inv_e, t_0 * inv_t
        of_a *= share_e
        of_b *= share_t
        of_h = gate_h * (share_e - share_t) + of_b * (mean_0 - mean) + gate_0 * share_t
        r = gate_h[:, None] * tl.exp2(s[None, :] * LOG2E - m_a[:, None])
        r += (beta * e)[:, None] * s[None, :] + (gamma * e)[:, None]
        a *= r * inv_k[None, :]
        a = tl.where(rows[:, None] >= rows[None, :], a, 0.0)
        v = load_rows(v_ptr, first_k, rows, seqlen_k, stride_vn, offs_v, stride_vd, V, BLOCK_V)
        acc = inv_e[:, None] * dot(cast(a, v.dtype), v)
    else:
        acc = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    WITH_H: tl.constexpr = CAUSAL or ZEROTH
    acc += _read_border(
        q, borders_ptr, border, offs_k, offs_v, of_a, of_b, of_h, WITH_H, K, V, BLOCK_K, BLOCK_V
    )
    for start_k in range(BLOCK_K, K, BLOCK_K):
        more = start_k + offs_k
        q_more = load_rows(q_ptr, first_q, rows, seqlen_q, stride_qn, more, stride_qd, K, BLOCK_K)
        acc += _read_border(
            q_more, borders_ptr, border, more, offs_v, of_a, of_b, of_h, WITH_H, K, V, BLOCK_K, BLOCK_V
        )
    store_rows(o_ptr + pair * seqlen_q * V, acc, first_q, rows, seqlen_q, offs_v, V)
