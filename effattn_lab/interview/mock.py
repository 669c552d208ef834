"""A timed mock interview: choose questions to fill the time, ask, probe, judge, write the debrief.

The clock runs while you answer and stands still while you judge yourself, so the planned minutes are spoken ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from effattn_lab.interview.bank import LEVELS, Question
from effattn_lab.interview.progress import Review
from effattn_lab.interview.schedule import Standing
from effattn_lab.interview.session import (
    ANSWER,
    KEYS,
    Answered,
    beside,
    judge,
    prose,
    question_heading,
    reveal,
)
from effattn_lab.interview.terminal import Leave, Screen, Stopwatch, counted, minutes

CASE = "case"  # the bank's word for a system-design question
SHORTEST, LONGEST = 5, 240
FOLLOW_UP_SECONDS = 60
_DESIGN_SHARE = 2 / 3  # a case may take this part of the time, so that other topics have a turn
_UNSEEN = 0.5  # need of a question about whose topic nothing is known
_VARIETY = 0.3  # what each earlier question on a topic takes from the need of the next


@dataclass(frozen=True)
class Planned:
    """A question and the seconds planned for answering it, follow-ups included."""

    question: Question
    seconds: float


@dataclass(frozen=True)
class Asked:
    """A question of the interview with the seconds planned and used."""

    answered: Answered
    planned: float
    used: float


@dataclass
class Interview:
    """What happened.

    Attributes:
        minutes: the time given.
        asked: questions answered and judged, in order.
        skipped: planned questions that were not reached, or not judged.
        used: seconds spent answering, also on a question that was not judged.
        ended: ``finished``, ``time`` (was up), ``left`` (by q) or ``interrupted`` (by Ctrl-C).
    """

    minutes: float
    asked: list[Asked] = field(default_factory=list)
    skipped: list[Question] = field(default_factory=list)
    used: float = 0.0
    ended: str = "finished"

    @property
    def left(self) -> float:
        """Seconds left; negative when overdrawn."""
        return 60 * self.minutes - self.used


def planned_seconds(question: Question) -> float:
    """Seconds for the answer and a minute for each follow-up; a case's minutes include them."""
    if question.kind == CASE:
        return 60 * question.minutes
    return 60 * question.minutes + FOLLOW_UP_SECONDS * len(question.follow_ups)


def needs(questions: Sequence[Question], standing: Mapping[str, Standing], now: datetime) -> dict[str, float]:
    """Question id → how much it needs practice: 0 to 1, and 1 more if it is due.

    A seen question needs what was not said last time or is forgotten since; a new one as much as its topic's
    seen ones.
    """
    seen = {}
    for question in questions:
        if known := standing.get(question.id):
            seen[question.id] = 1 - known.recall(now) * (1.0 if known.share is None else known.share)
    topics: dict[str, list[float]] = {}
    for question in questions:
        if question.id in seen:
            topics.setdefault(question.topic, []).append(seen[question.id])
    found = {}
    for question in questions:
        if question.id in seen:
            found[question.id] = seen[question.id] + (standing[question.id].due <= now)
        else:
            others = topics.get(question.topic)
            found[question.id] = sum(others) / len(others) if others else _UNSEEN
    return found


def plan(
    questions: Sequence[Question],
    need: Mapping[str, float],
    seconds: float,
    seed: int | None = None,
    design: bool = True,
) -> list[Planned]:
    """Questions to fill `seconds`: at most one system-design case, then level after level what needs practice most.

    A short question warms up, the case follows, so that nothing can crowd it out, then the rest by level. No question
    that does not fit is chosen; the list may be empty.
    """
    pool = list(questions)
    random.Random(seed).shuffle(pool)  # equal needs: another interview each time
    cases = [q for q in pool if q.kind == CASE and planned_seconds(q) <= seconds]
    pool = [q for q in pool if q.kind != CASE]
    chosen: list[Question] = []
    if design and cases:
        modest = [q for q in cases if planned_seconds(q) <= _DESIGN_SHARE * seconds]
        case = max(modest, key=lambda q: need[q.id]) if modest else min(cases, key=planned_seconds)
        chosen.append(case)
        seconds -= planned_seconds(case)
    others: list[Question] = []
    used: Counter[str] = Counter()
    misses, turn = 0, 0
    while misses < len(LEVELS):
        level = LEVELS[turn % len(LEVELS)]
        turn += 1
        fitting = [q for q in pool if q.level == level and planned_seconds(q) <= seconds]
        if not fitting:
            misses += 1
            continue
        misses = 0
        best = max(fitting, key=lambda q: need[q.id] - _VARIETY * used[q.topic])
        pool.remove(best)
        others.append(best)
        used[best.topic] += 1
        seconds -= planned_seconds(best)
    others.sort(key=lambda q: LEVELS.index(q.level))
    return [Planned(q, planned_seconds(q)) for q in [*others[:1], *chosen, *others[1:]]]


