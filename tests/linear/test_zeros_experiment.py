"""The one-layer study: tasks as described, runs that belong to this code, and what the record says."""

import pytest
import torch

from effattn_lab.linear import zeros_experiment as study
from effattn_lab.models.tiny import count_parameters


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tasks_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    for task, variance in (("contrast", 2.0), ("contrast_1", 2.0), ("mean", 1.0)):
        x, target = study.draw(task, 4000, generator)
        assert x.shape == (4000, 16, 11)
        assert target.shape == (4000, 1 if task == "contrast_1" else 8)
        assert target.square().mean().item() == pytest.approx(variance, rel=0.1)
        a, b = (x[x[..., flag] == 1] for flag in (8, 9))
        assert len(a) == len(b) == 4000
        assert (x[:, -1, 8:10] == 0).all()  # the asking token is neither
        assert (x[:, -1, 10] == 1).all()
        want = 4 * x[..., :8].mean(1) if task == "mean" else (a - b)[:, :8]
        torch.testing.assert_close(target, want[:, : target.shape[1]])


def test_models_are_of_one_size():
    sizes = {name: count_parameters(study.Reader(entry.build(), 8)) for name, entry in study.MIXERS.items()}
    assert max(sizes.values()) < 1.35 * min(sizes.values()), sizes  # ZeroS has a fifth matrix, W_u


@pytest.mark.parametrize("task", ["contrast", "mean"])
def test_runs_belong_to_this_code(task):
    """The first steps of each recorded run of seed 0, again. Only machines differ, and hardly."""
    for run in study.recorded():
        if run["task"] == task and run["seed"] == 0:
            again = study.train(task, run["mixer"], 0, steps=study.EARLY + 1)
            # The rate drops in the last third of the steps; the recorded run is longer, so only the first two agree.
            assert again["early_loss"] == pytest.approx(run["early_loss"], rel=0.2), run


def test_record_says_what_the_chapter_says():
    table = {row["mixer"]: row for row in study.summary(study.recorded())}
    assert all(
        len([r for r in study.recorded() if r["mixer"] == m and r["task"] == t]) == 3
        for m in table
        for t in study.TASKS
    )
    for name in ("softmax", "linear"):  # one convex head attends to A: the variance of c_B is left
        assert 0.9 < table[name]["contrast"][1] <= table[name]["contrast"][2] < 1.1
    for name in ("softmax_2", "signed", "zeros", "zeros_kept", "zeros_sm"):
        assert table[name]["contrast"][2] < 0.1, name
    # One number can be had by weights that look at it: in two runs of three.
    assert table["softmax"]["contrast_1"][0] < 0.1 < 0.9 < table["softmax"]["contrast_1"][2]
    # The mean: weights that sum to zero lose it, and the constant gets it back.
    for name in ("softmax", "softmax_2", "linear", "signed", "zeros_kept"):
        assert table[name]["mean"][2] < 0.1, name
    assert table["zeros_sm"]["mean"][1] > 0.9
    # The cosine can break the sum: one run of three finds it.
    median, least, most = table["zeros"]["mean"]
    assert least < 0.1 < 0.3 < median <= most < 0.6


def test_bad_input_is_named():
    for message, call in (
        ("task: expected one of contrast", lambda: study.draw("sum", 3, torch.Generator())),
        ("mixer: expected one of softmax", lambda: study.train("mean", "mamba", 0)),
        ("steps: expected an integer", lambda: study.train("mean", "zeros", 0, steps=0)),
        ("examples: expected an integer", lambda: study.draw("mean", 0, torch.Generator())),
    ):
        with pytest.raises(ValueError, match=message):
            call()
