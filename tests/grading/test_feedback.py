"""The page that a student gets: complete, honest about lateness, and deaf to whatever the student wrote."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from effattn_lab.grading.feedback import data, page
from effattn_lab.grading.model import ExerciseResult, Replay
from effattn_lab.grading.text import escaped, visible

sys.path.insert(0, str(Path(__file__).parent))
from results import ASSIGNMENT, DUE, MERGE, NASTY, nasty, student, verdicts

TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "h3",
        "p",
        "strong",
        "span",
        "div",
    ),
    *("section", "table", "thead", "tbody", "tr", "th", "td", "a", "ul", "li", "pre", "code"),
}
ATTRIBUTES = {
    *(
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "id",
        "href",
        "role",
        "aria-label",
        "scope",
    ),
    "colspan",
}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), set(), ""
        self.feed(text)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, tag, attributes):
        self.text += " " if tag in ("td", "th", "tr", "p", "li", "div") else ""
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text if self.open[-1:] != ["style"] else ""


def text_of(result):
    return re.sub(r"\s+", " ", Page(page(ASSIGNMENT, result)).text)


def test_passed():
    text = text_of(student())
    assert "3.5 of 3.5 points" in text
    assert "2 of 2 exercises passed" in text
    assert "Merge attention over two sets of keys" in text
    assert text.count("✓") == 6
    for absent in (
        "✗",
        "Likely cause",
        "Changed self-checks",
        "Cells that do not run",
        "About what you handed in",
    ):
        assert absent not in text


def test_failed():
    exercise = ExerciseResult(
        MERGE.id,
        "failed",
        0.0,
        2,
        verdicts(True, False, False),
        "The maximum is missing.",
        "ValueError: x\n  line 2",
    )
    result = dataclasses.replace(
        student(),
        exercises=(exercise,),
        changed_checks=("the self-check of full/flash/merge was edited (cell 8)",),
        replays=(Replay("full/flash", 12, ((9, "NameError: name 'm' is not defined"),)), Replay("x/y", 3)),
        problems=("two notebooks",),
    )
    text = text_of(result)
    for words in (
        "Properties: 1 of 3 hold",
        "✗ large scores",
        "o is off by 1.0e+00 at worst; 1.0e-05 allowed",
        "Hint: Take the larger of the two.",
        "Likely cause. The maximum is missing.",
        "ValueError: x line 2",
        "the self-check of full/flash/merge was edited (cell 8)",
        "full/flash: 12 cells ran",
        "Cell 9: NameError",
        "two notebooks",
        "0 of 2 points",
    ):
        assert words in text, words
    assert "x/y" not in text


@pytest.mark.parametrize("status", ["not written", "missing", "stopped"])
def test_other_statuses(status):
    assert f"{status}: " in text_of(student(merge=status))


def test_why_a_function_is_missing():
    """Nothing was raised by the student's code where the file could not be read."""
    exercise = ExerciseResult(MERGE.id, "missing", 0.0, 2, error="flash.ipynb: the notebook is not JSON")
    text = page(ASSIGNMENT, dataclasses.replace(student(), exercises=(exercise,)))
    assert "<h3>Why</h3><pre>flash.ipynb: the notebook is not JSON</pre>" in text
    assert "What your code raised" not in text


def test_how_points_are_given():
    assert "An exercise earns its points when every property holds" in text_of(student())
    shares = dataclasses.replace(ASSIGNMENT, credit="properties")
    assert "in proportion to the properties" in page(shares, student())


def test_late():
    at = (DUE + timedelta(minutes=130)).isoformat()
    text = text_of(student(submitted=at, late_minutes=130, late_percent=10))
    assert "Late: 10 % of 3.5 −0.35" in text
    assert "Total 3.15" in text
    assert "Handed in 2026-03-01 14:10 (UTC+03:00). Due 2026-03-01 12:00 (UTC+03:00)." in text
    assert "That is 2 hours 10 minutes late." in text
    assert "1 day begun: 10 % of 3.5 points is 0.35." in text
    assert "Nothing was taken off" in text_of(student(submitted=at, late_minutes=5))
    assert "Not late." in text_of(student(submitted=DUE.isoformat()))
    assert "Nothing says when this was handed in." in text_of(student())


def test_nothing_of_the_student_is_markup():
    text = page(ASSIGNMENT, nasty())
    parsed = Page(text)
    assert parsed.tags <= TAGS
    assert parsed.attributes <= ATTRIBUTES
    assert not set(text) & set("\u202e\x1b\x00")
    assert "⟨U+202E⟩gnp.exe⟨U+001B⟩[31m⟨U+0000⟩" in parsed.text
    assert len(text) < 100_000
    assert "and 50 more" in parsed.text


def test_frame():
    text = page(ASSIGNMENT, student())
    assert """content="default-src 'none'; style-src 'unsafe-inline'">""" in text
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text


def test_data():
    for result in (student(), nasty()):
        value = data(ASSIGNMENT, result)
        assert json.loads(json.dumps(value)) == value
        assert value["total"] == result.total
    assert data(ASSIGNMENT, student())["exercises"][0]["properties"][0] == {
        "property": "two parts give the whole", "passed": True, "detail": "", "hint": "",
    }  # fmt: skip
    assert len(json.dumps(data(ASSIGNMENT, nasty()))) < 100_000


def test_visible():
    assert visible("a\u202eb\u200bc\n") == "a⟨U+202E⟩b⟨U+200B⟩c⟨U+000A⟩"
    assert visible("a\nb\tc", lines=True) == "a\nb\tc"
    assert visible("x" * 300) == "x" * 200 + "…"
    assert visible("Zoë Ж 李 é") == "Zoë Ж 李 é"
    heap = "a" + "\u0301" * 100
    assert sum(c == "\u0301" for c in visible(heap)) == 3
    assert escaped("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert NASTY not in escaped(NASTY)


@pytest.mark.browser
def test_in_a_browser(browser, tmp_path):
    """No script runs, nothing is asked for, nothing sticks out on a phone, and axe finds nothing."""
    for name, result in (
        ("nasty", nasty()),
        ("late", student(step="failed", late_minutes=130, late_percent=10)),
    ):
        path = tmp_path / f"{name}.html"
        path.write_text(page(ASSIGNMENT, result), encoding="utf-8")
        for scheme in ("light", "dark"):
            look_at(browser, path, scheme)


def look_at(browser, path, scheme):
    from axe_playwright_python.sync_playwright import Axe

    view = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    seen = []
    view.on("dialog", lambda dialog: (seen.append("dialog"), dialog.dismiss()))
    view.on("request", lambda request: seen.append(request.url))
    view.goto(path.as_uri())
    assert seen == [path.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    # axe is a script, which the page's policy forbids: look at the same page without the policy.
    view.set_content(re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8")))
    found = Axe().run(view).response["violations"]
    assert not found, [(v["id"], v["nodes"][0]["html"]) for v in found]
    view.close()
