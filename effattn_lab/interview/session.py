"""One question from beginning to end, and a practice session of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from effattn_lab.interview.bank import Question
from effattn_lab.interview.links import heading, place
from effattn_lab.interview.plain import plain
from effattn_lab.interview.progress import Review
from effattn_lab.interview.schedule import RATINGS, Queue, Standing, proposal
from effattn_lab.interview.terminal import Leave, Screen, Stopwatch, counted, reflow

ANSWER = "Your answer, or Enter: "
KEYS = "Say your answer, then press Enter; or type it and end with an empty line. q leaves."


@dataclass(frozen=True)
class Answered:
    """A question that was answered and judged.

    Attributes:
        answer: what was typed, empty if it was said aloud.
        review: ratings, points and time as they were stored.
        replies: what was typed to each follow-up that was asked, in order; empty if said aloud.
    """

    question: Question
    answer: str
    review: Review
    replies: tuple[str, ...]

    @property
    def missed(self) -> list[str]:
        """Key points that were not said, as plain text."""
        points = zip(self.question.key_points, self.review.points, strict=True)
        return [prose(point) for point, had in points if not had]


def prose(markdown: str) -> str:
    """A text of the bank for the screen: formulas in Unicode, paragraphs in one line."""
    return reflow(plain(markdown))


def question_heading(question: Question, number: str) -> str:
    """``2/5 · FlashAttention · junior · 2 min``."""
    return f"{number} · {question.topic_title} · {question.level} · {question.minutes:g} min"


def reveal(screen: Screen, question: Question, answer: str) -> None:
    """Show the red flag and the strong answer, beside what the learner typed."""
    screen.show("Red flag", prose(question.red_flag), "red")
    beside(screen, answer, ("Strong answer", prose(question.strong_answer), "green"))


def beside(screen: Screen, answer: str, ours: tuple[str, str, str], title: str = "Your answer") -> None:
    """Show what the learner typed, if anything, next to `ours` (title, text, colour)."""
    if answer:
        screen.show_beside((title, answer, "yellow"), ours)
    else:
        screen.show(*ours)


def evidence(screen: Screen, question: Question) -> None:
    """Say where the numbers come from."""
    for number in question.numbers:
        origin = number.expr or f"reported: {number.source}"
        value = f"{number.value:g} {number.unit}".rstrip()
        screen.say(f"{value}  {plain(number.claim)}  [{origin}]", dim=True, indent=4)


def judge(screen: Screen, question: Question) -> tuple[tuple[bool, ...], int]:
    """Let the learner tick the rubric and rate; returns the points and the rating. Raises Leave."""
    more = "; e shows where the numbers come from" if question.numbers else ""
    screen.say(f"\nDid you say it? One y or n for each, together or one by one{more}.")
    points = screen.ticks([prose(p) for p in question.key_points], {"e": lambda: evidence(screen, question)})
    default = proposal(points)
    rule = "all: Good; half or more: Hard; fewer: Again"
    screen.say(f"{sum(points)} of {len(points)} points, so {RATINGS[default]} is proposed ({rule}).")
    words = {name.lower(): rating for rating, name in RATINGS.items()}
    words |= {str(rating): rating for rating in RATINGS} | {name[0]: rating for name, rating in words.items()}
    menu = "  ".join(f"{rating} {name}" for rating, name in RATINGS.items())
    while True:
        word = screen.read(f"{menu}  [Enter: {RATINGS[default]}] ").lower()
        if not word:
            return points, default
        if word in words:
            return points, words[word]
        screen.say("1, 2, 3, 4, Enter for the proposal, or q to leave")


def practise(
    screen: Screen, questions: Sequence[Question], record: Callable[[Review], None], heading_line: str
) -> tuple[list[Answered], bool]:
    """Ask `questions` one after another and `record` each review at once.

    Returns what was answered and whether Ctrl-C ended it.
    """
    answered: list[Answered] = []
    screen.say(heading_line)
    try:
        for number, question in enumerate(questions, start=1):
            answered.append(_one(screen, question, f"{number}/{len(questions)}", record))
    except Leave as leave:
        screen.say()
        return answered, leave.interrupted
    return answered, False


def _one(screen: Screen, question: Question, number: str, record: Callable[[Review], None]) -> Answered:
    watch = Stopwatch(screen.clock)
    screen.say()
    screen.show(question_heading(question, number), prose(question.question), "cyan")
    with watch:
        answer = screen.answer(ANSWER)
    reveal(screen, question, answer)
    replies: list[str] = []
    for count, follow_up in enumerate(question.follow_ups, start=1):
        title = f"Follow-up {count}/{len(question.follow_ups)}"
        screen.show(title, prose(follow_up.ask), "blue")
        with watch:
            replies.append(screen.answer(ANSWER))
        ours = ("An answer", prose(follow_up.answer), "green")
        beside(screen, replies[-1], ours)
    points, rating = judge(screen, question)
    review = Review.new(question.id, rating, screen.clock.now(), points, watch.total)
    record(review)
    return Answered(question, answer, review, tuple(replies))


def opening(questions: Sequence[Question], waiting: Queue) -> str:
    """``5 questions, about 12 minutes: 3 due, 2 new.``, and what the keys do."""
    kinds = {"due": waiting.due, "new": waiting.new, "ahead of time": waiting.ahead}
    counts = {name: sum(q in group for q in questions) for name, group in kinds.items()}
    mix = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    total = sum(question.minutes for question in questions)
    return f"{counted(len(questions), 'question')}, about {total:g} minutes: {mix}. {KEYS}"


def summary(screen: Screen, answered: Sequence[Answered], asked: int, after: Mapping[str, Standing]) -> None:
    """Print the score, what to read again and when the questions are due. `after`: standings with these reviews."""
    if not answered:
        screen.say("No question rated, so nothing was stored. Start again whenever you like.")
        return
    said = sum(sum(a.review.points) for a in answered)
    possible = sum(len(a.review.points) for a in answered)
    screen.say()
    screen.say(
        f"{len(answered)} of {counted(asked, 'question')}, {said} of {possible} points "
        f"({100 * said / possible:.0f} %)"
    )
    now = screen.clock.now()
    for a in answered:
        rating, due = RATINGS[a.review.rating], after[a.question.id].due
        points = f"{sum(a.review.points)}/{len(a.review.points)}"
        screen.say(f"  {points}  {rating:5s}  due {when(due, now)}  {a.question.id}")
    read_again(screen, answered)
    upcoming(screen, after, now)


def read_again(screen: Screen, answered: Sequence[Answered]) -> None:
    """Print the sections that answer what was missed, each once."""
    sections: dict[str, list[Answered]] = {}
    for a in answered:
        if a.missed:
            sections.setdefault(place(a.question), []).append(a)
    if not sections:
        screen.say("Every point made. Try the next level up.")
        return
    screen.say("Read again:")
    for where, group in sections.items():
        question = group[0].question
        title = heading(question.chapter, question.section)
        lab = f", lab labs/{question.lab}.ipynb" if question.lab else ""
        screen.say(f"{where}{f' ({title})' if title else ''}{lab}", indent=2)
        screen.say(f"missed: {'; '.join(point for a in group for point in a.missed)}", dim=True, indent=4)


def upcoming(screen: Screen, standing: Mapping[str, Standing], now: datetime) -> None:
    """Print how many questions are due now and when the next one is."""
    later = sorted(s.due for s in standing.values() if s.due > now)
    due = len(standing) - len(later)
    parts = [f"{counted(due, 'question')} due now"] if due else []
    if later:
        week = sum((moment - now).days < 7 for moment in later)
        parts.append(f"next due {when(later[0], now)}" + (f", {week} within a week" if week > 1 else ""))
    if parts:
        screen.say(f"Schedule: {'; '.join(parts)}.")


def when(due: datetime, now: datetime) -> str:
    """A date in the learner's time zone, and how far away it is: ``3 December (in 5 days)``."""
    local = due.astimezone()
    days = (local.date() - now.astimezone().date()).days
    date = f"{local:%Y-%m-%d}"
    if days <= 0:
        return f"{date} (now)" if due <= now else f"{date} (later today)"
    return f"{date} ({'tomorrow' if days == 1 else f'in {days} days'})"
