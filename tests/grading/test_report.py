"""`effattn report`: what the page says of a class, and which submissions it puts side by side."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import linecache
import os
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from effattn_lab.exercises import check
from effattn_lab.grading import report
from effattn_lab.grading.similarity import LEAST_TOKENS, MAX_PAIRS, THRESHOLD, pairs

sys.path.insert(0, str(Path(__file__).parent))
import variants
from results import ASSIGNMENT, NASTY, nasty, student, verdicts

MODEL, BATCHED, PLAIN = variants.model(), variants.cells(variants.BATCHED), variants.cells(variants.PLAIN)
WAYS = {
    "model": list(MODEL.values()),
    "batched": list(BATCHED.values()),
    "plain": list(PLAIN.values()),
}


# ---- submissions that look alike ---------------------------------------------------------------------------


def score(one, two, given=True):
    found = pairs(
        {"a": variants.joined(one), "b": variants.joined(two)}, variants.given() if given else (), threshold=0
    )
    return found[0].score if found else 0.0


@pytest.mark.parametrize("way", ["BATCHED", "PLAIN"])
def test_the_variants_are_solutions(way, capsys):
    """Else they would prove nothing. (The kernel's check takes seconds: it was run by hand.)"""
    names = {}
    exec(
        "import math, torch, triton\nimport triton.language as tl\n"
        "from effattn_lab.foundations.attention import repeat_kv",
        names,
    )
    for name, text in variants.cells(getattr(variants, way)).items():
        file = f"<{way} {name}>"
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        exec(compile(text, file, "exec"), names)
        if name != "triton_forward":
            assert check(f"full/flash/{name}", names[variants.FUNCTIONS[name]]), name


@pytest.mark.parametrize("way", WAYS)
def test_a_disguised_copy_is_found(way):
    copied = variants.disguised(WAYS[way])
    assert "\n".join(copied) != "\n".join(WAYS[way])
    assert score(WAYS[way], copied) >= 0.95


def test_independent_solutions_are_not():
    for one, two in itertools.combinations(WAYS, 2):
        assert score(WAYS[one], WAYS[two]) <= 0.35 < THRESHOLD, (one, two)
        assert score(WAYS[one], variants.disguised(WAYS[two])) <= 0.35, (one, two)


def test_half_a_copy_and_padding():
    mixed = list({**MODEL, **dict(list(BATCHED.items())[:3])}.values())
    assert score(WAYS["model"], mixed) >= THRESHOLD
    # Foreign code around a copy changes nothing: the smaller one's share counts.
    assert score(WAYS["model"], WAYS["plain"] + variants.disguised(WAYS["model"])) >= 0.95


def test_released_code_is_no_evidence():
    """Untouched cells are common to all; so is the frame of the kernel around two independent blanks."""
    assert score(variants.given(), variants.given()) == 0
    kernels = [[way["triton_forward"]] for way in (BATCHED, PLAIN)]
    assert score(*kernels, given=False) > score(*kernels) + 0.3


def test_too_little_to_say_anything():
    short = ["def merge(a, b):\n    return a + b"]
    assert score(short, short) == 0
    long = ["\n".join(f"def f{n}(a, b): return a.x{n} + b" for n in range(LEAST_TOKENS))]
    assert score(long, long) == 1


def test_marks_are_what_is_common():
    common = MODEL["backward_tile"]
    one, two = variants.joined([common, BATCHED["forward"]]), variants.joined([PLAIN["forward"], common])
    (pair,) = pairs({"a": one, "b": two}, variants.given(), threshold=0.1)
    for text, marks in zip((one, two), pair.marks):
        marked = "".join(text[start:end] for start, end in marks)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(marks))
        assert "(do * o).sum(dim=-1)" in marked
        assert "p * (dp - delta[:, None])" in marked
        assert len(marked) < 1.5 * len(common)


