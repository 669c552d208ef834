"""``effattn quiz``: interview questions in the terminal, judged by you against a rubric, scheduled by FSRS.

Five questions at a time, what is due first; ``--mock 45`` holds a timed interview. Every rating is on the disk before
the next question appears. ``--export`` and ``--import`` exchange the progress with the book's practice page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from effattn_lab.interview.bank import LEVELS, BankError, Question, load, select, topics

if TYPE_CHECKING:
    from effattn_lab.interview.progress import Journal
    from effattn_lab.interview.schedule import Standing
    from effattn_lab.interview.terminal import Clock, Screen

_COUNT = 5
_WRONG, _INTERRUPTED = 2, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    add = parser.add_argument
    add("--topic", metavar="TOPIC", help="a mechanism (full/flash) or a part (full); default: all")
    add("--level", choices=LEVELS, help="only questions of this level")
    add(
        "--kind",
        choices=("question", "case"),
        help="only questions, or only system-design cases (20 minutes or more)",
    )
    add(
        "--count",
        type=int,
        metavar="N",
        help=f"how many questions; default {_COUNT}, or fewer if there are fewer",
    )
    add("--due", action="store_true", help="only questions that are due for repetition")
    add(
        "--mock", type=float, metavar="MINUTES", help="a timed mock interview with a written debrief, e.g. 45"
    )
    add("--seed", type=int, metavar="S", help="draw new questions in the same order again")
    add("--list", action="store_true", help="list the questions that match and leave")
    add("--stats", action="store_true", help="show what was practised, by topic, and leave")
    add("--export", metavar="FILE", help="write the progress to FILE (JSON), and leave")
    add("--import", metavar="FILE", dest="import_", help="add the progress in FILE to yours, and leave")
    add(
        "--state",
        metavar="FILE",
        help="where the progress is kept; default: the user's data folder, EFFATTN_DATA",
    )
    add("--plain", action="store_true", help="no colours, no boxes (also when output is not a terminal)")


def run(args: argparse.Namespace, clock: Clock | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for a wrong option or file, 130 after Ctrl-C.

    `clock` is where the time comes from; default: the system's.
    """
    from effattn_lab.interview.progress import Journal, ProgressError

    try:
        _check(args)
        bank = load()
        questions = select(bank, args.topic, args.level)
        if not questions:
            known = ", ".join(topics(bank))
            raise ValueError(f"level: no question of level {args.level} in {args.topic}; topics: {known}")
        questions = [q for q in questions if args.kind in (None, q.kind)]
        if not questions:
            raise ValueError(f"kind: no {args.kind} in this choice of topic and level")
    except BankError as error:
        return _fail(str(error))
    except ValueError as error:
        return _fail(f"--{error}")
    try:
        return _run(args, bank, questions, Journal(args.state), clock)
    except ProgressError as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # outside of a prompt; what was rated is stored
        print()
        return _INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m effattn_lab.interview.quiz``, the same command without the rest of ``effattn``."""
    parser = argparse.ArgumentParser(prog="effattn quiz", description="Practise interview questions.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError, whose text begins with the option's name, if options are wrong or don't go together."""
    if args.count is not None and args.count < 1:
        raise ValueError(f"count: expected at least 1, got {args.count}")
    if args.mock is not None:
        from effattn_lab.interview.mock import LONGEST, SHORTEST

        if not SHORTEST <= args.mock <= LONGEST:
            raise ValueError(f"mock: expected {SHORTEST} to {LONGEST} minutes, got {args.mock:g}")
        if args.count is not None:
            raise ValueError(f"count: expected none beside --mock, which fills the time, got {args.count}")


