"""Readable flash attention against the reference, in float64 and float32, forward and backward."""

import math

import pytest
import torch

from effattn_lab.foundations.attention import attention, lse
from effattn_lab.full.flash import backward_tile, flash_attention, merge, online_softmax, tile_step

SHAPES = {  # B, Hq, Hkv, Nq, Nk, D
    "one": (1, 1, 1, 1, 1, 4),
    "square": (2, 2, 2, 64, 64, 16),
    "ragged": (1, 2, 2, 63, 65, 16),
    "grouped": (2, 6, 2, 33, 33, 12),
    "decode": (2, 4, 1, 1, 111, 8),
    "fewer-keys": (1, 2, 2, 40, 17, 8),
}


def inputs(shape, dtype=torch.float64, spread=1.0):
    batch, hq, hkv, nq, nk, dim = SHAPES[shape]
    g = torch.Generator().manual_seed(1)
    q = spread * torch.randn(batch, hq, nq, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, hkv, nk, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, hkv, nk, dim, generator=g, dtype=torch.float64)
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("blocks", [(1, 1), (16, 24), (64, 64), (200, 7)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, blocks, causal):
    q, k, v = inputs(shape, spread=4.0)  # spread-out scores: near-uniform attention would hide errors
    out, got_lse = flash_attention(
        q, k, v, causal=causal, block_q=blocks[0], block_k=blocks[1], return_lse=True
    )
    want = attention(q, k, v, causal=causal)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(got_lse, lse(q, k, causal=causal), rtol=0, atol=1e-13)
    do = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do)
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradcheck_with_lse():
    q, k, v = (x.detach()[..., :3].requires_grad_() for x in inputs("fewer-keys"))
    q, k, v = (x[:, :, :6].detach().requires_grad_() for x in (q, k, v))
    run = lambda q, k, v: flash_attention(q, k, v, causal=True, block_q=4, block_k=3, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype):
    """At most twice the error of the plain reference in the same dtype, both against float64."""
    q, k, v = inputs("square", dtype)
    truth = attention(q.double(), k.double(), v.double(), causal=True)
    plain = (attention(q, k, v, causal=True).double() - truth).abs().max()
    tiled = (flash_attention(q, k, v, causal=True, block_q=16, block_k=16).double() - truth).abs().max()
    assert tiled <= 2 * plain


def test_large_scores_do_not_overflow():
    q, k, v = inputs("square", torch.float32)
    out, log_sum = flash_attention(1e4 * q, k, v, return_lse=True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(log_sum).all()


def test_saves_nothing_quadratic():
    q, k, v = inputs("square")
    out = flash_attention(q, k, v)
    saved = max(t.numel() for t in out.grad_fn.saved_tensors)
    assert saved == q.numel() < q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_online_softmax(block):
    s = 30 * torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    s[1, :20] = -math.inf
    s[2] = -math.inf
    probs, got = online_softmax(s, block)
    want = torch.softmax(s, -1)
    want[2] = 0
    torch.testing.assert_close(probs, want, rtol=0, atol=1e-15)
    torch.testing.assert_close(got, torch.logsumexp(s, -1), rtol=1e-15, atol=0)


def test_merge_law():
    q, k, v = inputs("decode")
    parts = [
        flash_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True)
        for a, b in ((0, 1), (1, 60), (60, 111))
    ]
    whole = flash_attention(q, k, v, return_lse=True)
    for x, y, z in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        left = merge(*merge(*parts[x], *parts[y]), *parts[z])
        right = merge(*parts[x], *merge(*parts[y], *parts[z]))
        for got in (left, right):
            torch.testing.assert_close(got[0], whole[0], rtol=0, atol=1e-14)
            torch.testing.assert_close(got[1], whole[1], rtol=0, atol=1e-14)


def test_merge_with_an_empty_part():
    o, log_sum = torch.randn(2, 3), torch.randn(2)
    empty = torch.zeros(2, 3), torch.full((2,), -math.inf)
    torch.testing.assert_close(merge(o, log_sum, *empty), (o, log_sum))
    both = merge(*empty, *empty)
    assert (both[0] == 0).all()
    assert torch.isneginf(both[1]).all()


def test_tile_step_keeps_its_invariant():
    g = torch.Generator().manual_seed(4)
    s = 5 * torch.randn(3, 12, generator=g, dtype=torch.float64)
    v = torch.randn(12, 2, generator=g, dtype=torch.float64)
    state = (
        torch.full((3,), -math.inf, dtype=s.dtype),
        torch.zeros(3, dtype=s.dtype),
        torch.zeros(3, 2, dtype=s.dtype),
    )
    for j in range(0, 12, 5):
        state = tile_step(*state, s[:, j : j + 5], v[j : j + 5])
        seen = s[:, : j + 5]
        weights = torch.exp(seen - state[0][:, None])
        torch.testing.assert_close(state[0], seen.amax(-1))
        torch.testing.assert_close(state[1], weights.sum(-1))
        torch.testing.assert_close(state[2], weights @ v[: j + 5])


def test_rows_of_ds_sum_to_zero():
    """Softmax does not notice a constant added to its scores, so the gradient has no such component."""
    q, k, v = (x.detach() for x in inputs("square"))
    scale = 0.25
    s = scale * q @ k.transpose(-1, -2)
    log_sum = torch.logsumexp(s, -1)
    p = torch.exp(s - log_sum[..., None])
    do = torch.randn_like(q)
    delta = (do * (p @ v)).sum(-1)
    ones = torch.ones_like(k)  # dQ = scale dS K: with K all ones it is the row sum of dS
    dq, _, _ = backward_tile(q, ones, v, do, s, log_sum, delta, scale)
    assert dq.abs().max() < 1e-12
