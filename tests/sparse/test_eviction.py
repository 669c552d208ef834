"""H2O and SnapKV against their rules written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.sparse.eviction import H2OCache, SnapKVCache, attention_received


def draw(n, seed=0, heads=4, kv_heads=2, dim=8):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, n, dim, generator=g, dtype=torch.float64)
    return q, *(torch.randn(1, kv_heads, n, dim, generator=g, dtype=torch.float64) for _ in range(2))


def probabilities(q, k):
    """Causal attention ``[B, Hq, N, N]``, plainly."""
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2) * q.shape[3] ** -0.5
    return s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("n", [1, 5, 300])
@pytest.mark.parametrize("last", [None, 1, 3, 400])
def test_attention_received(n, last):
    q, k, _ = draw(n)
    a = probabilities(q, k)[:, :, max(0, n - (last or n)) :]
    want = a.sum(2).unflatten(1, (2, 2)).sum(2)
    got = attention_received(q, k, last=last)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert got.sum(-1) == pytest.approx(2 * min(last or n, n))


@pytest.mark.parametrize("heavy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prompt", [0, 14])
def test_h2o_by_its_rule(heavy, prompt):
    """One KV head at a time, lists instead of tensors."""
    n, budget = 30, 9
    q, k, v = draw(n, 1)
    cache = H2OCache(heavy)
    if prompt:
        cache.prefill(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    state = []
    for head in range(2):
        sigma = [0.0] * prompt
        if prompt:
            sigma = (
                probabilities(q[:, :, :prompt], k[:, :, :prompt])[0, 2 * head : 2 * head + 2]
                .sum((0, 1))
                .tolist()
            )
        state.append((list(range(prompt)), sigma))
    recent = max(1, budget - int(heavy * budget))
    for t in range(prompt, n):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        got = cache.attend(q[:, :, t : t + 1], budget)
        for head in range(2):
            kept, sigma = state[head]
            kept, sigma = [*kept, t], [*sigma, 0.0]
            while len(kept) > budget:
                worst = min(range(len(kept) - recent), key=lambda x: sigma[x])
                kept.pop(worst), sigma.pop(worst)
            for h in (2 * head, 2 * head + 1):
                s = q[0, h, t] @ k[0, head, kept].T * 8**-0.5
                a = s.softmax(-1)
                torch.testing.assert_close(got[0, h, 0], a @ v[0, head, kept], rtol=0, atol=1e-12)
                sigma = [x + y for x, y in zip(sigma, a.tolist())]
            state[head] = kept, sigma
            torch.testing.assert_close(cache.sigma[0, head], torch.tensor(sigma, dtype=torch.float64))
        assert cache.kept == cache.read == min(t + 1, budget)
    if prompt and heavy:
        assert state[0][0] != state[1][0], "heads keep different tokens"
    if not prompt and heavy:  # sums favour who was there first: early tokens had more time to collect
        assert state[0][0][:3] == [0, 1, 2]
    assert all(kept[-recent:] == list(range(n - recent, n)) for kept, _ in state)


def test_h2o_without_eviction_conserves_mass_and_is_full_attention():
    n = 20
    q, k, v = draw(n, 2)
    cache = H2OCache()
    for t in range(n):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        got = cache.attend(q[:, :, t : t + 1], 100)
        want = attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert cache.sigma.sum(-1).tolist() == [[pytest.approx(2 * n)] * 2]
    torch.testing.assert_close(cache.sigma, attention_received(q, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("window", [1, 4])
def test_snapkv_by_its_rule(pooling, window):
    n, budget, pool = 25, 12, 3
    q, k, v = draw(n + 3, 3)
    cache = SnapKVCache(window, pool, pooling)
    cache.prefill(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    a = probabilities(q[:, :, :n], k[:, :, :n])[0, :, n - window :]
    kept = []
    for head in range(2):
        votes = a[2 * head : 2 * head + 2].sum((0, 1))[: n - window].tolist()
        around = [votes[max(0, j - 1) : j + 2] for j in range(n - window)]
        smooth = [max(x) if pooling == "max" else sum(x) / 3 for x in around]
        best = sorted(range(n - window), key=lambda j: -smooth[j])[: budget - window - 1]
        kept.append([*sorted(best), *range(n - window, n)])
    for t in range(n, n + 3):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        got = cache.attend(q[:, :, t : t + 1], budget)
        assert cache.read == budget + t - n, "the prompt is cut once, later tokens stay"
        for head in range(2):
            kept[head].append(t)
            want = attention(q[:, 2 * head : 2 * head + 2, t : t + 1], k[:, head : head + 1, kept[head]],
                             v[:, head : head + 1, kept[head]])  # fmt: skip
            torch.testing.assert_close(got[:, 2 * head : 2 * head + 2], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [H2OCache, SnapKVCache])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 50])
def test_a_budget_for_all_is_full_attention(make, n):
    q, k, v = draw(n + 1, 4)
    cache = make()
    cache.prefill(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    cache.append(k[:, :, n:], v[:, :, n:])
    torch.testing.assert_close(
        cache.attend(q[:, :, n:], n + 1), attention(q[:, :, n:], k, v), rtol=0, atol=1e-13
    )


def test_the_question_in_the_window_or_after_it():
    """Why the place of the question decides: a needle that only the question looks at."""
    g = torch.Generator().manual_seed(5)
    n, needle = 200, 60
    k = torch.randn(1, 1, n, 32, generator=g, dtype=torch.float64)
    v = torch.randn(1, 1, n, 32, generator=g, dtype=torch.float64)
    q = torch.randn(1, 1, n, 32, generator=g, dtype=torch.float64)
    q[..., 0] = 0.0
    k[:, :, needle] = 0.0
    k[:, :, needle, 0] = 6.0  # what the needle says, no query of the prompt asks
    question = 20.0 * torch.eye(32, dtype=torch.float64)[:1].view(1, 1, 1, 32)
    later, inside = SnapKVCache(16), SnapKVCache(16)
    later.prefill(q, k, v)
    q_inside = torch.cat([q[:, :, :-1], question], dim=2)
    inside.prefill(q_inside, k, v)
    errors = []
    for cache in (later, inside):
        cache.append(k[:, :, -1:], v[:, :, -1:])
        out = cache.attend(question, 40)
        errors.append((out - v[:, :, needle : needle + 1]).norm().item())
    assert errors[1] < 0.01 < 1 < errors[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: H2OCache(1.5), "heavy: expected a share from 0 to 1, got 1.5"),
        (lambda: SnapKVCache(0), "window: expected an integer of at least 1, got 0"),
        (lambda: SnapKVCache(pool=4), "pool: expected an odd number"),
        (lambda: SnapKVCache(pooling="mean"), "pooling: expected avg or max, got 'mean'"),
        (lambda: _snap().attend(torch.zeros(1, 4, 1, 8), 5), "budget: expected more than the 5 tokens"),
        (lambda: _snap().prefill(*draw(3)), "prefill: expected an empty cache, got one with 11 tokens"),
        (lambda: H2OCache().prefill(draw(3)[0], *draw(4)[1:]), "q: expected a query for each of the 4 tokens, got 3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _snap():
    cache = SnapKVCache(4)
    q, k, v = (x.float() for x in draw(10))
    cache.prefill(q, k, v)
    cache.append(k[:, :, :1], v[:, :, :1])
    return cache
