"""The synthetic tasks are what their definitions say, read back from the examples themselves."""

from itertools import permutations

import numpy as np
import pytest
import torch

from effattn_lab.tasks.copying import copying, overwrite_recall
from effattn_lab.tasks.language import ByteText
from effattn_lab.tasks.mqar import accuracy, gap_probabilities, mqar
from effattn_lab.tasks.state_tracking import (
    modular_counting,
    parity,
    permutation_composition,
    symmetric_group,
)
from effattn_lab.tasks.text import topics

# ---------------------------------------------------------------------------------------------------- MQAR


@pytest.mark.parametrize(
    ("length", "pairs", "vocab"), [(64, 4, 8192), (64, 16, 128), (8, 2, 10), (130, 5, 256)]
)
@pytest.mark.parametrize("random_fillers", [True, False])
def test_mqar_by_its_definition(length, pairs, vocab, random_fillers):
    x, y = mqar(50, length=length, pairs=pairs, vocab_size=vocab, random_fillers=random_fillers, seed=3)
    assert x.shape == y.shape == (50, length)
    assert x.dtype == y.dtype == torch.int64
    for row, target in zip(x.tolist(), y.tolist()):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= k < vocab // 2 for k in keys)
        assert all(vocab // 2 <= v < vocab for v in values)
        asked = [t for t, label in enumerate(target) if label != -100]
        assert len(asked) == pairs
        assert all(t >= 2 * pairs and t % 2 == 0 for t in asked), "first place of a slot after the pairs"
        assert {row[t] for t in asked} == set(keys), "each key once"
        assert all(dict(zip(keys, values))[row[t]] == target[t] for t in asked)
        fillers = [row[t] for t in range(2 * pairs, length) if t not in asked]
        assert all(0 <= f < vocab for f in fillers)
        if not random_fillers:
            assert set(fillers) <= {0}


def test_mqar_gaps_follow_the_power_law():
    slots = gap_probabilities(24)
    assert slots.sum() == pytest.approx(1)
    assert slots[0] / slots[9] == pytest.approx(10**0.99)
    np.testing.assert_allclose(gap_probabilities(7, power=1.0), np.full(7, 1 / 7))
    # The first key is drawn first, so its slot has exactly these chances.
    x, _ = mqar(20_000, length=32, pairs=4, vocab_size=64, random_fillers=False, seed=0)
    at = ((x[:, 8:] == x[:, :1]).int().argmax(1) // 2).numpy()
    want = 20_000 * gap_probabilities(12)
    chi2 = (((np.bincount(at, minlength=12) - want) ** 2) / want).sum()
    assert chi2 < 31.3  # 11 degrees of freedom, p = 0.001
    # The second goes where the first is not: sum over j of p_j p_i / (1 - p_j).
    p = gap_probabilities(12)
    second = np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(12) if j != i) for i in range(12)])
    at = ((x[:, 8:] == x[:, 2:3]).int().argmax(1) // 2).numpy()
    chi2 = (((np.bincount(at, minlength=12) - 20_000 * second) ** 2) / (20_000 * second)).sum()
    assert chi2 < 31.3


def test_mqar_tokens_are_uniform_and_repeatable():
    x, _ = mqar(20_000, length=8, pairs=2, vocab_size=12, seed=0)
    for column, low, high in ((0, 1, 6), (2, 1, 6), (1, 6, 12), (3, 6, 12)):
        counts = np.bincount(x[:, column], minlength=12)[low:high]
        want = 20_000 / (high - low)
        assert (((counts - want) ** 2) / want).sum() < 20.5  # at most 5 degrees of freedom, p = 0.001
    assert torch.equal(mqar(300, seed=1).inputs, mqar(300, seed=1).inputs)
    assert not torch.equal(mqar(9, seed=1).inputs, mqar(9, seed=2).inputs)


def test_accuracy_counts_questions_only():
    _, y = mqar(10, length=16, pairs=4, vocab_size=32)
    right = torch.nn.functional.one_hot(y.clamp(min=0), 32).float()
    assert accuracy(right, y) == 1
    assert accuracy(-right, y) == 0
    with pytest.raises(ValueError, match="logits: expected shape"):
        accuracy(right[:5], y)
    with pytest.raises(ValueError, match="targets: expected at least one"):
        accuracy(right, torch.full_like(y, -100))


# ------------------------------------------------------------------------------------------- state tracking


def test_parity_and_counting():
    x, y = parity(20, length=33, seed=1)
    assert set(x.flatten().tolist()) == {0, 1}
    for row, target in zip(x.tolist(), y.tolist()):
        assert target == [sum(row[: t + 1]) % 2 for t in range(33)]
    x, y = modular_counting(20, length=33, modulus=5, seed=1)
    for row, target in zip(x.tolist(), y.tolist()):
        assert target == [sum(row[: t + 1]) % 5 for t in range(33)]


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("swaps_only", [False, True])
def test_permutations_are_carried_out_on_things(n, swaps_only):
    elements = list(permutations(range(n)))
    x, y = permutation_composition(20, length=17, n=n, swaps_only=swaps_only, seed=2)
    for row, target in zip(x.tolist(), y.tolist()):
        place = list(range(n))  # where each thing lies
        for letter, answer in zip(row, target):
            place = [elements[letter][p] for p in place]
            assert elements[answer] == tuple(place)
            if swaps_only:
                assert sum(a != b for a, b in enumerate(elements[letter])) in (0, 2)
    assert len(set(y.flatten().tolist())) > n, "the product wanders through the group"


def test_the_table_is_a_group():
    _, table = symmetric_group(4)
    size = 24
    assert (table[0] == np.arange(size)).all()
    assert all(sorted(row) == list(range(size)) for row in table)
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 100))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table != table.T).any(), "S4 is not commutative"


