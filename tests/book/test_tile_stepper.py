"""The in-page tile stepper computes what the package computes, and can be worked without a mouse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effattn_lab.foundations.attention import attention, lse
from effattn_lab.foundations.cost_model import flash_tiled_bytes, keys_read
from effattn_lab.full.flash import tile_step

pytestmark = pytest.mark.browser

SCRIPTS = [Path(__file__).parents[2] / "_sims" / name for name in ("stepper.js", "tile-stepper.js")]


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content("<!doctype html><title>t</title><body style='margin:0'><tile-stepper></tile-stepper>")
    for script in SCRIPTS:
        page.add_script_tag(path=str(script))
    yield page
    page.close()
    assert errors == []


def simulate(page, **options):
    return page.evaluate(
        """(options) => {
            const t = window.effattn.tileStepper, cfg = Object.assign({}, t.DEFAULTS, options);
            const run = t.simulate(cfg), finite = (x) => (Number.isFinite(x) ? x : null);
            run.lse = run.lse.map(finite);
            run.frames.forEach((f) => { f.m = f.m.map(finite); delete f.scores; });
            return { run, naive: t.naive(cfg).out, cfg };
        }""",
        options,
    )


def tensors(cfg):
    return (torch.tensor(cfg[name], dtype=torch.float64)[None, None] for name in "qkv")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (2, 4), (4, 2), (3, 3), (8, 8), (4, 3)])
def test_simulate_agrees_with_the_package(page, block_q, block_k, causal):
    result = simulate(page, blockQ=block_q, blockK=block_k, causal=causal)
    run, cfg = result["run"], result["cfg"]
    q, k, v = tensors(cfg)
    want = attention(q, k, v, causal=causal)[0, 0]
    torch.testing.assert_close(torch.tensor(run["out"], dtype=torch.float64), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.tensor(result["naive"], dtype=torch.float64), want, rtol=0, atol=1e-14)
    want_lse = lse(q, k, causal=causal)[0, 0]
    torch.testing.assert_close(torch.tensor(run["lse"], dtype=torch.float64), want_lse, rtol=0, atol=1e-14)
    assert run["bytes"] == flash_tiled_bytes(
        1, 1, 1, 8, 8, 2, block_m=block_q, block_n=block_k, causal=causal
    )
    key_bytes = 2 * 2 * keys_read(8, 8, block_q, block_k, causal)
    assert run["frames"][-1]["total"]["K"] == run["frames"][-1]["total"]["V"] == key_bytes
    assert run["tiles"] + run["skipped"] == -(-8 // block_q) * -(-8 // block_k)


def test_offset_rule_and_blind_rows(page):
    """Six queries over four keys: the first two see nothing; four over six: they are the last four."""
    cfg = simulate(page)["cfg"]
    for nq, nk in ((6, 4), (4, 6)):
        small = {"q": cfg["q"][:nq], "k": cfg["k"][:nk], "v": cfg["v"][:nk]}
        result = simulate(page, blockQ=4, blockK=3, **small)
        want = attention(*tensors(result["cfg"]), causal=True)[0, 0]
        torch.testing.assert_close(
            torch.tensor(result["run"]["out"], dtype=torch.float64), want, rtol=0, atol=1e-14
        )


def test_every_frame_follows_tile_step(page):
    result = simulate(page, blockQ=4, blockK=2, causal=False)
    q, k, v = (x[0, 0] for x in tensors(result["cfg"]))
    state = None
    for frame in result["run"]["frames"]:
        if frame["kind"] == "load":
            a, b = frame["rows"]
            zeros = torch.zeros(b - a, 2, dtype=torch.float64)
            state = (zeros[:, 0] - torch.inf, zeros[:, 0], zeros)
        elif frame["kind"] == "tile":
            c, d = frame["cols"]
            m_before = state[0]
            state = tile_step(*state, 2**-0.5 * q[a:b] @ k[c:d].T, v[c:d])
            for got, want in zip((frame["m"], frame["l"], frame["acc"]), state, strict=True):
                torch.testing.assert_close(torch.tensor(got).double(), want, rtol=0, atol=1e-6)
            alpha = torch.exp(m_before - state[0])
            torch.testing.assert_close(torch.tensor(frame["alpha"]).double(), alpha, rtol=0, atol=1e-6)


def test_keyboard_and_narrow_screen(page):
    stage = page.locator("tile-stepper .st-stage")
    stage.focus()
    steps = page.evaluate("document.querySelector('tile-stepper').run.frames.length")
    page.keyboard.press("ArrowRight")
    assert page.locator(".st-count").inner_text() == f"step 1 of {steps}"
    assert "Read keys and values 0–1" in page.locator(".st-say").inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("End")
    assert "Done: 6 tiles computed, 2 skipped" in page.locator(".st-say").inner_text()
    page.keyboard.press(" ")  # plays from the start
    assert page.locator("[data-do=play]").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Home")
    assert page.locator("[data-do=play]").get_attribute("aria-pressed") == "false"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_controls_change_the_run(page):
    page.locator("[data-set=blockQ]").select_option("8")
    page.locator("[data-set=causal]").uncheck()
    page.locator("[data-do=end]").click()
    assert "Done: 4 tiles computed, 0 skipped" in page.locator(".st-say").inner_text()