def test_order_and_names_do_not_matter():
    sources = {f"s{n}": variants.joined(WAYS["model"]) for n in range(9)}
    found = pairs(sources, variants.given())
    assert len(found) == MAX_PAIRS
    assert [(p.first, p.second) for p in found[:2]] == [("s0", "s1"), ("s0", "s2")]
    assert found == pairs(dict(reversed(sources.items())), variants.given())


def test_hostile_code():
    rng = random.Random(0)
    texts = [
        '"' * 60_000,
        "(" * 60_000,
        'f"{' * 20_000,
        "\\" * 60_000,
        "\x00\u202e\ud800" * 9_000,
        "a." * 30_000,
    ]
    texts += ["".join(chr(rng.randrange(1, 0x3000)) for _ in range(20_000)), "# ---- cell 1\n" * 4_000, ""]
    found = pairs({f"s{n}": text for n, text in enumerate(texts)}, variants.given(), threshold=0.3)
    for pair in found:
        report._marked(texts[int(pair.first[1:])], pair.marks[0])


def test_a_large_class(record_property):
    """4,950 pairs, the slowest kind: everybody uses one of three ways for each exercise."""
    import time

    rng = random.Random(0)
    ways = (MODEL, BATCHED, PLAIN)
    names = list(MODEL)[:5]
    sources = {f"s{n}": variants.joined([rng.choice(ways)[name] for name in names]) for n in range(100)}
    start = time.process_time()
    pairs(sources, variants.given())
    seconds = time.process_time() - start
    record_property("pairs_per_second", 4950 / seconds)
    assert seconds < 20


# ---- the page ----------------------------------------------------------------------------------------------


def class_results():
    merged = dataclasses.replace(
        student().exercises[0], status="failed", points=0.0,
        verdicts=verdicts(True, False, False, hint="Subtract the maximum."), cause="The maximum is missing.",
    )  # fmt: skip
    failed = [
        dataclasses.replace(student(f"f{n}", f"Fay {n}"), exercises=(merged, student().exercises[1]))
        for n in range(3)
    ]
    return [
        student("ann", "Ann Lee"),
        student("bob", "Bob", merge="not written", step="missing", problems=("no notebook was handed in",)),
        student("cyd", "Cyd", late_minutes=130, late_percent=10, changed_checks=("the self-check of x was edited",)),
        *failed,
    ]  # fmt: skip


@pytest.fixture
def graded(tmp_path):
    folder = tmp_path / "results"
    (folder / "students").mkdir(parents=True)
    (folder / "sources").mkdir()
    (folder / "assignment.json").write_text(json.dumps(ASSIGNMENT.to_json()))
    results = class_results()
    for result in results:
        (folder / "students" / f"{result.student}.json").write_text(json.dumps(result.to_json()))
    for name, cells in (
        ("ann", WAYS["model"]), ("cyd", variants.disguised(WAYS["model"])), ("f0", WAYS["plain"]),
    ):  # fmt: skip
        (folder / "sources" / f"{name}.py").write_text(variants.joined(cells))
    return folder


