"""``effattn quiz`` as a learner uses it: piped, in a terminal, interrupted, from one day to the next."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import pytest

from effattn_lab.interview import load, quiz, schedule, terminal
from effattn_lab.interview import select as choose
from effattn_lab.interview.plain import plain
from effattn_lab.interview.progress import Journal, Review

QUIZ = [sys.executable, "-m", "effattn_lab.interview.quiz"]
BANK = load()
START = datetime(2026, 11, 28, 10, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A learner's data folder of its own, which the commands inherit."""
    monkeypatch.setenv("EFFATTN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def piped(keys, *options):
    env = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [*QUIZ, *options], input=keys, capture_output=True, text=True, encoding="utf-8", timeout=60, env=env
    )


def parse(*options):
    parser = argparse.ArgumentParser()
    quiz.add_arguments(parser)
    return parser.parse_args(options)


def run(monkeypatch, answer, *options, now=START):
    """The command in this process; `answer` gets each prompt. Returns the status."""
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    clock = terminal.Clock(lambda: now, time.monotonic)
    return quiz.run(parse("--plain", *options), clock)


def flat(text):
    return " ".join(text.split())


def keys(question, points, rating="", answer=""):
    """What a learner types at one question: an answer, the follow-ups aloud, the rubric, the rating."""
    return f"{answer}\n" + "\n" * len(question.follow_ups) + f"{points}\n{rating}\n"


def drawn(count, seed, topic=None, level=None):
    return schedule.queue(choose(BANK, topic, level), {}, START, seed).new[:count]


def test_a_whole_round(data):
    options = ("--topic", "full/flash", "--level", "senior", "--seed", "3", "--count", "2")
    first, second = drawn(2, 3, "full/flash", "senior")
    # All points of the first question, typed one by one; none but the first of the second, after a slip.
    one_by_one = "\n".join("y" * len(first.key_points))
    answer = "It is the bytes.\nNot the FLOPs.\n"
    typed = keys(first, one_by_one, "4", answer) + keys(
        second, "maybe\nYES\n" + "n" * (len(second.key_points) - 1)
    )
    done = piped(typed, *options)
    out = flat(done.stdout)
    assert done.returncode == 0
    assert done.stderr == ""
    for question in (first, second):
        texts = [question.question, question.red_flag, question.strong_answer, *question.key_points]
        texts += [text for follow_up in question.follow_ups for text in (follow_up.ask, follow_up.answer)]
        places = [out.index(flat(plain(text))) for text in texts]
        assert places[:2] == sorted(places[:2])
        for follow_up in question.follow_ups:  # asked before its answer shows, with a prompt between
            between = out[out.index(flat(plain(follow_up.ask))) : out.index(flat(plain(follow_up.answer)))]
            assert "Your answer, or Enter:" in between
    assert "Your answer It is the bytes. Not the FLOPs." in out
    said, possible = len(first.key_points) + 1, len(first.key_points) + len(second.key_points)
    assert f"2 of 2 questions, {said} of {possible} points ({100 * said / possible:.0f} %)" in out
    assert "y, n, or q to leave" in out
    again = out.split("Read again:")[1]
    assert f"chapters/{second.chapter}.md#{second.section}" in again
    assert flat(plain(second.key_points[-1])) in again
    assert flat(plain(first.key_points[0])) not in again
    assert "\x1b" not in done.stdout
    one, two = Journal().read()
    assert (one.question, one.rating, one.points) == (first.id, 4, (True,) * len(first.key_points))
    assert (two.question, two.rating, two.points[:2]) == (second.id, 1, (True, False))
    assert re.search(rf"{len(first.key_points)}/\d Easy due \d{{4}}-\d\d-\d\d \(in 8 days\) {first.id}", out)
    assert "(tomorrow)" in out  # the other one


def test_same_seed_same_questions():
    a, b, c = (piped("", "--seed", seed, "--count", "1").stdout for seed in ("1", "1", "2"))
    assert a == b != c


@pytest.mark.parametrize(
    "typed",
    ["", "\n", "\n\n\n\ny\n", "q\n", "\nq\n"],
    ids=["eof", "eof-follow-up", "eof-later", "q", "q-later"],
)
def test_leaving_early_is_polite(typed, data):
    done = piped(typed, "--count", "1", "--plain")
    assert (done.returncode, done.stderr) == (0, "")
    assert "No question rated" in done.stdout
    assert Journal().read() == []


def test_leaving_after_one_question_counts_it():
    first = drawn(1, 0, "foundations")[0]
    typed = keys(first, "y" * len(first.key_points))
    done = piped(typed, "--topic", "foundations", "--count", "3", "--seed", "0")
    assert done.returncode == 0
    assert re.search(r"1 of 3 questions, (\d) of \1 points \(100 %\)", done.stdout)
    assert [one.question for one in Journal().read()] == [first.id]


def test_an_answer_may_begin_any_way_and_q_is_a_letter_inside_it():
    first = drawn(1, 0)[0]
    done = piped(
        keys(first, "n" * len(first.key_points), "1", "Well,\nq\nis the query.\n"),
        "--count",
        "1",
        "--seed",
        "0",
    )
    assert "Your answer\nWell,\nq\nis the query.\n" in done.stdout
    assert len(Journal().read()) == 1


