"""The selective scan, backward: a pass forwards for what *reads* the state, a pass backwards for what *writes*
it.

With ``dy = dout silu(z)``, ``g_t`` the gradient of the loss by ``h_t`` through every later token too, ``q_t =
B_t . g_t``:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
    dC_t = sum over channels of dy_t h_t              dB_t = sum over channels of delta_t u_t g_t
    w_t = exp(delta_t A) h_{t-1} g_t                  dA = sum_t delta_t w_t
    du_t = delta_t q_t + D dy_t                       ddelta_t = u_t q_t + A . w_t

The first pass computes the states again, forwards, uses them for dC and dz, and leaves every CHUNK-th one
behind. The second runs backwards and needs ``h_{t-1}`` beside ``g_t``: it makes the CHUNK - 1 states that
follow a stored one and holds them in registers. A longer chunk stores less and holds more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, cast
from ._selective_ssm_fwd import block_of, load_states, sigmoid, softplus, step_size, store_states


@triton.jit
def _selective_scan_dreads_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, start_ptr, do_ptr, border_ptr,
    dz_ptr, dC_ptr, dD_ptr,
    stride_ub, stride_ue, stride_un, stride_db, stride_de, stride_dn,
    stride_Bb, stride_Bg, stride_Bs, stride_Bn, stride_Cb, stride_Cg, stride_Cs, stride_Cn,
    stride_zb, stride_ze, stride_zn, stride_ob, stride_oe, stride_on, stride_gb, stride_ge, stride_gn,
    channels, per_group, blocks, seqlen, segment, num_chunks,
    S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """dC, dz, dD and the state before every CHUNK tokens. Grid: (segments, blocks of channels, batch).

    stride_o: of the output's gradient; stride_g: of du, ddelta and dz. dC, and dB below, are sums over
    channels: each program stores its own part, ``[batch, block, N, S]``, and the caller adds the parts, in an
    order that does not depend on which program came first. START as in the forward kernel.
    """
    pid_t = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
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
    do_ptrs = do_ptr + batch * stride_ob + chans * stride_oe
    dz_ptrs = dz_ptr + batch * stride_gb + chans * stride_ge
    part = (batch * tl.num_programs(1) + tl.program_id(1)) * seqlen
    row = batch * tl.num_programs(0) + pid_t

    A = load_states(A_ptr, 0, chans, here_e, offs_s, channels, S, BLOCK_S) * LOG2E
    bias = tl.zeros([BLOCK_E], tl.float32)
    skip = tl.zeros([BLOCK_E], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + chans, mask=here_e, other=0.0)
    if HAS_D:
        skip += tl.load(D_ptr + chans, mask=here_e, other=0.0)
    dskip = tl.zeros([BLOCK_E], tl.float32)
    h = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    if START:
        h += load_states(start_ptr, row, chans, here_e, offs_s, channels, S, BLOCK_S)

    first = pid_t * segment
    last = tl.minimum(first + segment, seqlen)
    for begin in range(first, last, CHUNK):
        store_states(border_ptr, h, batch * num_chunks + begin // CHUNK, chans, here_e, offs_s, channels, S)
        for position in range(begin, tl.minimum(begin + CHUNK, last)):
            t = tl.cast(position, tl.int64)
            delta = tl.load(delta_ptrs + t * stride_dn, mask=here_e, other=0.0).to(tl.float32)
            delta = step_size(delta, bias, here_e, SOFTPLUS)
            u = tl.load(u_ptrs + t * stride_un, mask=here_e, other=0.0).to(tl.float32)
            B = tl.load(B_ptrs + t * stride_Bn, mask=here_s, other=0.0).to(tl.float32)
            h = tl.exp2(delta[None, :] * A) * h + B[:, None] * (delta * u)[None, :]
            dy = tl.load(do_ptrs + t * stride_on, mask=here_e, other=0.0).to(tl.float32)
            if HAS_Z:
                C = tl.load(C_ptrs + t * stride_Cn, mask=here_s, other=0.0).to(tl.float32)
                z = tl.load(z_ptrs + t * stride_zn, mask=here_e, other=0.0).to(tl.float32)
                s = sigmoid(z)
                y = tl.sum(h * C[:, None], 0) + skip * u
                dz = dy * y * s * (1.0 + z * (1.0 - s))
                tl.store(dz_ptrs + t * stride_gn, cast(dz, dz_ptr.dtype.element_ty), mask=here_e)
                dy *= z * s
            if HAS_D:
                dskip += dy * u
            tl.store(dC_ptr + (part + t) * S + offs_s, tl.sum(h * dy[None, :], 1), mask=here_s)
    if HAS_D:
        tl.store(dD_ptr + row * channels + chans, dskip, mask=here_e)


@triton.jit
def _selective_scan_dwrites_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, border_ptr, do_ptr, end_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dbias_ptr, dstart_ptr,
    stride_ub, stride_ue, stride_un, stride_db, stride_de, stride_dn,
    stride_Bb, stride_Bg, stride_Bs, stride_Bn, stride_Cb, stride_Cg, stride_Cs, stride_Cn,
    stride_zb, stride_ze, stride_zn, stride_ob, stride_oe, stride_on, stride_gb, stride_ge, stride_gn,
    channels, per_group, blocks, seqlen, num_chunks,
    S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """du, ddelta, dA, dB, the bias's and the initial state's gradient. Grid: (1, blocks of channels, batch).

    END: the final state was used, and its gradient is where ``g`` begins.
    """
    batch = tl.program_id(2).to(tl.int64)
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
    do_ptrs = do_ptr + batch * stride_ob + chans * stride_oe
    du_ptrs = du_ptr + batch * stride_gb + chans * stride_ge
    ddelta_ptrs = ddelta_ptr + batch * stride_gb + chans * stride_ge
    part = (batch * tl.num_programs(1) + tl.program_id(1)) * seqlen

    A = load_states(A_ptr, 0, chans, here_e, offs_s, channels, S, BLOCK_S) * LOG2E
    bias = tl.zeros([BLOCK_E], tl.float32)
    skip = tl.zeros([BLOCK_E], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + chans, mask=here_e, other=0.0)
    if HAS_D:
        skip += tl.load(D_ptr + chans, mask=here_e, other=0.0)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    dA = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    carry = tl.zeros(
        [BLOCK_S, BLOCK_E], tl.float32
    )  # exp(delta_{t+1} A) g_{t+1}: what the later tokens ask of h_t
    if END:
        carry += load_states(end_ptr, batch, chans, here_e, offs_s, channels, S, BLOCK_S)

    for c in range(0, num_chunks):
        begin = (num_chunks - 1 - c) * CHUNK
        border = batch * num_chunks + num_chunks - 1 - c
        states = (load_states(border_ptr, border, chans, here_e, offs_s, channels, S, BLOCK_S),)
        for i in tl.static_range(CHUNK - 1):
            t = tl.cast(begin + i, tl.int64)
            here = begin + i < seqlen
            delta = tl.load(delta_ptrs + t * stride_dn, mask=here_e & here, other=0.0).to(tl.float32)
            delta = step_size(delta, bias, here, SOFTPLUS)
            u = tl.load(u_ptrs + t * stride_un, mask=here_e & here, other=0.0).to(tl.float32)
            B = tl.load(B_ptrs + t * stride_Bn, mask=here_s & here, other=0.0).to(tl.float32)
            h = tl.exp2(delta[None, :] * A) * states[i] + B[:, None] * (delta * u)[None, :]
            states = states + (h,)  # noqa: RUF005  (Triton unpacks no tuples)
        for i in tl.static_range(CHUNK - 1, -1, -1):
            t = tl.cast(begin + i, tl.int64)
            here = begin + i < seqlen
            mask = here_e & here
            raw = tl.load(delta_ptrs + t * stride_dn, mask=mask, other=0.0).to(tl.float32) + bias
            delta = raw
            if SOFTPLUS:
                delta = softplus(raw)
            delta = tl.where(here, delta, 0.0)
            u = tl.load(u_ptrs + t * stride_un, mask=mask, other=0.0).to(tl.float32)
            B = tl.load(B_ptrs + t * stride_Bn, mask=here_s & here, other=0.0).to(tl.float32)
            C = tl.load(C_ptrs + t * stride_Cn, mask=here_s & here, other=0.0).to(tl.float32)
            dy = tl.load(do_ptrs + t * stride_on, mask=mask, other=0.0).to(tl.float32)
            if HAS_Z:
                z = tl.load(z_ptrs + t * stride_zn, mask=mask, other=0.0).to(tl.float32)
                dy *= z * sigmoid(z)
            g = C[:, None] * dy[None, :] + carry
            tl.store(
                dB_ptr + (part + t) * S + offs_s, tl.sum(g * (delta * u)[None, :], 1), mask=here_s & here
            )
            q = tl.sum(B[:, None] * g, 0)
            du = delta * q
            if HAS_D:
                du += skip * dy
            tl.store(du_ptrs + t * stride_gn, cast(du, du_ptr.dtype.element_ty), mask=mask)
            carry = tl.exp2(delta[None, :] * A) * g
            w = carry * states[i]
            dA += delta[None, :] * w
            ddelta = u * q + tl.sum(A * w, 0) / LOG2E
            if SOFTPLUS:
                ddelta *= sigmoid(raw)
            ddelta = tl.where(here, ddelta, 0.0)
            if HAS_BIAS:
                dbias += ddelta
            tl.store(ddelta_ptrs + t * stride_gn, cast(ddelta, ddelta_ptr.dtype.element_ty), mask=mask)
    store_states(dA_ptr, dA, batch, chans, here_e, offs_s, channels, S)
    store_states(dstart_ptr, carry, batch, chans, here_e, offs_s, channels, S)
    if HAS_BIAS:
        tl.store(dbias_ptr + batch * channels + chans, dbias, mask=here_e)
