"""The directives and the filter, on a small book with the real bank: built without warnings, opened from a file."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from effattn_lab.interview import load, select, topics

ROOT = Path(__file__).parents[2]
BANK = load()


def write_book(folder, pages):
    for name in ("interview", "_sims", "references.bib"):
        (folder / name).symlink_to(ROOT / name)
    labels = sorted({question.section for question in BANK})
    pages["labels"] = "# Labels\n\n" + "".join(f"({label})=\n## Section {label}\n\n" for label in labels)
    pages["index"] = "# Book\n\n```{toctree}\n" + "\n".join(pages) + "\n```\n"
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def build(folder, monkeypatch):
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    monkeypatch.syspath_prepend(str(ROOT / "_ext"))
    config = {
        "extensions": ["myst_parser", "sphinxcontrib.bibtex", "sim", "interview"],
        "myst_enable_extensions": ["dollarmath"],
        "bibtex_bibfiles": ["references.bib"],
        "bibtex_reference_style": "author_year",
        "exclude_patterns": ["_build"],
        "mathjax_path": "none.js",
        "suppress_warnings": [
            "bibtex.duplicate_citation"
        ],  # as Jupyter Book does: each page has its own list
    }
    warnings = io.StringIO()
    with docutils_namespace():
        app = Sphinx(
            folder, None, folder / "_build", folder / "_doctrees", "html",
            confoverrides=config, status=None, warning=warnings,
        )  # fmt: skip
        app.build()
    return re.sub(r"\x1b\[[0-9;]*m", "", warnings.getvalue())


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    references = "\n```{bibliography}\n:filter: docname in docnames\n```\n"
    write_book(
        folder,
        {
            "bank": "# Bank\n\n## The questions\n\n```{interview-bank}\n```\n" + references,
            "chapter": "# Chapter\n\n```{interview} full/flash\n```\n" + references,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        warnings = build(folder, patch)
        for name in ("sim", "interview"):  # named like nothing else a test should import
            sys.modules.pop(name, None)
    assert warnings == ""
    return folder / "_build"


def test_every_question_is_folded_once_on_each_page(book):
    for page, questions in (("bank", BANK), ("chapter", select(BANK, "full/flash"))):
        html = (book / f"{page}.html").read_text(encoding="utf-8")
        assert re.findall(r'<details class="interview" [^>]*id="([^"]+)"', html) == [
            q.anchor for q in questions
        ]
        assert "<details open" not in html
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))


def test_answers_are_parsed_as_markdown(book):
    html = (book / "chapter.html").read_text(encoding="utf-8")
    assert html.count('<span class="math notranslate nohighlight">') > 30
    assert "$" not in re.sub(r"<[^>]*>|<script.*?</script>", "", html.split("<body", 1)[1])
    assert 'href="labels.html#flash-merge"' in html
    assert "keys_read" in html
    assert 'class="highlight-python' in html


def test_script_and_style_only_where_used(book):
    pages = {
        page: (book / f"{page}.html").read_text(encoding="utf-8") for page in ("bank", "chapter", "labels")
    }
    assert {p: "interview-filter.js" in html for p, html in pages.items()} == {
        "bank": True, "chapter": False, "labels": False,
    }  # fmt: skip
    assert {p: "interview.css" in html for p, html in pages.items()} == {
        "bank": True, "chapter": True, "labels": False,
    }  # fmt: skip
    assert (book / "_static" / "interview.css").is_file()


def test_unknown_topic_is_reported(tmp_path, monkeypatch):
    write_book(tmp_path, {"page": "# Page\n\n```{interview} full/none\n```\n"})
    assert "there is no interview/full/none.yml" in build(tmp_path, monkeypatch)


@pytest.fixture
def page(browser, book):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((book / "bank.html").as_uri())
    yield page
    page.close()
    assert errors == []


def shown(page):
    return page.evaluate(
        "[...document.querySelectorAll('details.interview')].filter((d) => d.checkVisibility()).map((d) => d.id)"
    )


def status(page):
    return page.locator("interview-filter [role=status]").inner_text()


@pytest.mark.browser
def test_filter_by_keyboard(page):
    assert status(page) == f"{len(BANK)} of {len(BANK)} questions"
    page.get_by_label("Topic").focus()
    page.keyboard.press("End")  # the last topic
    topic = list(topics(BANK))[-1]
    assert shown(page) == [q.anchor for q in select(BANK, topic)]
    page.keyboard.press("Tab")
    page.keyboard.type("staff")
    wanted = [q.anchor for q in select(BANK, topic, "staff")]
    assert shown(page) == wanted
    assert status(page) == f"{len(wanted)} of {len(BANK)} questions"
    assert page.evaluate("location.hash") == f"#topic={topic}&level=staff"
    assert page.locator("section.interview-topic:visible").count() == 1
    page.get_by_role("button", name="Clear").press("Enter")
    assert len(shown(page)) == len(BANK)
    assert page.evaluate("location.hash") == ""


@pytest.mark.browser
def test_words_and_folds(page):
    page.get_by_label("Words in question or answer").fill("  ATOMIC  dq ")
    assert 0 < len(shown(page)) < len(BANK)
    page.get_by_label("Words in question or answer").fill("no such words")
    assert status(page) == f"0 of {len(BANK)} questions"
    page.get_by_role("button", name="One at random").click()  # nothing to choose from, no error
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="One at random").click()
    page.keyboard.press("Enter")  # the question has the focus; Enter opens it
    assert page.locator("details.interview[open]").count() == 1
    page.get_by_role("button", name="Fold all answers").click()
    assert page.locator("details.interview[open]").count() == 0


@pytest.mark.browser
def test_address_keeps_the_filter(page, book):
    page.goto((book / "bank.html").as_uri() + "#level=junior&words=softmax")
    page.reload()
    assert page.get_by_label("Level").input_value() == "junior"
    assert page.get_by_label("Words in question or answer").input_value() == "softmax"
    page.evaluate("location.hash = '#topic=no/such&level=mid'")
    page.wait_for_function("document.querySelector('interview-filter select').value === ''")
    assert shown(page) == [q.anchor for q in select(BANK, None, "mid")]
    page.evaluate("location.hash = '#q-full-flash-merge'")  # a link to one question opens it
    page.wait_for_function("document.querySelector('#q-full-flash-merge').open")
    assert len(shown(page)) == len(BANK)


@pytest.mark.browser
def test_pure_functions(page):
    call = "([name, ...args]) => window.effattn.interviewFilter[name](...args)"
    everything = {"topic": "", "level": "", "words": ""}
    assert page.evaluate(call, ["parseHash", ""]) == everything
    assert page.evaluate(call, ["formatHash", everything]) == ""
    for given in (
        {"topic": "full/flash", "level": "mid", "words": "a&b=c ü#"},
        {**everything, "words": "x y"},
    ):
        assert page.evaluate(call, ["parseHash", "#" + page.evaluate(call, ["formatHash", given])]) == given
    question = {"topic": "full/flash", "level": "mid", "text": "Überlauf of the Exponential"}
    for change, passes in (({}, True), ({"words": "EXP uber"}, True), ({"words": "exp nil"}, False),
                           ({"level": "staff"}, False), ({"topic": "full/heads"}, False)):  # fmt: skip
        assert page.evaluate(call, ["matches", {**everything, **change}, question]) is passes


@pytest.mark.browser
def test_without_javascript_everything_is_there(browser, book):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "bank.html").as_uri())
    assert page.locator("details.interview").count() == len(BANK)
    assert page.locator("details.interview:visible").count() == len(BANK)
    assert page.locator("interview-filter form").count() == 0
    page.locator("#q-full-flash-merge > summary").click()
    assert page.locator("#q-full-flash-merge .interview-strong").is_visible()
    context.close()
