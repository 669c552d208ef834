"""When to ask a question again: FSRS, replayed from the learner's reviews.

No state is stored beside the reviews. Fuzzing is off and there are no learning steps, so what follows depends only on
each question's ratings and times, and the practice page of the book, which does the same in JavaScript, agrees.
Replaying 5,000 reviews takes about 0.1 s.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from effattn_lab.interview.bank import Question
from effattn_lab.interview.progress import Review, unique

RETENTION = 0.9
AGAIN, HARD, GOOD, EASY = 1, 2, 3, 4
RATINGS = {AGAIN: "Again", HARD: "Hard", GOOD: "Good", EASY: "Easy"}


@dataclass(frozen=True)
class Standing:
    """Where a question stands after its reviews.

    Attributes:
        stability: days after which the chance to recall it has fallen to 90 %.
        difficulty: 1 (easy) to 10.
        due: when that chance reaches 90 %, to the day; UTC.
        last: the last review; UTC.
        reviews: how many there were.
        share: part of the key points said at the last review, None if it had none.
    """

    stability: float
    difficulty: float
    due: datetime
    last: datetime
    reviews: int
    share: float | None

    def recall(self, now: datetime) -> float:
        """Chance, 0 to 1, that the answer is recalled at `now`."""
        import fsrs

        card = fsrs.Card(card_id=0, stability=self.stability, due=self.due, last_review=self.last)
        return float(scheduler().get_card_retrievability(card, now))


def standings(reviews: Iterable[Review]) -> dict[str, Standing]:
    """Question id → where it stands, for every question with a review, also those that the bank no longer has.

    The order of `reviews` does not matter, nor does a repeated id.
    """
    import fsrs

    histories: dict[str, list[Review]] = {}
    for review in sorted(unique(reviews), key=lambda review: (review.reviewed_at, review.id)):
        histories.setdefault(review.question, []).append(review)
    found: dict[str, Standing] = {}
    for question, history in histories.items():
        # A card without an id waits a millisecond for one; its number is of no use here.
        card = fsrs.Card(card_id=0, due=history[0].reviewed_at)
        for review in history:
            card, _ = scheduler().review_card(card, fsrs.Rating(review.rating), review.reviewed_at)
        last = history[-1]
        assert card.stability is not None
        assert card.difficulty is not None
        found[question] = Standing(
            stability=card.stability,
            difficulty=card.difficulty,
            due=card.due,
            last=last.reviewed_at,
            reviews=len(history),
            share=sum(last.points) / len(last.points) if last.points else None,
        )
    return found


@functools.cache
def scheduler() -> Any:
    """The `fsrs.Scheduler` that the terminal and the practice page share: no steps of minutes, nothing random."""
    import fsrs

    return fsrs.Scheduler(
        desired_retention=RETENTION, learning_steps=(), relearning_steps=(), enable_fuzzing=False
    )


def proposal(points: Sequence[bool]) -> int:
    """The rating that the ticked points suggest. Every point: Good. At least half: Hard. Fewer: Again.

    Easy is never proposed: how little effort it took, only the learner knows.
    """
    share = sum(points) / len(points) if points else 1.0
    return GOOD if share == 1 else HARD if share >= 0.5 else AGAIN


@dataclass(frozen=True)
class Queue:
    """Questions in the order in which to ask them: what is due, what is new, what could be asked ahead of time."""

    due: tuple[Question, ...]
    new: tuple[Question, ...]
    ahead: tuple[Question, ...]

    @property
    def all(self) -> tuple[Question, ...]:
        """Due, then new, then ahead of time."""
        return self.due + self.new + self.ahead


def queue(
    questions: Sequence[Question], standing: Mapping[str, Standing], now: datetime, seed: int | None = None
) -> Queue:
    """Order `questions` for practice at `now`.

    Due ones come first, the least likely to be recalled before the others, then new ones, shuffled by `seed`, then
    those not due yet, the next due first.
    """
    known = [question for question in questions if question.id in standing]
    due = [question for question in known if standing[question.id].due <= now]
    due.sort(key=lambda q: (standing[q.id].recall(now), standing[q.id].due, q.id))
    later = [question for question in known if standing[question.id].due > now]
    later.sort(key=lambda q: (standing[q.id].due, q.id))
    new = [question for question in questions if question.id not in standing]
    random.Random(seed).shuffle(new)
    return Queue(tuple(due), tuple(new), tuple(later))
