"""XAttention and MoBA against their rules written out, and what a selection of blocks must never do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.sparse import block_sparse as bs
from effattn_lab.sparse.block_list import block_list_attention, causal_block_list


def draw(n, seed=0, dim=16, batch=1, heads=4, kv_heads=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=dtype)
    return q, *(torch.randn(batch, kv_heads, n, dim, generator=g, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("n", [1, 4, 15, 16, 17, 33])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_antidiagonals_by_their_sum(n, stride):
    q, k, _ = draw(n, n)
    s = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.25
    tiles = math.ceil(n / stride)
    want = torch.zeros(1, 4, tiles, tiles, dtype=torch.float64)
    for a, b, t in itertools.product(range(tiles), range(tiles), range(stride)):
        i, j = a * stride + stride - 1 - t, b * stride + t
        if i < n and j < n:
            want[:, :, a, b] += s[:, :, i, j] / stride
    torch.testing.assert_close(bs.antidiagonal_scores(q, k, stride=stride), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_block_scores(n):
    q, k, _ = draw(n, 1)
    got = bs.xattention_scores(q, k, block_size=16, stride=4)
    p = bs.antidiagonal_scores(q, k, stride=4)
    p = p.masked_fill(torch.ones(p.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)
    blocks = math.ceil(n / 16)
    for a, b in itertools.product(range(blocks), range(blocks)):
        want = p[:, :, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4].sum((-1, -2))
        torch.testing.assert_close(got[:, :, a, b], want, rtol=0, atol=1e-12)
    assert not got.triu(1).any()
    torch.testing.assert_close(got[:, :, : n // 16].sum(-1), torch.full((1, 4, n // 16), 4.0).double())


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_is_the_smallest_that_reaches_tau(tau, ties):
    g = torch.Generator().manual_seed(2)
    n = 9
    scores = torch.rand(2, 3, n, n, generator=g, dtype=torch.float64).tril()
    if ties:
        scores = (scores * 3).round() / 4
    got = bs.select_by_mass(scores, tau)
    for b, h, row in itertools.product(range(2), range(3), range(n)):
        s = scores[b, h, row].tolist()
        chosen, mass = {0, row}, sum(s[j] for j in {0, row})
        for j in sorted(set(range(row)) - chosen, key=lambda j: (-s[j], j)):
            if mass >= tau * sum(s) and tau < 1:
                break
            chosen.add(j)
            mass += s[j]
        assert got[b, h, row].nonzero()[:, 0].tolist() == sorted(chosen)
        assert mass >= tau * sum(s) - 1e-12
        if len(chosen) > 2 and tau < 1:  # minimal: without the last one added it is not reached
            last = max(chosen - {0, row}, key=lambda j: (-s[j], j))
            assert mass - s[last] < tau * sum(s)


@pytest.mark.parametrize("n", [1, 31, 64, 65, 100])
def test_everything_chosen_is_full_attention(n):
    q, k, v = draw(n, 3)
    want = attention(q, k, v, causal=True)
    torch.testing.assert_close(
        bs.xattention(q, k, v, tau=1.0, block_size=16, stride=4), want, rtol=0, atol=1e-13
    )
    for fn in (bs.moba_attention, bs.moba_attention_grouped):
        torch.testing.assert_close(fn(q, k, v, block_size=16, top_k=99), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(fn(q, k, v, block_size=128, top_k=1), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [31, 64, 65])
@pytest.mark.parametrize("tau", [0.0, 0.6])
def test_xattention_is_softmax_over_what_was_chosen(n, tau):
    q, k, v = draw(n, 4)
    q = 3 * q
    selected = bs.select_by_mass(bs.xattention_scores(q, k, block_size=8, stride=4), tau)
    keep = selected.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :n, :n]
    want = attention(q, k, v, causal=True, mask=keep)
    got = bs.xattention(q, k, v, tau=tau, block_size=8, stride=4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    if n >= 64 and tau == 0:
        assert keep.tril().sum() < 0.5 * torch.ones(n, n).tril().sum() * 4


def test_what_an_antidiagonal_sees_of_a_slash():
    """Columns and odd slashes always; an even slash lies between the antidiagonals of half of its tiles."""
    n, stride = 64, 8
    antidiagonal = torch.zeros(n, n)
    for i, j in itertools.product(range(n), range(n)):
        antidiagonal[i, j] = float(i % stride == stride - 1 - j % stride)
    tiles = antidiagonal.view(8, 8, 8, 8).transpose(1, 2).sum((2, 3))
    assert (tiles == stride).all(), "one cell in every column of every tile"
    for offset in range(1, 16):
        slash = torch.ones(n, n).diag().diag() * 0 + torch.diag(torch.ones(n - offset), -offset)
        assert bool((slash * antidiagonal).any()) == (offset % 2 == 1)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_moba_by_its_rule(n, top_k):
    q, k, v = draw(n, 5)
    size = 8
    chosen = bs.moba_selection(q, k, block_size=size, top_k=top_k)
    blocks = math.ceil(n / size)
    keep = torch.zeros(1, 4, n, n, dtype=torch.bool)
    for h, i in itertools.product(range(4), range(n)):
        own = i // size
        gate = {b: (q[0, h, i] @ k[0, h // 2, b * size : (b + 1) * size].mean(0)).item() for b in range(own)}
        best = sorted(gate, key=lambda b: -gate[b])[: top_k - 1]
        assert chosen[0, h, i].nonzero()[:, 0].tolist() == sorted([*best, own])
        for b in [*best, own]:
            keep[0, h, i, b * size : (b + 1) * size] = True
    assert chosen.shape == (1, 4, n, blocks)
    want = attention(q, k, v, causal=True, mask=keep)
    for fn in (bs.moba_attention, bs.moba_attention_grouped):
        torch.testing.assert_close(fn(q, k, v, block_size=size, top_k=top_k), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fn", [bs.moba_attention, bs.moba_attention_grouped])
def test_moba_leaks_nothing(fn):
    q, k, v = draw(40, 6, dtype=torch.float32)
    before = fn(q, k, v, block_size=8, top_k=2)
    for t in (7, 20, 39):
        x = [y.clone() for y in (q, k, v)]
        for y in x:
            y[:, :, t] += 5.0
        after = fn(*x, block_size=8, top_k=2)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t], before[:, :, t])


def test_xattention_blocks_choose_together():
    """The known price: a later query of the same block changes what an earlier one reads, though not beyond it."""
    q, k, v = draw(64, 7, dtype=torch.float32)
    before = bs.xattention(q, k, v, tau=0.7, block_size=16, stride=4)
    moved = False
    for seed in range(5):
        other = q.clone()
        other[:, :, 63] = 20 * torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(seed))
        after = bs.xattention(other, k, v, tau=0.7, block_size=16, stride=4)
        assert torch.equal(after[:, :, :48], before[:, :, :48])
        moved |= not torch.equal(after[:, :, 48:63], before[:, :, 48:63])
    assert moved


def test_gradients_and_none_through_the_choice():
    q, k, v = (x.requires_grad_() for x in draw(6, 8, dim=2, heads=2, kv_heads=1))
    options = {"block_size": 2, "top_k": 2}
    assert torch.autograd.gradcheck(lambda *x: bs.moba_attention_grouped(*x, **options), (q, k, v))
    grads = [torch.autograd.grad(fn(q, k, v, **options).square().sum(), (q, k, v))
             for fn in (bs.moba_attention, bs.moba_attention_grouped)]  # fmt: skip
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="does not require grad"):
        bs.moba_selection(q, k, block_size=4, top_k=2).double().sum().backward()


@pytest.mark.parametrize("n", [1, 7, 8, 20])
def test_lists_of_chosen_blocks(n):
    g = torch.Generator().manual_seed(9)
    q, k, v = draw(n, 9, batch=2)
    m = math.ceil(n / 8)
    selected = torch.rand(2, 4, m, m, generator=g) < 0.5
    blocks = causal_block_list(selected, n, 8)
    keep = selected.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :n, :n]
    want = attention(q, k, v, causal=True, mask=keep)
    out, lse = block_list_attention(q, k, v, blocks)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    assert torch.equal(lse.isneginf(), ~(keep & torch.ones(n, n).tril().bool()).any(-1))
    assert torch.equal(blocks.count, (selected & torch.ones(m, m).tril().bool()).sum(-1).int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chooses_in_float32(dtype):
    q, k, v = draw(64, 10, dtype=torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    assert torch.equal(
        bs.moba_selection(q, k, block_size=8), bs.moba_selection(q.float(), k.float(), block_size=8)
    )
    got = bs.xattention(q, k, v, tau=0.5, block_size=16, stride=4)
    want = bs.xattention(q.float(), k.float(), v.float(), tau=0.5, block_size=16, stride=4)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bs.antidiagonal_scores(*draw(8)[:2], stride=0), "stride: expected an integer of at least 1, got 0"),
        (lambda: bs.xattention_scores(*draw(8)[:2], block_size=8, stride=3), "stride: expected a divisor"),
        (lambda: bs.select_by_mass(torch.ones(1, 1, 2, 2), 1.1), "tau: expected a share from 0 to 1, got 1.1"),
        (lambda: bs.moba_selection(*draw(8)[:2], top_k=0), "top_k: expected an integer of at least 1, got 0"),
        (lambda: bs.moba_selection(draw(7)[0], draw(8)[1]), "q: expected as many queries as keys .8., got 7"),
        (lambda: causal_block_list(torch.ones(1, 1, 2, 2).bool(), 30, 8), "selected: expected bool .B, Hq, 4, 4."),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
