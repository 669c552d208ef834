"""``effattn deck OUT.apkg``: the question bank as an Anki deck, a subdeck a topic, a note a question.

What Anki recognises a note, a deck and the kind of note by depends on ids alone, so a corrected text replaces the
old one at the next import and the learner's schedule stays. Nothing in the file depends on when or where it was made:
equal questions give equal bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import re
import sqlite3
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effattn_lab import __version__
from effattn_lab._atomic import write_atomic
from effattn_lab.interview.bank import LEVELS, BankError, Question, load, select, topics
from effattn_lab.interview.links import Book, find_book
from effattn_lab.interview.plain import plain

NAME = "Efficient Attention Lab"
#: A changed list of fields or templates needs a new number: Anki merges note types by it.
MODEL_ID = 1_764_288_001
_MODEL_VERSION = "interview question"
_EPOCH = 1_735_689_600  # 2025-01-01 UTC; all times in the file are counted from here
_SPREAD_MS = 10**10

_FRONT = """<div class="about">{{Topic}} · {{Level}}</div>
<div class="question">{{Question}}</div>"""
_BACK = """{{FrontSide}}
<hr id="answer">
<div class="red"><div class="label">Red flag</div>{{Red flag}}</div>
<div class="strong"><div class="label">Strong answer</div>{{Strong answer}}</div>
<div class="label">What the listener ticks off</div>{{Points}}
<div class="label">Follow-ups</div>{{Follow-ups}}
{{#Link}}<div class="about">Read again: {{Link}}</div>{{/Link}}"""
_CSS = """.card { font-family: sans-serif; font-size: 18px; line-height: 1.45; text-align: left; max-width: 42em;
  margin: 0 auto; padding: 0.5em; }
p, ul { margin: 0.3em 0; }
details { margin: 0.2em 0; }
.about { font-size: 0.8em; margin-top: 0.8em; }
.nightMode a { color: #9ec1ff; }
.question { font-weight: 600; }
.label { font-size: 0.8em; font-weight: 700; margin-top: 0.8em; }
.red, .strong { border-left: 4px solid; padding-left: 0.7em; margin: 0.8em 0; }
.red { border-color: #b3261e; }
.strong { border-color: #2e7d32; }
.nightMode .red { border-color: #f2b8b5; }
.nightMode .strong { border-color: #a5d6a7; }
code { overflow-wrap: anywhere; }
table { border-collapse: collapse; }
td, th { border: 1px solid; padding: 0.2em 0.5em; }
summary { cursor: pointer; }"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    parser.add_argument("out", metavar="OUT.apkg", help="the file to write; Anki: File, Import")
    parser.add_argument(
        "--topic", metavar="TOPIC", help="a mechanism (full/flash) or a part (full); default: all"
    )
    parser.add_argument("--level", choices=LEVELS, help="only questions of this level")
    parser.add_argument(
        "--book-url",
        metavar="URL",
        help="where the built book is, for the links back; default: the checkout's repository, in a wheel no links",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 0, or 2 with a sentence on the error stream."""
    out = Path(args.out)
    if out.suffix != ".apkg":
        return _fail(f"OUT: expected a name that ends in .apkg, which Anki opens, got {args.out!r}")
    try:
        questions = select(load(), args.topic, args.level)
        if not questions:
            raise ValueError(f"level: no question of level {args.level} in {args.topic}")
        book = find_book(args.book_url)
    except BankError as error:
        return _fail(str(error))
    except ValueError as error:
        return _fail(f"--{error}")
    try:
        data = build(questions, book)
        write_atomic(out, data)
    except ImportError as error:
        return _fail(f"the package {error.name} is missing: pip install 'effattn-lab[deck]'")
    except OSError as error:
        return _fail(f"{out}: cannot be written: {error.strerror or error}")
    print(
        f"{out}: {len(questions)} notes in {len(topics(questions))} subdecks of “{NAME}”, {len(data) // 1000} kB"
    )
    return 0


def build(questions: Sequence[Question], book: Book | None = None) -> bytes:
    """The ``.apkg`` file of `questions`, with links into `book`.

    Raises:
        ValueError: no questions, or two whose ids collide.
        ImportError: genanki or the Markdown parser is not installed.
    """
    import genanki

    if not questions:
        raise ValueError("questions: expected at least one, got none")
    decks = _decks(questions, book or Book())
    # genanki's own write_to_file puts the time of day into the archive and numbers the rows one after another.
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "collection.anki2"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            genanki.Package(decks).write_to_db(connection.cursor(), modified(), _row_ids(decks))
            connection.commit()
        return _zipped({"collection.anki2": database.read_bytes(), "media": b"{}"})


def guid(question_id: str) -> str:
    """What Anki knows the note of a question by."""
    import genanki

    return str(genanki.guid_for(NAME, question_id))


def deck_id(topic: str) -> int:
    """What Anki knows the subdeck of a topic by; between 2³⁰ and 2³¹, as genanki's manual asks."""
    return (1 << 30) + _hash(f"deck:{topic}") % (1 << 30)


def modified(version: str = __version__) -> int:
    """Time stamp of the notes, in seconds: it grows with the version and with nothing else.

    Anki replaces a note that it has only by one with a later stamp, so the notes of a newer release get in, and the
    same release always gives the same file.
    """
    release = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    major, minor, patch = (int(part or 0) for part in release.groups()) if release else (0, 0, 0)
    return _EPOCH + 1_000_000 * major + 1_000 * minor + patch


def _decks(questions: Sequence[Question], book: Book) -> list[Any]:
    import genanki

    from effattn_lab.interview.cards import fields

    names = list(fields(questions[0], book))
    model = genanki.Model(
        MODEL_ID,
        f"{NAME}: {_MODEL_VERSION}",
        fields=[{"name": name} for name in names],
        templates=[{"name": "Question", "qfmt": _FRONT, "afmt": _BACK}],
        css=_CSS,
    )
    decks = {"": genanki.Deck(deck_id(""), NAME)}
    titles = topics(questions)
    for topic, title in titles.items():
        unique = title if list(titles.values()).count(title) == 1 else f"{title} ({topic})"
        decks[topic] = genanki.Deck(deck_id(topic), f"{NAME}::{unique.replace('::', ':')}")
    for position, question in enumerate(questions):
        note = genanki.Note(
            model,
            list(fields(question, book).values()),
            sort_field=plain(question.question),
            guid=guid(question.id),
            tags=[
                f"effattn::level::{question.level}",
                f"effattn::topic::{question.topic.replace('/', '::')}",
            ],
            due=position,  # new cards come in the bank's order
        )
        decks[question.topic].add_note(note)
    return list(decks.values())


def _row_ids(decks: Sequence[Any]) -> Iterator[int]:
    """Ids of the rows in the order in which genanki asks: a note, its card, the next note.

    They follow from the note's guid, so a question that is added or taken out moves no other's.
    """
    found: set[int] = set()
    for deck in decks:
        for note in deck.notes:
            for kind in ("note", "card"):
                row = 1000 * _EPOCH + _hash(f"{kind}:{note.guid}") % _SPREAD_MS
                if row in found:
                    raise ValueError(f"questions: two rows have the id {row}; rename one of their ids")
                found.add(row)
                yield row


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # its time is 1980, whatever the clock says
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # the same bytes on every system
            archive.writestr(entry, data)
    return buffer.getvalue()


def _fail(message: str) -> int:
    print(f"effattn deck: {message}", file=sys.stderr)
    return 2
