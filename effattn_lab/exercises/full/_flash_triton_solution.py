"""A solution of ``full/flash/triton_forward``: the kernel and its launcher. Needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    seqlen_q, seqlen_k, groups, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. Tensors are contiguous [B, H, N, D]."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    q_tile = head * seqlen_q * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_tile, mask=rows[:, None] < seqlen_q, other=0.0)
    kv_base = (head // groups) * seqlen_k * HEAD_DIM

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    end = seqlen_k
    if CAUSAL:
        last_position = tl.program_id(0) * BLOCK_M + BLOCK_M - 1 + seqlen_k - seqlen_q
        end = tl.minimum(seqlen_k, last_position + 1)
    for start in range(0, end, BLOCK_N):
        offs = start + cols
        kv_tile = kv_base + offs[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_ptr + kv_tile, mask=offs[:, None] < seqlen_k, other=0.0)
        v = tl.load(v_ptr + kv_tile, mask=offs[:, None] < seqlen_k, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        see = offs[None, :] < seqlen_k
        if CAUSAL:
            see = see & (offs[None, :] <= rows[:, None] + seqlen_k - seqlen_q)
        s = tl.where(see, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - origin)
        p = tl.exp(s - origin[:, None])
        l = alpha * l + tl.sum(p, 1)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new

    l_safe = tl.where(l == 0.0, 1.0, l)
    out = acc / l_safe[:, None]
    tl.store(out_ptr + q_tile, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] < seqlen_q)
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log(l_safe))
    tl.store(lse_ptr + head * seqlen_q + rows, lse, mask=rows < seqlen_q)


def flash_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, block_m: int = 32, block_n: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `flash_kernel`: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D] give out and lse [B, Hq, Nq]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernel computes addresses from the shape
    batch, num_heads, seqlen_q, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, device=q.device, dtype=torch.float32)
    flash_kernel[(triton.cdiv(seqlen_q, block_m), batch * num_heads)](
        q, k, v, out, lse, seqlen_q, k.shape[2], num_heads // k.shape[1], head_dim**-0.5,
        CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return out, lse
