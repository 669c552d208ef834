"""What the chapter and the lab on Adamas say: costs, and which estimator finds the keys of largest product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effattn_lab.sparse import adamas_cost as cost
from effattn_lab.sparse import adamas_latency as latency
from effattn_lab.sparse.adamas import select_nearest
from effattn_lab.sparse.adamas_recall import ESTIMATES, KINDS, by_sign, make, recall_and_mass
from effattn_lab.sparse.codes import bucketize, hadamard, l1_naive, pack


@pytest.fixture(scope="module")
def found():
    inputs = {kind: make(kind, heads=4) for kind in KINDS}
    return {name: [recall_and_mass(e, *inputs[kind]) for kind in KINDS] for name, e in ESTIMATES.items()}


def test_recall_says_what_the_chapter_says(found):
    raw, coded = found["codes of k itself, thresholds 4"], found["codes of kH, thresholds 4"]
    assert abs(raw[0][0] - coded[0][0]) < 0.05, "channels alike: the transform does nothing"
    assert coded[1][0] > 1.5 * raw[1][0], "channels unequal: it helps much"
    assert found["codes of kH, thresholds 10"][1][0] < coded[1][0] - 0.1, "the scale of thresholds"
    assert found["codes of kH, {1, 2} counted 3"][1][0] < coded[1][0], "the released count"
    assert found["codes of kH, bits that differ"][1][0] < found["codes of kH, {1, 2} counted 3"][1][0]
    assert all(recall == 1 for recall, _ in found["oracle"])
    assert all(mass <= found["oracle"][i][1] for rows in found.values() for i, (_, mass) in enumerate(rows))
    exact = found["exact distance"]
    assert min(exact[0][0], exact[1][0]) > 0.99
    assert exact[2][0] < 0.2, "lengths break every distance"
    assert found["product of codes of kH"][2][0] > 2 * coded[2][0], "a product of the same codes holds"
    assert found["Quest's bound, pages of 16"][0][0] < 0.3, "scattered tokens"


def test_wide_thresholds_are_signs():
    q, k = make(KINDS[1], heads=2, seqlen=500)
    x = hadamard(k)
    assert set(bucketize(x, (-1e3, 0, 1e3)).unique().tolist()) == {1, 2}
    assert torch.equal(by_sign()(q, k), -((hadamard(q) > 0) != (x > 0)).sum(-1).float())


def test_related_keys_are_the_best_and_sizes_are_as_said():
    q, k = make(KINDS[0], heads=2, seqlen=300)
    assert torch.allclose(k.square().mean(-1).sqrt(), torch.full((2, 300), 4.0), rtol=1e-5)
    assert torch.allclose(q.square().mean(-1).sqrt(), torch.full((2, 1), 4.0), rtol=1e-5)
    free = make(KINDS[2], heads=2, seqlen=300)[1].norm(dim=-1)
    assert free.std() > 0.3 * free.mean()


def test_costs():
    assert cost.code_bytes(100, 128) == 3200
    assert cost.selection_bytes(100) == 400
    assert cost.decode_bytes(1000, 64, 128) == 1000 * 36 + 64 * 512
    assert cost.decode_bytes(1000, 64, 128, fused=True) == 1000 * 32 + 64 * 512
    assert cost.traffic_ratio(1000, 1000, 128) < 1
    assert cost.hadamard_adds(128) == 128 * 7


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make("all"), "kind: expected one of channels alike"),
        (lambda: make(KINDS[0], heads=0), "heads: expected an integer of at least 1, got 0"),
        (
            lambda: recall_and_mass(by_sign(), *make(KINDS[0], heads=1, seqlen=8), budget=0),
            "budget: expected",
        ),
        (lambda: cost.code_bytes(0, 128), "seqlen: expected an integer of at least 1, got 0"),
        (lambda: latency.words_first(torch.zeros(1, 2, 3).int()), "codes: expected int32"),
        (lambda: latency.rows([0], 3), "seqlen: expected an integer of at least 1, got 0"),
        (lambda: latency.rows([64], 2), "rounds: expected at least 3, got 2"),
        (lambda: latency.select(np.zeros((1, 4), dtype=np.uint16), 0), "budget: expected an integer"),
        (lambda: cost.hadamard_adds(0), "head_dim: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("n", [1, 2, 300, 8193])
@pytest.mark.parametrize("counted", [True, False])
def test_the_fast_estimator_is_exact(n, counted, monkeypatch):
    """Word by word and in pieces, with NumPy's count of bits and without."""
    if not counted:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    g = torch.Generator().manual_seed(n)
    a, b = (torch.randint(0, 4, (2, m, 128), generator=g).to(torch.uint8) for m in (1, n))
    got = latency.estimate(*(latency.words_first(pack(x)) for x in (a, b)))
    assert torch.equal(torch.from_numpy(got.astype(np.int32)), l1_naive(a, b))


