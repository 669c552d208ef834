"""What speculation yields and costs: tokens of a round, speed-up, the best number of drafts.

Numbers and sympy symbols alike where no comparison is needed. ``alpha`` is the probability that a draft is accepted,
given that those before it were; ``gamma`` the number of drafts; ``c`` the time of one draft over the time of one pass
of the target; ``v`` the time of a pass over ``gamma + 1`` tokens over that of a pass over one (1 as long as the pass
waits for memory: :func:`verify_ratio`). Source: Leviathan, Kalman, Matias 2023, section 3; the symbol ``v`` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations.cost_model import Number
from effattn_lab.foundations.presets import ModelShape
from effattn_lab.foundations.serving import step_time
from effattn_lab.measure.roofline import GPU


def expected_tokens(alpha: Number, gamma: int) -> Number:
    """Tokens of a round: ``1 + alpha + ... + alpha^gamma = (1 - alpha^(gamma+1)) / (1 - alpha)``.

    The round yields more than i tokens iff the first i drafts were all accepted, probability ``alpha^i``; the sum of
    these tails is the mean. Written as the sum, so that ``alpha = 1`` gives ``gamma + 1``.
    """
    _check_gamma(gamma)
    _check_share("alpha", alpha)
    return sum(alpha**i for i in range(gamma + 1))


def expected_tokens_by_depth(alphas: Sequence[Number]) -> Number:
    """The same with a rate for each place: ``1 + a_1 + a_1 a_2 + ...``, ``a_i`` given that the first i - 1 passed.

    Exact for any draft, however its acceptances depend on each other.
    """
    total: Number = 1
    run: Number = 1
    for alpha in alphas:
        _check_share("alphas", alpha)
        run = run * alpha
        total = total + run
    return total


def speedup(alpha: Number, gamma: int, c: Number, v: Number = 1) -> Number:
    """Time of plain decoding over time with speculation: ``expected_tokens / (gamma c + v)``.

    A round costs gamma drafts and one pass; plain decoding pays one pass a token. Leviathan's theorem 3.8 for v = 1.
    """
    _check_cost(c, v)
    return expected_tokens(alpha, gamma) / (gamma * c + v)


def operations_factor(alpha: Number, gamma: int, c_flops: Number) -> Number:
    """FLOPs with speculation over FLOPs without: ``(gamma c' + gamma + 1) / expected_tokens`` (theorem 3.11).

    ``c_flops``: FLOPs of a draft over FLOPs of the target, for one token. Never below 1: drafts are thrown away.
    """
    _check_cost(c_flops, 1)
    return (gamma * c_flops + gamma + 1) / expected_tokens(alpha, gamma)


def optimal_gamma(alpha: float, c: float, max_gamma: int = 32) -> int:
    """The number of drafts with the greatest :func:`speedup` (v = 1), 0 where speculation only costs.

    Some gamma pays iff ``alpha > c`` (corollary 3.9): one draft adds alpha tokens for c passes, and each later draft
    adds less. 0 to ``max_gamma``, the smallest of equals.
    """
    check_positive_int("max_gamma", max_gamma)
    return max(range(max_gamma + 1), key=lambda gamma: (speedup(alpha, gamma, c), -gamma))


def verify_ratio(model: ModelShape, gpu: GPU, gamma: int, *, batch: int = 1, context: int = 1) -> float:
    """``v`` by the roofline: a decode step with ``gamma + 1`` tokens a sequence over one with one.

    1 while weights and cache take longer to read than all tokens take to multiply; it grows with the batch.
    """
    _check_gamma(gamma)
    one = step_time(model, gpu, decodes=batch, context=context)
    return step_time(model, gpu, decodes=batch, context=context, queries=gamma + 1) / one


def _check_gamma(gamma: int) -> None:
    if isinstance(gamma, bool) or not isinstance(gamma, int) or gamma < 0:
        raise ValueError(f"gamma: expected an integer of at least 0, got {gamma!r}")


def _check_share(name: str, value: Number) -> None:
    if isinstance(value, bool) or (isinstance(value, int | float) and not 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")


def _check_cost(c: Number, v: Number) -> None:
    if isinstance(c, bool) or (isinstance(c, int | float) and not c >= 0):
        raise ValueError(f"c: expected a number of at least 0, got {c!r}")
    if isinstance(v, bool) or (isinstance(v, int | float) and not v > 0):
        raise ValueError(f"v: expected a number above 0, got {v!r}")
