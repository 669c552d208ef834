"""The selective scan, forward: one pass along time with the state in registers; segments of time side by side.

A program holds ``h [BLOCK_S, BLOCK_E]``, states by channels, and walks one segment of the sequence. With the
channels on the fast axis each thread owns whole channels with all their states: the sum over states needs no
other thread. Tokens past the end get a step of 0, which is neutral: the decay is 1 and nothing is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``, relative error of a few roundings; the hardware's logarithm near 1 has three digits.

    ``max(x, 0) + log1p(e)`` with ``e = exp(-|x|)`` in (0, 1], and ``log1p(e) = 2 artanh(w)``, ``w = e / (2 +
    e) <= 1/3``, whose odd power series is cut where a term is below a rounding.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    w = e / (2.0 + e)
    q = w * w
    series = 1.0 + q * (
        1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))))
    )
    return tl.maximum(x, 0.0) + 2.0 * w * series


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def step_size(delta, bias, here, SOFTPLUS: tl.constexpr):
    """Bias and softplus; 0 for tokens that do not exist."""
    delta += bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(here, delta, 0.0)


@triton.jit
def block_of(blocks, per_group, BLOCK_E: tl.constexpr):
    """``(group, first channel of the group, offsets inside the group)`` of this program along its second grid
    axis.

    A block never straddles two groups, since their B and C differ.
    """
    pid = tl.program_id(1)
    group = pid // blocks
    return group, group * per_group, (pid % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def load_states(ptr, index, chans, here_e, offs_s, channels, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """``[BLOCK_S, BLOCK_E]`` of the ``index``-th ``[S, E]`` matrix."""
    ptrs = ptr + tl.cast(index, tl.int64) * (S * channels) + (offs_s[:, None] * channels + chans[None, :])
    if S == BLOCK_S:
        tile = tl.load(ptrs, mask=here_e[None, :], other=0.0)
    else:
        tile = tl.load(ptrs, mask=here_e[None, :] & (offs_s[:, None] < S), other=0.0)
    return tile


@triton.jit
def store_states(ptr, tile, index, chans, here_e, offs_s, channels, S: tl.constexpr):
    ptrs = ptr + tl.cast(index, tl.int64) * (S * channels) + (offs_s[:, None] * channels + chans[None, :])
    tl.store(ptrs, tile, mask=here_e[None, :] & (offs_s[:, None] < S))


@triton.jit
def _selective_scan_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, start_ptr, out_ptr, end_ptr, sum_ptr,
    stride_ub, stride_ue, stride_un, stride_db, stride_de, stride_dn,
    stride_Bb, stride_Bg, stride_Bs, stride_Bn, stride_Cb, stride_Cg, stride_Cs, stride_Cn,
    stride_zb, stride_ze, stride_zn, stride_ob, stride_oe, stride_on,
    channels, per_group, blocks, seqlen, segment, num_segments,
    S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    START: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``h = exp(delta A) h + delta u B``; ``out = (C . h + D u) silu(z)``. Grid: (segments, blocks of channels,
    batch).

    START: begin from the segment's stored state, else from zero. OUT: read the state and write outputs. END:
    store the state after the last token; with SUM after each segment, and the sum of its steps, by which an
    earlier state decays on its way through.
    """
    pid_t = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)  # int64: batch * stride can pass 2^31 elements
    group, first_channel, in_group = block_of(blocks, per_group, BLOCK_E)
    here_e = in_group < per_group
    chans = first_channel + in_group
    offs_s = tl.arange(0, BLOCK_S)
    here_s = offs_s < S
    u_ptrs = u_ptr + batch * stride_ub + chans * stride_ue
    delta_ptrs = delta_ptr + batch * stride_db + chans * stride_de
    B_ptrs = B_ptr + batch * stride_Bb + group * stride_Bg + offs_s * stride_Bs
    C_ptrs = C_ptr + batch * stride_Cb + group * stride_Cg + offs_s * stride_Cs
    z_ptrs = z_ptr + batch * stride_zb + chans * stride_ze
    out_ptrs = out_ptr + batch * stride_ob + chans * stride_oe
    row = batch * num_segments + pid_t

    # exp(delta A) = 2^(delta A / ln 2), folded once
    A = load_states(A_ptr, 0, chans, here_e, offs_s, channels, S, BLOCK_S) * LOG2E
    bias = tl.zeros([BLOCK_E], tl.float32)
    skip = tl.zeros([BLOCK_E], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + chans, mask=here_e, other=0.0)
    if HAS_D and OUT:
        skip += tl.load(D_ptr + chans, mask=here_e, other=0.0)
    h = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    if START:
        h += load_states(start_ptr, row, chans, here_e, offs_s, channels, S, BLOCK_S)
    total = tl.zeros([BLOCK_E], tl.float32)

    first = pid_t * segment
    last = tl.minimum(first + segment, seqlen)
    for t0 in range(first, last, UNROLL):
        for i in tl.static_range(UNROLL):
            here = t0 + i < last
            t = tl.cast(t0 + i, tl.int64)  # a scalar: positions move in int64, lanes stay where they are
            mask = here_e & here
            u = tl.load(u_ptrs + t * stride_un, mask=mask, other=0.0)
            delta = tl.load(delta_ptrs + t * stride_dn, mask=mask, other=0.0)
            B = tl.load(B_ptrs + t * stride_Bn, mask=here_s & here, other=0.0)
            delta = step_size(delta.to(tl.float32), bias, here, SOFTPLUS)
            u = u.to(tl.float32)
            h = tl.exp2(delta[None, :] * A) * h + B.to(tl.float32)[:, None] * (delta * u)[None, :]
            if SUM:
                total += delta
            if OUT:
                C = tl.load(C_ptrs + t * stride_Cn, mask=here_s & here, other=0.0)
                y = tl.sum(h * C.to(tl.float32)[:, None], 0)  # after the write: a token sees itself
                if HAS_D:
                    y += skip * u
                if HAS_Z:
                    z = tl.load(z_ptrs + t * stride_zn, mask=mask, other=0.0)
                    z = z.to(tl.float32)
                    y *= z * sigmoid(z)
                tl.store(out_ptrs + t * stride_on, cast(y, out_ptr.dtype.element_ty), mask=mask)
    if END:
        if SUM:
            store_states(end_ptr, h, row, chans, here_e, offs_s, channels, S)
            tl.store(sum_ptr + row * channels + chans, total, mask=here_e)
        else:
            store_states(end_ptr, h, batch, chans, here_e & (last == seqlen), offs_s, channels, S)