def test_the_rating_is_proposed_and_may_be_overruled(monkeypatch, capsys):
    first, second, third = drawn(3, 5)
    replies = iter(
        (
            keys(first, "y" * len(first.key_points))
            + keys(second, "n" + "y" * (len(second.key_points) - 1), "what\n4")
            + keys(third, "e\n" + "n" * len(third.key_points), "good")
        ).split("\n")
    )
    assert run(monkeypatch, lambda prompt="": next(replies), "--seed", "5", "--count", "3") == 0
    out = flat(capsys.readouterr().out)
    for word in ("so Good is proposed", "so Hard is proposed", "so Again is proposed", "1, 2, 3, 4, Enter"):
        assert word in out
    assert [one.rating for one in Journal().read()] == [3, 4, 3]
    if third.numbers:
        assert flat(plain(third.numbers[0].claim)) in out  # e shows them
    assert "where the numbers come from" in out


def test_due_questions_come_first_and_alone_with_due(monkeypatch, capsys):
    a, b, c = BANK[:3]
    book = Journal()
    for question, rating, day in ((a, 4, 0), (b, 3, 0), (c, 1, 0), (b, 3, 2)):
        book.append(Review.new(question.id, rating, START + timedelta(days=day), [True], 60))
    asked = []

    def leave_at_second(prompt=""):
        asked.append(prompt)
        raise EOFError

    later = START + timedelta(days=6)
    assert run(monkeypatch, leave_at_second, "--count", "3", now=later) == 0
    out = flat(capsys.readouterr().out)
    assert "3 questions" in out
    assert "1 due, 2 new" in out
    assert flat(plain(c.question)) in out  # Again, six days ago; b is not due before day 13
    assert run(monkeypatch, leave_at_second, "--due", now=later) == 0
    assert "1 question, about" in capsys.readouterr().out
    assert run(monkeypatch, leave_at_second, "--due", "--list", now=later) == 0
    assert capsys.readouterr().out.split("\t")[0] == c.id
    assert run(monkeypatch, leave_at_second, "--due", now=START + timedelta(hours=1)) == 0
    assert "Nothing is due. Next: 2026-11-29 (tomorrow)." in flat(capsys.readouterr().out)
    assert run(monkeypatch, leave_at_second, "--due", "--topic", "full", now=later) == 0
    assert "no question of these was practised yet" in flat(capsys.readouterr().out)
    assert run(monkeypatch, leave_at_second, "--count", "99", "--topic", a.topic, now=later) == 0
    assert "ahead of time" in flat(capsys.readouterr().out)


def test_kind():
    for kind in ("question", "case"):
        done = piped("", "--list", "--kind", kind)
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [
            q.id for q in BANK if q.kind == kind
        ]


def test_list():
    done = piped("", "--list", "--topic", "full/flash")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert [line.split("\t")[0] for line in lines] == [q.id for q in choose(BANK, "full/flash")]


def test_stats(monkeypatch, capsys, data):
    for question, points in (
        (BANK[0].id, [True, True]),
        (BANK[1].id, [True, False]),
        ("gone/for/good", [True]),
    ):
        Journal().append(Review.new(question, 3, START, points, 1800))
    assert run(monkeypatch, None, "--stats", now=START + timedelta(days=30)) == 0
    out = capsys.readouterr().out
    assert "2 reviews, 1.0 hours, kept in" in flat(out)
    assert "1 review of questions that are not in the bank" in flat(out)
    row = next(line.split("\t") for line in out.splitlines() if line.startswith(BANK[0].topic))
    total = len(choose(BANK, BANK[0].topic))
    standing = schedule.standings(Journal().read())[BANK[0].id]
    recall = f"{100 * standing.recall(START + timedelta(days=30)):.0f} %"
    assert row == [BANK[0].topic, f"2 of {total}", "2", recall, "75 %", BANK[0].topic_title]
    assert "2 questions due now" in flat(out)


