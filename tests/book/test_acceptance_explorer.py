"""The in-page acceptance explorer computes what the package computes, and can be worked without a mouse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effattn_lab.linear import speculative as spec
from effattn_lab.linear import speculative_cost as cost
from effattn_lab.linear import speculative_proof as proof

pytestmark = pytest.mark.browser

SCRIPT = Path(__file__).parents[2] / "_sims" / "acceptance-explorer.js"
RULES = {"target": "resample from p", "turned": "accept with q/p", "always": "accept everything"}


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content(
        "<!doctype html><title>t</title><body style='margin:0'><acceptance-explorer></acceptance-explorer>"
    )
    page.add_script_tag(path=str(SCRIPT))
    yield page
    page.close()
    assert errors == []


def call(page, name, *arguments):
    return page.evaluate(
        "([name, args]) => window.effattn.acceptanceExplorer[name](...args)", [name, arguments]
    )


def test_worth_agrees_with_the_package(page):
    for alpha in (0.0, 0.3, 0.71, 0.99):
        for c in (0.0, 0.05, 0.3):
            for gamma in (0, 1, 4, 16):
                want = cost.expected_tokens(alpha, gamma)
                assert call(page, "expectedTokens", alpha, gamma) == pytest.approx(want, rel=1e-12)
                want = cost.speedup(alpha, gamma, c)
                assert call(page, "speedup", alpha, gamma, c) == pytest.approx(want, rel=1e-12)
                want = cost.operations_factor(alpha, gamma, c)
                assert call(page, "operationsFactor", alpha, gamma, c) == pytest.approx(want, rel=1e-12)
            assert call(page, "optimalGamma", alpha, c, 16) == cost.optimal_gamma(alpha, c, 16)


def test_rounds_agree_with_the_package(page):
    """The same three random numbers give the same token, for every draft that the page offers."""
    given = page.evaluate("window.effattn.acceptanceExplorer.DEFAULTS")
    p = torch.tensor(given["p"], dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1)
    u = torch.rand(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weights in given["drafts"].values():
        q = torch.tensor(weights, dtype=torch.float64)
        assert q.sum().item() == pytest.approx(1)
        assert call(page, "overlap", given["p"], weights) == pytest.approx(spec.overlap(p, q).item())
        assert call(page, "residual", given["p"], weights) == pytest.approx(spec.residual(p, q).tolist())
        drafts = spec.sample(q.expand(300, -1), u[:, 0])
        tokens, accepted = spec.verify(
            p.expand(300, 2, -1), q.expand(300, 1, -1), drafts[:, None], u[:, 1:2], u[:, 2]
        )
        rounds = page.evaluate(
            "([p, q, us]) => us.map((u) => window.effattn.acceptanceExplorer.round(p, q, u, 'right'))",
            [given["p"], weights, u.tolist()],
        )
        assert [r["token"] for r in rounds] == tokens[:, 0].tolist()
        assert [int(r["accepted"]) for r in rounds] == accepted.tolist()


def test_every_rule_emits_what_the_package_says(page):
    given = page.evaluate("window.effattn.acceptanceExplorer.DEFAULTS")
    p = torch.tensor(given["p"], dtype=torch.float64)
    for weights in given["drafts"].values():
        q = torch.tensor(weights, dtype=torch.float64)
        assert call(page, "emitted", given["p"], weights, "right") == pytest.approx(given["p"])
        for rule, name in RULES.items():
            want = proof.WRONG_RULES[name](p, q)
            assert call(page, "emitted", given["p"], weights, rule) == pytest.approx(want.tolist(), abs=1e-12)


def test_what_is_drawn_is_what_the_rule_gives(page):
    """5,000 draws with the page's own generator: the right rule passes the chi-square test, wrong ones don't."""
    p = torch.tensor(page.evaluate("window.effattn.acceptanceExplorer.DEFAULTS.p"), dtype=torch.float64)
    for rule in ("right", *RULES):
        page.locator("[data-set=rule]").select_option(rule)
        for _ in range(5):
            page.locator("[data-do='1000']").click()
        counts = torch.tensor(page.evaluate("document.querySelector('acceptance-explorer').counts"))
        assert counts.sum() == 5000
        assert (proof.chi_square(counts, p).p_value > 1e-3) == (rule == "right")
        exact = "none: exact" in page.locator(".ae-tally").inner_text()
        assert exact == (rule == "right")


def test_keyboard_and_narrow_screen(page):
    alpha = page.locator("[data-set=alpha]")
    alpha.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-of=alpha]").inner_text() == "0.71"
    page.keyboard.press("Home")
    assert "α is not above c" in page.locator(".ae-worth").inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert page.locator("[data-of=gamma]").inner_text() == "16"
    page.locator("[data-do='1']").focus()
    page.keyboard.press("Enter")
    assert "Drafted" in page.locator(".ae-last").inner_text()
    page.locator("[data-do=alpha]").focus()
    page.keyboard.press(" ")
    assert page.locator("[data-of=alpha]").inner_text() == "0.68"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    svg = page.locator(".ae-curve title").text_content()
    assert "γ = 16" in svg


def test_start_again_repeats_the_same_draws(page):
    said = []
    for _ in range(2):
        page.locator("[data-do=reset]").click()
        for _ in range(3):
            page.locator("[data-do='1']").click()
        said.append(page.locator(".ae-last").inner_text())
    assert said[0] == said[1]
