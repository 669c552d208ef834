"""Wrong Triton kernels for ``full/flash/triton_forward``: one kernel whose FAULT is chosen at compile time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def faulty_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scratch_ptr,
    seqlen_q, seqlen_k, groups, heads_kv, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    q_tile = head * seqlen_q * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_tile, mask=rows[:, None] < seqlen_q, other=0.0)
    kv_head = head // groups
    if FAULT == "heads tiled":
        kv_head = head // (groups * heads_kv) * heads_kv + head % heads_kv
    kv_base = kv_head * seqlen_k * HEAD_DIM
    offset = seqlen_k - seqlen_q
    if FAULT == "top-left":
        offset = 0
    if FAULT == "no scale":
        scale = 1.0
    if FAULT == "scale twice":
        scale = scale * scale

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if FAULT == "m starts at 0":
        m = tl.zeros([BLOCK_M], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    end = seqlen_k
    if CAUSAL and FAULT != "reads every tile":
        end = tl.minimum(seqlen_k, tl.program_id(0) * BLOCK_M + BLOCK_M + seqlen_k - seqlen_q)
        if FAULT == "diagonal tile skipped":
            end = tl.maximum(end - BLOCK_N, 0)
    if FAULT == "last keys dropped":
        end = end // BLOCK_N * BLOCK_N
    if FAULT == "nothing added":
        end = 0
    if CAUSAL and FAULT == "end without offset":
        end = tl.minimum(seqlen_k, tl.program_id(0) * BLOCK_M + BLOCK_M)
    for start in range(0, end, BLOCK_N):
        offs = start + cols
        kv_tile = kv_base + offs[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_ptr + kv_tile, mask=offs[:, None] < seqlen_k, other=0.0)
        v = tl.load(v_ptr + kv_tile, mask=offs[:, None] < seqlen_k, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        see = offs[None, :] < seqlen_k
        if FAULT == "padding counted":
            see = offs[None, :] >= 0
        if CAUSAL:
            if FAULT == "mask too strict":
                see = see & (offs[None, :] < rows[:, None] + offset)
            elif FAULT == "mask too loose":
                see = see & (offs[None, :] <= rows[:, None] + offset + 1)
            elif FAULT == "mask local":
                see = see & (cols[None, :] <= rows[:, None] + offset)
            elif FAULT != "mask forgotten":
                see = see & (offs[None, :] <= rows[:, None] + offset)
        hidden = -1.0e6 if FAULT == "finite mask" else float("-inf")
        s = tl.where(see, s, hidden)
        m_new = tl.maximum(m, tl.max(s, 1))
        if FAULT == "no max":
            m_new = tl.zeros([BLOCK_M], tl.float32)
        if FAULT == "tile max only":
            m_new = tl.max(s, 1)
        origin = m_new
        if FAULT != "no guard":
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - origin)
        p = tl.exp(s - origin[:, None])
        if FAULT == "origin across columns":
            p = tl.exp(s - origin[None, :])
        if FAULT == "base 2":
            alpha = tl.exp2(m - origin)
            p = tl.exp2(s - origin[:, None])
        if FAULT == "inverse factor":
            alpha = tl.where(m == float("-inf"), 0.0, tl.exp(origin - m))
        if FAULT == "scores stored":
            tile = head * seqlen_q * seqlen_k + rows[:, None] * seqlen_k + offs[None, :]
            inside = (rows[:, None] < seqlen_q) & (offs[None, :] < seqlen_k)
            tl.store(scratch_ptr + tile, p, mask=inside)
            p = tl.load(scratch_ptr + tile, mask=inside, other=0.0)
        l = (l if FAULT == "l not rescaled" else alpha * l) + tl.sum(p, 1)
        if FAULT == "acc not rescaled":
            alpha = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if FAULT == "half":
            acc = acc.to(tl.float16).to(tl.float32)
        if FAULT == "divided inside":
            acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        if FAULT != "m not updated":
            m = m_new

    l_safe = tl.where(l == 0.0, 1.0, l)
    out = acc / l_safe[:, None]
    if FAULT == "no division":
        out = acc
    tl.store(out_ptr + q_tile, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] < seqlen_q)
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log(l_safe))
    if FAULT == "lse without m":
        lse = tl.log(l)
    if FAULT == "lse in base 2":
        lse = lse / 0.6931471805599453
    tl.store(lse_ptr + head * seqlen_q + rows, lse, mask=rows < seqlen_q)


def launch(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `faulty_kernel`; ``fault=""`` has no fault."""
    batch, num_heads, seqlen_q, head_dim = q.shape
    seqlen_k, heads_kv, block = k.shape[2], k.shape[1], 32
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, device=q.device, dtype=torch.float32)
    size = batch * num_heads * seqlen_q * seqlen_k if fault == "scores stored" else 1
    scratch = torch.empty(size, device=q.device, dtype=torch.float32)
    faulty_kernel[(triton.cdiv(seqlen_q, block), batch * num_heads)](
        q, k, v, out, lse, scratch, seqlen_q, seqlen_k, num_heads // heads_kv, heads_kv, head_dim**-0.5,
        CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_M=block, BLOCK_N=block, FAULT=fault,
    )  # fmt: skip
    return out, lse
