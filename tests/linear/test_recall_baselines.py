"""What text costs without a network: counts against a slow, plain version; compressors that have read before."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from effattn_lab.linear.recall_baselines import compressed, counted, parts
from effattn_lab.linear.recall_tasks import RECIPES, byte_text


def plainly(order, train, asked):
    """Witten and Bell's mixture, one byte at a time, as the paper's recursion reads."""
    follow = Counter(train[i : i + n + 1] for n in range(order + 1) for i in range(len(train) - n))

    def chance(context, byte, n):
        if n < 0:
            return 1 / 256
        tail = context[len(context) - n :] if n else b""
        after = [follow[tail + bytes([b])] for b in range(256)]
        total, kinds = sum(after), sum(c > 0 for c in after)
        lower = chance(context, byte, n - 1)
        return (after[byte] + kinds * lower) / (total + kinds) if total else lower

    bits = [-math.log2(chance(asked[:i], b, min(order, i))) for i, b in enumerate(asked)]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_counts_against_a_plain_version(order):
    train = b"the key and the value, the value and the key; a state is what stays.\x00\xff" * 2
    asked = b"the state and a key that never was: \xfe\xff the value"
    assert counted(order, train, asked) == pytest.approx(plainly(order, train, asked), rel=1e-12)


def test_a_text_that_repeats_itself_needs_few_bits():
    assert counted(1, b"ab" * 500, b"ab" * 50) < 0.1
    assert counted(0, b"ab" * 500, b"ab" * 50) == pytest.approx(1, abs=0.1)
    assert counted(0, b"a", b"b") == pytest.approx(-math.log2(0.5 / 256)), "one follower in one: half is left"
    text = bytes(range(256)) * 8
    for name in ("lzma", "bz2"):
        alone, after = compressed(name, text, text[:1024])
        assert after < 0.5 * alone, "what was read before need not be said again"


def test_parts_are_what_the_models_saw():
    train, asked = parts()
    text, recipe = byte_text(), RECIPES["language"]
    assert train == bytes(text.train.tolist())
    assert asked == bytes(text.valid[1 : recipe.test * recipe.length + 1].tolist())
    pieces = [asked[i : i + 64] for i in range(0, len(asked), 64)]
    assert sum(piece in train for piece in pieces) < 0.01 * len(pieces), "what is asked was not read before"
    # A uniform byte costs 8 bits; English letters by their frequency between 4 and 5; context helps.
    bits = [counted(order, train, asked) for order in range(3)]
    assert 4 < bits[0] < 5
    assert bits[0] - bits[1] > 0.5
    assert bits[1] - bits[2] > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: counted(-1, b"ab", b"a"), "order: expected"),
        (lambda: counted(7, b"ab" * 9, b"a"), "order: expected at most 6"),
        (lambda: counted(2, b"ab", b"a"), "train: expected more bytes, got 2"),
        (lambda: counted(0, b"ab", b""), "asked: expected more bytes, got 0"),
        (lambda: compressed("zip", b"ab", b"a"), "name: expected one of lzma, bz2, got 'zip'"),
        (lambda: compressed("bz2", b"ab", b""), "asked: expected at least one byte, got none"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
