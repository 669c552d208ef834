"""The router study: tasks as described, runs that belong to this code, and what the record says."""

from __future__ import annotations

import json

import pytest
import torch

from effattn_lab.sparse import elastic_experiment as study
from effattn_lab.sparse.elastic_tasks import LENGTH, TASKS, VOCABULARY, mixed, prompts


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_recall_asks_every_key_once_and_the_pairs_answer():
    v = VOCABULARY
    ids, targets = prompts("recall", 300, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (300, LENGTH)
    assert (targets[:, :-8] == -100).all()
    places = set()
    for row, want in zip(ids, targets):
        assert row[0] == 0
        pairs = {}
        for at, token in enumerate(row.tolist()):
            if v.pairs <= token < v.keys:
                pairs[(token - v.pairs) // 8] = (token - v.pairs) % 8
                places.add(at)
        assert sorted(pairs) == list(range(8))
        asked = (row[-8:] - v.keys).tolist()
        assert sorted(asked) == list(range(8))
        assert (want[-8:] - v.values).tolist() == [pairs[k] for k in asked]
    assert (min(places), max(places)) == (1, 40)
    share = torch.bincount(targets[:, -8:].flatten() - v.values) / (300 * 8)
    assert (share - 1 / 8).abs().max() < 0.04, "values are drawn evenly: chance is 1 in 8"


def test_local_asks_three_back():
    ids, targets = prompts("local", 50, torch.Generator().manual_seed(1))
    assert (ids[:, 0] == 1).all()
    assert (ids[:, 1:] >= VOCABULARY.noise).all()
    assert int(ids.max()) < VOCABULARY.size
    for at in range(LENGTH - 8, LENGTH):
        assert torch.equal(targets[:, at], ids[:, at - 3])


def test_no_route_leads_from_a_question_to_a_pair_when_all_heads_are_sparse():
    """Gradients: the last 8 logits do not depend on what stands at 1 to 40, and with full heads they do."""
    recipe = study.Recipe()
    model, _ = study.train_backbone(recipe, 0, stop=1)
    layers = study.make_elastic(model, recipe, 0)
    ids, _ = prompts("recall", 2, torch.Generator().manual_seed(2))
    for full in (0, 1):
        for layer in layers:
            layer.fixed = torch.full((4,), float(full))
        x = model.embed(ids).detach().requires_grad_(True)
        h = x
        for block in model.blocks:
            h = block.feed(block.mix(h)[0])
        model.head(model.norm(h))[:, -8:].square().sum().backward()
        reached = x.grad[:, 1:41].abs().amax()
        assert (reached > 0) == bool(full)


def test_halves():
    batch, task = mixed(6, torch.Generator().manual_seed(3))
    assert batch.inputs[:, 0].tolist() == task.tolist() == [0, 0, 0, 1, 1, 1]


def test_masks():
    recipe = study.Recipe()
    assert study.bits(0, recipe).sum() == 0
    assert study.bits(255, recipe).sum() == 8
    assert study.bits(0b0001_0010, recipe).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    rows = [[m, 255 - m] for m in range(256)]
    row = {"static": {"choose": rows}}
    assert study.best_mask(row, recipe, 8) == 0
    assert study.best_mask(row, recipe, 4, "recall") == 0b1111_0000
    assert study.best_mask(row, recipe, 4, "local") == 0b0000_1111
    with pytest.raises(ValueError, match="sparse_heads: expected 0 to 8, got 9"):
        study.best_mask(row, recipe, 9)


def test_the_table_of_masks_is_what_the_model_answers():
    """The shortcut (modes once, then mixed) against the model itself with its heads fixed."""
    recipe = study.Recipe(choose=5, test=6)
    model, _ = study.train_backbone(recipe, 1, stop=60)
    table = study.static_table(model, recipe, 1)
    assert len(table["choose"]) == len(table["test"]) == 256
    layers = study.make_elastic(model, recipe, 1)
    for mask in (0, 255, 0b1010_0110, 0b0000_0001, 0b0001_0000):
        for n, layer in enumerate(layers):
            layer.fixed = study.bits(mask, recipe)[n]
        for part, examples in (("choose", 5), ("test", 6)):
            want = [study.correct(model, t, examples, study.PARTS[part])[0] for t in TASKS]
            assert table[part][mask] == want, (mask, part)
    assert len({tuple(t) for t in table["test"]}) > 4


def test_training_moves_routers_and_nothing_else():
    recipe = study.Recipe()
    model, _ = study.train_backbone(recipe, 0, stop=1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen = []
    result = study.train_routers(model, recipe, 0, "signed", stop=10, watch=seen.append)
    assert seen == result["trace"]
    after = dict(model.named_parameters())
    for name, p in before.items():
        at = name.replace("mixer.", "mixer.attention.") if ".mixer." in name else name
        assert torch.equal(after[at], p), name
    assert result["trace"][0]["step"] == 10
    fresh = study.make_elastic(model, recipe, 0)[0].router
    study.train_routers(model, recipe, 0, "signed", stop=2)
    trained = model.mixers[0].router
    assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), trained.parameters()))


