"""Sinks in SmolLM2: the study's shortcut is the cache, its record belongs to the code and says what the book says."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.models import smollm2
from effattn_lab.models.decode import Decoder, loss_after, rope_base
from effattn_lab.sparse import streaming_experiment as study
from effattn_lab.sparse.streaming import StreamingCache
from effattn_lab.tasks.text import topics


@pytest.fixture(scope="module")
def lm():
    return smollm2.load()


@pytest.fixture(scope="module")
def ids(lm):
    return lm.ids(topics(2000), 40)


@pytest.mark.parametrize(
    ("sinks", "positions"), [(0, "text"), (2, "text"), (4, "cache"), (1, "cache")], ids=str
)
def test_all_at_once_is_token_by_token(lm, ids, sinks, positions):
    """A prompt that fits is read in full; from then on the decoder takes token after token through real caches."""
    budget = 16
    base = rope_base(lm.model) if positions == "cache" else None
    decoder = Decoder(lm.model, lambda: StreamingCache(sinks, rope_base=base), budget)
    want = loss_after(decoder, ids, budget)
    got = study.losses(lm.model, ids, study.Setting(budget, sinks, positions))[budget:]
    assert want.tokens == len(got)
    assert want.read == budget
    assert got.mean().item() == pytest.approx(want.nats, abs=1e-3)


def test_without_sinks_or_beyond_the_text_positions_do_not_matter(lm, ids):
    full = study.losses(lm.model, ids, study.Setting(None))
    for setting in (study.Setting(64, 4, "cache"), study.Setting(64, 4, "text")):
        torch.testing.assert_close(study.losses(lm.model, ids, setting), full, rtol=0, atol=2e-3)
    near, far = (study.losses(lm.model, ids, study.Setting(16, 0, where)) for where in ("text", "far"))
    # The model takes its angles in float32: at 65,000 they are off by some thousandths.
    assert near.mean().item() == pytest.approx(far.mean().item(), abs=0.02)


def test_runs_belong_to_this_code(lm):
    """The first tokens of recorded runs, again; another Python may have another wording of the text."""
    record = study.recorded()
    ids = lm.ids(topics(3000), 2 * record["run"] + 1)
    again = study.losses(lm.model, ids, study.Setting(None)).split(record["run"])
    for row in record["rows"]:
        if row["positions"] != "far":
            for got, want in zip(again, row["runs"]):
                assert got.mean().item() == pytest.approx(want, abs=0.3), row


@pytest.mark.parametrize(("sinks", "where"), [(0, "text"), (4, "cache"), (1, "far")])
def test_the_first_runs_after_eviction_again(lm, sinks, where):
    """Where the settings part: without sinks the loss leaps by a nat, far sinks cost more. The text may vary."""
    record = study.recorded()
    width, budget = record["run"], record["budget"]
    (row,) = (
        r for r in record["rows"] if (r["budget"], r["sinks"], r["positions"]) == (budget, sinks, where)
    )
    ids = lm.ids(topics(8000), budget + 2 * width + 1)
    again = study.losses(lm.model, ids, study.Setting(budget, sinks, where))
    assert len(again) == budget + 2 * width
    got = again[budget:].mean().item()
    first = budget // width
    assert got == pytest.approx(sum(row["runs"][first : first + 2]) / 2, abs=0.2)


def test_layers_hold_sinks(lm, ids):
    found = study.sink_layers(lm.model, ids)
    assert len(found) == 30
    for layer in found:
        assert 0 < layer["token_0"] <= layer["mass"] <= 1
        assert 0 <= layer["heads"] <= 1


def test_bad_input_is_named(lm, ids):
    with pytest.raises(ValueError, match="positions: expected one of text, cache, far, got 'here'"):
        study.losses(lm.model, ids, study.Setting(16, 4, "here"))
    with pytest.raises(ValueError, match="budget: expected more than 8 and less than 31, got 40"):
        study.study(32, 40)


def test_record_says_what_the_chapter_says():
    record = study.recorded()
    table, budget = study.perplexities(record), record["budget"]
    full = table[study.Setting(None)]
    # Without sinks perplexity nearly doubles at once; with one it is within a tenth of full attention's.
    assert 1.6 * full < table[study.Setting(budget, 0, "text")] < 3 * full
    for sinks in (1, 2, 4, 8):
        for where in ("text", "cache"):
            assert full < table[study.Setting(budget, sinks, where)] < 1.1 * full
    # Inside the trained length positions make no difference, far beyond it they do.
    near, cache, far = (table[study.Setting(budget, 4, where)] for where in ("text", "cache", "far"))
    assert abs(near - cache) < 0.02 * cache
    assert far > 10 * cache
    apart = {sinks: table[study.Setting(budget, sinks, "far")] for sinks in (1, 2, 4, 8)}
    assert 2 * table[study.Setting(budget, 0, "text")] < apart[1] < 50, "worse than no sink at all"
    assert all(10 * apart[1] < apart[sinks] < 1100 for sinks in (2, 4, 8))
    # Nearly all of the sinks' mass is token 0, and its value is short.
    layers = record["layers"]
    rest = sum(r["mass"] - r["token_0"] for r in layers) / len(layers)
    assert 0.15 < rest / (sum(3 / (t + 1) for t in range(256, 512)) / 256) < 0.19, "a sixth of an even spread"
    deep = layers[12:]
    assert 0.28 < min(r["mass"] for r in deep) < max(r["mass"] for r in deep) < 0.615
    assert sum(r["token_0"] for r in deep) / len(deep) == pytest.approx(0.45, abs=0.005)
    assert all(0.1 < r["value"] < 0.44 for r in deep)