def interview(
    screen: Screen,
    questions: Sequence[Question],
    need: Mapping[str, float],
    limit: float,
    record: Callable[[Review], None],
    seed: int | None = None,
) -> Interview:
    """Hold an interview of `limit` minutes; each review is recorded as soon as it is rated."""
    state = Interview(limit)
    waiting = plan(questions, need, state.left, seed)
    _opening(screen, state, waiting, any(q.kind == CASE for q in questions))
    number = 0
    try:
        while waiting or (waiting := _more(screen, state, questions, need, seed)):
            item = waiting.pop(0)
            if state.left < item.seconds / 2:  # an answer that can't be half finished helps nobody
                state.skipped.append(item.question)
                continue
            number += 1
            state.skipped.append(item.question)  # until it is judged
            asked = _one(screen, state, item, f"{number}/{number + len(waiting)}", record)
            state.skipped.remove(item.question)
            state.asked.append(asked)
    except Leave as leave:
        state.ended = "interrupted" if leave.interrupted else "left"
    if state.ended == "finished" and state.skipped:
        state.ended = "time"
    state.skipped += [item.question for item in waiting]
    return state


def _opening(screen: Screen, state: Interview, waiting: Sequence[Planned], wanted: bool) -> None:
    total = sum(item.seconds for item in waiting)
    screen.say(
        f"Mock interview, {state.minutes:g} minutes: {counted(len(waiting), 'question')}, {minutes(total)} planned. "
        f"The clock stands still while you judge yourself. {KEYS}"
    )
    if wanted and not any(item.question.kind == CASE for item in waiting):
        screen.say("No system-design case fits into this time.")


def _more(
    screen: Screen,
    state: Interview,
    questions: Sequence[Question],
    need: Mapping[str, float],
    seed: int | None,
) -> list[Planned]:
    """Further questions when the planned ones took less time than they had."""
    met = {asked.answered.question.id for asked in state.asked} | {q.id for q in state.skipped}
    more = plan([q for q in questions if q.id not in met], need, state.left, seed, design=False)
    if more and state.asked:
        screen.say(f"\n{minutes(state.left)} left: {counted(len(more), 'more question')}.")
    return more


def _one(
    screen: Screen, state: Interview, item: Planned, number: str, record: Callable[[Review], None]
) -> Asked:
    question = item.question
    screen.say()
    screen.show(question_heading(question, number), prose(question.question), "cyan")
    _clock(screen, state, 0.0, item)
    watch = Stopwatch(screen.clock)
    answer = _timed_answer(screen, state, watch)
    _clock(screen, state, watch.total, item)
    replies: list[str] = []
    for count, follow_up in enumerate(question.follow_ups, start=1):
        if state.left <= 0:
            screen.say("Time is up: no more follow-ups.")
            break
        screen.show(f"Follow-up {count}/{len(question.follow_ups)}", prose(follow_up.ask), "blue")
        replies.append(_timed_answer(screen, state, watch))
        _clock(screen, state, watch.total, item)
    screen.say("\nThe clock stands still. How was it?")
    reveal(screen, question, answer)
    for count, (follow_up, reply) in enumerate(zip(question.follow_ups, replies, strict=False), start=1):
        text = f"{prose(follow_up.ask)}\n\n{prose(follow_up.answer)}"
        ours = (f"Follow-up {count}, and an answer", text, "blue")
        beside(screen, reply, ours, f"Your answer to follow-up {count}")
    points, rating = judge(screen, question)
    review = Review.new(question.id, rating, screen.clock.now(), points, watch.total)
    record(review)
    return Asked(Answered(question, answer, review, tuple(replies)), item.seconds, watch.total)


def _timed_answer(screen: Screen, state: Interview, watch: Stopwatch) -> str:
    before = watch.total
    try:
        with watch:
            return screen.answer(ANSWER)
    finally:
        state.used += watch.total - before


def _clock(screen: Screen, state: Interview, used: float, item: Planned) -> None:
    left = f"{minutes(state.left)} of {state.minutes:g}:00 left" if state.left > 0 else "Time is up"
    follow = ", follow-ups included" if used == 0 and item.question.follow_ups else ""
    screen.say(f"[{left} · this question {minutes(used)} of {minutes(item.seconds)}{follow}]", dim=True)