def test_export_and_import(tmp_path, data):
    lost = Review.new("gone/for/good", 3, START, [True], 5)
    Journal().append(lost)
    done = piped("", "--export", str(tmp_path / "e.json"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'e.json'}: 1 review written\n")
    assert json.loads((tmp_path / "e.json").read_text())["reviews"] == [lost.to_json()]
    other = str(tmp_path / "elsewhere" / "p.jsonl")
    for count, known in ((1, 0), (0, 1)):
        done = piped("", "--import", str(tmp_path / "e.json"), "--state", other)
        assert done.returncode == 0
        assert f"{count} new review" in done.stdout
        assert f"{known} known already" in done.stdout
    assert Journal(other).read() == [lost]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--topic", "linear/mamba"), "--topic: expected one of foundations, full"),
        (("--topic", "full/flsh"), "got 'full/flsh'; did you mean full/flash?"),
        (("--topic", "flash"), "got 'flash'; did you mean full/flash?"),
        (("--topic", "zeros"), "got 'zeros'; did you mean linear/zeros?"),
        (("--level", "guru"), "--level"),
        (("--kind", "riddle"), "--kind"),
        (("--kind", "case", "--topic", "full"), "--kind: no case in this choice of topic and level"),
        (("--count", "0"), "--count: expected at least 1, got 0"),
        (("--count", "many"), "--count"),
        (("--mock", "2"), "--mock: expected 5 to 240 minutes, got 2"),
        (("--mock", "nan"), "--mock: expected 5 to 240 minutes, got nan"),
        (("--mock", "45", "--count", "3"), "--count: expected none beside --mock"),
        (("--import", "no-such-file.json"), "no-such-file.json: cannot be read: No such file"),
        (("--export", "no-such-folder/x.json"), "no-such-folder/x.json: cannot be written: No such file"),
    ],
)
def test_wrong_option(options, message):
    done = piped("", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_session_that_could_not_be_saved_does_not_begin(tmp_path):
    (tmp_path / "file").write_text("")
    for options in ((), ("--mock", "45")):
        done = piped("", "--state", str(tmp_path / "file" / "p.jsonl"), *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"p.jsonl: progress cannot be kept here: {tmp_path / 'file'} is no folder" in done.stderr


def test_progress_of_a_newer_version_is_refused(tmp_path):
    state = tmp_path / "p.jsonl"
    state.write_text('{"format": "effattn-practice-journal", "version": 9}\n')
    for options in ((), ("--stats",), ("--mock", "45"), ("--export", str(tmp_path / "e.json"))):
        done = piped("\n" * 20, "--state", str(state), *options)
        assert done.returncode == 2
        assert "a newer one wrote it. Update effattn" in done.stderr
    assert state.read_text() == '{"format": "effattn-practice-journal", "version": 9}\n'
    assert not (tmp_path / "e.json").exists()


def test_all_points_made(monkeypatch, capsys):
    answer = lambda prompt="": "y" if "[y/n]" in prompt else ""  # noqa: E731
    assert run(monkeypatch, answer, "--count", "1", "--seed", "5") == 0
    assert "Every point made" in capsys.readouterr().out


def test_ctrl_c_anywhere_keeps_what_was_rated(monkeypatch, capsys):
    first = drawn(1, 5)[0]
    replies = iter(keys(first, "y" * len(first.key_points)).split("\n")[:-1])

    def answer(prompt=""):
        try:
            return next(replies)
        except StopIteration:
            raise KeyboardInterrupt from None

    assert run(monkeypatch, answer, "--count", "2", "--seed", "5") == 130
    assert "1 of 2 questions" in capsys.readouterr().out
    assert len(Journal().read()) == 1

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Screen, "show", interrupted)
    assert run(monkeypatch, answer, "--count", "2", "--seed", "5") == 130


def test_starting_is_cheap():
    slow = "{'rich', 'fsrs', 'numpy', 'torch', 'genanki'}"
    code = f"import sys, effattn_lab.interview.quiz; print(*{slow} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\n"


@pytest.mark.skipif(os.name != "posix", reason="not run: pseudo-terminals are a POSIX facility")
@pytest.mark.parametrize("interrupt", [False, True], ids=["finished", "ctrl-c"])
def test_in_a_terminal(interrupt):
    import pty

    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        [*QUIZ, "--count", "1", "--seed", "1"],
        stdin=child, stdout=child, stderr=child, env=env, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(child)
    seen = _until(parent, "or Enter:")
    os.write(parent, b"said in one line\r")
    seen += _until(parent, "…")
    os.write(parent, b"\r")
    for _ in drawn(1, 1)[0].follow_ups:
        seen += _until(parent, "or Enter:")
        os.write(parent, b"\r")
    seen += _until(parent, "[y/n] ")
    if interrupt:
        for _ in range(
            5
        ):  # readline may miss it in the instant before it begins to read; then one presses again
            time.sleep(0.3)
            os.write(parent, b"\x03")
            if select.select([parent], [], [], 5)[0]:
                break
        seen += _until(parent, "No question rated")
        assert process.wait(20) == 130
        assert Journal().read() == []
    else:
        os.write(parent, b"y" * len(drawn(1, 1)[0].key_points) + b"\r")
        seen += _until(parent, "[Enter: Good]")
        os.write(parent, b"\r")
        seen += _until(parent, "next due")
        assert process.wait(20) == 0
        assert [one.rating for one in Journal().read()] == [3]
    assert "Strong answer" in seen
    assert re.search(r"said in one line +│", seen)  # the answer, shown beside ours
    assert "╭" in seen  # boxes, since this is a terminal
    assert "Traceback" not in seen
    os.close(parent)


def _take_terminal():
    import fcntl
    import signal
    import termios

    # A test run started in the background ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _until(handle, *marks):
    seen, end = b"", time.monotonic() + 30
    while not any(mark in _text(seen) for mark in marks):
        assert time.monotonic() < end, f"waited for {marks}, saw {seen[-500:]!r}"
        if select.select([handle], [], [], 0.2)[0]:
            try:
                seen += os.read(handle, 4096)
            except OSError:  # the other side is closed
                break
    return _text(seen)


def _text(seen):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode(errors="replace"))
