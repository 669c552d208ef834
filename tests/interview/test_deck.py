"""The Anki deck, read back from the file's database as Anki would."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import sqlite3
import subprocess
import sys
import time
import zipfile
from html.parser import HTMLParser

import pytest

from effattn_lab.interview import deck, load
from effattn_lab.interview.cards import inline_html, to_html
from effattn_lab.interview.links import Book, heading

BANK = load()
BOOK = Book(pages="https://example.org/book")
VOID = {"br", "hr", "img"}


class Deck:
    """What is in an ``.apkg``."""

    def __init__(self, data, tmp_path):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            self.names = archive.namelist()
            file = tmp_path / "collection.anki2"
            file.write_bytes(archive.read("collection.anki2"))
            assert archive.read("media") == b"{}"
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        db = sqlite3.connect(file)
        db.row_factory = sqlite3.Row
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        self.notes = [dict(row) for row in db.execute("SELECT * FROM notes ORDER BY id")]
        self.cards = [dict(row) for row in db.execute("SELECT * FROM cards ORDER BY id")]
        decks, models = db.execute("SELECT decks, models FROM col").fetchone()
        self.decks = {int(key): value["name"] for key, value in json.loads(decks).items()}
        (self.model,) = json.loads(models).values()
        db.close()
        names = [field["name"] for field in self.model["flds"]]
        self.by_id = {}
        for note in self.notes:
            values = note["flds"].split("\x1f")
            assert len(values) == len(names)
            note["fields"] = dict(zip(names, values, strict=True))
            self.by_id[note["fields"]["Id"]] = note


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Deck(deck.build(BANK, BOOK), tmp_path_factory.mktemp("deck"))


class Tags(HTMLParser):
    """Finds a tag that is closed wrongly or not at all, and text in code and formulas."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.wrong, self.prose = [], [], ""
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        if "code" not in self.open:
            self.prose += data


def test_a_note_and_a_card_for_each_question(built):
    assert set(built.by_id) == {question.id for question in BANK}
    assert len(built.notes) == len(built.cards) == len(BANK)
    assert sorted(card["nid"] for card in built.cards) == [note["id"] for note in built.notes]
    assert len({note["guid"] for note in built.notes}) == len(BANK)
    order = {card["nid"]: card["due"] for card in built.cards}
    assert [order[built.by_id[question.id]["id"]] for question in BANK] == list(range(len(BANK)))
    for question in BANK:
        note = built.by_id[question.id]
        assert note["guid"] == deck.guid(question.id)
        assert note["tags"].split() == [
            f"effattn::level::{question.level}",
            f"effattn::topic::{question.topic.replace('/', '::')}",
        ]
        fields = note["fields"]
        assert fields["Points"].count("<li>") == len(question.key_points)
        assert fields["Follow-ups"].count("<details>") == len(question.follow_ups)
        assert (
            f'href="https://example.org/book/chapters/{question.chapter}.html#{question.section}"'
            in fields["Link"]
        )
        assert fields["Level"] == f"{question.level} · {question.minutes:g} min"


def test_a_subdeck_for_each_topic(built):
    names = {name for key, name in built.decks.items() if key != 1}
    titles = {question.topic: question.topic_title for question in BANK}
    assert names == {deck.NAME, *(f"{deck.NAME}::{title}" for title in titles.values())}
    of_note = {card["nid"]: built.decks[card["did"]] for card in built.cards}
    for question in BANK:
        assert of_note[built.by_id[question.id]["id"]] == f"{deck.NAME}::{question.topic_title}"
    assert all(1 << 30 <= key < 1 << 31 for key in built.decks if key != 1)


def test_fields_are_whole_html_with_formulas_for_mathjax(built):
    for id_, note in built.by_id.items():
        for name, value in note["fields"].items():
            tags = Tags(value)
            assert tags.wrong == [], (id_, name)
            # A price may keep its sign; two signs with TeX between them would be a formula left behind.
            assert not re.search(r"\$[^$]*[\\^_{][^$]*\$", tags.prose), (id_, name)
            assert tags.prose.count("\\(") == tags.prose.count("\\)")
    formulas = sum(text.count("$") for question in BANK for text in _texts(question)) // 2
    shown = sum(note["flds"].count("\\(") + note["flds"].count("\\[") for note in built.notes)
    prices = sum(note["flds"].count("$") for note in built.notes)
    assert formulas > 100
    assert abs(shown - formulas) <= prices
    for side in (built.model["tmpls"][0]["qfmt"], built.model["tmpls"][0]["afmt"]):
        assert Tags(re.sub(r"\{\{.*?\}\}", "", side)).wrong == []
        used = set(re.findall(r"\{\{[#/]?([^}]+)\}\}", side)) - {"FrontSide"}
        assert used <= set(built.notes[0]["fields"])


