"""Captured mass in SmolLM2: patterns of one budget, a record that belongs to the code and says what the book says."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.models import smollm2
from effattn_lab.sparse import static_patterns_experiment as experiment
from effattn_lab.tasks.text import topics


def test_patterns_have_one_budget():
    for name, mask in experiment.PATTERNS.items():
        assert 64 <= experiment.mean_keys(mask) <= 68, name


def test_first_layer_of_the_record_again():
    """Layer 0 of the record from captured queries and keys, by another way; the text depends on Python."""
    lm = smollm2.load()
    q, k, _ = lm.capture(topics(8 * experiment.TOKENS), layer=0, max_tokens=experiment.TOKENS)
    s = q[0] @ k[0].repeat_interleave(3, dim=0).transpose(-1, -2) / 8
    past = torch.ones(experiment.TOKENS, experiment.TOKENS, dtype=torch.bool).tril()
    p = torch.softmax(s.masked_fill(~past, float("-inf")), dim=-1)[:, -experiment.QUERIES :]
    place = torch.arange(experiment.TOKENS)
    gap = place[-experiment.QUERIES :, None] - place
    near = (gap >= 0) & (gap < 68)
    got = (p * near).sum(-1).mean(-1)
    want = torch.tensor(experiment.recorded()["mass"]["window 68"][0])
    torch.testing.assert_close(got, want, rtol=0, atol=0.03)


def test_record_says_what_the_chapter_says():
    rows = {row["pattern"]: row for row in experiment.summary(experiment.recorded()["mass"])}
    assert all(row["heads"] == 270 for row in rows.values())
    sinks, window = rows["4 sinks + window 64"], rows["window 68"]
    combs = [rows["strided, l = 60"], rows["fixed, l = 64, c = 6"], rows["dilated, every 6th"]]
    assert rows["largest 68 (oracle)"]["mean"] >= max(row["mean"] for row in rows.values())
    # Moving four keys to the front is worth more than any comb.
    assert sinks["mean"] > window["mean"] + 0.2
    assert all(row["mean"] < sinks["mean"] - 0.2 for row in combs)
    assert sinks["mean"] == pytest.approx(0.73, abs=0.006)
    assert window["mean"] == pytest.approx(0.43, abs=0.006)
    # Even the best keys hold less than 95 % in a third of the heads, and above 90 % in four of five.
    best = torch.tensor(experiment.recorded()["mass"]["largest 68 (oracle)"])
    assert (best < 0.95).double().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert (best >= 0.9).double().mean().item() == pytest.approx(0.8, abs=0.04)
    # The same pattern keeps one head whole and starves another.
    assert sinks["kept"] > 0
    assert sinks["worst"] < 0.6


@pytest.mark.parametrize("name", ["random 68", "largest 68 (oracle)"])
def test_record_has_the_comparisons(name):
    mass = torch.tensor(experiment.recorded()["mass"][name])
    assert mass.shape == (30, 9)
    assert bool(((mass > 0) & (mass <= 1)).all())
