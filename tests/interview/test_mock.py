"""The mock interview, held with a clock of its own: what is chosen, how time runs, what the debrief says."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from effattn_lab.interview import FollowUp, Question, load, quiz, terminal
from effattn_lab.interview.debrief import debrief, overall, save
from effattn_lab.interview.links import Book, find_book
from effattn_lab.interview.mock import CASE, Asked, Interview, interview, needs, plan, planned_seconds
from effattn_lab.interview.progress import Journal, Review
from effattn_lab.interview.schedule import standings
from effattn_lab.interview.session import Answered

START = datetime(2026, 11, 28, 10, tzinfo=timezone.utc)


def question(name, level="mid", minutes=2, topic="full/flash", follow_ups=1, kind="question"):
    return Question(
        id=f"{topic}/{name}", topic=topic, topic_title=topic.split("/")[1], level=level, minutes=minutes,
        question=f"What about {name}?", red_flag=f"Nothing about {name}.", strong_answer=f"All about {name}.",
        key_points=(f"{name} costs", f"{name} saves", f"{name} fails"),
        follow_ups=tuple(FollowUp(f"And {name}, part {i}?", f"Part {i} of {name}.") for i in range(follow_ups)),
        chapter=topic, section=f"sec-{topic.split('/')[0]}", lab=None, sources=(), given=(), numbers=(),
        proof=None, file=Path("x.yml"), kind=kind,
    )  # fmt: skip


def flat(text):
    return " ".join(text.split())


LEVELS = ("junior", "mid", "senior", "staff")
POOL = [question(f"{level}{i}", level, topic=f"full/t{i}") for level in LEVELS for i in range(4)]
CASES = [question(f"case{m}", "senior", m, "practice/system_design", 2, CASE) for m in (15, 20, 40)]


class Learner:
    """Types what it is told and takes its time: `seconds` for each answer, none for ticking."""

    def __init__(self, monkeypatch, seconds, points="y", rating="", answers=None, leave=None, interrupt=None):
        self.time = 0.0
        self.prompts = 0
        self.told = (seconds, points, rating, answers or {}, leave, interrupt)
        monkeypatch.setattr("builtins.input", self)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
        self.clock = terminal.Clock(lambda: START + timedelta(seconds=self.time), lambda: self.time)
        self.screen = terminal.Screen(boxes=False, clock=self.clock)

    def __call__(self, prompt=""):
        seconds, points, rating, answers, leave, interrupt = self.told
        if "[y/n]" in prompt:
            self.time += 500  # however long judging takes, it is not the interview's time
            return points
        if prompt.startswith("1 Again"):
            return rating
        if "…" in prompt:
            return ""
        self.prompts += 1
        self.time += seconds
        if self.prompts == leave:
            return "q"
        if self.prompts == interrupt:
            raise KeyboardInterrupt
        return answers.get(self.prompts, "")


def hold(learner, questions=POOL, minutes=20, reviews=None):
    need = needs(questions, {}, START)
    return interview(
        learner.screen, questions, need, minutes, (reviews if reviews is not None else []).append, 1
    )


# ---- choosing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [3, 5, 12, 20, 30, 45, 90])
def test_a_plan_fits_its_time_and_mixes_levels(minutes):
    questions = POOL + CASES
    chosen = plan(questions, needs(questions, {}, START), 60 * minutes, seed=1)
    used = sum(item.seconds for item in chosen)
    rest = [q for q in questions if q.kind != CASE and q not in [item.question for item in chosen]]
    assert used <= 60 * minutes
    assert not rest or 60 * minutes - used < min(planned_seconds(q) for q in rest)  # nothing more would fit
    assert len({item.question.id for item in chosen}) == len(chosen)
    cases = [i for i, item in enumerate(chosen) if item.question.kind == CASE]
    assert len(cases) == (1 if minutes >= 20 else 0)
    short = [LEVELS.index(item.question.level) for item in chosen if item.question.kind != CASE]
    assert short == sorted(short)
    counts = [short.count(level) for level in range(4)]
    assert max(counts) - min(counts) <= 1
    if minutes >= 30:
        assert cases == [1]  # after the warm-up


def test_planned_seconds():
    assert planned_seconds(question("a", minutes=3, follow_ups=2)) == 180 + 120
    assert planned_seconds(CASES[0]) == 15 * 60  # a case's minutes hold the whole conversation


def test_a_case_that_would_crowd_out_all_else_yields_to_a_shorter_one():
    questions = POOL + CASES
    need = needs(questions, {}, START) | {CASES[2].id: 5.0}
    assert CASES[2] not in [item.question for item in plan(questions, need, 45 * 60, seed=1)]
    assert CASES[2] in [item.question for item in plan(questions, need, 60 * 60, seed=1)]
    assert [i.question for i in plan(CASES, need, 18 * 60)] == [CASES[0]]


def test_weak_and_due_questions_are_preferred():
    seen = POOL[:8]
    reviews = [Review.new(q.id, 3 if i else 1, START, [i % 2 == 0] * 3, 60) for i, q in enumerate(seen)]
    now = START + timedelta(days=2)
    need = needs(POOL, standings(reviews), now)
    assert need[seen[1].id] == 2  # due, nothing said last time
    assert 1 < need[seen[2].id] < 1.2  # due, everything said
    new = POOL[8]  # as weak as what was seen of its topic, due or not
    assert need[new.id] == pytest.approx((need[POOL[0].id] - 1 + need[POOL[4].id] - 1) / 2)
    first = plan(POOL, need, 3 * 60 * 2, seed=1)
    assert {item.question.id for item in first} <= {q.id for q in seen}
    unseen = needs(POOL, {}, START)
    assert set(unseen.values()) == {0.5}


def test_each_seed_its_interview():
    need = needs(POOL, {}, START)
    plans = [[item.question.id for item in plan(POOL, need, 1200, seed)] for seed in (1, 1, 2, 3)]
    assert plans[0] == plans[1]
    assert len({tuple(p) for p in plans}) == 3


# ---- holding it ----------------------------------------------------------------------------------------------


def test_the_clock_runs_while_answering_only(monkeypatch, capsys):
    reviews = []
    learner = Learner(monkeypatch, seconds=60)
    state = hold(learner, minutes=12, reviews=reviews)
    out = capsys.readouterr().out
    assert (state.ended, len(state.asked), state.skipped) == ("finished", 5, [])
    assert state.used == 10 * 60  # an answer and a follow-up each, 60 s apiece; judging took 40 minutes
    assert [asked.used for asked in state.asked] == [120] * 5
    assert [one.seconds for one in reviews] == [120] * 5
    assert "[12:00 of 12:00 left · this question 0:00 of 3:00, follow-ups included]" in out
    assert "[11:00 of 12:00 left · this question 1:00 of 3:00]" in out
    assert "[10:00 of 12:00 left · this question 2:00 of 3:00]" in out
    assert "4:00 left: 1 more question." in out  # quicker than planned
    # In an interview nobody shows you the answer before the follow-ups.
    first = state.asked[0].answered.question
    assert out.index(first.follow_ups[0].ask) < out.index(first.strong_answer)


def test_time_is_up(monkeypatch, capsys):
    state = hold(Learner(monkeypatch, seconds=250, points="n"), minutes=12)
    out = capsys.readouterr().out
    assert state.ended == "time"
    assert len(state.asked) == 2
    assert [len(asked.answered.replies) for asked in state.asked] == [1, 0]
    assert "Time is up: no more follow-ups." in out
    assert len(state.skipped) == 2
    assert state.left == -30
    text = flat(overall(state))
    assert (
        "The time was up. You answered 2 of 4 questions and made 0 of 6 points (0 %), in 12:30 of 12:00."
        in text
    )
    assert "2 answers ran over by more than a quarter, 6:30 in all" in text
    assert "No level reached 70 %" in text


def test_q_ends_it_early(monkeypatch, capsys):
    reviews = []
    state = hold(Learner(monkeypatch, seconds=60, leave=3), minutes=12, reviews=reviews)
    assert state.ended == "left"
    assert [one.question for one in reviews] == [asked.answered.question.id for asked in state.asked]
    assert len(reviews) == 1
    assert len(state.skipped) == 3  # the one in which q was pressed is among them, once
    assert state.used == 180


def test_no_case_fits(monkeypatch, capsys):
    hold(Learner(monkeypatch, seconds=60, leave=1), [*POOL, *CASES], minutes=10)
    assert "No system-design case fits into this time." in capsys.readouterr().out


# ---- the debrief ---------------------------------------------------------------------------------------------


def test_the_debrief(monkeypatch, tmp_path):
    learner = Learner(
        monkeypatch, 60, points="n", answers={1: "``` sneaky\n# fence", 4: "my follow-up"}, leave=7
    )
    state = hold(learner, minutes=12)
    assert [len(asked.answered.missed) for asked in state.asked] == [3, 3, 3]
    at = START + timedelta(hours=1)
    text = debrief(state, at, Book(pages="https://example.org/book"))
    assert text.startswith(f"# Mock interview, {at.astimezone():%Y-%m-%d %H:%M}\n\nYou ended it early. ")
    for number, asked in enumerate(state.asked, start=1):
        q = asked.answered.question
        section = text.split(f"## {number}. ")[1].split("\n## ")[0]
        for piece in (q.question, q.red_flag, *q.key_points, q.follow_ups[0].ask, q.follow_ups[0].answer):
            assert piece in section
        assert f"*A strong answer:* {q.strong_answer}" in section
        assert "Planned 3:00, used 2:00 (1:00 under). Follow-ups asked: 1 of 1. Rated Again." in section
        assert f"https://example.org/book/chapters/{q.chapter}.html#{q.section}" in section
        assert "**Missed**" in section
        assert "**Made**" not in section
    assert "````text\n``` sneaky\n# fence\n````" in text
    assert "```text\nmy follow-up\n```" in text
    assert text.count("| Again |") == 3
    assert state.skipped[0].id in text.split("## Not reached, or not judged")[1]
    paths = [save(tmp_path / "debriefs", text, at) for _ in range(3)]
    assert len({*paths}) == 3  # the same second, yet nothing is overwritten
    assert [path.read_text() for path in paths] == [text] * 3


def test_the_overall_paragraph_follows_from_the_numbers(monkeypatch):
    learner = Learner(monkeypatch, 60)
    pool = [question("a", "junior", topic="full/a"), question("b", "senior", topic="full/b", minutes=8)]
    marks = iter(["yyy", "nny"])
    learner.told = (60, None, "", {}, None, None)
    original = Learner.__call__
    monkeypatch.setattr(
        Learner,
        "__call__",
        lambda self, prompt="": next(marks) if "[y/n]" in prompt else original(self, prompt),
    )
    state = hold(learner, pool, minutes=15)
    assert overall(state) == (
        "You answered 2 of 2 questions and made 4 of 6 points (67 %), in 4:00 of 15:00. "
        "By level: junior 3 of 3, senior 1 of 3. At least 70 % of the points at every level up to junior. "
        "Weakest topic: b, 1 of 3. "
        "1 answer took less than half of the planned time and missed points: there was time to name the cost and "
        "the case where it fails."
    )
    text = debrief(state, START, Book())
    assert "Read again: b, `chapters/full/b.md#sec-full`" in text  # no address known: no broken link
    assert text.count("full/a.md") == 0  # everything said, nothing to read
    assert "All about a." not in text
    assert "All about b." in text


@pytest.mark.parametrize(
    ("points", "says"),
    [
        (
            {"junior": "yyy", "mid": "yyy", "senior": "yyy"},
            "At least 70 % of the points at every level up to senior.",
        ),
        (
            {"junior": "yyy", "mid": "yyn", "senior": "yyy"},
            "At least 70 % of the points at every level up to junior.",
        ),
        (
            {"junior": "yyn", "senior": "yyy"},
            "Less than 70 % of the points at junior level already: begin there.",
        ),
        ({"mid": "yyn"}, "No level reached 70 % of its points."),
    ],
)
def test_a_level_counts_with_those_below_it(points, says):
    asked = []
    for level, said in points.items():
        q = question(level, level)
        review = Review.new(q.id, 3, START, [letter == "y" for letter in said], 60)
        asked.append(Asked(Answered(q, "", review, ("",)), 180, 180))
    assert says in overall(Interview(15, asked=asked))


def test_book_addresses():
    q = load()[0]
    assert find_book("https://example.org/b/index.html").url(q) == (
        f"https://example.org/b/chapters/{q.chapter}.html#{q.section}"
    )
    assert re.fullmatch(rf"https://.*/blob/main/chapters/{q.chapter}\.md", find_book().url(q))
    assert Book().url(q) is None
    for wrong in ("example.org", "javascript:alert(1)", "https://"):
        with pytest.raises(ValueError, match="book-url: expected an address"):
            find_book(wrong)


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_a_debrief_and_keeps_the_reviews(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFATTN_DATA", str(tmp_path))
    learner = Learner(monkeypatch, 60)
    parser = argparse.ArgumentParser()
    quiz.add_arguments(parser)
    assert quiz.run(parser.parse_args(["--mock", "10", "--seed", "2", "--plain"]), learner.clock) == 0
    out = capsys.readouterr().out
    path = Path(re.search(r"Debrief:\s+(\S+)", out)[1])
    assert path.parent == tmp_path / "debriefs"
    text = path.read_text()
    reviews = Journal().read()
    assert [one.question for one in reviews] == re.findall(r"\| \d+ \| `([^`]+)`", text)
    assert len(reviews) >= 2
    # Interrupted: the debrief of what there was is still written, and the status says so.
    learner = Learner(monkeypatch, 60, interrupt=8)
    assert quiz.run(parser.parse_args(["--mock", "10", "--plain"]), learner.clock) == 130
    assert "It was interrupted." in flat(capsys.readouterr().out)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="not run: needs SIGKILL")
def test_a_kill_in_the_middle_keeps_the_answered(tmp_path):
    env = {**os.environ, "EFFATTN_DATA": str(tmp_path), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-m", "effattn_lab.interview.quiz", "--mock", "20", "--seed", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
    )  # fmt: skip
    # More Enters than the first question needs would answer the next one: feed it as a person does, on request.
    seen = b""
    while not re.search(rb"\n2/\d", seen):
        chunk = os.read(process.stdout.fileno(), 4096)
        assert chunk, seen
        seen += chunk
        for prompt, reply in ((b"or Enter: ", b"\n"), (b"[y/n] ", b"y\n"), (b"Good] ", b"\n")):
            if seen.endswith(prompt):
                process.stdin.write(reply)
                process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    first = Journal(tmp_path / "practice.jsonl").read()
    assert len(first) == 1
    assert all(first[0].points)
