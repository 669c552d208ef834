"""Quest against brute force: the bound always holds, pages are the best, budgets are kept. Beside it, the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.sparse.cache import DecodeCache, FullCache, captured_mass, decode_scores
from effattn_lab.sparse.quest import OracleCache, QuestCache, page_bounds, page_scores, select_pages


def draw(n, seed=0, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, 1, dim, generator=g, dtype=dtype)
    return q, *(torch.randn(2, kv_heads, n, dim, generator=g, dtype=dtype) for _ in range(2))


def filled(cache: DecodeCache, k, v, piece=7):
    for t in range(0, k.shape[2], piece):
        cache.append(k[:, :, t : t + piece], v[:, :, t : t + piece])
    return cache


def only(q, k, v, chosen):
    """Full attention with everything else hidden: the oracle of what a cache should give."""
    return attention(q, k, v, mask=chosen[:, :, None])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 65])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_a_bound_for_every_key_of_the_page(n, page, seed):
    q, k, _ = draw(n, seed)
    q = q * torch.tensor([1.0, -1.0, 100.0, 1e-3], dtype=torch.float64)[:, None, None]
    if seed == 4:
        k = k.abs()  # keys of one sign
    least, greatest = page_bounds(k, page)
    bound = page_scores(q, least, greatest)
    true = decode_scores(q, k, scale=1.0)
    loose = 0
    for p in range(math.ceil(n / page)):
        best = true[..., p * page : (p + 1) * page].amax(-1)
        assert (bound[..., p] >= best - 1e-9 * best.abs()).all()
        loose += (bound[..., p] > best + 1e-6).sum()
    if page == 1:
        torch.testing.assert_close(bound, true, rtol=1e-12, atol=1e-12)
    elif n > 16:
        assert loose > 0, "and no estimate"


def test_the_bound_by_its_definition():
    q, k, _ = draw(40, 1, heads=2)
    least, greatest = page_bounds(k, 8)
    for p in range(5):
        here = k[:, :, 8 * p : 8 * p + 8]
        assert torch.equal(least[:, :, p], here.amin(2))
        assert torch.equal(greatest[:, :, p], here.amax(2))
        written = torch.maximum(q[:, :, 0] * greatest[:, :, p], q[:, :, 0] * least[:, :, p]).sum(-1)
        torch.testing.assert_close(page_scores(q, least, greatest)[..., p], written)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_pages_are_the_last_and_the_best(count):
    g = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 4, (2, 3, 7), generator=g).double()  # many ties
    pages = select_pages(scores, count)
    assert pages.shape[-1] == min(count, 7)
    for b in range(2):
        for h in range(3):
            got = pages[b, h].tolist()
            assert got == sorted(set(got))
            assert got[-1] == 6
            best = sorted(scores[b, h, :6].tolist(), reverse=True)[: count - 1]
            assert sorted(scores[b, h, got[:-1]].tolist(), reverse=True) == best


@pytest.mark.parametrize("n", [1, 5, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("make", [QuestCache, lambda: QuestCache(share=True), OracleCache, FullCache])
def test_a_budget_for_all_is_full_attention(n, make):
    q, k, v = draw(n, n)
    cache = filled(make(), k, v)
    for budget in (n, n + 1, 10_000, None):
        torch.testing.assert_close(cache.attend(q, budget), attention(q, k, v), rtol=0, atol=1e-13)
        assert cache.read == n


@pytest.mark.parametrize("n", [40, 64, 65])
@pytest.mark.parametrize("budget", [8, 17, 24])
@pytest.mark.parametrize("share", [False, True])
def test_quest_reads_the_pages_that_brute_force_finds(n, budget, share):
    q, k, v = draw(n, 3)
    cache = filled(QuestCache(8, share=share), k, v)
    got = cache.attend(q, budget)
    pages = math.ceil(n / 8)
    bound = torch.zeros(2, 4, pages, dtype=torch.float64)
    for p in range(pages):
        here = k[:, :, 8 * p : 8 * p + 8].repeat_interleave(2, dim=1)
        bound[..., p] = torch.maximum(q[:, :, 0] * here.amax(2), q[:, :, 0] * here.amin(2)).sum(-1)
    chosen = torch.zeros(2, 4, n, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            mine = bound[b, h] if not share else bound[b, h // 2 * 2 : h // 2 * 2 + 2].amax(0)
            best = sorted(range(pages - 1), key=lambda p: -mine[p])[: budget // 8 - 1]
            for p in [*best, pages - 1]:
                chosen[b, h, 8 * p : 8 * p + 8] = True
    torch.testing.assert_close(got, only(q, k, v, chosen), rtol=0, atol=1e-13)
    assert cache.read <= budget
    assert cache.read == chosen.sum(-1).double().mean()
    assert cache.kept == n, "nothing is evicted"
    if share:
        assert torch.equal(chosen[:, 0], chosen[:, 1])


def test_bounds_grow_with_the_keys():
    _, k, v = draw(50, 4)
    want = page_bounds(k, 16)
    for piece in (1, 3, 16, 50):
        cache = filled(QuestCache(16), k, v, piece)
        assert torch.equal(cache.least, want[0])
        assert torch.equal(cache.greatest, want[1])


@pytest.mark.parametrize("budget", [1, 7, 30])
def test_nobody_holds_more_weight_than_the_oracle(budget):
    q, k, v = draw(60, 5)
    true = decode_scores(q, k)
    top = true.topk(budget, dim=-1).indices
    chosen = torch.zeros(2, 4, 60, dtype=torch.bool).scatter(2, top, True)
    cache = filled(OracleCache(), k, v)
    torch.testing.assert_close(cache.attend(q, budget), only(q, k, v, chosen), rtol=0, atol=1e-13)
    assert cache.read == budget
    best = captured_mass(q, k, top)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.stack([torch.randperm(60, generator=g)[:budget] for _ in range(8)]).view(2, 4, budget)
        assert (captured_mass(q, k, other) <= best + 1e-12).all()


def test_pages_of_one_are_the_oracle():
    q, k, v = draw(33, 6)
    k[:, :, -1] = q.unflatten(1, (2, 2)).sum((2, 3)) * 50  # the current token would be chosen anyway
    quest, oracle = filled(QuestCache(1), k, v), filled(OracleCache(), k, v)
    assert (decode_scores(q, k)[..., -1] >= decode_scores(q, k).topk(9).values[..., -1]).any()
    mine, best = quest.attend(q, 9), oracle.attend(q, 9)
    forced = (decode_scores(q, k).topk(9).indices == 32).any(-1)
    assert forced.any()
    torch.testing.assert_close(mine[forced], best[forced], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: QuestCache(0), "page_size: expected an integer of at least 1, got 0"),
        (lambda: page_bounds(torch.zeros(1, 1, 0, 4)), "k: expected a non-empty tensor"),
        (lambda: select_pages(torch.zeros(1, 1, 3), 0), "count: expected an integer of at least 1, got 0"),
        (
            lambda: page_scores(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)),
            "greatest: expected the shape of least",
        ),
        (
            lambda: filled(QuestCache(16), *[torch.zeros(1, 1, 40, 4)] * 2).attend(torch.zeros(1, 1, 1, 4), 15),
            "budget: expected at least one page of 16 tokens, got 15",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