@pytest.mark.parametrize("budget", [1, 2, 40, 500])
@pytest.mark.parametrize("kinds", [1, 3, 300])
def test_the_fast_selection_has_the_rule_for_ties(budget, kinds):
    g = torch.Generator().manual_seed(budget)
    d = torch.randint(0, kinds, (3, 200), generator=g)
    got = latency.select(d.numpy().astype(np.uint16), budget)
    assert torch.equal(torch.from_numpy(got).sort(-1).values, select_nearest(d[None], budget)[0])


def test_latency_rows_are_checked_and_whole():
    (row,) = latency.rows([512], rounds=3)
    assert row["correct"]
    assert row["ratio"] == row["full"] / row["step"]
    assert min(row[part] for part in ("encode", "estimate", "select", "attend")) > 0


def test_the_record_holds_the_bar():
    """No clock here: the figures of one run, which every change of the step has to measure again."""
    rows = {row["seqlen"]: row for row in latency.recorded()["rows"]}
    assert tuple(rows) == latency.LENGTHS
    assert all(row["correct"] and row["budget"] == latency.BUDGET == 128 for row in rows.values())
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["full"] / row["step"])
    assert rows[65536]["ratio"] >= 3, "the bar: 64K tokens, a budget of 128"
    # What the chapter says in words of the figures that it prints.
    short, long = rows[4096], rows[131072]
    assert short["encode"] > 0.1 * short["step"]
    assert long["estimate"] > 0.5 * long["step"]
    for part in ("encode", "attend"):
        assert long[part] < 5 * short[part], "hardly know the length"
    for n, row in rows.items():
        dense, scan = (size * n / row[part] for size, part in ((8 * 128, "full"), (128 / 4, "estimate")))
        assert scan < dense, "the scan reads more slowly than full attention"
        assert row["ratio"] < cost.traffic_ratio(n, 128, 128, 4), "less than the bytes allow"


def test_a_wrong_step_gets_no_time(monkeypatch):
    estimate = latency.estimate
    monkeypatch.setattr(latency, "estimate", lambda q, k: estimate(q, k) + np.uint16(1))
    (row,) = latency.rows([256], rounds=3)
    assert not row["correct"]
    assert row["ratio"] is None
    assert row["step"] is None


def test_pictures_draw():
    from effattn_lab.figures import adamas as figures

    figures.codes_picture()
    held = [axis.get_title(loc="left").split()[-4] for axis in figures.choices_picture().axes]
    assert sorted(held, key=lambda share: float(share[:-1])) == held, "the choices get better downwards"
    figures.distance_picture(200)
    figures.energy_picture({"layer 0": (torch.rand(64), torch.rand(64))})
    row = {
        "seqlen": 512,
        "full": 5.0,
        "step": 1.4,
        "encode": 0.1,
        "estimate": 1.0,
        "select": 0.2,
        "attend": 0.1,
    }
    picture = figures.time_picture([row, {**row, "seqlen": 1024}])
    assert [text.get_text() for text in picture.axes[0].get_xticklabels()] == ["0.5K", "1K"]
