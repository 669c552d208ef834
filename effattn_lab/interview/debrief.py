"""The written debrief of a mock interview: Markdown, computed from what was ticked and timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from effattn_lab._atomic import write_atomic
from effattn_lab.interview.bank import LEVELS, Question
from effattn_lab.interview.links import Book, heading, place
from effattn_lab.interview.mock import Asked, Interview
from effattn_lab.interview.progress import ProgressError
from effattn_lab.interview.schedule import RATINGS
from effattn_lab.interview.terminal import counted, minutes

HELD = 0.7  # from this share of the points on, a level counts as held
_OVER, _UNDER = 1.25, 0.5  # of the planned time
_ENDED = {
    "finished": "",
    "time": "The time was up. ",
    "left": "You ended it early. ",
    "interrupted": "It was interrupted. ",
}


def debrief(state: Interview, at: datetime, book: Book) -> str:
    """The whole document. `at`: when the interview ended, aware; `book`: where the links lead."""
    parts = [f"# Mock interview, {at.astimezone():%Y-%m-%d %H:%M}", overall(state)]
    if state.asked:
        parts.append(_table(state.asked))
    for number, asked in enumerate(state.asked, start=1):
        parts += _question(number, asked, book)
    if state.skipped:
        lines = [f"- {q.question}  \n  `{q.id}`, {q.level}" for q in state.skipped]
        parts += ["## Not reached, or not judged", "\n".join(lines)]
    again = [asked.answered.question for asked in state.asked if asked.answered.missed]
    if again:
        links = dict.fromkeys(f"- {reading(question, book)}" for question in again)
        parts += ["## Read again", "\n".join(links)]
    return "\n\n".join(parts) + "\n"


def overall(state: Interview) -> str:
    """A paragraph that follows from the numbers alone."""
    planned = len(state.asked) + len(state.skipped)
    if not state.asked:
        return f"{_ENDED[state.ended]}None of {counted(planned, 'question')} was judged, so there is nothing to say."
    said, possible = _points(state.asked)
    text = (
        f"{_ENDED[state.ended]}You answered {len(state.asked)} of {counted(planned, 'question')} and made {said} of "
        f"{possible} points ({100 * said / possible:.0f} %), in {minutes(state.used)} of {state.minutes:g}:00."
    )
    return " ".join([text, *_levels(state.asked), *_topics(state.asked), *_timing(state.asked)])


def save(folder: Path, text: str, at: datetime) -> Path:
    """Write the debrief to a new file of `folder`, which is made; returns its path.

    Raises:
        ProgressError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"mock-{at.astimezone():%Y%m%d-%H%M%S}"
        path, number = folder / f"{stem}.md", 2
        while path.exists():
            path, number = folder / f"{stem}-{number}.md", number + 1
        write_atomic(path, text.encode())
    except OSError as error:
        raise ProgressError(f"{folder}: the debrief cannot be written: {error.strerror}") from None
    return path


def reading(question: Question, book: Book) -> str:
    """A Markdown link to the section that answers `question`, or its place where no address is known."""
    title = heading(question.chapter, question.section)
    name = f"{question.topic_title}: {title}" if title else f"{question.topic_title}, `{place(question)}`"
    url = book.url(question)
    return f"[{name}]({url})" if url else name


def _points(asked: Iterable[Asked]) -> tuple[int, int]:
    points = [point for a in asked for point in a.answered.review.points]
    return sum(points), len(points)


def _by(asked: Sequence[Asked], key: Callable[[Question], str]) -> dict[str, tuple[int, int]]:
    groups: dict[str, list[Asked]] = {}
    for a in asked:
        groups.setdefault(key(a.answered.question), []).append(a)
    return {name: _points(group) for name, group in groups.items()}


def _levels(asked: Sequence[Asked]) -> list[str]:
    shares = _by(asked, lambda q: q.level)
    known = [level for level in LEVELS if level in shares]
    text = (
        "By level: " + ", ".join(f"{level} {shares[level][0]} of {shares[level][1]}" for level in known) + "."
    )
    least = f"{100 * HELD:.0f} %"
    short = [level for level in known if shares[level][0] < HELD * shares[level][1]]
    if len(short) == len(known):
        return [text, f"No level reached {least} of its points."]
    # A level counts only with those below it: a few lucky points at the top are no foundation.
    held = known[: known.index(short[0])] if short else known
    if not held:
        return [text, f"Less than {least} of the points at {short[0]} level already: begin there."]
    return [text, f"At least {least} of the points at every level up to {held[-1]}."]


def _topics(asked: Sequence[Asked]) -> list[str]:
    shares = _by(asked, lambda q: q.topic_title)
    name, (said, possible) = min(shares.items(), key=lambda item: item[1][0] / item[1][1])
    if said == possible or len(shares) < 2:
        return []
    return [f"Weakest topic: {name}, {said} of {possible}."]


def _timing(asked: Sequence[Asked]) -> list[str]:
    found = []
    late = [a for a in asked if a.used > _OVER * a.planned]
    if late:
        over = sum(a.used - a.planned for a in late)
        found.append(
            f"{counted(len(late), 'answer')} ran over by more than a quarter, {minutes(over)} in all: say the claim "
            "and one number first, and stop when the rubric is covered."
        )
    short = [a for a in asked if a.used < _UNDER * a.planned and a.answered.missed]
    if short:
        found.append(
            f"{counted(len(short), 'answer')} took less than half of the planned time and missed points: there was "
            "time to name the cost and the case where it fails."
        )
    return found


def _table(asked: Sequence[Asked]) -> str:
    rows = ["| | question | level | points | planned | used | rating |", "|---|---|---|---|---|---|---|"]
    for number, a in enumerate(asked, start=1):
        question, review = a.answered.question, a.answered.review
        rows.append(
            f"| {number} | `{question.id}` | {question.level} | {sum(review.points)} of {len(review.points)} "
            f"| {minutes(a.planned)} | {minutes(a.used)} | {RATINGS[review.rating]} |"
        )
    return "\n".join(rows)


def _question(number: int, asked: Asked, book: Book) -> list[str]:
    answered = asked.answered
    question, review = answered.question, answered.review
    difference = asked.used - asked.planned
    timing = f"{minutes(abs(difference))} {'over' if difference > 0 else 'under'}"
    parts = [
        f"## {number}. {question.topic_title} ({question.level})",
        question.question,
        f"Planned {minutes(asked.planned)}, used {minutes(asked.used)} ({timing}). Follow-ups asked: "
        f"{len(answered.replies)} of {len(question.follow_ups)}. Rated {RATINGS[review.rating]}.",
    ]
    if answered.answer:
        parts += ["**Your answer**", _fenced(answered.answer)]
    for label, wanted in (("Made", True), ("Missed", False)):
        points = [p for p, had in zip(question.key_points, review.points, strict=True) if had == wanted]
        if points:
            parts += [f"**{label}**", "\n".join(f"- {point}" for point in points)]
    if answered.missed:
        parts.append(f"*A strong answer:* {question.strong_answer}")
    for follow_up, reply in zip(question.follow_ups, answered.replies, strict=False):
        parts.append(f"**Follow-up:** {follow_up.ask}")
        if reply:
            parts.append(_fenced(reply))
        parts.append(f"*An answer:* {follow_up.answer}")
    parts.append(f"**Red flag to avoid:** {question.red_flag}")
    if answered.missed:
        parts.append(f"Read again: {reading(question, book)}.")
    return parts


def _fenced(text: str) -> str:
    """What a learner typed, kept from being read as Markdown."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
