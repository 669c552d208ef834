"""State tracking with the delta rule: the recipe, and that the recorded run is one of it."""

import pytest
import torch

from effattn_lab.linear import delta_rule_tracking as tracking


def test_only_the_range_differs():
    """The two delta rules have the same parameters to begin with: beta is doubled in one."""
    narrow, wide = (tracking.build(f"delta, beta < {n}", "parity", 3) for n in (1, 2))
    for (name, a), (other, b) in zip(narrow.named_parameters(), wide.named_parameters()):
        assert name == other
        assert torch.equal(a, b)
    assert narrow.mixers[0].state_elements == wide.mixers[0].state_elements == 2 * 16 * 16


def test_training_is_repeatable_and_learns():
    losses = []
    for _ in range(2):
        model = tracking.build("delta, beta < 2", "parity", 1)
        losses.append(tracking.train(model, "parity", steps=12, seed=1))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_tasks():
    ids, answers = tracking.draw("three things exchanged", 200, 9, 0)
    assert set(ids.unique().tolist()) == {0, 1, 2, 5}  # the identity and the three exchanges of S3
    assert len(answers[:, -1].unique()) == 6
    ids, answers = tracking.draw("parity", 5, 9, 0)
    assert torch.equal(answers, ids.cumsum(1) % 2)
    with pytest.raises(ValueError, match="mixer: expected one of softmax"):
        tracking.build("delta", "parity")
    with pytest.raises(ValueError, match="task: expected one of parity"):
        tracking.build("softmax", "copying")


def test_the_recorded_run():
    """Every mixer, task and seed once; only those that can turn the state over leave chance.

    At twice the trained length all their answers are right, or nearly. At eight times it one seed in six has lost
    parity without a gate, and half of them with one; the chapter looks into one of those.
    """
    table = tracking.recorded()
    seeds = {row["seed"] for row in table}
    assert len(seeds) >= 6
    assert len(table) == len(tracking.TASKS) * len(tracking.MIXERS) * len(seeds)
    for task in tracking.TASKS:
        chance = 1 / 2 if task == "parity" else 1 / 6
        for mixer in tracking.MIXERS:
            rows = [row for row in table if (row["task"], row["mixer"]) == (task, mixer)]
            assert {row["seed"] for row in rows} == seeds
            share = {n: [row["answers"][n] for row in rows] for n in ("64", "256")}
            if "beta < 2" in mixer:
                assert min(share["64"]) > 0.95, (task, mixer)
                held = sum(value > 0.9 for value in share["256"]) / len(seeds)
                assert held >= (0.5 if (task, "gated" in mixer) == ("parity", True) else 0.8), (task, mixer)
            else:
                assert max(share["256"]) < chance + 0.15, (task, mixer)
    assert tracking.summary(table)[0].keys() >= {"task", "mixer", "seeds", "at 32", "at 64", "at 256"}