def _texts(question):
    yield from (question.question, question.red_flag, question.strong_answer, *question.key_points)
    for follow_up in question.follow_ups:
        yield from (follow_up.ask, follow_up.answer)
    yield heading(question.chapter, question.section) or ""  # of the link; one may hold a formula


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("$a<b$ and $x_i$, then $y_i$", r"\(a&lt;b\) and \(x_i\), then \(y_i\)"),
        ("It costs $5 to $6 a day", "It costs $5 to $6 a day"),
        ("from $5/$6 an hour", "from $5/$6 an hour"),
        (r"\$4,000 a month for $4N^2D$ FLOPs", r"$4,000 a month for \(4N^2D\) FLOPs"),
        ("run `echo $HOME $PATH` first", "run <code>echo $HOME $PATH</code> first"),
        ("$$E=mc^2$$", r"\[E=mc^2\]"),
        (
            "**bold** *it* <script>alert(1)</script>",
            "<strong>bold</strong> <em>it</em> &lt;script&gt;alert(1)&lt;/script&gt;",
        ),
        (r"$\{a\}$", r"\(\{a\}\)"),
        ("[x](javascript:alert(1))", "[x](javascript:alert(1))"),
    ],
)
def test_markdown(markdown, expected):
    assert inline_html(markdown) == expected


def test_blocks():
    assert (
        to_html("one\n\n- two $x$\n- three")
        == "<p>one</p>\n<ul>\n<li>two \\(x\\)</li>\n<li>three</li>\n</ul>"
    )
    assert "<table>" in to_html("| a | b |\n|---|---|\n| 1 | 2 |")
    assert to_html("$$\na < b\n$$") == r"\[a &lt; b\]"


BUILD = """
import sys
from effattn_lab.interview import deck
from effattn_lab.interview.bank import load
from effattn_lab.interview.links import Book
sys.stdout.buffer.write(deck.build(load(), Book(pages="https://example.org/book")))
"""


def test_the_same_questions_give_the_same_bytes(monkeypatch):
    built = []
    for seed in ("1", "2"):
        if built:
            time.sleep(1.1)
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setenv("TZ", "Asia/Tokyo" if seed == "1" else "America/Lima")
        done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        built.append(done.stdout)
    assert built[0] == built[1] == deck.build(BANK, BOOK)


def test_a_new_text_a_new_question_and_a_missing_one_move_no_id(tmp_path):
    before = Deck(deck.build(BANK, BOOK), tmp_path)
    changed = [dataclasses.replace(q, question=f"New: {q.question}", topic_title="Renamed") for q in BANK[1:]]
    after = Deck(deck.build(changed, BOOK), tmp_path)
    assert after.model["id"] == before.model["id"] == str(deck.MODEL_ID)
    cards = [{card["nid"]: (card["id"], card["did"]) for card in built.cards} for built in (before, after)]
    for question in BANK[1:]:
        old, new = before.by_id[question.id], after.by_id[question.id]
        assert (old["id"], old["guid"]) == (new["id"], new["guid"])
        assert cards[0][old["id"]] == cards[1][new["id"]]
        assert old["flds"] != new["flds"]
    # Pinned: a change here would double every card in learners' collections.
    assert deck.guid("full/flash/flops") == "GBJXSgc;@p"
    assert deck.deck_id("full/flash") == 1847076145


def test_topics_of_one_title_get_decks_of_their_own(tmp_path):
    same = [dataclasses.replace(question, topic_title="A::B") for question in BANK]
    names = Deck(deck.build(same, BOOK), tmp_path).decks.values()
    topics = {question.topic for question in BANK}
    assert {f"{deck.NAME}::A:B ({topic})" for topic in topics} <= set(names)


def test_the_stamp_grows_with_the_version():
    versions = ["0.1.0", "0.1.1", "0.2.0", "0.10.0", "1.0.0rc1", "1.0.1", "2.0"]
    stamps = [deck.modified(version) for version in versions]
    assert stamps == sorted(set(stamps))


def test_the_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    deck.add_arguments(parser)
    out = tmp_path / "deck.apkg"
    assert deck.run(parser.parse_args([str(out), "--book-url", "https://example.org/book/"])) == 0
    assert f"{len(BANK)} notes in" in capsys.readouterr().out
    assert out.read_bytes() == deck.build(BANK, BOOK)
    assert deck.run(parser.parse_args([str(out), "--topic", "full/flash", "--level", "mid"])) == 0
    small = Deck(out.read_bytes(), tmp_path)
    wanted = {q.id for q in BANK if q.topic == "full/flash" and q.level == "mid"}
    assert set(small.by_id) == wanted
    assert "/blob/main/chapters/full/flash.md" in small.notes[0]["flds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deck.zip",), "OUT: expected a name that ends in .apkg"),
        (("no-such-folder/deck.apkg",), "no-such-folder/deck.apkg: cannot be written: No such file"),
        (("deck.apkg", "--topic", "x"), "--topic: expected one of"),
        (
            ("deck.apkg", "--book-url", "example.org"),
            "--book-url: expected an address that begins with https://",
        ),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    deck.add_arguments(parser)
    assert deck.run(parser.parse_args(arguments)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_genanki_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "genanki", None)
    parser = argparse.ArgumentParser()
    deck.add_arguments(parser)
    assert deck.run(parser.parse_args([str(tmp_path / "deck.apkg")])) == 2
    assert "pip install 'effattn-lab[deck]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