# -------------------------------------------------------------------------------------------------- copying


def test_copying():
    x, y = copying(20, symbols=5, vocab_size=9, seed=0)
    for row, target in zip(x.tolist(), y.tolist()):
        word = row[:5]
        assert 0 not in word
        assert row == [*word, 0, *word[:-1]]
        assert target == [-100] * 5 + word


@pytest.mark.parametrize("writes", [1, 2, 4])
def test_overwrite_recall(writes):
    x, y = overwrite_recall(20, pairs=6, writes=writes, vocab_size=32, seed=0)
    assert x.shape == (20, 12 * writes + 6)
    for row, target in zip(x.tolist(), y.tolist()):
        memory, history = {}, []
        for t in range(0, 12 * writes, 2):
            assert memory.get(row[t]) != row[t + 1], "every write changes the value"
            memory[row[t]] = row[t + 1]
            history.append(row[t])
        assert all(history.count(k) == writes for k in memory)
        assert all(1 <= k < 16 <= v < 32 for k, v in memory.items())
        assert target[: 12 * writes] == [-100] * (12 * writes)
        asked = row[12 * writes :]
        assert sorted(asked) == sorted(memory)
        assert target[12 * writes :] == [memory[k] for k in asked]


# ------------------------------------------------------------------------------------------------ real text


def test_bytes_of_real_text():
    data = ByteText()
    whole = topics().encode()
    assert len(data.train) + len(data.valid) == len(whole)
    assert 0.08 < len(data.valid) / len(whole) < 0.12
    # Every held-out block is a piece of the text, and no training block is the same piece.
    blocks = [whole[i : i + 4096] for i in range(0, len(whole), 4096)]
    valid = bytes(data.valid.tolist())
    held = [b for b in blocks if b in valid]
    train = bytes(data.train.tolist())
    assert sum(map(len, held)) == len(valid)
    assert not any(b in train for b in held)
    x, y = data.batch(3, 50, 0)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert all(bytes(row.tolist()) in train for row in x)
    assert torch.equal(data.batch(3, 50, 0).inputs, x)
    x, y = data.validation(100)
    assert torch.equal(torch.cat([x.flatten()[:1], y.flatten()]), data.valid[: x.numel() + 1])
    assert len(data.validation(100, 3).inputs) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mqar(0), "examples: expected an integer of at least 1, got 0"),
        (lambda: mqar(1, length=30, pairs=8), r"length: expected an even number of at least 4 \* pairs = 32"),
        (lambda: mqar(1, length=63, pairs=8), "length: expected an even number"),
        (lambda: mqar(1, vocab_size=64), "vocab_size: expected an even number above length"),
        (lambda: mqar(1, power=0), "power: expected a number above 0"),
        (lambda: mqar(1, seed=-1), "seed: expected an integer of at least 0"),
        (lambda: parity(1, length=0), "length: expected an integer of at least 1"),
        (lambda: modular_counting(1, modulus=1), "modulus: expected at least 2, got 1"),
        (lambda: permutation_composition(1, n=1), "n: expected 2 to 5, got 1"),
        (lambda: permutation_composition(1, n=6), "n: expected 1 to 5"),
        (lambda: copying(1, vocab_size=2), "vocab_size: expected at least 3"),
        (lambda: overwrite_recall(1, pairs=8, vocab_size=16), "vocab_size: expected an even number with"),
        (lambda: ByteText("abc"), "text: expected at least two blocks of 4096 bytes, got 3 bytes"),
        (lambda: ByteText(held_out=1), "held_out: expected a share"),
        (lambda: ByteText("ab" * 50, block=10).batch(1, 1000, 0), "length: expected less than the 90 bytes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
