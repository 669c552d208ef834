"""Pictures of the practice page. The curves are the scheduler's own: nothing is typed here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from effattn_lab.figures.style import COLORS, CYCLE, WIDTH, rc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def scheduler() -> Any:
    """FSRS as `effattn quiz` and the practice page use it: default parameters, whole days, no fuzzing."""
    from fsrs import Scheduler

    from effattn_lab.interview.schedule import RETENTION

    return Scheduler(
        desired_retention=RETENTION, learning_steps=(), relearning_steps=(), enable_fuzzing=False
    )


def history(ratings: Sequence[int]) -> list[Any]:
    """Cards after each review, when every review happens on the day it is due.

    Args:
        ratings: 1 Again, 2 Hard, 3 Good, 4 Easy, one for each review.
    """
    from fsrs import Card, Rating

    model, card, cards = scheduler(), Card(card_id=0, due=START), []
    for rating in ratings:
        card, _ = model.review_card(card, Rating(rating), card.due)
        cards.append(card)
    return cards


def intervals(ratings: Sequence[int]) -> list[int]:
    """Days from each review of `history` to the next."""
    return [(card.due - card.last_review).days for card in history(ratings)]


def forgetting_curves() -> Figure:
    """Left: recall after the first review, by its rating. Right: five reviews rated Good, each when it is due."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(rc())
    model, good = scheduler(), history([3] * 5)
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.5), layout="constrained")

    def curve(card: Any, days: int) -> tuple[list[int], list[float]]:
        x = list(range(days + 1))
        return x, [100 * model.get_card_retrievability(card, card.last_review + timedelta(d)) for d in x]

    for rating, name, dash in ((4, "Easy", "-"), (3, "Good", "--"), (2, "Hard", "-."), (1, "Again", ":")):
        card = history([rating])[0]
        days, recall = curve(card, 30)
        left.plot(days, recall, dash, color=CYCLE[4 - rating])
        below = name == "Hard"  # the line of Good runs close above it
        y = recall[30] - 1 if below else recall[17] + 1
        label = f"{name}, S = {card.stability:.1f} d"
        left.text(29.5, y, label, ha="right", va="top" if below else "bottom", fontsize=10.5)
    left.set(title="After one review", xlabel="days since the review", ylabel="chance to recall, %")
    left.set(xlim=(0, 30), ylim=(40, 101))
    for card in good:
        days, recall = curve(card, (card.due - card.last_review).days)
        offset = (card.last_review - START).days
        right.plot([offset + day for day in days], recall, color=CYCLE[1])
        right.plot(offset, 100, "o", color=CYCLE[1], clip_on=False)
    starts = [(card.last_review - START).days for card in good]
    right.set(title="Five reviews rated Good", xlabel="days since the first", ylim=(87, 100.4))
    right.set_xlim(0, None)
    end = (good[-1].due - START).days
    right.set_xticks([*starts[3:], end])
    right.text(end, 89.2, f"asked on days {', '.join(map(str, starts))}", ha="right", fontsize=10.5)
    for axes in (left, right):
        axes.axhline(
            100 * model.desired_retention, color=COLORS["muted"], linewidth=1.2, linestyle=(0, (2, 2))
        )
    return fig
