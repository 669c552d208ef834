"""The in-page linear-attention stepper computes what the package computes, and can be worked without a mouse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effattn_lab.linear.linear_attention import LinearState, chunk_step, linear_attention
from effattn_lab.linear.linear_attention_cost import chunked_flops, state_elements

pytestmark = pytest.mark.browser

SCRIPTS = [Path(__file__).parents[2] / "_sims" / name for name in ("stepper.js", "linear-stepper.js")]


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content(
        "<!doctype html><title>t</title><body style='margin:0'><linear-stepper></linear-stepper>"
    )
    for script in SCRIPTS:
        page.add_script_tag(path=str(script))
    yield page
    page.close()
    assert errors == []


def simulate(page, **options):
    return page.evaluate(
        """(options) => {
            const t = window.effattn.linearStepper, cfg = Object.assign({}, t.DEFAULTS, options);
            return { run: t.simulate(cfg), quadratic: t.quadratic(cfg), cfg };
        }""",
        options,
    )


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 9])
def test_all_forms_agree_with_the_package(page, chunk, normalize):
    result = simulate(page, chunk=chunk, normalize=normalize)
    run, cfg = result["run"], result["cfg"]
    q, k, v = (tensor(cfg[name])[None, None] for name in "qkv")
    want = linear_attention(
        q, k, v, feature_map=None, causal=True, scale=1.0, normalize=normalize, eps=cfg["eps"]
    )[0, 0]
    torch.testing.assert_close(tensor(run["out"]), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(tensor(result["quadratic"]), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(tensor(run["S"]), (k.mT @ v)[0, 0], rtol=0, atol=1e-13)
    torch.testing.assert_close(tensor(run["z"]), k.sum(2)[0, 0], rtol=0, atol=1e-13)
    assert run["held"] == state_elements(1, 2, 2) + min(chunk, 8) ** 2
    if 8 % chunk == 0:
        assert 2 * (run["pairs"] + run["state"]) == chunked_flops(1, 8, 2, 2, chunk)


def test_every_frame_follows_chunk_step(page):
    result = simulate(page, chunk=3)
    q, k, v = (tensor(result["cfg"][name])[None, None] for name in "qkv")
    state = LinearState(torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 2).double())
    after = state
    for frame in result["run"]["frames"]:
        part = slice(*frame["rows"])
        kept = after if frame["kind"] == "write" else state
        torch.testing.assert_close(tensor(frame["S"]), kept.S[0, 0])
        if frame["kind"] == "read":
            num, den, after = chunk_step(state, q[:, :, part], k[:, :, part], v[:, :, part])
        if frame["kind"] == "inside":
            torch.testing.assert_close(tensor(frame["num"]), num[0, 0])
            torch.testing.assert_close(tensor(frame["den"]), den[0, 0])
            inside = (q[0, 0, part] @ k[0, 0, part].T).tril()
            torch.testing.assert_close(tensor(frame["square"]), inside)
        if frame["kind"] == "write":
            state = after


def test_keyboard_and_narrow_screen(page):
    page.locator("linear-stepper .st-stage").focus()
    assert "it is empty" in page.locator(".st-say").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator(".st-count").inner_text() == "step 1 of 12"
    assert "Weights inside the chunk of tokens 0–1" in page.locator(".st-say").inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("End")
    said = page.locator(".st-say").inner_text()
    assert said.startswith("Done: 176 multiply-adds, at most 10 numbers held.")
    assert float(said.rstrip(".").rsplit(" ", 1)[1]) < 1e-14
    page.keyboard.press(" ")  # plays from the start
    assert page.locator("[data-do=play]").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Home")
    assert page.locator("[data-do=play]").get_attribute("aria-pressed") == "false"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_controls_change_the_run(page):
    for chunk, steps in (("1", 24), ("8", 3)):
        page.locator("[data-set=chunk]").select_option(chunk)
        assert page.locator(".st-count").inner_text() == f"step 0 of {steps}"
    page.locator("[data-set=normalize]").uncheck()
    page.locator("[data-do=step]").click()
    assert "that is the output" in page.locator(".st-say").inner_text()
    assert "token 7" in page.locator(".st-tables").inner_text()
