"""The reference itself, checked against loops, SDPA and the facts that define it."""

import math

import pytest
import torch
import torch.nn.functional as F

from effattn_lab.foundations.attention import attention, lse, repeat_kv, visible


def qkv(batch=2, hq=2, hkv=2, nq=5, nk=5, dim=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, hq, nq, dim, generator=g, dtype=dtype),
        torch.randn(batch, hkv, nk, dim, generator=g, dtype=dtype),
        torch.randn(batch, hkv, nk, dim, generator=g, dtype=dtype),
    )


def by_hand(q, k, v, causal, window_size):
    """Four loops and no tensor algebra."""
    batch, hq, nq, dim = q.shape
    hkv, nk = k.shape[1], k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(hq):
            for i in range(nq):
                position = i + nk - nq
                keys = [
                    j
                    for j in range(nk)
                    if (not causal or j <= position)
                    and (window_size is None or abs(position - j) < window_size)
                ]
                if not keys:
                    continue
                g = h // (hq // hkv)
                s = [float(q[b, h, i] @ k[b, g, j]) / math.sqrt(dim) for j in keys]
                top = max(s)
                w = [math.exp(x - top) for x in s]
                out[b, h, i] = sum(wi * v[b, g, j] for wi, j in zip(w, keys)) / sum(w)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [None, 1, 3])
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (5, 5), (2, 7), (7, 2), (1, 6)])
@pytest.mark.parametrize(("hq", "hkv"), [(2, 2), (4, 2), (3, 1)])
def test_against_loops(nq, nk, hq, hkv, causal, window_size):
    q, k, v = qkv(hq=hq, hkv=hkv, nq=nq, nk=nk)
    got = attention(q, k, v, causal=causal, window_size=window_size)
    torch.testing.assert_close(got, by_hand(q, k, v, causal, window_size), rtol=0, atol=1e-14)


def test_square_causal_is_sdpa():
    q, k, v = qkv(hq=4, hkv=2, nq=33, nk=33, dim=16)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), want, rtol=0, atol=1e-14)


def test_offset_rule_is_what_a_cache_needs():
    """The last rows of the full causal output are what decoding with a cache must give."""
    q, k, v = qkv(nq=9, nk=9)
    full = attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q[:, :, 6:], k, v, causal=True), full[:, :, 6:], rtol=0, atol=1e-15)


def test_no_key_gives_zero_and_minus_infinity():
    q, k, v = qkv(nq=4, nk=1)
    q.requires_grad_()
    out = attention(q, k, v, causal=True)
    assert (out[:, :, :3] == 0).all()
    assert torch.isneginf(lse(q, k, causal=True)[:, :, :3]).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_large_scores():
    q, k, v = qkv(dtype=torch.float32)
    assert torch.isfinite(attention(1e4 * q, 1e4 * k, v)).all()


def test_half_precision_is_rounded_once():
    q, k, v = qkv(nq=64, nk=64, dim=32)
    half = [x.half() for x in (q, k, v)]
    want = attention(*(x.double() for x in half))
    got = attention(*half)
    assert got.dtype == torch.float16
    # One rounding of the result to fp16: half a unit in the last place, 2**-11 relative.
    torch.testing.assert_close(got.double(), want, rtol=2**-11 + 1e-6, atol=1e-7)


def test_mask_and_scale():
    q, k, v = qkv()
    eye = torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(attention(q, k, v, mask=eye), v)
    torch.testing.assert_close(attention(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand_as(v))


def test_shifting_the_scores_shifts_only_lse():
    q, k, v = qkv()
    ones = torch.ones_like(q[..., :1])
    q1, k0, k1 = torch.cat([q, ones], -1), torch.cat([k, 0 * ones], -1), torch.cat([k, 3 * ones], -1)
    v1 = torch.cat([v, ones], -1)
    torch.testing.assert_close(attention(q1, k1, v1, scale=1.0), attention(q1, k0, v1, scale=1.0))
    torch.testing.assert_close(lse(q1, k1, scale=1.0), lse(q1, k0, scale=1.0) + 3)


def test_visible_counts():
    assert visible(3, 5, causal=True).sum(1).tolist() == [3, 4, 5]
    assert visible(5, 3, causal=True).sum(1).tolist() == [0, 0, 1, 2, 3]
    assert visible(6, 6, causal=True, window_size=2).sum(1).tolist() == [1, 2, 2, 2, 2, 2]
    assert visible(4, 4, window_size=2).sum(1).tolist() == [2, 3, 3, 2]


def test_head_map():
    x = torch.arange(2.0).view(1, 2, 1, 1)
    assert repeat_kv(x, 3).flatten().tolist() == [0, 0, 0, 1, 1, 1]
