"""NSA's three branches against their rules written out for single queries."""

from __future__ import annotations

import itertools

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.sparse import nsa
from effattn_lab.sparse.nsa import Blocks

SMALL = Blocks(length=8, stride=4, select=16, count=4, first=1, local=2, window=10)


def draw(n, seed=0, dim=8, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, n, dim, generator=g, dtype=torch.float64)
    keys, values = (
        tuple(torch.randn(1, kv_heads, n, dim, generator=g, dtype=torch.float64) for _ in range(3))
        for _ in "kv"
    )
    return q, keys, values, torch.rand(1, heads, n, 3, generator=g, dtype=torch.float64)


def test_overlap_of_the_papers_sizes():
    w = nsa.overlap(40, 10, Blocks())
    for j in range(1, 9):
        assert w[4 * j - 1 : 4 * j + 4, j].tolist() == [1, 2, 2, 2, 1]
        assert w[:, j].sum() == 8
    assert w[:4, 0].tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40, 65])
def test_by_its_rule(n):
    q, keys, values, gates = draw(n, n)
    got = nsa.nsa_attention(q, keys, values, gates, blocks=SMALL)
    blocks = max(0, (n - 8) // 4 + 1)
    want = torch.zeros_like(q)
    for h, t in itertools.product(range(4), range(n)):
        kv = h // 2

        def coarse_weights(head, t=t):
            ks = [keys[0][0, head // 2, 4 * i : 4 * i + 8].mean(0) for i in range(blocks) if 4 * i + 7 <= t]
            if not ks:
                return torch.zeros(0, dtype=torch.float64)
            return (torch.stack(ks) @ q[0, head, t] * 8**-0.5).softmax(0)

        p = coarse_weights(h)
        if len(p):
            vs = torch.stack([values[0][0, kv, 4 * i : 4 * i + 8].mean(0) for i in range(len(p))])
            want[0, h, t] += gates[0, h, t, 0] * (p @ vs)
        own = t // 16
        score = dict.fromkeys(range(own + 1), 0.0)
        for head in (2 * kv, 2 * kv + 1):
            for i, weight in enumerate(coarse_weights(head).tolist()):
                for j in score:
                    shared = min(4 * i + 8, 16 * j + 16) - max(4 * i, 16 * j)
                    score[j] += weight * max(0, shared) / 4
        given = {j for j in score if j < 1 or own - j < 2}
        best = sorted(set(score) - given, key=lambda j: -score[j])[: 4 - len(given)]
        tokens = [x for j in sorted([*given, *best]) for x in range(16 * j, min(16 * j + 16, t + 1))]
        a = (keys[1][0, kv, tokens] @ q[0, h, t] * 8**-0.5).softmax(0)
        want[0, h, t] += gates[0, h, t, 1] * (a @ values[1][0, kv, tokens])
        near = range(max(0, t - 9), t + 1)
        a = (keys[2][0, kv, near] @ q[0, h, t] * 8**-0.5).softmax(0)
        want[0, h, t] += gates[0, h, t, 2] * (a @ values[2][0, kv, near])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_budgets():
    q, keys, _, _ = draw(100, 1)
    p = nsa.compressed_weights(q, nsa.compress(keys[0], SMALL), SMALL)
    chosen = nsa.nsa_selection(p, SMALL, 2)
    assert chosen.sum(-1).max() == 4
    assert chosen.shape == (1, 2, 100, 7)
    t = torch.arange(100)
    assert chosen[:, :, :, 0].all(), "the first block"
    assert chosen[0, :, t, t // 16].all(), "the query's own"
    assert not (chosen & (torch.arange(7) > t[:, None] // 16)).any()
    assert (p.sum(-1)[..., 7:] - 1).abs().max() < 1e-12
    assert not p[:, :, :7].any(), "no whole block yet"


def test_fine_and_near_branches_alone_are_full_attention_when_large():
    q, keys, values, gates = draw(50, 2)
    big = Blocks(length=8, stride=4, select=16, count=99, window=50)
    for branch in (1, 2):
        gate = torch.zeros_like(gates)
        gate[..., branch] = 1
        got = nsa.nsa_attention(q, keys, values, gate, blocks=big)
        want = attention(q, keys[branch], values[branch], causal=True)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_leaks_nothing():
    q, keys, values, gates = draw(60, 3)
    before = nsa.nsa_attention(q, keys, values, gates, blocks=SMALL)
    for t in (8, 31, 59):
        moved = [x.clone() for x in (q, *keys, *values)]
        for x in moved:
            x[:, :, t] += 5
        after = nsa.nsa_attention(moved[0], tuple(moved[1:4]), tuple(moved[4:]), gates, blocks=SMALL)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t], before[:, :, t])


def test_gradients():
    small = Blocks(length=4, stride=2, select=4, count=3, window=3)
    q, keys, values, gates = draw(7, 4, dim=1, heads=2, kv_heads=1)
    leaves = [x.requires_grad_() for x in (q, *keys, *values, gates)]

    def fn(q, a, b, c, x, y, z, gates):
        return nsa.nsa_attention(q, (a, b, c), (x, y, z), gates, blocks=small)

    assert torch.autograd.gradcheck(fn, leaves)


def test_a_compression_of_ones_own():
    q, keys, values, gates = draw(30, 5)
    first = nsa.nsa_attention(q, keys, values, gates, blocks=SMALL, phi=lambda x: x[..., 0, :])
    assert not torch.allclose(first, nsa.nsa_attention(q, keys, values, gates, blocks=SMALL))
    assert torch.equal(nsa.compress(keys[0], SMALL, lambda x: x[..., 0, :]), keys[0][:, :, :23:4])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Blocks(stride=5), "stride: expected a divisor of length 32 and select 64, got 5"),
        (lambda: Blocks(count=2), "count: expected at least first . local = 3 blocks, got 2"),
        (lambda: Blocks(window=0), "window: expected an integer of at least 1, got 0"),
        (lambda: nsa.nsa_attention(*draw(9)[:3], torch.zeros(1, 4, 9, 2)), "gates: expected shape .1, 4, 9, 3."),
        (lambda: nsa.nsa_attention(draw(9)[0], draw(9)[1][:2], *draw(9)[2:]), "keys: expected three branches"),
        (lambda: nsa.nsa_attention(draw(8)[0], *draw(9)[1:]), "q: expected as many queries as keys .9., got 8"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
