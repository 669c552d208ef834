"""What the chapter and the lab on Quest say: costs, and who still has the needle."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.sparse import quest_cost as cost
from effattn_lab.sparse.cache import FullCache
from effattn_lab.sparse.quest_needle import RULES, needle_weight


def test_needle_story():
    """Evictors lose what nobody has asked for, whatever the rule; selectors have it, wherever it is."""
    found = {name: needle_weight(make, 64, 0.5, texts=40) for name, make in RULES.items()}
    assert found["StreamingLLM"] == 0
    assert found["H2O"] < 0.2
    assert found["SnapKV"] < 0.5
    assert min(found["Quest"], found["oracle"]) > 0.9
    assert needle_weight(RULES["SnapKV"], 64, 0.5, inside=True, texts=40) > 0.9
    assert needle_weight(RULES["H2O"], 64, 0.1, texts=40) > 0.8, "an early long key collects by accident"
    assert needle_weight(RULES["StreamingLLM"], 64, 0.95, texts=40) > 0.9, "recent"
    assert needle_weight(FullCache, 1, 0.5, texts=40) > 0.8


def test_costs():
    assert cost.full_bytes(100, 128) == 100 * 512
    assert cost.evicted_bytes(10, 128) == 10 * 512
    assert cost.h2o_bytes(10, 128) == 10 * 520
    assert cost.oracle_bytes(100, 10, 128) == 110 * 256
    assert cost.oracle_bytes(100, 1000, 128) == cost.full_bytes(100, 128)
    assert cost.metadata_bytes(33, 128) == 3 * 512
    assert cost.decode_bytes(32, 16, 128) == (2 + 16) * 512
    assert cost.load_fraction(65536, 4096) == 1 / 8


def test_best_page_size_is_where_traffic_is_least():
    seqlen, pages = 1 << 16, 64
    best = cost.best_page_size(seqlen, pages)
    assert best == 32
    traffic = {p: cost.decode_bytes(seqlen, pages * p, 64, p) for p in (8, 16, 32, 64, 128)}
    assert min(traffic, key=traffic.__getitem__) == best


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: needle_weight(FullCache, 1, 1.0), "depth: expected a share from 0 to below 1, got 1.0"),
        (
            lambda: needle_weight(FullCache, 1, 0.5, texts=0),
            "texts: expected an integer of at least 1, got 0",
        ),
        (lambda: cost.full_bytes(0, 128), "seqlen: expected an integer of at least 1, got 0"),
        (lambda: cost.evicted_bytes(1, 0), "head_dim: expected an integer of at least 1, got 0"),
        (lambda: cost.best_page_size(16, 0), "pages: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_pictures_draw():
    from effattn_lab.figures import quest as figures

    q, tight, wide = figures.two_pages()
    best = [(keys @ q).max() for keys in (tight, wide)]
    corner = [torch.where(q > 0, keys.amax(0), keys.amin(0)) @ q for keys in (tight, wide)]
    assert best[0] > best[1]
    assert corner[0] < corner[1], "the picture's point"
    figures.bound_picture()
    figures.mass_picture({"layer 0": {"oracle": [0.5, 0.9], "Quest": [0.4, 0.8]}}, (16, 64), 512)
