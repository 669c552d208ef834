"""The three CSV files: columns, arithmetic, what a learning platform reads, and cells that would be formulas."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

from effattn_lab.grading.gradebook import canvas_csv, cell, gradebook_csv, moodle_csv
from effattn_lab.grading.text import number

sys.path.insert(0, str(Path(__file__).parent))
from results import ASSIGNMENT, NASTY, nasty, student

RESULTS = [
    student("zoe_103", "Zoë", merge="failed", ids={"moodle": "103"}, late_minutes=90, late_percent=10),
    student("ann_11", "ann", ids={"canvas": "11"}, problems=("a; b", "c")),
    student("bob", "Bob, \"B\"\nLee"),
]  # fmt: skip


def rows(text):
    assert "\r" not in text
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_gradebook():
    head, *body = rows(gradebook_csv(ASSIGNMENT, RESULTS))
    assert head == [
        "student", "name", "full/flash/merge", "full/flash/tile_step", "raw", "late_minutes", "late_percent",
        "penalty", "total", "possible", "problems",
    ]  # fmt: skip
    assert [row[0] for row in body] == ["ann_11", "bob", "zoe_103"]
    assert body[0][1:] == ["ann", "2", "1.5", "3.5", "0", "0", "0", "3.5", "3.5", "a; b; c"]
    assert body[1][1] == 'Bob, "B"⟨U+000A⟩Lee'
    assert body[2][1:] == ["Zoë", "0", "1.5", "1.5", "90", "10", "0.15", "1.35", "3.5", ""]


def test_an_exercise_without_a_result():
    result = student("ann")
    result = type(result)("ann", "Ann", "", result.exercises[:1])
    assert rows(gradebook_csv(ASSIGNMENT, [result]))[1][2:5] == ["2", "0", "2"]


def test_canvas():
    head, possible, *body = rows(canvas_csv(ASSIGNMENT, RESULTS))
    assert head == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Week 1"]
    assert possible == ["    Points Possible", "", "", "", "", "3.5"]
    assert body == [
        ["ann", "11", "", "", "", "3.5"],
        ['Bob, "B"⟨U+000A⟩Lee', "", "", "bob", "", "3.5"],
        ["Zoë", "", "", "zoe_103", "", "1.35"],
    ]


def test_canvas_finds_the_comma():
    """Canvas takes ; for the separator if it splits the first three lines into equally many, and more, fields."""
    lines = canvas_csv(ASSIGNMENT, [student("a", "a;b;c;d;e;f;g;h")]).splitlines()[:3]
    assert len({line.count(";") for line in lines}) > 1


def test_moodle():
    head, *body = rows(moodle_csv(ASSIGNMENT, RESULTS))
    assert head[:2] == ["Identifier", "Full name"]
    assert {"Grade", "Maximum grade", "Last modified (grade)", "Feedback comments"} <= set(head)
    (row,) = body
    values = dict(zip(head, row))
    assert values["Identifier"] == "Participant 103"
    assert (values["Grade"], values["Maximum grade"]) == ("1.35", "3.5")
    assert values["Feedback comments"] == (
        "full/flash/merge: 0 of 2 (failed)<br>full/flash/tile_step: 1.5 of 1.5 (passed)<br>"
        "90 minutes late: 0.15 points off (10 %)"
    )


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =cmd|' /C calc'!A0", "＝1", "\n=1"]
)
def test_formulas(name):
    assert cell(name)[0] in "'⟨"
    for text in (
        gradebook_csv(ASSIGNMENT, [student("a", name, problems=(name,))]),
        canvas_csv(ASSIGNMENT, [student("a", name)]),
        moodle_csv(ASSIGNMENT, [student("a", name, ids={"moodle": "1"})]),
    ):
        for row in rows(text):
            for value in row:
                assert value == "-" or not value.lstrip().startswith(
                    ("=", "+", "-", "@", "\t", "\r", "＝")
                ), value


def test_nasty_names():
    for text in (gradebook_csv(ASSIGNMENT, [nasty()]), canvas_csv(ASSIGNMENT, [nasty()])):
        assert not set(text) & set("\u202e\x1b\x00")
        assert len(rows(text)) in (2, 3)
    comment = student("a", NASTY, ids={"moodle": "1"})
    assert "\u202e" not in moodle_csv(ASSIGNMENT, [comment])


def test_numbers():
    assert [number(x) for x in (0, 1, 1.5, 1 / 3, 1234567.25, 1e-9, 100)] == [
        "0", "1", "1.5", "0.3333", "1234567.25", "0", "100",
    ]  # fmt: skip
