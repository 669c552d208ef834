"""``effattn quiz`` as a learner uses it: piped, in a terminal, interrupted."""

from __future__ import annotations

import argparse
import os
import re
import select
import subprocess
import sys
import time

import pytest

from effattn_lab.interview import load, quiz
from effattn_lab.interview import select as choose
from effattn_lab.interview.plain import plain

QUIZ = [sys.executable, "-m", "effattn_lab.interview.quiz"]
BANK = load()


def piped(keys, *options):
    env = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [*QUIZ, *options], input=keys, capture_output=True, text=True, encoding="utf-8", timeout=60, env=env
    )


def flat(text):
    return " ".join(text.split())


def test_a_whole_round():
    options = ("--topic", "full/flash", "--level", "senior", "--seed", "3", "--count", "2")
    namespace = argparse.ArgumentParser()
    quiz.add_arguments(namespace)
    args = namespace.parse_args(options)
    pool = choose(BANK, args.topic, args.level)
    first, second = quiz.random.Random(3).sample(pool, 2)
    # All points of the first question, none but the first of the second; one unclear answer is asked again.
    keys = "\n" + "y\n" * len(first.key_points) + "\n" + "maybe\nYES\n" + "n\n" * (len(second.key_points) - 1)
    done = piped(keys, *options)
    out = flat(done.stdout)
    assert done.returncode == 0
    assert done.stderr == ""
    for question in (first, second):
        for text in (question.question, question.red_flag, question.strong_answer, *question.key_points):
            assert flat(plain(text)) in out
        assert flat(plain(question.follow_ups[0].answer)) in out
    said, possible = len(first.key_points) + 1, len(first.key_points) + len(second.key_points)
    assert f"2 of 2 questions, {said} of {possible} points ({100 * said / possible:.0f} %)" in out
    assert "y, n, or q to leave" in out
    again = out.split("Read again:")[1]
    assert f"chapters/{second.chapter}.md#{second.section}" in again
    assert flat(plain(second.key_points[-1])) in again
    assert flat(plain(first.key_points[0])) not in again
    assert "\x1b" not in done.stdout


def test_same_seed_same_questions():
    a, b, c = (piped("", "--seed", seed, "--count", "1").stdout for seed in ("1", "1", "2"))
    assert a == b != c


@pytest.mark.parametrize(
    "keys", ["", "\n", "\ny\n", "q\n", "\nq\n"], ids=["eof", "eof-rating", "eof-later", "q", "q-rating"]
)
def test_leaving_early_is_polite(keys):
    done = piped(keys, "--count", "1", "--plain")
    assert (done.returncode, done.stderr) == (0, "")
    assert "No question rated" in done.stdout


def test_leaving_after_one_question_counts_it():
    done = piped("\n" + "y\n" * 5, "--topic", "foundations", "--count", "3", "--seed", "0")
    assert done.returncode == 0
    assert re.search(r"1 of 3 questions, (\d) of \1 points \(100 %\)", done.stdout)


def test_list():
    done = piped("", "--list", "--topic", "full/flash")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert [line.split("\t")[0] for line in lines] == [q.id for q in choose(BANK, "full/flash")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--topic", "linear/mamba"), "--topic: expected one of foundations, full, foundations/attention"),
        (("--level", "guru"), "--level"),
        (("--count", "0"), "--count: expected at least 1, got 0"),
        (("--count", "many"), "--count"),
    ],
)
def test_wrong_option(options, message):
    done = piped("", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_all_points_made(monkeypatch, capsys):
    monkeypatch.setattr(
        "builtins.input", lambda prompt="": "y" if "[y/n]" in flat(capsys.readouterr().out) else ""
    )
    parser = argparse.ArgumentParser()
    quiz.add_arguments(parser)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert quiz.run(parser.parse_args(["--count", "1", "--seed", "5"])) == 0
    assert "Every point made" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="not run: pseudo-terminals are a POSIX facility")
@pytest.mark.parametrize("interrupt", [False, True], ids=["finished", "ctrl-c"])
def test_in_a_terminal(interrupt):
    import pty

    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "40"}
    process = subprocess.Popen(
        [*QUIZ, "--count", "1", "--seed", "1"],
        stdin=child, stdout=child, stderr=child, env=env, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(child)
    seen = _until(parent, "shows the answer")
    os.write(parent, b"\n")
    seen += _until(parent, "[y/n]")
    if interrupt:
        os.write(parent, b"\x03")
        seen += _until(parent, "No question rated")
        assert process.wait(20) == 130
    else:
        while "points (" not in seen:
            os.write(parent, b"y\n")
            seen += _until(parent, "[y/n]", "points (")
        assert process.wait(20) == 0
    assert "Strong answer" in seen
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
    seen, end = "", time.monotonic() + 30
    while not any(mark in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen) for mark in marks):
        assert time.monotonic() < end, f"waited for {marks}, saw {seen[-500:]!r}"
        if select.select([handle], [], [], 0.2)[0]:
            try:
                seen += os.read(handle, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                break
    return seen
