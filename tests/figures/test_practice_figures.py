"""The pictures of the practice page show the scheduler that the terminal uses, and their text says what they show."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

from effattn_lab.figures import practice
from effattn_lab.interview import schedule
from effattn_lab.interview.progress import Review

PAGE = Path(__file__).parents[2] / "chapters" / "practice" / "practise.md"


@pytest.mark.parametrize("ratings", [[3] * 5, [4, 1, 2, 3], [1, 1, 4]])
def test_history_is_the_terminals(ratings):
    cards = practice.history(ratings)
    reviews = [Review.new("q", rating, card.last_review, [], 1) for rating, card in zip(ratings, cards)]
    standing = schedule.standings(reviews)["q"]
    assert standing.stability == pytest.approx(cards[-1].stability)
    assert standing.difficulty == pytest.approx(cards[-1].difficulty)
    assert standing.due == cards[-1].due
    assert practice.intervals(ratings) == [(card.due - card.last_review).days for card in cards]


def test_the_page_says_what_the_curves_show():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    days = [0, *itertools.accumulate(practice.intervals([3] * 4))]
    assert f"days {', '.join(map(str, days[:-1]))} and {days[-1]} lift the curve" in text
    assert practice.intervals([3] * 5)[-1] > 365, "the last one holds for more than a year"
    easy, good, hard, again = (practice.history([rating])[0].stability for rating in (4, 3, 2, 1))
    assert (round(easy), round(good), round(hard)) == (8, 2, 1)
    assert again < 0.5, "Again within hours"
    assert easy / again > 30, "more than one and a half orders of magnitude"
    model, card = practice.scheduler(), practice.history([4])[0]
    assert model.get_card_retrievability(card, card.last_review + timedelta(8)) == pytest.approx(
        0.9, abs=0.01
    )


def test_figure_has_both_panels_and_units():
    left, right = practice.forgetting_curves().axes
    assert len(left.lines) == 5  # four curves and the wanted recall
    assert "days" in left.get_xlabel()
    assert "%" in left.get_ylabel()
    assert "days" in right.get_xlabel()
    labels = [text.get_text() for text in right.texts]
    assert labels == ["asked on days 0, 2, 13, 59, 222"]
