"""The in-page mask explorer computes what the package computes, and can be worked without a mouse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effattn_lab.sparse import static_patterns as sp
from effattn_lab.sparse import static_patterns_cost as cost
from effattn_lab.sparse.block_list import block_list

pytestmark = pytest.mark.browser

SCRIPT = Path(__file__).parents[2] / "_sims" / "mask-explorer.js"

# Pattern, its numbers, the package's mask.
CASES = [
    ("causal", {}, lambda n: sp.causal()),
    ("window", {"sinks": 2, "window": 8}, lambda n: sp.sinks_and_window(2, 8)),
    ("window", {"sinks": 0, "window": 1}, lambda n: sp.sinks_and_window(0, 1)),
    ("strided", {"stride": 7}, lambda n: sp.strided(7)),
    ("strided", {"stride": 1}, lambda n: sp.strided(1)),
    ("fixed", {"stride": 8, "summary": 2}, lambda n: sp.fixed(8, 2)),
    ("longformer", {"half": 4, "globals": 2}, lambda n: sp.longformer(8, (0, 1))),
    ("longnet", {"segment": 6, "patterns": 4}, lambda n: sp.union(*(sp.dilated(6 * 2**m, 2**m) for m in range(4)))),
]  # fmt: skip


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content("<!doctype html><title>t</title><body style='margin:0'><mask-explorer></mask-explorer>")
    page.add_script_tag(path=str(SCRIPT))
    yield page
    page.close()
    assert errors == []


def computed(page, name, numbers, n, tile):
    return page.evaluate(
        """({name, numbers, n, tile}) => {
            const m = window.effattn.maskExplorer, p = m.PATTERNS[name], keep = m.dense(p.rule(numbers), n);
            return { keep, kinds: m.kinds(keep, tile), cost: m.cost(keep, tile, 64), layers: m.layers(keep, p.causal),
                captured: m.captured(keep, p.causal), causal: p.causal,
                score: keep.map((row, i) => row.map((_, j) => m.score(i, j))) };
        }""",
        {"name": name, "numbers": numbers, "n": n, "tile": tile},
    )


@pytest.mark.parametrize(("n", "tile"), [(48, 8), (29, 4), (1, 1), (17, 16)])
@pytest.mark.parametrize(
    ("name", "numbers", "make"), CASES, ids=lambda x: str(x) if isinstance(x, dict | str) else ""
)
def test_numbers_are_the_package_s(page, name, numbers, make, n, tile):
    got = computed(page, name, numbers, n, tile)
    want = sp.dense_mask(make(n), n, n)[0]
    assert torch.equal(torch.tensor(got["keep"]), want)

    blocks = block_list(make(n), n, n, block_m=tile, block_n=tile)
    listed = torch.arange(blocks.index.shape[-1]) < blocks.count[0, 0, :, None]
    kinds = torch.zeros(len(got["kinds"]), len(got["kinds"]), dtype=torch.int64)
    for a, (index, kind, real) in enumerate(zip(blocks.index[0, 0], blocks.tile[0, 0], listed)):
        kinds[a, index[real].long()] = torch.where(kind[real] == 0, 2, 1)
    assert torch.equal(torch.tensor(got["kinds"]), kinds)

    pairs, tiles = int(want.sum()), int(blocks.count.sum())
    assert got["cost"]["pairs"] == pairs
    assert got["cost"]["flops"] == cost.pair_flops(pairs, 64)
    assert got["cost"]["tiles"] == tiles
    assert got["cost"]["tile_flops"] == cost.pair_flops(tiles * tile**2, 64)
    assert got["cost"]["bytes"] == tiles * tile * 2 * 64 * 2
    assert got["cost"]["last"] == int(want[-1].sum())

    past = torch.ones(n, n, dtype=torch.bool).tril() if got["causal"] else torch.ones(n, n, dtype=torch.bool)
    step, paths, layers = want.float() + torch.eye(n), torch.eye(n), 0
    while not bool((paths > 0)[past].all()) and layers <= n:
        paths, layers = (step @ paths > 0).float(), layers + 1
    assert got["layers"] == (layers if layers <= n else None)

    scores = torch.tensor(got["score"], dtype=torch.float64).masked_fill(~past, float("-inf"))
    mass = (torch.softmax(scores, dim=-1) * want).sum(-1)
    torch.testing.assert_close(torch.tensor(got["captured"], dtype=torch.float64), mass, rtol=0, atol=1e-12)


def test_some_token_never_reaches_another(page):
    got = computed(page, "longnet", {"segment": 2, "patterns": 1}, 8, 2)
    assert got["layers"] is None


def test_by_keyboard_and_on_a_narrow_screen(page):
    said = page.locator(".me-say")
    assert said.get_attribute("aria-live") == "polite"
    assert "of the pairs" in said.inner_text()
    page.get_by_label("Pattern", exact=True).select_option("window")
    assert "misses key 17" in said.inner_text()
    page.get_by_label("window w").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("40")
    assert "sees key 17" in said.inner_text()
    page.get_by_label("Tile of the kernel").select_option("1")
    assert "of them whole" in page.locator(".me-scroll").inner_text()
    assert "Mask of 48 queries by 48 keys" in page.locator("svg title").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_wrong_numbers_are_named(page):
    page.get_by_label("Pattern", exact=True).select_option("fixed")
    page.get_by_label("summary cells c").fill("9")
    assert page.locator(".me-say").inner_text() == "summary cells c: expected at most the block l."
    assert not page.locator(".me-out").is_visible()
    for text in ("", "2.5", "0"):
        page.get_by_label("block l").fill(text)
        assert "block l: expected a whole number from 1 to 48." in page.locator(".me-say").inner_text()
        assert page.get_by_label("block l").get_attribute("aria-invalid") == "true"
    page.get_by_label("block l").fill("12")
    assert page.locator(".me-out").is_visible()
