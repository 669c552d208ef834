"""Budgets inside the tiny trained model: room for all is full attention, and what evicts can't answer."""

import copy

import pytest
import torch

from effattn_lab.sparse import budget_tiny as tiny
from effattn_lab.sparse.elastic_backbone import load_backbone
from effattn_lab.sparse.elastic_tasks import ASKED, LENGTH, prompts

SELECT = ("oracle", "adamas", "adamas_raw", "quest")
EVICT = ("snapkv", "h2o", "streaming")


@pytest.fixture(scope="module")
def model():
    return load_backbone(path=tiny.WEIGHTS, head_dim=tiny.HEAD_DIM)


def logits(model, method, budget, ids):
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mixer = tiny.CachedAttention(block.mixer, method, budget)
    with torch.no_grad():
        _, state = model(ids[:, :-ASKED], return_state=True)
        out = []
        for i in range(LENGTH - ASKED, LENGTH):
            step, state = model.step(state, ids[:, i : i + 1])
            out.append(step)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("method", tiny.CACHES)
def test_with_room_for_all_every_cache_is_full_attention(model, method):
    ids = prompts("recall", 3, torch.Generator().manual_seed(0)).inputs
    with torch.no_grad():
        whole = model(ids)[:, -ASKED:]
    torch.testing.assert_close(logits(model, method, LENGTH, ids), whole, atol=1e-4, rtol=1e-4)


def test_what_the_chapter_says_of_the_tables():
    found = {(r["task"], r["method"], r["budget"]): r["accuracy"] for r in tiny.rows(examples=64)}
    assert found["recall", "full", None] == found["local", "full", None] == 1
    for method in SELECT:
        assert found["recall", method, 16] > 0.98
    for method in EVICT:
        assert found["recall", method, 32] < 0.8
    assert found["recall", "quest", 8] < found["recall", "adamas_raw", 8] < found["recall", "adamas", 8]
    assert all(found["local", method, 32] > 0.99 for method in tiny.CACHES if method != "full")
    assert found["local", "streaming", 16] > 0.95


def test_a_step_leaves_the_state_as_it_was(model):
    layer = tiny.CachedAttention(model.mixers[0], "h2o", 8)
    x = torch.randn(1, 20, 32)
    with torch.no_grad():
        _, cache = layer(x, return_state=True)
        first, _ = layer.step(cache, x[:, -1:])
        again, longer = layer.step(cache, x[:, -1:])
    assert torch.equal(first, again)
    assert (cache.length, longer.length) == (20, 21)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: tiny.CachedAttention(m, "lru", 8), "method: expected one of full, oracle"),
        (lambda m: tiny.CachedAttention(m, "quest", 0), "budget: expected an integer of at least 1, got 0"),
        (
            lambda m: tiny.CachedAttention(m, "quest", 8).step(None, torch.zeros(1, 1, 32)),
            "state: expected the",
        ),
        (lambda m: tiny.rows(examples=0), "examples: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(model, wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong(model.mixers[0])


def test_the_weights_belong_to_this_training():
    """The first steps again, from the recorded seed: the model they start from is the one the weights come from."""
    trained = load_backbone(path=tiny.WEIGHTS, head_dim=tiny.HEAD_DIM)
    fresh, early = tiny.train_backbone(tiny.Recipe(), tiny.SEED, stop=12, head_dim=tiny.HEAD_DIM)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in trained.state_dict().items()
    }
    assert early > 2  # nothing is known after ten steps
    batch = prompts("recall", 32, torch.Generator().manual_seed(1))
    assert trained.accuracy(*batch) > 0.99 > 0.5 > fresh.accuracy(*batch)
