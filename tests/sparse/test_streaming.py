"""Sinks and window: mask, tiles and cache; positions inside the cache."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.linear.rotary import rotate
from effattn_lab.sparse.cache import FullCache, captured_mass, gather_attention
from effattn_lab.sparse.streaming import (
    StreamingCache,
    streaming_attention,
    streaming_attention_blocked,
    streaming_attention_reindexed,
)

BASE = 100.0


def draw(n, seed=0, dtype=torch.float64, dim=16):
    """Queries, keys and values before RoPE, four query heads on two."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, n, dim, generator=g, dtype=dtype)
    return q, *(torch.randn(2, 2, n, dim, generator=g, dtype=dtype) for _ in range(2))


def fed(cache, q, k, v, budget=None):
    """Token by token, as a model would: keys and queries rotated by their positions in the text."""
    outs = []
    for t in range(k.shape[2]):
        at = torch.tensor([t])
        cache.append(rotate(k[:, :, t : t + 1], at, base=BASE), v[:, :, t : t + 1])
        outs.append(cache.attend(rotate(q[:, :, t : t + 1], at, base=BASE), budget))
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("sinks", "window"), [(4, 16), (0, 1), (1, 64), (4, 500)])
def test_tiles_equal_the_mask(n, sinks, window):
    q, k, v = draw(n)
    want = streaming_attention(q, k, v, sinks=sinks, window=window)
    got = streaming_attention_blocked(q, k, v, sinks=sinks, window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    if sinks + window >= n:
        torch.testing.assert_close(want, attention(q, k, v, causal=True), rtol=0, atol=1e-13)


def test_before_the_first_eviction_it_is_full_attention():
    q, k, v = draw(20)
    at = torch.arange(20)
    want = attention(rotate(q, at, base=BASE), rotate(k, at, base=BASE), v, causal=True)
    for cache in (StreamingCache(4, rope_base=BASE), StreamingCache(4, rope_base=None), FullCache()):
        torch.testing.assert_close(fed(cache, q, k, v, 20), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("budget", [5, 12])
def test_positions_are_places_in_the_cache(sinks, budget):
    """Against a rule written out: kept tokens in order, key c rotated by c, the query by its own place."""
    n = 30
    q, k, v = draw(n, 1)
    got = fed(StreamingCache(sinks, rope_base=BASE), q, k, v, budget)
    for t in range(n):
        kept = [j for j in range(t + 1) if j < sinks or t - j < budget - sinks]
        place = torch.arange(len(kept))
        query = rotate(q[:, :, t : t + 1], place[-1:], base=BASE)
        want = attention(query, rotate(k[:, :, kept], place, base=BASE), v[:, :, kept])
        torch.testing.assert_close(got[:, :, t : t + 1], want, rtol=0, atol=1e-12)
    example = [j for j in range(10) if j < 4 or 9 - j < 4]
    assert example == [0, 1, 2, 3, 6, 7, 8, 9], "the example of the paper's figure: 6, 7, 8 and the query 9"


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize(("n", "budget"), [(1, 5), (30, 5), (30, 12), (30, 30), (12, 40)])
def test_all_at_once_equals_the_cache(n, sinks, budget):
    q, k, v = draw(n, 7)
    at = torch.arange(n)
    want = fed(StreamingCache(sinks, rope_base=BASE), q, k, v, budget)
    q, k = rotate(q, at, base=BASE), rotate(k, at, base=BASE)
    got = streaming_attention_reindexed(q, k, v, sinks=sinks, budget=budget, rope_base=BASE)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if sinks == 0:
        stays = streaming_attention(q, k, v, sinks=0, window=budget)
        torch.testing.assert_close(got, stays, rtol=0, atol=1e-12)


def test_without_a_base_positions_stay():
    n, budget = 30, 9
    q, k, v = draw(n, 2)
    got = fed(StreamingCache(4, rope_base=None), q, k, v, budget)
    at = torch.arange(n)
    want = streaming_attention(
        rotate(q, at, base=BASE), rotate(k, at, base=BASE), v, sinks=4, window=budget - 4
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    turned = fed(StreamingCache(4, rope_base=BASE), q, k, v, budget)
    assert (turned[:, :, -1] - got[:, :, -1]).abs().max() > 1e-3, "and that makes a difference"


def test_a_prompt_at_once_or_token_by_token():
    q, k, v = draw(25, 3)
    at = torch.arange(25)
    keys, queries = rotate(k, at, base=BASE), rotate(q, at, base=BASE)
    one, many = StreamingCache(2, rope_base=BASE), StreamingCache(2, rope_base=BASE)
    one.append(keys, v)
    for t in range(25):
        many.append(keys[:, :, t : t + 1], v[:, :, t : t + 1])
    torch.testing.assert_close(one.attend(queries[:, :, -1:], 8), many.attend(queries[:, :, -1:], 8))
    assert one.kept == many.kept == 8
    assert one.length == 25
    assert one.read == 8.0
    assert one.attend(queries[:, :, -1:]).shape == (2, 4, 1, 16), "no budget: what is kept"


def test_evicted_tokens_are_gone():
    q, k, v = draw(12, 4)
    cache = StreamingCache(2, rope_base=BASE)
    fed(cache, q, k, v, 5)
    again = cache.attend(q[:, :, -1:], 12)
    assert cache.kept == 5
    torch.testing.assert_close(again, cache.attend(q[:, :, -1:], 5))


def test_captured_mass_bounds_the_error():
    q, k, v = draw(50, 5)
    q = q[:, :, -1:]
    index = torch.stack([torch.randperm(50)[:20] for _ in range(8)]).view(2, 4, 20)
    out, mass = gather_attention(q, k, v, index), captured_mass(q, k, index)
    full = attention(q, k, v)
    values = v.repeat_interleave(2, dim=1)
    spread = torch.cdist(values, values).amax(dim=(-1, -2))
    assert ((out - full)[:, :, 0].norm(dim=-1) <= (1 - mass) * spread + 1e-12).all()
    chosen = torch.zeros(2, 4, 50, dtype=torch.bool).scatter(2, index, True)
    rest = attention(q, k, v, mask=~chosen[:, :, None])
    identity = (1 - mass)[..., None, None] * (rest - out)
    torch.testing.assert_close(full - out, identity, rtol=0, atol=1e-12)
    everything = torch.arange(50).expand(2, 4, -1)
    torch.testing.assert_close(captured_mass(q, k, everything), torch.ones(2, 4, dtype=torch.float64))
    valid = torch.zeros(2, 4, 20, dtype=torch.bool)
    assert torch.equal(gather_attention(q, k, v, index, valid=valid), torch.zeros_like(q))
    assert torch.equal(captured_mass(q, k, index, valid=valid), torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q, k, v = draw(40, 6)
    want = fed(StreamingCache(4, rope_base=BASE), q, k, v, 10)
    got = fed(StreamingCache(4, rope_base=BASE), q.to(dtype), k.to(dtype), v.to(dtype), 10)
    assert got.dtype == dtype
    assert (got - want).abs().max() < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: StreamingCache(-1, rope_base=None), "sinks: expected an integer of at least 0, got -1"),
        (lambda: _reindexed(3, 4, 9), "q: expected as many queries as keys .4., got 3"),
        (lambda: _reindexed(4, 4, 4), "budget: expected more than the 4 sinks, got 4"),
        (lambda: StreamingCache(rope_base=1.0), "rope_base: expected a number above 1 or None, got 1.0"),
        (lambda: FullCache().attend(torch.zeros(1, 1, 1, 4)), "cache: expected at least one token"),
        (lambda: _one().attend(torch.zeros(1, 1, 2, 4), 9), "q: expected one query"),
        (lambda: _one().attend(torch.zeros(1, 1, 1, 4), 0), "budget: expected an integer of at least 1, got 0"),
        (lambda: _one().attend(torch.zeros(1, 1, 1, 4), 4), "budget: expected more than the 4 sinks, got 4"),
        (lambda: _one().append(*[torch.zeros(1, 2, 1, 4)] * 2), "k: expected the batch, heads and head_dim"),
        (lambda: streaming_attention(*[torch.zeros(1, 1, 2, 4)] * 3, window=0), "window: expected an integer"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _reindexed(nq, nk, budget):
    k = torch.zeros(1, 1, nk, 4)
    return streaming_attention_reindexed(torch.zeros(1, 1, nq, 4), k, k, budget=budget, rope_base=BASE)


def _one():
    cache = StreamingCache(rope_base=None)
    cache.append(*[torch.zeros(1, 1, 1, 4)] * 2)
    return cache
