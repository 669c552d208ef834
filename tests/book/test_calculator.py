"""The in-page roofline calculator computes what the package computes, and says when an input is wrong."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from effattn_lab.foundations.presets import MODELS, calculator_data, estimate
from effattn_lab.measure.roofline import GPUS

pytestmark = pytest.mark.browser

SCRIPT = Path(__file__).parents[2] / "_sims" / "roofline-calculator.js"


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    data = json.dumps(calculator_data()).replace("</", "<\\/")
    page.set_content(
        "<!doctype html><title>t</title><body style='margin:0'><roofline-calculator>"
        f'<script type="application/json">{data}</script></roofline-calculator>'
    )
    page.add_script_tag(path=str(SCRIPT))
    yield page
    page.close()
    assert errors == []


def test_estimate_equals_the_package(page):
    grid = itertools.product(
        MODELS,
        GPUS,
        ("prefill", "decode"),
        (1, 63, 8192, 131_072),
        (1, 64),
        ((2, 2), (0.5, 1)),
        ("flash", "naive"),
    )
    cases = [
        {"model": m, "gpu": g, "phase": p, "seqlen": n, "batch": b, "weight_itemsize": w, "cache_itemsize": c,
         "kernel": kernel}
        for m, g, p, n, b, (w, c), kernel in grid
    ]  # fmt: skip
    answers = page.evaluate(
        """({cases, data}) => cases.map((c) => window.effattn.rooflineCalculator.estimate(
            data.models.find((m) => m.name === c.model), data.gpus.find((g) => g.name === c.gpu), c))""",
        {"cases": cases, "data": calculator_data()},
    )
    assert len(cases) == len(answers) > 1000
    for case, got in zip(cases, answers):
        options = {key: value for key, value in case.items() if key not in ("model", "gpu")}
        gpu = GPUS[case["gpu"]]
        want = asdict(
            estimate(
                MODELS[case["model"]],
                peak_flops=gpu.peak_flops,
                bandwidth=gpu.bandwidth,
                memory_bytes=gpu.memory_gb * 1e9,
                **options,
            )
        )
        assert set(got) == set(want), case
        for key, value in want.items():
            if isinstance(value, dict):
                assert got[key]["bound"] == value.pop("bound"), case
                got[key].pop("bound")
            # Same formulas in another order of operations: only the last bits may differ.
            assert got[key] == pytest.approx(value, rel=1e-12), (case, key)


def test_the_chapter_takes_its_tables_from_python():
    chapter = SCRIPT.parents[1] / "chapters" / "foundations" / "cost_model.md"
    assert ":data: effattn_lab.foundations.presets:calculator_data" in chapter.read_text(encoding="utf-8")
    source = SCRIPT.read_text(encoding="utf-8")
    assert not any(model in source for model in MODELS), "model shapes are written in Python, not here"


def test_units_are_readable(page):
    values = [16.06e9, 4.79e-3, 0.32e-3, 1, 999.7, 0, 9.886e14, 2.5e-7]
    got = page.evaluate("(xs) => xs.map((x) => window.effattn.rooflineCalculator.si(x, 'B'))", values)
    assert got == ["16.1 GB", "4.79 mB", "320 µB", "1.00 B", "1.00 kB", "0 B", "989 TB", "250 nB"]


def test_page_answers_by_keyboard_and_announces(page):
    status = page.locator(".rc-say")
    assert status.get_attribute("aria-live") == "polite"
    assert "Llama-3-8B on H100, decode" in status.inner_text()
    page.get_by_label("Length N (tokens)").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("131072")
    assert "N = 131,072" in status.inner_text()
    page.get_by_label("Phase").select_option("prefill")
    assert "prefill" in status.inner_text()
    assert "compute" in page.locator("svg title").text_content()
    page.get_by_label("Sequences B").fill("64")
    assert "do not fit" in status.inner_text()


def test_wrong_input_is_named_and_nothing_is_computed(page):
    for text in ("0", "2.5", ""):
        page.get_by_label("Sequences B").fill(text)
        assert "Sequences B: expected a whole number" in page.locator(".rc-say").inner_text()
        assert page.get_by_label("Sequences B").get_attribute("aria-invalid") == "true"
        assert not page.locator(".rc-out").is_visible()
    page.get_by_label("Sequences B").fill("2")
    assert page.locator(".rc-out").is_visible()


def test_custom_model_starts_from_a_real_one_and_checks_groups(page):
    before = page.locator(".rc-scroll").inner_text()
    page.get_by_label("Model", exact=True).select_option("custom")
    assert page.locator(".rc-scroll").inner_text() == before
    page.get_by_label("KV heads").fill("5")
    assert "must divide" in page.locator(".rc-say").inner_text()
    page.get_by_label("KV heads").fill("32")
    assert "4.29 GB" in page.locator(".rc-scroll").inner_text()  # four times the cache of 8 KV heads


def test_every_field_has_a_label_and_nothing_overflows_a_phone(page):
    page.get_by_label("Model", exact=True).select_option("custom")
    bare = page.evaluate(
        "() => [...document.querySelectorAll('input, select')].filter((f) => !f.labels.length).length"
    )
    assert bare == 0
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
