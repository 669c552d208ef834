"""``effattn quiz --stats``: what was practised and how well it would be recalled today, by topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from effattn_lab.interview.bank import Question, topics
from effattn_lab.interview.progress import Review
from effattn_lab.interview.schedule import Standing
from effattn_lab.interview.session import upcoming
from effattn_lab.interview.terminal import Screen, counted


def show_stats(
    screen: Screen,
    bank: Sequence[Question],
    questions: Sequence[Question],
    reviews: Sequence[Review],
    standing: Mapping[str, Standing],
    path: Path,
) -> None:
    """Print the figures of the chosen `questions`; `bank` tells which reviewed ids no longer exist."""
    chosen = {question.id for question in questions}
    mine = [review for review in reviews if review.question in chosen]
    now = screen.clock.now()
    seconds = sum(review.seconds for review in mine)
    spent = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else counted(round(seconds / 60), "minute")
    # Not through the screen, which would break a long path in two.
    print(f"{counted(len(mine), 'review')}, {spent}, kept in {path}")
    rows = []
    for topic, title in topics(questions).items():
        group = [question for question in questions if question.topic == topic]
        seen = [standing[question.id] for question in group if question.id in standing]
        recall = f"{100 * sum(s.recall(now) for s in seen) / len(seen):.0f} %" if seen else "–"
        shares = [s.share for s in seen if s.share is not None]
        points = f"{100 * sum(shares) / len(shares):.0f} %" if shares else "–"
        due = sum(s.due <= now for s in seen)
        rows.append((topic, f"{len(seen)} of {len(group)}", str(due), recall, points, title))
    screen.table(("topic", "seen", "due", "recall today", "points", "title"), rows)
    upcoming(screen, {q.id: standing[q.id] for q in questions if q.id in standing}, now)
    lost = [review for review in reviews if review.question not in {question.id for question in bank}]
    if lost:
        screen.say(
            f"{counted(len(lost), 'review')} of questions that are not in the bank (taken out since, or the practice "
            "page's own); they are kept."
        )
