"""The in-page code explorer computes what the package computes, and can be worked without a mouse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effattn_lab.sparse import codes

pytestmark = pytest.mark.browser

SCRIPT = Path(__file__).parents[2] / "_sims" / "code-explorer.js"


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content("<!doctype html><title>t</title><body style='margin:0'><code-explorer></code-explorer>")
    page.add_script_tag(path=str(SCRIPT))
    yield page
    page.close()
    assert errors == []


def call(page, name, *arguments):
    return page.evaluate("([name, args]) => window.effattn.codeExplorer[name](...args)", [name, arguments])


def test_transform_and_buckets_agree_with_the_package(page):
    g = torch.Generator().manual_seed(0)
    for dim in (1, 2, 16, 64):
        x = 3 * torch.randn(dim, generator=g, dtype=torch.float64)
        assert call(page, "hadamard", x.tolist()) == pytest.approx(codes.hadamard(x).tolist(), abs=1e-12)
        for t in (0.5, 2.0, 50.0):
            assert call(page, "bucketize", x.tolist(), t) == codes.bucketize(x, (-t, 0, t)).tolist()
    assert call(page, "bucketize", [-2.0, 0.0, 2.0], 2.0) == [0, 1, 2], "on a threshold counts as below"


def test_words_and_distances_agree_with_the_package(page):
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        a, b = torch.randint(0, 4, (2, 32), generator=g).to(torch.uint8)
        wa, wb = codes.pack(a), codes.pack(b)
        assert call(page, "pack", a.tolist()) == wa.tolist()
        assert call(page, "l1", wa.tolist(), wb.tolist()) == codes.l1_naive(a, b).item()
        assert call(page, "released", wa.tolist(), wb.tolist()) == codes.released_distance(wa, wb).item()
        assert call(page, "signs", a.tolist(), b.tolist()) == int(((a > 1) != (b > 1)).sum())


def state(page, part="keys", **options):
    return page.evaluate(
        "(o) => window.effattn.codeExplorer.state(Object.assign({}, window.effattn.codeExplorer.DEFAULTS, o))",
        options,
    )[part]


def test_the_defaults_show_what_the_chapter_says(page):
    raw, turned = state(page, transform=False), state(page)
    assert raw["b"]["product"] > raw["a"]["product"]
    assert turned["b"]["product"] == pytest.approx(raw["b"]["product"]), "products stay"
    assert raw["a"]["l1"] < raw["b"]["l1"], "without the transform the codes choose the wrong key"
    assert turned["b"]["l1"] < turned["a"]["l1"], "with it the right one"
    long = state(page, lengthB=3)
    assert long["b"]["product"] == pytest.approx(3 * turned["b"]["product"])
    assert long["b"]["l1"] == turned["b"]["l1"] == 10, "a longer key is no nearer"
    assert state(page, lengthB=2)["b"]["l1"] == 9, "in between a little"
    assert min(state(page, lengthB=1 + i / 10)["b"]["l1"] for i in range(21)) == 8
    assert turned["b"]["far"] == pytest.approx(6.5, abs=0.05)
    assert long["b"]["far"] == pytest.approx(17.7, abs=0.05)
    assert long["b"]["signs"] == turned["b"]["signs"], "a length changes no sign"
    query, before, after = (
        state(page, "rows", lengthB=x)[name]["codes"] for name, x in (("q", 1), ("b", 1), ("b", 3))
    )
    moved = [(c, a, b) for c, a, b in zip(query, before, after, strict=True) if a != b]
    assert len(moved) == 6
    assert {b for _, _, b in moved} <= {0, 3}, "outwards"
    assert sum(c == b for c, _, b in moved) == 3, "three meet outer codes of the query"
    assert sum(c in (1, 2) and abs(c - b) > abs(c - a) for c, a, b in moved) == 3, "three leave inner ones"


def test_no_default_lies_on_a_threshold(page):
    """There a rounding error would decide the code, and with it what the chapter says."""
    for length in (1, 3):
        for name, row in state(page, "rows", lengthB=length).items():
            for x in row["y"]:
                assert min(abs(x - t) for t in (-2, 0, 2)) > 0.01, (name, x)


def test_it_can_be_worked_by_keyboard_and_fits_a_phone(page):
    say, check = page.locator(".ce-say"), page.locator('[data-set="transform"]')
    assert "So do the codes" in say.inner_text()
    check.focus()
    page.keyboard.press("Space")
    assert "The codes choose key A" in say.inner_text()
    page.locator('[data-set="t"]').focus()
    page.keyboard.press("End")
    assert page.locator('[data-of="t"]').inner_text() == "12.0"
    page.locator('[data-do="reset"]').focus()
    page.keyboard.press("Enter")
    assert check.is_checked()
    assert page.locator('[data-of="t"]').inner_text() == "2.0"
    assert page.locator("svg title").text_content().startswith("query: codes ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
