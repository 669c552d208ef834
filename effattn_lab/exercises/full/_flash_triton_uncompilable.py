"""Triton kernels that the interpreter runs rightly and the compiler refuses, for ``full/flash/triton_forward``."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

NEG_INF = float("-inf")


def weights(s, origin):
    """Ordinary Python: it lacks @triton.jit."""
    return tl.exp(s - origin[:, None])


@triton.jit
def _load(q_ptr, kv_ptr, seqlen_q, seqlen_k, groups, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """q of this program, addresses of its rows and of the first keys of its head."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    q_tile = head * seqlen_q * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_tile, mask=rows[:, None] < seqlen_q, other=0.0)
    return q, q_tile, rows, head, (head // groups) * seqlen_k * HEAD_DIM + dims[None, :]


@triton.jit
def _scores(q, k_ptr, v_ptr, kv, start, rows, seqlen_q, seqlen_k, scale, CAUSAL: tl.constexpr,
            HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Scores of a tile before anything is hidden, what is seen, and v."""
    offs = start + tl.arange(0, BLOCK)
    k = tl.load(k_ptr + kv + offs[:, None] * HEAD_DIM, mask=offs[:, None] < seqlen_k, other=0.0)
    v = tl.load(v_ptr + kv + offs[:, None] * HEAD_DIM, mask=offs[:, None] < seqlen_k, other=0.0)
    see = (offs[None, :] < seqlen_k) & (rows[:, None] >= 0)
    if CAUSAL:
        see = see & (offs[None, :] <= rows[:, None] + seqlen_k - seqlen_q)
    return scale * tl.dot(q, tl.trans(k), input_precision="ieee"), see, v


@triton.jit
def _end(seqlen_q, seqlen_k, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    end = seqlen_k
    if CAUSAL:
        end = tl.minimum(seqlen_k, tl.program_id(0) * BLOCK + BLOCK + seqlen_k - seqlen_q)
    return end


@triton.jit
def _store(out_ptr, lse_ptr, m, l, acc, q_tile, rows, head, seqlen_q):
    l_safe = tl.where(l == 0.0, 1.0, l)
    out = (acc / l_safe[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_tile, out, mask=rows[:, None] < seqlen_q)
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log(l_safe))
    tl.store(lse_ptr + head * seqlen_q + rows, lse, mask=rows < seqlen_q)


@triton.jit
def plain_global(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlen_q, seqlen_k, groups, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    q, q_tile, rows, head, kv = _load(q_ptr, k_ptr, seqlen_q, seqlen_k, groups, HEAD_DIM, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, _end(seqlen_q, seqlen_k, CAUSAL, BLOCK), BLOCK):
        s, see, v = _scores(
            q, k_ptr, v_ptr, kv, start, rows, seqlen_q, seqlen_k, scale, CAUSAL, HEAD_DIM, BLOCK
        )
        s = tl.where(see, s, NEG_INF)
        m_new = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - origin)
        p = tl.exp(s - origin[:, None])
        l = alpha * l + tl.sum(p, 1)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    _store(out_ptr, lse_ptr, m, l, acc, q_tile, rows, head, seqlen_q)


@triton.jit
def plain_helper(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlen_q, seqlen_k, groups, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    q, q_tile, rows, head, kv = _load(q_ptr, k_ptr, seqlen_q, seqlen_k, groups, HEAD_DIM, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, _end(seqlen_q, seqlen_k, CAUSAL, BLOCK), BLOCK):
        s, see, v = _scores(
            q, k_ptr, v_ptr, kv, start, rows, seqlen_q, seqlen_k, scale, CAUSAL, HEAD_DIM, BLOCK
        )
        s = tl.where(see, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - origin)
        p = weights(s, origin)
        l = alpha * l + tl.sum(p, 1)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    _store(out_ptr, lse_ptr, m, l, acc, q_tile, rows, head, seqlen_q)


@triton.jit
def changed_dtype(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlen_q, seqlen_k, groups, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    q, q_tile, rows, head, kv = _load(q_ptr, k_ptr, seqlen_q, seqlen_k, groups, HEAD_DIM, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, _end(seqlen_q, seqlen_k, CAUSAL, BLOCK), BLOCK):
        s, see, v = _scores(
            q, k_ptr, v_ptr, kv, start, rows, seqlen_q, seqlen_k, scale, CAUSAL, HEAD_DIM, BLOCK
        )
        s = tl.where(see, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - origin)
        p = tl.exp(s - origin[:, None])
        l = (alpha * l + tl.sum(p, 1)).to(tl.float64)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    _store(out_ptr, lse_ptr, m, l.to(tl.float32), acc, q_tile, rows, head, seqlen_q)


KERNELS = {"plain global": plain_global, "plain helper": plain_helper, "changed dtype": changed_dtype}


def launch(
    fault: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one of `KERNELS`."""
    batch, num_heads, seqlen_q, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, seqlen_q, device=q.device, dtype=torch.float32)
    KERNELS[fault][(triton.cdiv(seqlen_q, 32), batch * num_heads)](
        q, k, v, out, lse, seqlen_q, k.shape[2], num_heads // k.shape[1], head_dim**-0.5,
        CAUSAL=causal, HEAD_DIM=head_dim, BLOCK=32,
    )  # fmt: skip
    return out, lse
