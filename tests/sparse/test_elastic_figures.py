"""The pictures of Elastic Attention show the study's own numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pytest

from effattn_lab.figures import elastic as figures
from effattn_lab.sparse import elastic_experiment as study


def test_idea_shows_the_modes_it_was_given():
    fig = figures.idea_picture(tokens=10, boundary=2, sinks=1, window=3, modes=(False, True))
    titles = [axis.get_title(loc="left") for axis in fig.axes]
    assert titles == [
        "the router reads 2 keys at either end, before RoPE", "KV head 0: sparse", "KV head 1: full",
    ]  # fmt: skip
    # 10 queries: 1 + 2 + 3 + 7 times (3 of the window and the sink, where it lies outside it)
    assert fig.axes[1].get_xlabel() == f"keys ({(6 + 7 * 4) / 55:.0%} of the pairs)"
    assert fig.axes[2].get_xlabel() == "keys (100% of the pairs)"


def test_static_picture_has_every_mask_and_the_routers():
    record = study.recorded()
    fig = figures.static_picture(record)
    assert len(fig.axes) == len(record["rows"])
    for axis, row in zip(fig.axes, record["rows"]):
        clouds = [c.get_offsets() for c in axis.collections]
        assert len(clouds[0]) == 256
        routers = [tuple(float(x) for x in c[0]) for c in clouds[1:]]
        want = [
            (e["mean_sparsity"], sum(e["accuracy"]) / 2)
            for e in study.summary(record)
            if e["seed"] == row["seed"]
        ]
        assert routers == [pytest.approx(w) for w in want]


def test_prices_and_heads():
    record = study.recorded()
    fig = figures.prices_picture(record)
    lines = fig.axes[0].get_lines()
    trace = record["rows"][0]["routed"]["signed"]["trace"]
    assert list(lines[0].get_ydata()) == [t["sparsity"][0] for t in trace]
    fig = figures.heads_picture(record)
    first = record["rows"][0]["routed"]["signed"]["recall"]["full"]
    assert [t.get_text() for t in fig.axes[0].texts] == [f"{x:.2f}" for layer in first for x in layer]


def test_the_chapter_says_what_the_lab_printed_of_the_real_model():
    """Perplexities of the section on the lab, in its order, are outputs of the solved notebook."""
    root = Path(__file__).parents[2]
    notebook = json.loads((root / "labs/solved/sparse/elastic.ipynb").read_text(encoding="utf-8"))
    printed = "".join(
        "".join(o.get("text", ""))
        for c in notebook["cells"]
        for o in c.get("outputs", ())
        if c["cell_type"] == "code"
    )
    number = r"(\d+(?:\.\d+)?)"
    both = {
        name: re.search(rf"{name}: perplexity {number} with full heads, {number} with", printed).groups()
        for name in ("prose", "copy")
    }
    kept = [re.search(rf"the {n:2} that the copy needs most: .*copy {number}", printed)[1] for n in (3, 9)]
    kept.append(re.search(rf"the  9 that it needs least: .*copy {number}", printed)[1])
    first = re.search(rf"read for the first time: {number}", printed)[1]
    chapter = (root / "chapters/sparse/elastic.md").read_text(encoding="utf-8")
    section = chapter.split("(elastic-lab)=")[1].split("\n## When")[0]
    found = re.findall(r"(?:from a perplexity of|from|to|at) (\d+\.\d+)", section)
    assert found == [*both["prose"], *both["copy"], *kept]
    assert f"those tokens have {first}." in section