def test_runs_belong_to_this_code():
    """The first steps of the recorded runs of seed 0, again. Only machines differ, and hardly."""
    record = study.recorded()
    recipe = study.Recipe(**record["recipe"])
    assert recipe == study.Recipe()
    row = next(r for r in record["rows"] if r["seed"] == 0)
    _, early = study.train_backbone(recipe, 0, stop=study.EARLY + 1)
    assert early == pytest.approx(row["early_loss"], rel=1e-3)


def test_the_task_that_needs_the_past_keeps_more_full_heads_with_every_seed():
    """The study's first result, in the record: three seeds, every variant, by at least one head of eight."""
    record = study.recorded()
    assert sorted(row["seed"] for row in record["rows"]) == [0, 1, 2]
    assert record["results"] == study.flat(study.summary(record)), "what the page shows is made from the runs"
    gaps = [r["sparsity_local"] - r["sparsity_recall"] for r in record["results"]]
    assert len(gaps) == 9
    assert min(gaps) > 1 / 8, gaps


def test_rivals_of_a_router():
    """The best mask for both tasks that is not sparser, and one a task, about as sparse."""
    recipe = study.Recipe(test=1)
    # answers: recall needs heads 0 and 1, local head 7
    right = [[4 * (m & 1) + 2 * (m >> 1 & 1), 6 * (m >> 7)] for m in range(256)]
    routed = {t: {"right": 5, "sparsity": s} for t, s in (("recall", 0.6), ("local", 0.85))}
    row = {
        "seed": 0,
        "full": [6, 6],
        "static": {"choose": right, "test": right},
        "routed": {"signed": routed},
    }
    (entry,) = study.summary({"recipe": vars(recipe), "rows": [row]})
    assert entry["mean_sparsity"] == pytest.approx(0.725)
    rival = entry["rival"]  # 5 of 8 sparse: three full heads suffice
    assert (rival["sparsity"], rival["mask"], rival["accuracy"]) == (0.625, 0b1000_0011, [6 / 8, 6 / 8])
    assert [o["sparsity"] for o in entry["own"]] == [5 / 8, 7 / 8]
    assert entry["own"][0]["mask"] & 3 == 3
    assert entry["own"][1]["mask"] == 0b1000_0000
    assert [o["accuracy"] for o in entry["own"]] == [6 / 8, 6 / 8]


def test_one_mask_a_task_is_as_good_as_the_router():
    """In the record: with the nearest whole number of sparse heads, in every row and for both tasks."""
    for row in study.recorded()["results"]:
        for task in TASKS:
            assert abs(row[f"own_sparsity_{task}"] - row[f"sparsity_{task}"]) <= 1 / 16
            assert row[f"own_{task}"] >= row[f"routed_{task}"], (row["seed"], row["variant"], task)


def test_a_router_with_targets_beats_one_mask_for_both_tasks():
    """In the record: more accurate in the mean of both tasks, and not less sparse. One target is not enough."""
    worse = []
    for row in study.recorded()["results"]:
        assert row["rival_sparsity"] <= row["mean_sparsity"]
        gain = sum(row[f"routed_{t}"] - row[f"rival_{t}"] for t in TASKS)
        if gain <= 0:
            worse.append((row["seed"], row["variant"]))
    assert worse == [(0, "one target")]


def test_a_record_without_missing_seeds_is_not_run_again(tmp_path, capsys):
    """Its runs stay, its results are computed anew."""
    record = study.recorded()
    record["results"] = []
    out = tmp_path / "record.json"
    out.write_text(json.dumps(record))
    study.main(["--out", str(out), "--seeds", "0", "1"])
    again = json.loads(out.read_text())
    assert again == study.recorded()
    assert len(capsys.readouterr().out.splitlines()) == len(again["results"])


def test_bad_input_is_named(tmp_path):
    recipe = study.Recipe()
    for words, call in (
        ("task: expected one of recall, local, got 'sum'", lambda: prompts("sum", 1, torch.Generator())),
        ("examples: expected an integer", lambda: prompts("local", 0, torch.Generator())),
        ("examples: expected an even number, got 3", lambda: mixed(3, torch.Generator())),
        ("variant: expected one of signed", lambda: study.train_routers(None, recipe, 0, "both")),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"recipe": {"width": 5}, "rows": []}))
    with pytest.raises(SystemExit) as stop:
        study.main(["--out", str(other)])
    assert stop.value.code == 2
    assert TASKS == ("recall", "local")
