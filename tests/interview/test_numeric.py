"""The numeric drills: answers against formulas written out here, slips that can be told apart, and wrong files."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from effattn_lab.foundations.presets import MODELS, estimate
from effattn_lab.interview import load as load_bank
from effattn_lab.interview import numeric, topics
from effattn_lab.interview.numeric import DrillError, distinct, shown
from effattn_lab.measure.roofline import GPUS

DRILLS = {drill.id: drill for drill in numeric.load()}
DRAWN = {name: drill.draw() for name, drill in DRILLS.items()}
CHAPTERS = Path(__file__).parents[2] / "chapters"


def kv(model, seqlen, batch=1, itemsize=2):
    m = MODELS[model]
    return 2 * m.num_layers * m.num_kv_heads * m.head_dim * seqlen * batch * itemsize


def decode(b):
    gpu, model = GPUS[b["gpu"]], MODELS[b["model"]]
    return estimate(model, peak_flops=gpu.peak_flops, bandwidth=gpu.bandwidth, memory_bytes=gpu.memory_gb * 1e9,
                    phase="decode", seqlen=b["seqlen"], batch=b["batch"])  # fmt: skip


# What a reader would compute, written out without the cost model.
BY_HAND = {
    "kv-cache": lambda b: kv(b["model"], b["seqlen"], b["batch"], b["bits"] / 8),
    "kv-token": lambda b: 4 * b["layers"] * b["kv_heads"] * b["dim"],
    "gqa-saving": lambda b: 4 * b["layers"] * (b["heads"] - b["kv_heads"]) * 128 * b["seqlen"],
    "mla-token": lambda b: 2 * b["layers"] * (b["latent"] + b["rope"]),
    "flops-full": lambda b: 4 * b["batch"] * b["heads"] * b["seqlen"] ** 2 * b["dim"],
    "flops-causal": lambda b: 4 * b["heads"] * b["dim"] * sum(b["cached"] + i for i in range(1, b["queries"] + 1)),
    "flops-backward": lambda b: 3.5e12 * b["layers"] * b["forward"],
    "ridge": lambda b: b["share"] / 100 * GPUS[b["gpu"]].fp16_tflops * 1000 / GPUS[b["gpu"]].bandwidth_gbs,
    "decode-intensity": lambda b: 2 * (b["drafts"] + 1) * (b["heads"] / b["kv_heads"]) / (b["bits"] / 8),
    "decode-bytes": lambda b: 2 * MODELS[b["model"]].read_params + kv(b["model"], b["seqlen"], b["batch"]),
    # The estimate also counts the queries and outputs, a thousandth of the caches.
    "decode-time": lambda b: decode(b).time_s,
    "naive-traffic": lambda b: 8 * b["batch"] * b["heads"] * b["seqlen"] * (b["seqlen"] + b["dim"]),
    "naive-over-flash": lambda b: 8 * b["seqlen"] * (b["seqlen"] + b["dim"]) / (b["seqlen"] * (8 * b["dim"] + 4)),
    "tiled-traffic": lambda b: b["heads"] * b["seqlen"] * (4 * b["dim"] * (1 + b["seqlen"] / b["block"]) + 4),
    "tile-memory": lambda b: 2 * b["dim"] * b["block_m"] + b["stages"] * 2 * (2 * b["dim"] * b["block_n"]),
    "rescale": lambda b: math.exp(-b["step"]),
    "merge-sums": lambda b: b["l2"] + b["l1"] / math.exp(b["gap"]),
    "fit": lambda b: (GPUS[b["gpu"]].memory_gb * 1e9 - 2 * MODELS[b["model"]].total_params)
    // kv(b["model"], b["seqlen"], 1, b["bits"] / 8),
    "serving-bill": lambda b: b["price"] / 3600 * 1e6 / decode(b).tokens_per_s,
}  # fmt: skip


def crossover(b):
    """Found by counting, not by the formula: where the two FLOP counts meet."""
    heads = b["width"] // 128
    weights = 2 * b["width"] * 128 * (heads + heads // b["group"]) + 3 * b["width"] * int(
        b["ratio"] * b["width"]
    )
    low, high = 1.0, 1e7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if 4 * heads * 128 * middle**2 / 2 < 2 * weights * middle else (low, middle)
        )
    return low


BY_HAND["crossover"] = crossover


def test_every_drill_is_computed_by_hand_too():
    assert set(BY_HAND) == set(DRILLS)
    assert len(DRILLS) >= 12


@pytest.mark.parametrize("name", DRILLS)
def test_answer(name):
    drill = DRILLS[name]
    for chosen in itertools.islice(drill.combinations(), 0, None, 5):
        assert drill.instance(chosen).answer == pytest.approx(BY_HAND[name](chosen), rel=2e-3), chosen


@pytest.mark.parametrize("name", DRILLS)
def test_slips_can_be_told_from_the_answer_and_from_each_other(name):
    drill = DRILLS[name]
    seen = set()
    for instance in DRAWN[name]:
        values = [instance.answer, *(value for _, value in instance.slips)]
        for a, b in itertools.combinations(values, 2):
            # A reply within the tolerance of one is never within that of the other.
            t = drill.rel_tol
            assert a != b
            assert min(a, b) + t * abs(min(a, b, key=abs)) < max(a, b) - t * abs(
                max(a, b, key=abs)
            ) + 1e-12 * abs(a)
        assert len(instance.slips) >= 2, "a drill without feedback"
        seen |= {index for index, _ in instance.slips}
    assert seen == set(range(len(drill.slips))), "a slip that no instance shows"


def test_indistinguishable_slips_are_dropped():
    drill = DRILLS["kv-cache"]
    chosen = {"seqlen": 4096, "batch": 3, "bits": 16}
    kept = {model: [i for i, _ in drill.instance({**chosen, "model": model}).slips] for model in MODELS}
    # With as many key-value heads as query heads, counting either gives the right answer.
    assert 0 in kept["Llama-3-8B"]
    assert 0 not in kept["Llama-2-7B"]
    assert not distinct(100, 101.9, 0.01)
    assert distinct(100, 102.1, 0.01)


@pytest.mark.parametrize("name", DRILLS)
def test_instances_are_many_different_and_repeatable(name):
    drill, drawn = DRILLS[name], DRAWN[name]
    assert 30 <= len(drawn) <= 60
    assert len({json.dumps(instance.texts) for instance in drawn}) == len(drawn)
    assert drill.draw() == drawn
    assert drill.draw(seed=1) != drawn


@pytest.mark.parametrize("name", DRILLS)
def test_texts_are_whole_and_plain(name):
    drill = DRILLS[name]
    templates = [drill.ask, drill.worked, *(slip.say for slip in drill.slips)]
    for instance in DRAWN[name][:10]:
        for template in templates:
            text = template.format(**instance.texts, answer=instance.shown)
            assert not re.search(r"[{}`]|\$\\|\*\w|\de[+-]?\d", text), text
            assert "  " not in text


def test_figures_of_the_question_lead_to_the_answer():
    """`fit` rounds down: the rounded figures that a learner sees must give the same whole number."""
    for instance in DRAWN["fit"]:
        memory, weights, gib = (
            float(instance.texts[k].replace(",", "")) for k in ("memory", "weights", "gib")
        )
        assert math.floor((memory - weights) * 1e9 / (gib * 2**30)) == instance.answer


def test_topics_and_sections_exist():
    known = topics(load_bank())
    labels = set()
    for chapter in CHAPTERS.rglob("*.md"):
        labels |= set(re.findall(r"^\(([\w-]+)\)=$", chapter.read_text(encoding="utf-8"), re.M))
    for drill in DRILLS.values():
        assert drill.topic in known
        assert drill.section in labels


def test_page_data_is_plain_and_has_what_is_shown():
    data = numeric.page_data(count=3)
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(data))
    for entry in data:
        needed = set(re.findall(r"\{(\w+)\}", " ".join([entry["ask"], entry["worked"], *entry["says"]])))
        for instance in entry["instances"]:
            assert set(instance["p"]) == needed - {"answer"}


def test_mixed_prefixes():
    factors = dict((round(f, 4), say) for f, say in DRILLS["kv-cache"].mixed_prefixes())
    assert len(factors) == 8
    assert "that many GB, and you said GiB" in factors[1.0737]
    assert "that many GiB, and you said GB" in factors[0.9313]
    assert DRILLS["ridge"].mixed_prefixes() == []
    for drill in DRILLS.values():
        for factor, _ in drill.mixed_prefixes():
            assert distinct(1, factor, drill.rel_tol)


@pytest.mark.parametrize(
    ("value", "unit", "want"),
    [(16 * 2**30, "GiB", "16 GiB = 17.18 GB"), (1.5e9, "GB", "1.5 GB = 1.397 GiB"),
     (131072, "KiB", "128 KiB = 131.1 kB"),
     (0.0045, "ms", "4.5 ms"), (1e15, "GFLOP", "1,000,000 GFLOP"), (0.2214, "$", "$0.221"), (12, "$", "$12"),
     (1234.5, "$", "$1,234.50"), (85.894, "×", "85.89 ×"),
     (0.2231301, "", "0.2231"), (59, "sequences", "59 sequences")],
)  # fmt: skip
def test_shown(value, unit, want):
    assert shown(value, unit) == want


GOOD = yaml.safe_load(numeric.DRILLS.read_text(encoding="utf-8"))[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unit": "GiB"}, "Additional properties are not allowed ('unit' was unexpected)"),
        ({"level": "easy"}, "field 'level': 'easy' is not one of"),
        ({"slips": []}, "field 'slips'"),
        ({"parameters": {"layers": []}}, "field 'parameters.layers'"),
        ({"ask": "How many {eggs}?"}, "field 'ask': unknown 'eggs'; expected one of dim, heads"),
        ({"worked": "{egg}"}, "field 'worked': unknown 'egg'"),
        ({"let": {"a": "{b}", "b": "1"}}, "field 'let.a': unknown 'b'"),
        ({"answer": {"expr": "1", "unit": "parsec"}}, "'parsec' is not one of"),
        (
            {"answer": {"expr": "1", "unit": "GiB", "rel_tol": 0.02}},
            "expected at most 0.011 for bytes, got 0.02",
        ),
    ],
)
def test_wrong_entries_are_named(tmp_path, change, says):
    path = tmp_path / "drills.yml"
    path.write_text(yaml.safe_dump([{**GOOD, **change}]), encoding="utf-8")
    with pytest.raises(DrillError) as error:
        numeric.load(path)
    assert says in str(error.value)
    assert f"{path}: kv-token" in str(error.value)


def test_wrong_files(tmp_path):
    path = tmp_path / "drills.yml"
    with pytest.raises(DrillError, match="cannot be read"):
        numeric.load(path)
    for text, says in (("a: [", "cannot be read"), ("{}", "expected a list of drills"), ("[1]", "drill 1")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DrillError, match=re.escape(says)):
            numeric.load(path)
    path.write_text(yaml.safe_dump([GOOD, GOOD]), encoding="utf-8")
    with pytest.raises(DrillError, match="used twice"):
        numeric.load(path)


def test_an_answer_must_be_a_positive_number(tmp_path):
    path = tmp_path / "drills.yml"
    for expr, says in (
        ("{layers} - {layers}", "expected a positive number"),
        ("nothing({layers})", "unknown name"),
    ):
        entry = {**GOOD, "answer": {"expr": expr, "unit": "KiB"}}
        path.write_text(yaml.safe_dump([entry]), encoding="utf-8")
        with pytest.raises(DrillError, match=says):
            numeric.load(path)[0].draw()
