"""Every page of the built book, opened in Chromium: offline, without errors, readable, reachable."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
GRAVE = ("serious", "critical")
# Half of a page's elements are letters of formulas and words of code, coloured alike everywhere: one page shows all.
ALIKE = [[".bd-article .highlight pre"], ["mjx-container"]]
ALL_OF_IT = "chapters/foundations/attention.html"
TYPESET = "() => window.MathJax && MathJax.startup && MathJax.startup.promise.then(() => true)"
UNFOLD = """(most) => {
    [...document.querySelectorAll('.bd-article details')].slice(0, most).forEach((d) => { d.open = true; });
    document.querySelectorAll('.toggle-hidden').forEach((d) => d.classList.remove('toggle-hidden'));
    return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""
LINKS = """() => [...document.querySelectorAll('a[href], a[*|href]')].map((a) =>
    new URL(a.getAttribute('href') || a.getAttribute('xlink:href'), document.baseURI).href)"""
WIDEST = """() => [...document.querySelectorAll('body *')]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 8).map((e) => e.tagName + '.' + e.className)"""


class Watched:
    """A page that records what no reader should meet."""

    def __init__(self, page: Any, local: str) -> None:
        self.page, self.local = page, local
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        page.on("console", lambda m: m.type == "error" and self.faults.append(f"console: {m.text}"))
        page.on("response", lambda r: r.status >= 400 and self.faults.append(f"{r.status}: {r.url}"))
        page.route("**/*", self.only_local)

    def only_local(self, route: Any) -> None:
        if route.request.url.startswith((self.local, "data:", "blob:")):
            route.continue_()
        else:
            self.faults.append(f"request to elsewhere: {route.request.url}")
            route.abort()

    def open(self, where: str) -> Any:
        self.page.goto(self.local + where, wait_until="load")
        self.page.evaluate(TYPESET)
        return self.page


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Watched]:
    context = browser.new_context(viewport=WIDE, color_scheme="light", reduced_motion="reduce")
    yield Watched(context.new_page(), address)
    context.close()


def show(page: Any, mode: str) -> None:
    page.evaluate("(m) => { document.documentElement.dataset.mode = m; document.documentElement.dataset.theme = m; }",
                  mode)  # fmt: skip


def grave_faults(page: Any, **options: Any) -> list[str]:
    """Serious and critical violations that axe-core finds on the page as it stands."""
    from axe_playwright_python.sync_playwright import Axe

    # Without `preload`, axe fetches style sheets once more by itself.
    options = {"preload": False, "resultTypes": ["violations"], **options}
    context = None if page.url.endswith(ALL_OF_IT) else {"exclude": ALIKE}
    found = Axe().run(page, context=context, options=options).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:160]} ({' '.join(node.get('failureSummary', '').split())[:240]})"
        for fault in found
        if fault["impact"] in GRAVE
        for node in fault["nodes"][:4]
    ]


@functools.cache
def ids(path: Path) -> set[str]:
    return set(re.findall(r"""\b(?:id|name)=["']([^"']+)["']""", path.read_text(encoding="utf-8")))


def dead_links(links: list[str], address: str, site: Path) -> list[str]:
    dead = []
    for link in links:
        if not link.startswith(address):
            continue
        parts = urlsplit(link)
        path = site / unquote(parts.path).lstrip("/")
        path = path / "index.html" if path.is_dir() else path
        anchor = unquote(parts.fragment)
        if not path.is_file() or (anchor and path.suffix == ".html" and anchor not in ids(path)):
            dead.append(link)
    return sorted(set(dead))


def test_page(watched: Watched, address: str, site: Path, toc_page: str) -> None:
    page = watched.open(f"{toc_page}.html")
    assert page.title()
    assert page.locator("h1:visible").count() >= 1
    assert page.locator("mjx-merror, .katex-error, mjx-container [data-mjx-error]").count() == 0
    raw = page.evaluate("() => [...document.querySelectorAll('.bd-article .math')]"
                        ".filter((m) => !m.querySelector('mjx-container')).map((m) => m.textContent)")  # fmt: skip
    assert raw == [], "formulas that were not typeset"
    broken = page.evaluate("() => [...document.images].filter((i) => !i.complete || (i.src && !i.naturalWidth))"
                           ".map((i) => i.src)")  # fmt: skip
    assert broken == []
    silent = page.evaluate("() => [...document.querySelectorAll('img')]"
                           ".filter((i) => !(i.getAttribute('alt') || '').trim()).map((i) => i.src)")  # fmt: skip
    assert silent == [], "pictures without alternative text"
    assert dead_links(page.evaluate(LINKS), address, site) == []

    # Folded answers look alike: axe reads some of them, the check of the width all.
    page.evaluate(UNFOLD, 12)
    assert grave_faults(page) == [], "wide, light"
    show(page, "dark")
    assert grave_faults(page, runOnly=["color-contrast"]) == [], "wide, dark"
    page.set_viewport_size(NARROW)
    page.evaluate(UNFOLD, 1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"] + 1, page.evaluate(WIDEST)
    assert grave_faults(page, rules={"color-contrast": {"enabled": False}}) == [], "narrow"
    assert watched.faults == []


def test_search_finds_a_word(watched: Watched) -> None:
    page = watched.open("search.html?q=softmax")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    assert grave_faults(page) == []
    assert watched.faults == []


def test_theme_button_changes_the_mode_and_is_remembered(watched: Watched) -> None:
    page = watched.open("index.html")
    mode = "document.documentElement.dataset.theme"
    for _ in range(3):
        if page.evaluate(mode) == "dark":
            break
        page.locator("button.theme-switch-button").first.click()
    assert page.evaluate(mode) == "dark"
    assert watched.open("chapters/intro.html").evaluate(mode) == "dark"
    assert watched.faults == []


def sim_pages(site: Path) -> list[str]:
    return [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))
            if "data-sim=" in p.read_text(encoding="utf-8")]  # fmt: skip


@pytest.mark.parametrize("how", ["served", "file"])
def test_simulators_work_from_the_keyboard(browser: Any, address: str, site: Path, how: str) -> None:
    """Each is defined, is reached with Tab, answers keys without an error: from a server and from a file."""
    local = address if how == "served" else f"{site.as_uri()}/"
    names = sim_pages(site)
    assert names
    for name in names:
        context = browser.new_context(viewport=NARROW, reduced_motion="reduce")
        watched = Watched(context.new_page(), local)
        page = watched.open(name)
        page.wait_for_function("() => [...document.querySelectorAll('[data-sim]')]"
                               ".every((e) => customElements.get(e.localName))")  # fmt: skip
        for sim in page.locator("[data-sim]").all():
            controls = sim.locator(
                "button:enabled:visible, select:visible, input:visible, [tabindex='0']:visible"
            )
            assert controls.count() > 0, f"{name}: nothing to focus"
            before = sim.inner_html()
            for control in controls.all()[:6]:
                control.focus()
                for key in ("ArrowRight", "ArrowDown", "Home", "End", "Enter"):
                    page.keyboard.press(key)
            page.keyboard.press("Tab")
            assert sim.inner_html() != before, f"{name}: no key changes anything"
        assert page.locator("mjx-merror").count() == 0
        # The theme preloads its icon font in a way that a page opened from a file may not; it is loaded all the same.
        faults = [
            f for f in watched.faults if how == "served" or not re.search("font at 'file:|ERR_FAILED", f)
        ]
        assert faults == [], name
        context.close()