@triton.jit
def _selective_scan_carry_kernel(
    state_ptr, sum_ptr, A_ptr, start_ptr, channels, per_group, blocks, num_segments,
    S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds into what each segment finds, in place. Grid: (1, blocks of channels, batch).

    ``H_{j+1} = exp(A sum_j) H_j + end_j``: segments compose as tokens do.
    """
    batch = tl.program_id(2).to(tl.int64)
    _, first_channel, in_group = block_of(blocks, per_group, BLOCK_E)
    here_e = in_group < per_group
    chans = first_channel + in_group
    offs_s = tl.arange(0, BLOCK_S)
    A = load_states(A_ptr, 0, chans, here_e, offs_s, channels, S, BLOCK_S) * LOG2E
    h = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    if START:
        h += load_states(start_ptr, batch, chans, here_e, offs_s, channels, S, BLOCK_S)
    for j in range(0, num_segments - 1):
        row = batch * num_segments + j
        end = load_states(state_ptr, row, chans, here_e, offs_s, channels, S, BLOCK_S)
        total = tl.load(sum_ptr + row * channels + chans, mask=here_e, other=0.0)
        store_states(state_ptr, h, row, chans, here_e, offs_s, channels, S)
        h = tl.exp2(total[None, :] * A) * h + end
    store_states(state_ptr, h, batch * num_segments + num_segments - 1, chans, here_e, offs_s, channels, S)
