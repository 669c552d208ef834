"""Choosing blocks in SmolLM2: the rules by their definitions, and a record that says what the book says."""

from __future__ import annotations

import itertools

import pytest
import torch

from effattn_lab.figures.block_sparse import hit_rate
from effattn_lab.foundations.attention import attention
from effattn_lab.models import smollm2
from effattn_lab.sparse import block_sparse_experiment as experiment
from effattn_lab.sparse import block_sparse_layers as study
from effattn_lab.sparse.block_sparse_cost import expected_hit_rate
from effattn_lab.tasks.text import passages_once, topics

N, QUERIES, BLOCK, SCALE = 64, 32, 16, 0.4


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, N, 6, generator=g, dtype=torch.float64)
    return q, *(torch.randn(1, 2, N, 6, generator=g, dtype=torch.float64) for _ in range(2))


def test_truth_is_full_attention_by_blocks():
    q, k, v = draw()
    p, mass, parts = study.truth(q, k, v, SCALE, queries=QUERIES, block=BLOCK)
    want = attention(q, k, v, causal=True, scale=SCALE)[0, :, -QUERIES:]
    torch.testing.assert_close(parts.sum(2), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, QUERIES).double(), rtol=0, atol=1e-13)
    assert not p[:, 0, N - QUERIES + 1 :].any(), "nothing of the future"