class Text(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.alts, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.alts += [value for name, value in attributes if name == "alt"]
        assert not any(name.startswith("on") for name, _ in attributes)
        self.text += " " if tag in ("td", "th", "tr", "p", "h2", "h3", "h4") else ""

    def handle_data(self, text):
        self.text += text


def run(folder, similar=None):
    return report.run(argparse.Namespace(results=str(folder), similar=similar))


def test_the_page(graded, capsys):
    assert run(graded) == 0
    assert "report.html: mean 1.86 of 3.5 points" in capsys.readouterr().out
    text = (graded / "report.html").read_text(encoding="utf-8")
    page = Text(text)
    said = re.sub(r"\s+", " ", page.text)
    for words in (
        "6 students. Mean 1.86, median 1.5 of 3.5 points. 2 passed every exercise; 1 lost points for being late.",
        "full/flash/merge 33 % 0.67 of 2",
        "full/flash/merge large scores 3 50 % Subtract the maximum.",
        "3 The maximum is missing.",
        "cyd (Cyd) 130 min 10 % 0.35",
        "cyd (Cyd) the self-check of x was edited",
        "bob (Bob) no notebook was handed in",
        "Whom to look at student points why bob (Bob) 0 no notebook was handed in cyd (Cyd) 3.15 changed self-checks "
        "Totals",
        "3 submissions compared.",
        "ann (Ann Lee) and cyd (Cyd): 100 %",
        "a reason to look, not a finding",
    ):
        assert words in said, words
    assert '<a href="feedback/bob.html">bob (Bob)</a>' in text
    assert "not finished" not in said
    assert said.count(" tokens") == 2, "one pair, and the sentence above it"
    assert "<mark>" in text
    histogram, bars = page.alts
    assert histogram == (
        "Histogram of the total points. about 0: 1 student; about 1.5: 3 students; about 3: 1 student; "
        "about 3.5: 1 student."
    )
    assert "full/flash/merge: 2 passed, 3 failed, 1 not written" in bars
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert text.count("data:image/png;base64,iVBOR") == 2
    again = report.page(ASSIGNMENT, *_inputs(graded))
    assert again == text, "the same results, the same page"


def test_whom_to_look_at(graded, capsys):
    (graded / "run.json").write_text('{"complete": false}')
    tried = student("gus", "Gus", merge="failed", step="stopped")
    (graded / "students" / "gus.json").write_text(json.dumps(tried.to_json()))
    assert run(graded) == 0
    assert "not finished" in capsys.readouterr().out
    text = (graded / "report.html").read_text(encoding="utf-8")
    assert "The run is not finished" in text
    assert "stopped: full/flash/tile_step; tried, and nothing passed" in Text(text).text
    nobody = report.page(ASSIGNMENT, [student()], {}, 0.6)
    assert "Nobody: no problems" in nobody


def _inputs(folder):
    assignment, results = report.load_results(folder)
    assert assignment == ASSIGNMENT
    return results, report.load_sources(folder, results), THRESHOLD


def test_nothing_of_a_student_is_markup():
    code = variants.joined([*WAYS["model"], f"x = '''{NASTY}'''"])
    text = report.page(ASSIGNMENT, [nasty(), student("ann", NASTY)], {"eve": code, "ann": code}, THRESHOLD)
    page = Text(text)
    assert not page.tags & {"script", "iframe", "object", "form", "link", "base", "svg"}
    assert len(page.alts) == 2, "no picture but ours"
    assert not set(text) & set("\u202e\x1b\x00")
    assert "⟨U+202E⟩gnp" in page.text


def test_wrong_folders(graded, tmp_path):
    with pytest.raises(ValueError, match="RESULTS: expected a folder that `effattn grade` wrote"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"--similar: expected a share from 0\.3 to 1, got 2"):
        run(graded, 2)
    (graded / "students" / "zed.json").write_text("{")
    with pytest.raises(ValueError, match=r"zed\.json: "):
        run(graded)
    (graded / "students" / "zed.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"zed\.json: "):
        run(graded)
    (graded / "students" / "zed.json").unlink()
    (graded / "sources" / "ann.py").unlink()
    (graded / "sources" / "ann.py").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic links"):
        run(graded)
    assert not (graded / "report.html").exists()
    for path in (graded / "students").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no graded student"):
        run(graded)


def test_whole_or_not_at_all(graded, monkeypatch):
    (graded / "report.html").write_text("before")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        run(graded)
    assert (graded / "report.html").read_text() == "before"
    assert sorted(os.listdir(graded)) == ["assignment.json", "report.html", "sources", "students"]


@pytest.mark.browser
def test_in_a_browser(graded, browser):
    from axe_playwright_python.sync_playwright import Axe

    run(graded)
    path = graded / "report.html"
    view = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    asked = []
    view.on("request", lambda request: asked.append(request.url))
    view.goto(path.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    assert view.evaluate("[...document.images].every(image => image.naturalWidth > 300)")
    view.set_content(re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8")))
    found = Axe().run(view).response["violations"]
    assert not found, [(v["id"], v["nodes"][0]["html"][:200]) for v in found]
    view.close()