def _run(
    args: argparse.Namespace,
    bank: Sequence[Question],
    questions: Sequence[Question],
    journal: Journal,
    clock: Clock | None,
) -> int:
    from effattn_lab.interview.schedule import queue, standings
    from effattn_lab.interview.terminal import Screen

    if args.import_ or args.export:
        return _exchange(args, journal)
    if args.list and not args.due:  # what there is does not depend on the progress
        return _list(Screen(boxes=_boxes(args)), questions)
    reviews = journal.read()
    standing = standings(reviews)
    screen = Screen(boxes=_boxes(args), clock=clock)
    if journal.damaged:
        print(
            f"effattn quiz: {journal.path}: lines that can't be read: {journal.damaged}; they are left as they are",
            file=sys.stderr,
        )
    now = screen.clock.now()
    if args.stats:
        from effattn_lab.interview.stats import show_stats

        show_stats(screen, bank, questions, reviews, standing, journal.path)
        return 0
    waiting = queue(questions, standing, now, args.seed)
    if args.due:
        questions = waiting.due
        if not questions:
            return _nothing_due(screen, [standing[q.id] for q in waiting.ahead])
    if args.list:
        return _list(screen, questions)
    journal.prepare()
    if args.mock is not None:
        return _mock(args, screen, questions, standing, journal)
    from effattn_lab.interview import session

    pool = waiting.due if args.due else waiting.all
    chosen = pool[: args.count or _COUNT]
    answered, interrupted = session.practise(screen, chosen, journal.append, session.opening(chosen, waiting))
    reviews += [a.review for a in answered]
    session.summary(screen, answered, len(chosen), _of(questions, standings(reviews)))
    return _INTERRUPTED if interrupted else 0


def _mock(
    args: argparse.Namespace,
    screen: Screen,
    questions: Sequence[Question],
    standing: Mapping[str, Standing],
    journal: Journal,
) -> int:
    from effattn_lab.interview import debrief, links, mock, session

    need = mock.needs(questions, standing, screen.clock.now())
    state = mock.interview(screen, questions, need, args.mock, journal.append, args.seed)
    at = screen.clock.now()
    screen.say()
    screen.say(debrief.overall(state))
    if state.asked:
        session.read_again(screen, [asked.answered for asked in state.asked])
        text = debrief.debrief(state, at, links.find_book())
        # Not through the screen, which would break a long path in two.
        print(f"Debrief: {debrief.save(journal.path.parent / 'debriefs', text, at)}")
    return _INTERRUPTED if state.ended == "interrupted" else 0


def _exchange(args: argparse.Namespace, journal: Journal) -> int:
    """Import, then export, whatever was asked for."""
    from effattn_lab.interview.progress import export_reviews, import_reviews
    from effattn_lab.interview.terminal import counted

    if args.import_:
        found = import_reviews(args.import_)
        new = journal.merge(found)
        known = len(found) - new
        print(f"{args.import_}: {counted(new, 'new review')} added to {journal.path}, {known} known already")
    if args.export:
        count = export_reviews(args.export, journal.read())
        print(f"{args.export}: {counted(count, 'review')} written")
    return 0


def _list(screen: Screen, questions: Sequence[Question]) -> int:
    from effattn_lab.interview.plain import plain
    from effattn_lab.interview.terminal import counted

    if screen.boxes:
        screen.say(counted(len(questions), "question"))
    screen.table(("id", "level", "question"), [(q.id, q.level, plain(q.question)) for q in questions])
    return 0


def _nothing_due(screen: Screen, later: Sequence[Standing]) -> int:
    from effattn_lab.interview.session import when

    if later:
        first = min(standing.due for standing in later)
        screen.say(f"Nothing is due. Next: {when(first, screen.clock.now())}.")
    else:
        screen.say("Nothing is due: no question of these was practised yet. Leave --due out to begin.")
    return 0


def _of(questions: Sequence[Question], standing: Mapping[str, Standing]) -> dict[str, Standing]:
    return {question.id: standing[question.id] for question in questions if question.id in standing}


def _boxes(args: argparse.Namespace) -> bool | None:
    return False if args.plain else None


def _fail(message: str) -> int:
    print(f"effattn quiz: {message}", file=sys.stderr)
    return _WRONG


if __name__ == "__main__":
    sys.exit(main())
