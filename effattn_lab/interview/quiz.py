"""``effattn quiz``: interview questions in the terminal, judged by you against a rubric.

A question is shown; you answer aloud; Enter shows what a wrong candidate says, a strong answer and the rubric; you
say for each point whether you had it. At the end: the score and the sections to read again. Works with a keyboard,
with piped input (the end of the input ends the round) and without colours (``--plain``).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from effattn_lab.interview.bank import LEVELS, BankError, Question, load, select, topics
from effattn_lab.interview.plain import plain

_YES, _NO, _QUIT = {"y", "yes"}, {"n", "no"}, {"q", "quit"}
_INTERRUPTED = 130  # the shell's convention for Ctrl-C


@dataclass(frozen=True)
class Rated:
    """A question and, for each key point, whether the learner had it."""

    question: Question
    points: tuple[bool, ...]


class _Leave(Exception):
    """The learner leaves: end of input, ``q`` or Ctrl-C."""

    def __init__(self, interrupted: bool = False) -> None:
        super().__init__()
        self.interrupted = interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    parser.add_argument(
        "--topic", metavar="TOPIC", help="a mechanism (full/flash) or a part (full); default: all"
    )
    parser.add_argument("--level", choices=LEVELS, help="only questions of this level")
    parser.add_argument(
        "--count", type=int, metavar="N", help="how many questions; default 5, or fewer if there are fewer"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="draw the same questions in the same order again"
    )
    parser.add_argument("--list", action="store_true", help="list the questions that match and leave")
    parser.add_argument(
        "--plain", action="store_true", help="no colours, no boxes (also when output is not a terminal)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 0, 2 for a wrong option, 130 after Ctrl-C."""
    if args.count is not None and args.count < 1:
        return _fail(f"--count: expected at least 1, got {args.count}")
    try:
        bank = load()
        questions = select(bank, args.topic, args.level)
    except BankError as error:
        return _fail(str(error))
    except ValueError as error:
        return _fail(f"--{error}")
    if not questions:
        return _fail(f"no question of level {args.level} in {args.topic}; topics: {', '.join(topics(bank))}")
    boxes = sys.stdout.isatty() and not args.plain
    console = Console(no_color=not boxes, highlight=False, soft_wrap=False)
    if args.list:
        _list(console, questions, boxes)
        return 0
    count = min(args.count or 5, len(questions))
    chosen = random.Random(args.seed).sample(questions, count)
    return _practise(console, chosen, boxes)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m effattn_lab.interview.quiz``, the same command without the rest of ``effattn``."""
    parser = argparse.ArgumentParser(prog="effattn quiz", description="Practise interview questions.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _fail(message: str) -> int:
    print(f"effattn quiz: {message}", file=sys.stderr)
    return 2


def _list(console: Console, questions: Sequence[Question], boxes: bool) -> None:
    if not boxes:
        for q in questions:
            print(f"{q.id}\t{q.level}\t{plain(q.question)}")
        return
    table = Table(title=f"{len(questions)} questions", box=None, pad_edge=False)
    for heading in ("id", "level", "question"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "level")
    for q in questions:
        table.add_row(q.id, q.level, Text(plain(q.question)))
    console.print(table)


def _practise(console: Console, questions: Sequence[Question], boxes: bool) -> int:
    rated: list[Rated] = []
    interrupted = False
    minutes = sum(q.minutes for q in questions)
    console.print(
        f"{len(questions)} {'question' if len(questions) == 1 else 'questions'}, about {minutes:g} minutes. "
        "Answer aloud, then press Enter. [bold]q[/bold] leaves."
    )
    try:
        for number, question in enumerate(questions, start=1):
            _ask(console, question, f"{number}/{len(questions)}", boxes)
            rated.append(_rate(console, question))
    except _Leave as leave:
        interrupted = leave.interrupted
        console.print()
    _summary(console, rated, len(questions), boxes)
    return _INTERRUPTED if interrupted else 0


def _ask(console: Console, question: Question, number: str, boxes: bool) -> None:
    heading = f"{number} · {question.topic_title} · {question.level} · {question.minutes:g} min"
    console.print()
    _show(console, heading, plain(question.question), boxes, "cyan")
    while (word := _read(console, "Enter shows the answer: ").lower()) in _QUIT or word:
        if word in _QUIT:
            raise _Leave()
        if not sys.stdin.isatty():  # a typed answer, piped in: the rating follows
            break
        console.print("Your answer stays with you; Enter alone shows ours.")
    _show(console, "Red flag", plain(question.red_flag), boxes, "red")
    _show(console, "Strong answer", plain(question.strong_answer), boxes, "green")
    for follow_up in question.follow_ups:
        _show(console, f"Follow-up: {plain(follow_up.ask)}", plain(follow_up.answer), boxes, "blue")
    for number_ in question.numbers:
        origin = number_.expr or f"reported: {number_.source}"
        console.print(
            Text(
                f"  {number_.value:g} {number_.unit}".rstrip() + f"  {plain(number_.claim)}  [{origin}]",
                style="dim",
            )
        )


def _rate(console: Console, question: Question) -> Rated:
    console.print("\nDid you say it? (y/n)")
    points = []
    for point in question.key_points:
        while True:
            word = _read(console, f"  {plain(point)} [y/n] ").lower()
            if word in _QUIT:
                raise _Leave()
            if word in _YES | _NO:
                break
            console.print("  y, n, or q to leave")
        points.append(word in _YES)
    console.print(f"{sum(points)} of {len(points)}")
    return Rated(question, tuple(points))


def _read(console: Console, prompt: str) -> str:
    try:
        word = console.input(escape(prompt)).strip()
        if not sys.stdin.isatty():
            console.print(Text(word))  # the terminal echoes what is typed; a pipe does not
        return word
    except EOFError:
        raise _Leave() from None
    except KeyboardInterrupt:
        raise _Leave(interrupted=True) from None


def _show(console: Console, title: str, text: str, boxes: bool, colour: str) -> None:
    if boxes:
        console.print(
            Panel(
                Text(text), title=Text(title), title_align="left", border_style=colour, width=_width(console)
            )
        )
    else:
        console.print(Text(f"\n{title}\n{text}"))


def _width(console: Console) -> int:
    """Lines longer than this are hard to read, however wide the terminal is."""
    return min(console.width, 100)


def _summary(console: Console, rated: Sequence[Rated], asked: int, boxes: bool) -> None:
    if not rated:
        console.print("No question rated. Nothing is stored; start again whenever you like.")
        return
    said = sum(sum(r.points) for r in rated)
    possible = sum(len(r.points) for r in rated)
    console.print()
    console.print(
        f"{len(rated)} of {asked} questions, {said} of {possible} points ({100 * said / possible:.0f} %)"
    )
    for r in rated:
        console.print(Text(f"  {sum(r.points)}/{len(r.points)}  {r.question.id} ({r.question.level})"))
    again = [r for r in rated if not all(r.points)]
    if not again:
        console.print("Every point made. Try the next level up.")
        return
    console.print("Read again:")
    seen: set[str] = set()
    for r in again:
        target = f"chapters/{r.question.chapter}.md#{r.question.section}"
        lab = f", lab labs/{r.question.lab}.ipynb" if r.question.lab else ""
        missed = "; ".join(
            plain(p) for p, had in zip(r.question.key_points, r.points, strict=True) if not had
        )
        console.print(Text(f"  {target}{lab if target not in seen else ''}"))
        console.print(Text(f"    missed: {missed}", style="dim" if boxes else ""))
        seen.add(target)


if __name__ == "__main__":
    sys.exit(main())
