"""What the delta rule's pictures show, and that they can be drawn."""

import pytest
import torch

from effattn_lab.figures import delta_rule as figures
from effattn_lab.figures import delta_rule_lab as lab
from effattn_lab.linear.delta_rule import delta_rule_chunked, l2_normalize
from effattn_lab.measure import delta_rule_peers as peers


def test_recalled():
    """The figures of the text: one pass stores less, rewriting is where it wins."""
    assert figures.recalled(128, 1, delta=False, repeats=3) > 0.9
    assert 0.4 < figures.recalled(128, 1, delta=True, repeats=3) < 0.7
    assert figures.recalled(16, 8, delta=True, repeats=3) > 0.99
    assert figures.recalled(16, 8, delta=False, repeats=3) < 0.3


def test_recall_of_alike_keys():
    """Keys that lean the same way, as real ones do: a sum answers far too much, the delta rule does not."""
    generator = torch.Generator().manual_seed(0)
    k = l2_normalize(torch.randn(1, 1, 512, 64, generator=generator) + 1)
    v = torch.randn(1, 1, 512, 64, generator=generator)
    _, state = delta_rule_chunked(k, k, v, torch.ones(1, 1, 512), return_state=True)
    added, delta = lab.recall(k.mT @ v, k, v), lab.recall(state, k, v)
    assert list(added) == list(lab.AGES)
    assert delta[1, 1][0] == pytest.approx(1, abs=1e-4)
    assert delta[1, 1][1] < 1e-3
    assert all(error > 5 for _, error in added.values())
    assert all(error < 2 for _, error in delta.values())
    best = lab.recall(k.mT @ v, k, v, rescale=True)
    for age, (cosine, error) in best.items():
        assert cosine == pytest.approx(added[age][0], abs=1e-5), "another length, the same direction"
        assert error < 1.1, "hardly worse than answering nothing"
    assert min(error for _, error in best.values()) > 0.5
    exact = lab.recall(torch.linalg.lstsq(k[:, :, :64], v[:, :, :64]).solution, k[:, :, :64], v[:, :, :64])
    assert exact[17, 64][1] < 1e-2  # what is answered exactly has error 0


def test_pictures_are_drawn():
    rows = [
        {"task": task, "mixer": mixer, "answers": {"32": 0.5 + 0.1 * seed, "64": 0.4}}
        for task in ("parity", "other") for mixer in ("a", "b") for seed in (0, 1)
    ]  # fmt: skip
    for figure, panels in (
        (figures.overwrite(), 1),
        (lab.tracking_picture(rows), 2),
        (lab.recall_picture({"x": dict.fromkeys(lab.AGES, (0.5, 2.0))}), 2),
    ):
        assert len(figure.axes) == panels
        assert all(axis.get_xlabel() for axis in figure.axes)


def test_the_recorded_peers():
    """The table of the chapter: together ours take fewer instructions, and none of ours spills."""
    table = peers.recorded()["rows"]
    found = {(row["gpu"], row["kernel"], row["by"]): row for row in table}
    assert {key[0] for key in found} == {"A100", "H100"}
    for gpu in ("A100", "H100"):
        total = {
            by: sum(found[gpu, k, by]["instructions_per_token"] for k in peers.PEERS)
            for by in ("ours", "fla")
        }
        assert total["ours"] < 0.75 * total["fla"]
        for kernel in peers.PEERS:
            assert found[gpu, kernel, "ours"]["spill_bytes"] == 0