def test_scores_by_their_definitions():
    q, k, v = draw(1)
    _, mass, _ = study.truth(q, k, v, SCALE, queries=QUERIES, block=BLOCK)
    got = study.scores(q, k, mass, block=BLOCK)
    assert set(got) == set(study.RULES)
    for h, i, b in itertools.product(range(4), (0, 5, 31), range(N // BLOCK)):
        products = k[0, h // 2, b * BLOCK : (b + 1) * BLOCK] @ q[0, h, N - QUERIES + i]
        torch.testing.assert_close(
            got["mean key (MoBA's gate)"][h, i, b], products.mean(), rtol=0, atol=1e-12
        )
        assert got["bound (Quest's)"][h, i, b] >= products.max() - 1e-12
    for h, row, b in itertools.product(range(4), range(2), range(4)):
        queries = q[0, h, N - QUERIES + row * BLOCK :][:BLOCK]
        keys = k[0, h // 2, b * BLOCK : (b + 1) * BLOCK]
        pooled = (queries @ keys.T).mean()
        torch.testing.assert_close(got["pooled, mean q · mean k"][h, row, b], pooled, rtol=0, atol=1e-12)
        weight = mass[h, row * BLOCK : (row + 1) * BLOCK, b].sum()
        torch.testing.assert_close(got["oracle, by block"][h, row, b], weight, rtol=0, atol=1e-12)
    # Diagonals: the pairs (8 n + a, 8 m + a).
    s = q[0, 0] @ k[0, 0].T * 6**-0.5
    tiles = torch.stack([s[a::8, a::8] for a in range(8)]).mean(0)
    future = torch.ones(8, 8).triu(1).bool()
    p = tiles.masked_fill(future, float("-inf")).softmax(-1).view(4, 2, 4, 2).sum((1, 3))
    torch.testing.assert_close(got["diagonal, S = 8"][0], p[2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("budget", [2, 3, 9])
def test_take_gives_two_and_the_best_between(budget):
    score = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2))
    own = torch.arange(8)
    got = study.take(score, budget, own)
    for h, row in itertools.product(range(3), range(8)):
        between = sorted(range(1, row), key=lambda j: -score[h, row, j])
        assert got[h, row].nonzero()[:, 0].tolist() == sorted({0, row, *between[: budget - 2]})


def test_judge_is_softmax_over_what_is_kept():
    q, k, v = draw(3)
    _, mass, parts = study.truth(q, k, v, SCALE, queries=QUERIES, block=BLOCK)
    own = torch.arange(N - QUERIES, N) // BLOCK
    keep = study.take(mass, 3, own)
    tokens = keep.repeat_interleave(BLOCK, dim=-1)[None]
    want = attention(q[:, :, -QUERIES:], k, v, causal=True, mask=tokens, scale=SCALE)[0]
    full = attention(q, k, v, causal=True, scale=SCALE)[0, :, -QUERIES:]
    held, error = study.judge(mass, parts, keep)
    torch.testing.assert_close(
        error, ((want - full).norm(dim=-1) / full.norm(dim=-1)).mean(-1), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(held, (mass * keep).sum(-1).mean(-1))
    everything = study.judge(mass, parts, torch.ones_like(keep))
    assert everything[1].max() < 1e-12


def test_effective_keys_of_known_blocks():
    p = torch.zeros(1, 2, 64)
    p[0, 0, 20] = 1.0  # one key of block 1
    assert study.effective_keys(p[:, :1], torch.tensor([3]), 16) == 1
    p[0, 1, 16:48] = 1 / 32
    assert study.effective_keys(p[:, 1:], torch.tensor([3]), 16) == pytest.approx(16)


def test_dilution_by_formula():
    for delta, size in ((8, 16), (8, 64), (16, 64), (32, 128)):
        assert hit_rate(delta, size) == pytest.approx(expected_hit_rate(delta, size), abs=0.04)
    assert expected_hit_rate(16, 256) == pytest.approx(expected_hit_rate(8, 64))
    assert expected_hit_rate(0, 64) == pytest.approx(0.125)


def test_a_mean_misses_what_softmax_sees():
    """Of two blocks the one with the larger mean holds a fortieth of the other's weight."""
    lone, even = torch.tensor([8.0, 0, 0, 0]), torch.tensor([3.0, 3, 3, 3])
    assert lone.mean() < even.mean()
    assert lone.exp().sum() > 30 * even.exp().sum()
    for s in (lone, even):
        assert s.exp().sum() >= 4 * s.mean().exp() * (1 - 1e-6)


@pytest.mark.slow
def test_a_layer_of_the_record_again():
    """Layer 3, where means fail, from captured queries and keys; another Python may have another wording."""
    lm = smollm2.load()
    q, k, v = lm.capture(passages_once(topics())[: 8 * study.TOKENS], layer=3, max_tokens=study.TOKENS)
    got, want = study.layer_rows(q, k, v, 0.125), study.recorded()["layers"][3]
    for name in study.RULES:
        torch.testing.assert_close(
            torch.tensor(got["rules"][name]), torch.tensor(want["rules"][name]), rtol=0, atol=0.05
        )
    assert got["effective"] == pytest.approx(want["effective"], abs=0.3)


def test_record_says_what_the_chapter_says():
    record = study.recorded()
    assert len(record["layers"]) == 30
    lost, fine = [], []
    for i, layer in enumerate(record["layers"]):
        at = {name: layer["rules"][name][study.BUDGETS.index(6)][0] for name in study.RULES}
        means = [at[name] for name in study.RULES if name.startswith(("pooled", "diagonal", "antidiagonal"))]
        assert max(means) - min(means) < 0.02, "three shapes of sample, one result"
        (lost if 3 <= i <= 10 else fine).append((at, layer))
    for at, layer in fine:
        assert layer["effective"] > 5
        assert at["oracle, by block"] - at["antidiagonal, S = 8"] < 0.025
        assert at["oracle, by query"] - at["mean key (MoBA's gate)"] < 0.025
    for at, layer in lost:
        assert layer["effective"] < 1.2, "one key holds the block's weight"
        assert at["oracle, by block"] - at["antidiagonal, S = 8"] > 0.1
        assert at["bound (Quest's)"] > at["mean key (MoBA's gate)"] + 0.03
    six = study.BUDGETS.index(6)
    for layer in record["layers"][3:9]:  # more mass than chance, and an output further from the truth
        error = {name: layer["rules"][name][six][1] for name in study.RULES}
        assert error["mean key (MoBA's gate)"] > error["random"] > error["bound (Quest's)"]
    words = record["layers"][4]["columns"]
    assert {record["words"][str(j)].strip().lower() for j, *_ in words} == {"the"}
    assert sum(share for _, share, _ in words[:2]) > 0.25
    assert all(value < 0.2 for *_, value in words), "values of sinks"
    table = {(row["rule"], row["budget"]): row["mass"] for row in study.summary(record)}
    for budget in study.BUDGETS[1:]:
        assert (
            table["random", budget] < table["antidiagonal, S = 8", budget] < table["oracle, by block", budget]
        )
    # The threshold: kept on average nowhere near its word, since some heads are wrong; density varies by head.
    at_90 = next(row for row in study.thresholds(record) if row["tau"] == 0.9)
    assert at_90["worst"] < 0.5 < 0.75 < at_90["mass"] < 0.9
    assert at_90["greatest"] > 5 * at_90["least"]
    for layer, held in ((layer, [t[1] for t in layer["taus"]["0.9"]]) for _, layer in fine):
        assert sum(held) / 9 > 0.8, layer["columns"]


def test_losses_of_the_chapter():
    losses = experiment.recorded()["loss"]
    above = {name: row["nats"] - losses["full"]["nats"] for name, row in losses.items()}
    assert above["MoBA, 8 blocks"] == pytest.approx(0.62, abs=0.005)
    assert above["MoBA with block 0, 8 blocks"] == pytest.approx(0.04, abs=0.005)
    assert 0.1 < above["first and nearest, 8 blocks"] < 0.11


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="budget: expected at least 2 blocks, the first and the own, got 1"):
        study.take(torch.rand(1, 4, 4), 1, torch.arange(4))
