"""The budget study: methods read what they say they read, runs go on where they stopped, and the record is theirs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from effattn_lab.figures import budget as figures
from effattn_lab.models import smollm2
from effattn_lab.models.decode import Prompt
from effattn_lab.sparse import budget_record, budget_study
from effattn_lab.sparse.budget_methods import (
    BEST,
    METHODS,
    VARIANTS,
    FittedAdamasCache,
    chosen,
    judge,
    key_statistics,
    recalled,
    sinks,
)
from effattn_lab.sparse.cache import gather_attention
from effattn_lab.sparse.codes import bucketize, hadamard, unpack
from effattn_lab.sparse.eviction import SnapKVCache
from effattn_lab.sparse.streaming import StreamingCache
from effattn_lab.tasks import ruler

BASE = 10_000.0


class Config:
    rope_theta = BASE


class Model:
    config = Config()


#: The study's methods, with a window that leaves SnapKV a choice here, and positions that stay in StreamingLLM.
MAKERS = {
    name: method.make(Model(), (-1.0, 0.0, 1.0)) for name, method in {**METHODS, **VARIANTS}.items()
} | {
    "snapkv": lambda: SnapKVCache(8),
    "streaming": lambda: StreamingCache(rope_base=None),
}


def text(layers=2, heads=4, kv_heads=2, n=90, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        tuple(1.5 * torch.randn(1, h, n, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
        for _ in range(layers)
    ]
    return Prompt(tuple(rows), None, torch.zeros(1, 3))


@pytest.mark.parametrize("name", [*METHODS, "hadamard_fit_centred"])
@pytest.mark.parametrize("budget", [32, 48, 200])
def test_chosen_is_what_was_read(name, budget):
    """Attention over the named positions of the text is what the cache gave, step after step."""
    q, k, v = text().layers[0]
    tagged = v.clone()
    tagged[..., 0] = torch.arange(v.shape[2])
    cache = MAKERS[name]()
    cache.prefill(q[:, :, :70], k[:, :, :70], tagged[:, :, :70])
    for t in range(70, 80):
        query = q[:, :, t : t + 1]
        cache.append(k[:, :, t : t + 1], tagged[:, :, t : t + 1])
        got = cache.attend(query, budget)
        index, valid = chosen(cache, query, budget)
        want = gather_attention(query, k[:, :, : t + 1], tagged[:, :, : t + 1], index, valid=valid)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        counts = valid.sum(-1).double().mean() if valid is not None else index.shape[-1]
        assert float(counts) == cache.read


@pytest.mark.parametrize("name", METHODS)
def test_judge(name):
    prompt = text()
    found = judge(MAKERS[name], prompt, 70, 48, every=3)
    mass, best, recall, error = (np.array(found[k]) for k in ("mass", "oracle", "recall", "error"))
    assert mass.shape == best.shape == recall.shape == error.shape == (2, 4)
    assert (recall <= 1).all()
    assert (error < 1e-4 if name == "full" else error > 1e-3).all()
    if name in ("full", "oracle"):
        assert (recall == 1).all()
        np.testing.assert_allclose(mass, best if name == "oracle" else 1, atol=2e-4)
    else:
        assert (recall > 0).all()
        assert (recall < 1).all()
    if name not in ("full", "snapkv"):  # these read more than the budget
        assert (mass <= best + 1e-4).all()
        assert found["read"] <= 48
    whole = judge(MAKERS[name], prompt, 70, 90)
    np.testing.assert_allclose(whole["mass"], 1, atol=2e-4)
    np.testing.assert_allclose(whole["recall"], 1, atol=2e-4)
    np.testing.assert_allclose(whole["error"], 0, atol=2e-4)


def test_variants():
    """The plain ones are Adamas with and without its transform; fitted codes are equally frequent."""
    q, k, v = text(n=120).layers[0]
    k = 3 * k + 1  # another scale than the queries', and a mean
    for plain, variant in (("adamas", "hadamard_one"), ("adamas_raw", "raw_one")):
        one, other = MAKERS[plain](), MAKERS[variant]()
        for cache in (one, other):
            cache.prefill(q, k, v)
        assert torch.equal(one.distances(q[:, :, -1:]), other.distances(q[:, :, -1:]))
    for name, x in (("hadamard_released", hadamard(k)), ("raw_released", k)):
        cache = MAKERS[name]()
        cache.prefill(q, k, v)
        assert torch.equal(unpack(cache.codes), bucketize(x, (-10, 0, 10)))
    fitted = MAKERS["hadamard_fit_centred"]()
    fitted.prefill(q, k, v)
    share = torch.bincount(unpack(fitted.codes).flatten().long(), minlength=4) / k.numel()
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.04)
    assert float(hadamard(q).abs().median()) == pytest.approx(fitted.query_thresholds[2])
    assert fitted.thresholds[2] > 2 * fitted.query_thresholds[2]


def test_a_mean_taken_off_is_not_seen():
    """The same direction added to all keys moves no product against another, and no distance of centred codes."""
    q, k, v = text(n=120).layers[0]
    shift = 2 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    far = [FittedAdamasCache(centre=centre) for centre in (True, True, False, False)]
    for cache, keys in zip(far, (k, k + shift, k, k + shift)):
        cache.prefill(q, keys, v)
    query = q[:, :, -1:]
    assert (far[0].distances(query) - far[1].distances(query)).abs().max() <= 1, (
        "but for rounding at a threshold"
    )
    assert (far[2].distances(query) - far[3].distances(query)).abs().max() > 5


def test_sinks():
    """By hand: all queries look at token 5, which stands at 3 and, with half the score, at 6; its value is short."""
    n, dim = 12, 8
    q, k, v = torch.zeros(1, 2, n, dim), torch.zeros(1, 1, n, dim), torch.ones(1, 1, n, dim)
    q[..., 0], k[0, 0, 3, 0], k[0, 0, 6, 0] = 1.0, 4.0, 2.0
    v[0, 0, 3] = 0.5
    ids = torch.tensor([[0, 1, 2, 5, 4, 3, 5, 7, 8, 9, 10, 11]])
    row = sinks(Prompt(((q, k, v),), 1.0, torch.zeros(1, 3)), ids, last=2)[0]
    sums = [math.exp(4) + math.exp(2) + others for others in (9, 10)]  # two queries: 11 and 12 keys
    for name, e in (("weight", math.exp(4)), ("same", math.exp(4) + math.exp(2)), ("first", 1)):
        assert row[name] == pytest.approx(sum(e / s for s in sums) / 2, abs=1e-4)
    assert row["place"] == 3
    assert row["value"] == pytest.approx(0.5 / (11.5 / 12), abs=1e-4)


def test_judge_by_hand():
    """One query that looks at key 3 alone: a window of the last keys misses it, the oracle has it."""
    n, dim = 40, 16
    k = 0.01 * torch.randn(1, 1, n, dim, generator=torch.Generator().manual_seed(0))
    k[:, :, 10] = 3.0
    q, v = torch.ones(1, 1, n, dim), torch.zeros(1, 1, n, dim)
    v[:, :, 10] = 1.0
    prompt = Prompt(((q, k, v),), None, torch.zeros(1, 3))
    judged = {name: judge(MAKERS[name], prompt, n - 1, 16) for name in ("oracle", "streaming", "quest")}
    held = {name: found["mass"][0][0] for name, found in judged.items()}
    assert judged["oracle"]["error"][0][0] < 0.01
    assert (judged["streaming"]["first"], judged["quest"]["first"]) == ([1.0], [0.0])
    assert judged["streaming"]["error"][0][0] == pytest.approx(1, abs=1e-3), "it reads zeros alone"
    assert held["oracle"] > 0.99
    assert held["streaming"] < 0.01
    # 16 keys are one page for Quest, and the current page is always read.
    assert held["quest"] < 0.01
    assert judge(MAKERS["quest"], prompt, n - 1, 32)["mass"][0][0] > 0.99


def test_recalled():
    """Pairs of text: (5, 6) comes at 1, 4 and 9, (7, 5) at 3 and 11, all others once."""
    tokens = [5, 6, 7, 5, 6, 1, 2, 3, 5, 6, 7, 5]
    found = recalled(tokens, 1, 2)
    assert [t for t, far in enumerate(found, 1) if far] == [4, 9, 10, 11]
    assert [t for t, far in enumerate(recalled(tokens, 1, 4), 1) if far] == [9, 10, 11]
    assert [t for t, far in enumerate(recalled(tokens, 1, 5), 1) if far] == [10, 11], "9 had come at 4"
    assert recalled(tokens, 9, 5) == [False, True, True]


def test_statistics():
    n, dim = 400, 64
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(1, 2, n, dim, generator=generator)
    uneven = even.clone()
    uneven[..., :4] *= 10
    shifted = even + 2
    long = even * torch.linspace(0.1, 3, n)[:, None]
    layers = tuple((torch.zeros(1, 2, n, dim), k, k) for k in (even, uneven, shifted, long))
    found = key_statistics(Prompt(layers, None, torch.zeros(1, 3)))
    assert found.spread == pytest.approx(
        [k.square().mean().sqrt().item() for k in (even, uneven, shifted, long)]
    )
    assert found.spread[1] == pytest.approx(hadamard(uneven).square().mean().sqrt().item(), rel=1e-5)
    assert found.top[0] == pytest.approx(4 / dim, abs=0.02)
    assert found.top[1] > 0.8
    assert found.top_transformed[1] < 0.15, "spread over all channels"
    assert found.top[2] == pytest.approx(4 / dim, abs=0.02)
    assert found.top_transformed[2] > 0.7, "a constant goes into one channel"
    assert found.constant[2] == pytest.approx(0.8, abs=0.02)
    assert max(found.constant[0], found.constant[1]) < 0.01
    assert found.norms[3] > 4 * found.norms[0]
    low, middle, high = found.thresholds()
    assert (low, middle) == (-high, 0)
    share = 1 - math.erf(high / math.sqrt(2) / np.sqrt(np.mean(np.square(found.spread))))
    assert share == pytest.approx(0.326, abs=1e-3), "a third of a normal variable lies outside"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: judge(MAKERS["h2o"], text(), 90, 8), "begin: expected fewer than the 90 tokens of the text, got 90"),
        (lambda: sinks(text(), torch.zeros(1, 90), 90), "last: expected fewer than the 90 tokens of the text"),
        (lambda: judge(MAKERS["h2o"], text(), 80, 0), "budget: expected an integer of at least 1, got 0"),
        (lambda: budget_record.perplexities({"rows": []}), "record: expected rows of kind 'loss', got none"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


SMALL = budget_study.Recipe(
    prompt=128, tokens=4, budgets=(48,), mass_budgets=(48,), mass_tokens=4, mass_every=2, task_length=420,
    needles=("niah_single_1",), needle_length=320, needle_budgets=(48,), task_budget=48,
    far=8,
)  # fmt: skip


PARTS = ("loss", "mass", "codes", "needle")
RESERVE = 10


class Short(budget_study.Study):
    """Answers are short."""

    def sample(self, task, length, seed):
        return ruler.make(task, length, self.count, seed=seed, reserve=RESERVE)


@pytest.fixture(scope="module")
def lm():
    return smollm2.load()


@pytest.fixture(scope="module")
def small(lm, tmp_path_factory):
    """A study of seconds, all parts of it."""
    study = Short(tmp_path_factory.mktemp("study") / "r.json", SMALL, lm)
    study.run(PARTS, 1, 1)
    study.task("fwe", 0, compare=True)
    return study


def test_every_run_is_there(small):
    kinds = [row["kind"] for row in small.record["rows"]]
    others = len(METHODS) - 1
    assert kinds.count("loss") == 1 + others
    assert kinds.count("mass") == others
    assert kinds.count("sinks") == 1
    assert kinds.count("codes") == len(VARIANTS)
    assert kinds.count("codes_loss") == 4
    assert kinds.count("needle") == 1 + others + len(SMALL.early)
    assert kinds.count("tasks") == 1 + others
    assert json.loads(small.path.read_text()) == json.loads(json.dumps(small.record)), "saved as it ends"


def test_full_attention_is_the_model(small, lm):
    row = next(r for r in small.record["rows"] if r["kind"] == "loss" and r["method"] == "full")
    source, begin = budget_study.TEXTS["docs"]
    ids = small.ids(source, begin, 133)
    with torch.no_grad():
        logits = lm.model(ids, use_cache=False).logits[0]
    want = torch.nn.functional.cross_entropy(logits[128:132], ids[0, 129:], reduction="none")
    assert row["nats"] == pytest.approx(want.mean().item(), abs=1e-3)
    assert row["read"] == pytest.approx(130.5)
    pairs = list(zip(ids[0].tolist(), ids[0, 1:].tolist()))  # pairs[t - 1] ends with token t
    far = [
        t
        for t in range(129, 133)
        if pairs[t - 1] in pairs[: t - 9] and pairs[t - 1] not in pairs[t - 9 : t - 1]
    ]
    assert row["far_tokens"] == len(far) > 0
    assert row["far_nats"] == pytest.approx(want[[t - 129 for t in far]].mean().item(), abs=1e-3)


def test_it_goes_on_where_it_stopped(small, lm, monkeypatch):
    rows = list(small.record["rows"])
    again = budget_study.Study(small.path, SMALL, lm)
    monkeypatch.setattr(budget_study, "read_prompt", None)  # nothing is read again
    again.run(PARTS, 1, 1)
    assert again.record["rows"] == rows
    monkeypatch.undo()
    lost = [r for r in rows if r["kind"] == "loss" and r["method"] == "h2o"]
    again.record["rows"] = [r for r in rows if r not in lost]
    again.run(("loss",), 1, 1)
    made = again.record["rows"][-len(lost) :]
    assert [r["nats"] for r in made] == [r["nats"] for r in lost], "the same numbers"


def test_another_recipe_is_refused(small, lm):
    with pytest.raises(ValueError, match=r"--out: .* another recipe"):
        budget_study.Study(small.path, budget_study.Recipe(), lm)


def test_answers_are_what_the_model_says(small, lm):
    """Greedily, cut where the score is full or at the tokens that the task reserves, and not before."""
    for kind, task, length in (
        ("needle", "niah_single_1", SMALL.needle_length),
        ("tasks", "fwe", SMALL.task_length),
    ):
        row = next(r for r in small.record["rows"] if (r["kind"], r.get("method")) == (kind, "full"))
        sample = small.sample(task, length, 0)
        said = lm.generate(sample.prompt, RESERVE)
        assert said.startswith(row["output"])
        assert row["wanted"] == list(sample.references)
        assert row["score"] == pytest.approx(sample.score(row["output"]), abs=1e-4)
        assert sample.score(said) == sample.score(row["output"])
        assert row["output"] == said or row["score"] == 1
    assert budget_study.Study.sample(small, "fwe", 420, 0).reserve == ruler.RESERVE["fwe"]


def test_tables_and_pictures(small):
    record = small.record
    table = budget_record.perplexities(record)
    full = next(r for r in table if r["method"] == "full")
    assert full["worse"] == 0
    assert {(r["method"], r["budget"]) for r in table} == {("full", None)} | {(m, 48) for m in figures.LOOKS}
    assert len([r for r in budget_record.needles(record) if r["late"]]) == len(METHODS)
    assert {r["samples"] for r in budget_record.needles(record)} == {1}
    variants = {r["method"]: r for r in budget_record.variants(record)}
    assert list(variants) == list(VARIANTS)
    raw = next(r for r in table if (r["method"], r["budget"]) == ("adamas_raw", 48))
    assert variants["raw_one"]["perplexity"] == pytest.approx(raw["perplexity"])
    assert variants["raw_fit"]["perplexity"] != variants["raw_one"]["perplexity"]
    assert variants["raw_fit_centred"]["perplexity"] is None
    found = budget_record.tasks(record)
    assert [(row["task"], row["samples"], set(row["scores"])) for row in found] == [
        ("niah_single_1", 1, set(METHODS)),
        ("fwe", 1, set(METHODS)),
    ]
    assert np.array(budget_record.masses(record)[0]["mass"]).shape == (30, 9)
    assert [len(layers) for layers in budget_record.sinks(record).values()] == [30]
    assert [r["method"] for r in budget_record.masses(record, "codes")] == list(VARIANTS)
    for figure, panels in (
        (figures.perplexity_against_budget(record), 1),
        (figures.excess_by_token(record, 48), 1),
        (figures.needles_against_budget(record), 1),
        (figures.mass_by_layer(record), 1),
        (figures.lost_by_head(record, 48), 4),
        (figures.key_picture(record), 2),
    ):
        assert len(figure.axes) == panels
        figure.canvas.draw()


def test_far_tokens_apart():
    """Two texts: the mean over all is kept, and far tokens count once each, not once a text."""
    row = {"kind": "loss", "method": "full", "budget": None, "read": 1.0, "tokens": 10}
    found = budget_record.perplexities(
        {
            "rows": [
                row | {"text": "a", "nats": 2.0, "far_nats": 5.0, "far_tokens": 1},
                row | {"text": "b", "nats": 3.0, "far_nats": 1.0, "far_tokens": 3},
            ]
        }
    )[0]
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert (found["far"], found["far_tokens"]) == (2.0, 4)
    assert found["other"] == pytest.approx((20 + 30 - 8) / 16)


def test_only_what_all_have_run_on_is_compared(small):
    rows = [r for r in small.record["rows"] if r["kind"] == "loss"]
    more = [{**r, "text": "code", "nats": 9.0} for r in rows if r["method"] != "h2o"]
    table = budget_record.perplexities({"rows": rows + more})
    assert all(set(r["by_text"]) == {"docs"} for r in table)
    assert set(figures.LOOKS) == {*METHODS, BEST} - {"full"}
    best = [r for r in small.record["rows"] if r["kind"] == "codes_loss"]
    assert {r["method"] for r in budget_record.perplexities({"rows": rows + more + best})} == set(METHODS)


def test_a_wrong_argument_is_named_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "load", None)
    (tmp_path / "text").write_text("not JSON", encoding="utf-8")
    for arguments, words in (
        (["--out", str(tmp_path / "none" / "r.json")], "--out: .* there is no folder"),
        (["--out", str(tmp_path / "text")], "--out: expected a record .* got no JSON"),
        (["--out", str(tmp_path / "r"), "--part", "lose"], "--part: invalid choice: 'lose'"),
        (["--out", str(tmp_path / "r"), "--samples", "0"], "--samples: expected an integer of at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            budget_study.main(arguments)
        assert stop.value.code == 2
        assert re.search(words, capsys.readouterr().err.replace("\n", " "))


# --------------------------------------------------------------------------------------- the recorded runs

recorded = pytest.mark.skipif(not budget_record.RECORD.is_file(), reason="no run is recorded yet")


@recorded
def test_the_record_is_whole():
    found = budget_record.recorded()
    recipe = budget_study.Recipe()
    assert found["recipe"] == json.loads(json.dumps(asdict(recipe))), "run it again: the recipe has changed"
    sizes = {("full", None)} | {(m, b) for m in figures.LOOKS for b in recipe.budgets}
    table = budget_record.perplexities(found)
    assert {(r["method"], r["budget"]) for r in table} == sizes
    assert all({"docs", "code"} <= set(r["by_text"]) for r in table)
    assert {(r["method"], r["budget"]) for r in budget_record.masses(found)} == {
        (m, b) for m in METHODS if m != "full" for b in recipe.mass_budgets
    }
    assert set(budget_record.sinks(found)) == {"docs", "code"}
    variants = budget_record.variants(found)
    assert [r["method"] for r in variants] == list(VARIANTS)
    assert all(r["perplexity"] for r in variants if "centred" not in r["method"])
    late = [r for r in budget_record.needles(found) if r["late"]]
    assert {(r["method"], r["budget"]) for r in late} == {("full", None)} | {
        (m, b) for m in METHODS if m != "full" for b in recipe.needle_budgets
    }
    assert all(set(r["by_task"]) == set(recipe.needles) for r in late)
    asked = budget_record.tasks(found)
    assert [r["task"] for r in asked] == list(ruler.TASKS)
    compared = {*recipe.needles, *recipe.compared}
    assert all(set(r["scores"]) == (set(METHODS) if r["task"] in compared else {"full"}) for r in asked)


@recorded
def test_the_record_belongs_to_this_code(lm, tmp_path):
    """Its cheapest rows again, and what the thresholds were set by: whoever changes a cache has to run the study."""
    found = budget_record.recorded()
    if budget_study.versions()["text"] != found["versions"]["text"]:
        pytest.skip("the record is of another Python's text")
    study = budget_study.Study(tmp_path / "r.json", budget_study.Recipe(), lm)
    assert study.record["thresholds"] == pytest.approx(found["thresholds"], abs=0.01)
    for name, values in found["keys"].items():
        assert study.record["keys"][name] == pytest.approx(values, abs=0.01)
    study.run(("check",), 1, 1)
    rows = {r["method"]: r for r in found["rows"] if r["kind"] == "check"}
    assert set(rows) == set(METHODS)
    for row in study.record["rows"]:
        # A choice between two all but equal keys may fall otherwise in another build of torch.
        assert row["nats"] == pytest.approx(rows[row["method"]]["nats"], abs=0.03), row["method"]
        assert row["read"] == pytest.approx(rows[row["method"]]["read"], abs=0.01)
