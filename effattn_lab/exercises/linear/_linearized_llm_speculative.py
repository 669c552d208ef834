"""Exercises on speculative decoding: residual, acceptance, a whole round of drafts.

The random numbers are arguments, and inputs keep away from their thresholds, so that float32 and the float64
reference decide alike: what is compared is exact.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Mutant, Output, Tolerance
from effattn_lab.exercises.linear._linearized_llm_rounds import (
    EXACT,
    FROM_SCRATCH,
    judge,
    round_case,
    round_of,
)
from effattn_lab.exercises.linear._linearized_llm_tokens import EXPECTED_TOKENS, TREE_MASK
from effattn_lab.exercises.making import mutants

# ---- the residual ------------------------------------------------------------------------------------------


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Where a rejected place is drawn from; p where p = q. p, q [B, V] -> [B, V]."""
    over = torch.clamp(p - q, min=0.0)
    total = over.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, over / torch.where(total > 0, total, 1.0), p)


def _pair(rng: np.random.Generator, rows: int, vocab: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    p, q = (rng.standard_normal((rows, vocab)) * size for _ in "pq")
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (p, q))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    return torch.from_numpy(p).float(), torch.from_numpy(q).float()


def _residual_inputs(rng: np.random.Generator) -> list[Case]:
    near, far, wide = _pair(rng, 8, 6, 0.7), _pair(rng, 8, 6, 3.0), _pair(rng, 4, 500, 2.0)
    same = _pair(rng, 5, 7, 1.0)[0]
    apart = torch.zeros(3, 8)
    apart[:, :4] = _pair(rng, 3, 4, 1.0)[0]
    guess = torch.nn.functional.one_hot(torch.from_numpy(rng.integers(0, 6, 8)), 6).float()
    return [
        Case("only where p exceeds q", {"p": near[0], "q": near[1]}),
        Case("rows add up to 1", {"p": far[0], "q": far[1]}),
        Case("rows add up to 1", {"p": wide[0], "q": wide[1]}),
        Case("a guess that is not random", {"p": far[0], "q": guess}),
        Case("nothing in common", {"p": apart, "q": apart.flip(-1)}),
        Case("p equals q", {"p": same, "q": same.clone()}),
    ]


def _residual_mutant(fault: str, p: torch.Tensor, q: torch.Tensor, guard: bool = True) -> torch.Tensor:
    guard = guard and fault != "no guard"
    over = torch.clamp(p - q, min=0.0)
    if fault == "target again":
        return p.clone()
    if fault == "turned round":
        over = torch.clamp(q - p, min=0.0)
    elif fault == "absolute":
        over = (p - q).abs()
    elif fault == "not clamped":
        over = p - q
    elif fault == "ratio":
        over = torch.where(q > 0, p / torch.where(q > 0, q, 1.0), p)
    elif fault == "softmax":
        return torch.softmax(over, dim=-1)
    elif fault == "where larger":
        over = torch.where(p > q, p, 0.0)
    total = over.sum(dim=-1, keepdim=True)
    if fault == "not normalised":
        total = torch.ones_like(total)
    if fault == "whole batch":
        total = over.sum()
    if not guard:
        return over / total
    ok = total.abs() > 1e-30
    return torch.where(ok, over / torch.where(ok, total, 1.0), p)


RESIDUAL = Exercise(
    id="linear/linearized_llm/residual",
    title="where a rejected token is drawn from",
    signature="residual(p [B, V], q [B, V]) -> r [B, V]",
    outputs=(Output("r", "p"),),
    make_inputs=_residual_inputs,
    reference=lambda p, q: (residual(p, q),),
    solution=residual,
    from_scratch=FROM_SCRATCH,
    properties={
        "only where p exceeds q": "A token that the draft proposes at least as often as the target wants it needs no "
        "second chance: its residual is 0.",
        "rows add up to 1": "Each row is a distribution: divide it by its own sum.",
        "a guess that is not random": "With q = 1 for one token, the residual is p without that token, normalised.",
        "nothing in common": "Where p and q share no token every draft is rejected: the residual must be p itself.",
        "p equals q": "Then max(0, p - q) is 0 everywhere and 0/0 is NaN. Nothing is ever rejected; return p.",
    },
    tolerance=Tolerance(
        1e-4,
        1e-6,
        "p - q loses digits where both are near: 6e-8 of p, at sums above 0.05 that is a few 1e-6 of the quotient.",
    ),
    mutants=mutants(
        _residual_mutant,
        {
            "target again": "That is p. Drawing from p after a rejection gives the tokens that the draft likes a "
            "second chance, and the output is no longer the target's.",
            "turned round": "The difference is turned round: max(0, q - p) is what the draft proposes too often.",
            "absolute": "The absolute difference counts tokens that the draft proposes too often as well.",
            "not clamped": "Differences below 0 are kept: p - q adds up to 0, and a probability is never negative.",
            "not normalised": "The row is not divided by its sum: its sum is 1 - beta, the chance of a rejection.",
            "whole batch": "The sum runs over the whole batch. Each row has its own: dim=-1, keepdim=True.",
            "ratio": "The quotient p / q decides about acceptance; the residual is the difference.",
            "softmax": "A softmax gives tokens whose difference is 0 a weight of e^0. Divide by the sum.",
            "where larger": "Where p exceeds q only the excess p - q is left to give: accepted drafts gave "
            "min(p, q).",
            "no guard": "For p = q the sum is 0, and 0/0 is NaN.",
        },
        unguarded=True,
    ),
    hints=(
        "Drafts that are accepted already emit a token x with probability min(p(x), q(x)). What is missing to p(x)?",
        "p - min(p, q) = max(0, p - q). It adds up to the chance of a rejection; divide each row by its sum, and "
        "think of the row whose sum is 0.",
        "over = torch.clamp(p - q, min=0.0)\ntotal = over.sum(dim=-1, keepdim=True)\n"
        "... then over / total, with the row of p where total is 0.",
    ),
)


# ---- acceptance --------------------------------------------------------------------------------------------


def accept(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """How many drafts are accepted. p, q [B, gamma, V]; drafts int64 [B, gamma]; u [B, gamma] -> int64 [B]."""
    p_x = p.gather(-1, drafts[..., None])[..., 0]
    q_x = q.gather(-1, drafts[..., None])[..., 0]
    return (u < p_x / q_x).long().cumprod(dim=1).sum(dim=1)


def _accept_case(name: str, rng: np.random.Generator, **how: object) -> Case:
    given = round_of(rng, **how)  # type: ignore[arg-type]
    return Case(name, {
        "p": given["p"][:, :-1].contiguous(), "q": given["q"], "drafts": given["drafts"], "u": given["u_accept"],
    })  # fmt: skip


def _accept_inputs(rng: np.random.Generator) -> list[Case]:
    zero = _accept_case("the target would never say it", rng, rows=16, gamma=3, vocab=8, like="apart")
    zero.kwargs["u"][::2] = 0.0  # type: ignore[index]  # 0 is not below 0
    return [
        _accept_case("one draft", rng, rows=64, gamma=1, vocab=6),
        _accept_case("stops at the first rejection", rng, rows=64, gamma=5, vocab=6),
        _accept_case("a likely draft is always accepted", rng, rows=32, gamma=4, vocab=5, like="target"),
        _accept_case("a guess that is not random", rng, rows=64, gamma=3, vocab=4, like="guess"),
        zero,
    ]


def _accept_mutant(
    fault: str, p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    p_x, q_x = (x.gather(-1, drafts[..., None])[..., 0] for x in (p, q))
    taken = u * q_x < p_x
    if fault == "turned round":
        taken = u * p_x < q_x
    elif fault == "no draw":
        taken = p_x >= q_x
    elif fault == "draft ignored":
        taken = u < p_x
    elif fault == "above":
        taken = u * q_x > p_x
    elif fault == "at or below":
        taken = u * q_x <= p_x
    elif fault == "argmax":
        taken = p.argmax(dim=-1) == drafts
    elif fault == "difference":
        taken = u < p_x - q_x
    if fault == "counts all":
        return taken.long().sum(dim=1)
    if fault == "all or nothing":
        return taken.all(dim=1).long() * drafts.shape[1]
    if fault == "counts the rejected":
        return taken.long().cumprod(dim=1).sum(dim=1).clamp(max=drafts.shape[1] - 1) + 1
    return taken.long().cumprod(dim=1).sum(dim=1)


ACCEPT = Exercise(
    id="linear/linearized_llm/accept",
    title="how many drafts are accepted",
    signature="accept(p [B, gamma, V], q [B, gamma, V], drafts [B, gamma], u [B, gamma]) -> accepted [B]",
    outputs=(Output("accepted", "int64"),),
    make_inputs=_accept_inputs,
    reference=lambda p, q, drafts, u: (accept(p, q, drafts, u),),
    solution=accept,
    from_scratch=FROM_SCRATCH,
    properties={
        "one draft": "Accept the draft x with probability min(1, p(x)/q(x)): that is, where u is below p(x)/q(x).",
        "stops at the first rejection": "What comes after a rejected draft was guessed behind a token that isn't "
        "there any more: count up to the first rejection only.",
        "a likely draft is always accepted": "Where p(x) >= q(x) every u below 1 accepts.",
        "a guess that is not random": "q(x) is 1 there: the guess is accepted with probability p(x).",
        "the target would never say it": "p(x) = 0: rejected, whatever u is, 0 included.",
    },
    tolerance=EXACT,
    mutants=mutants(
        _accept_mutant,
        {
            "turned round": "The quotient is turned round: q/p accepts what the draft likes too much, and rejects "
            "what it proposes too rarely.",
            "no draw": "The random number isn't used: a draft with p < q must still be accepted in p/q of the cases.",
            "draft ignored": "u is compared with p(x) alone. The draft came with probability q(x), so divide by it.",
            "above": "Accepted where it should be rejected: u below the quotient means yes.",
            "at or below": "u <= p/q accepts a draft that the target would never say (p = 0) when u is 0: the "
            "comparison is u < p/q.",
            "argmax": "That is the greedy rule: right at temperature 0, but the samples of a target are not its "
            "argmax.",
            "difference": "The difference p - q belongs to the residual; acceptance asks for the quotient.",
            "counts all": "All accepted drafts are counted, also those behind a rejected one. Multiply up "
            "(cumprod) before you add.",
            "all or nothing": "The accepted beginning is thrown away when a later draft is rejected.",
            "counts the rejected": "The rejected draft is counted as well: one too many where there is a rejection.",
        },
    ),
    hints=(
        "One comparison for each draft, then the length of the run of True at the beginning of each row.",
        "x.gather(-1, drafts[..., None])[..., 0] takes the probabilities of the drafts. The run: as integers, their "
        "cumulative product is 1 up to the first rejection and 0 from there on.",
        "p_x = p.gather(-1, drafts[..., None])[..., 0]\nq_x = ...\n"
        "(u < p_x / q_x).long().cumprod(dim=1) ... and its sum along dim 1.",
    ),
)


# ---- a round -----------------------------------------------------------------------------------------------


def verify(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, u_accept: torch.Tensor, u_final: torch.Tensor
) -> torch.Tensor:
    """Tokens of a round, -1 behind them: int64 [B, gamma + 1]. p [B, gamma + 1, V]; q [B, gamma, V]."""
    batch, gamma = drafts.shape
    count = accept(p[:, :gamma], q, drafts, u_accept)
    rows = torch.arange(batch)
    at = count.clamp(max=gamma - 1)
    last = torch.where((count < gamma)[:, None], residual(p[rows, at], q[rows, at]), p[:, gamma])
    final = (last.cumsum(dim=-1) <= u_final[:, None]).sum(dim=-1).clamp(max=p.shape[-1] - 1)
    place = torch.arange(gamma + 1)
    tokens = torch.cat([drafts, final[:, None]], dim=1).masked_fill(place > count[:, None], -1)
    return torch.where(place == count[:, None], final[:, None], tokens)


def _verify_inputs(rng: np.random.Generator) -> list[Case]:
    apart = round_case("everything rejected", rng, rows=24, gamma=2, vocab=8, like="apart")
    apart.kwargs["u_accept"][::2] = 0.0  # type: ignore[index]
    below = round_case("a sum that ends below 1", rng, rows=8, gamma=2, vocab=6, like="target")
    below.kwargs["p"][:, -1] *= 0.999  # type: ignore[index, operator]
    below.kwargs["u_final"][::2] = 0.9995  # type: ignore[index]
    return [
        round_case("drafts and what follows them", rng, rows=96, gamma=3, vocab=6),
        round_case("one draft", rng, rows=64, gamma=1, vocab=5),
        round_case("nothing rejected", rng, rows=32, gamma=3, vocab=6, like="target"),
        apart,
        round_case("guesses that are not random", rng, rows=64, gamma=2, vocab=5, like="guess"),
        round_case("what has probability 0 is not drawn", rng, rows=24, gamma=2, vocab=6, like="hole"),
        below,
    ]


VERIFY = Exercise(
    id="linear/linearized_llm/verify",
    title="judge a round of drafts",
    signature="verify(p [B, gamma+1, V], q [B, gamma, V], drafts [B, gamma], u_accept [B, gamma], u_final [B]) "
    "-> tokens [B, gamma+1]",
    outputs=(Output("tokens", "int64"),),
    make_inputs=_verify_inputs,
    reference=lambda **given: (verify(**given),),
    solution=verify,
    from_scratch=FROM_SCRATCH,
    properties={
        "drafts and what follows them": "Accepted drafts, then one token, then -1. At a rejection the token comes "
        "from the residual of that place.",
        "one draft": "Either the draft and a token from p[:, 1], or one token from the residual.",
        "nothing rejected": "All drafts stay, and one more token comes from the last distribution, p[:, gamma].",
        "everything rejected": "One token, from the residual of place 0, and -1 behind it.",
        "guesses that are not random": "q is one-hot: a rejected guess cannot come back as the replacement.",
        "what has probability 0 is not drawn": "The first token whose cumulative sum is above u_final: with "
        "u_final = 0 a sum of 0 does not count.",
        "a sum that ends below 1": "As float32 sums do, by a rounding: a u_final above it gives the last token, not "
        "an index past the end.",
    },
    tolerance=EXACT,
    mutants=(
        Mutant(
            "u twice",
            partial(judge, "u twice"),
            "The number that rejected the draft is used again to draw the replacement. Given a rejection it is no "
            "longer uniform: use u_final.",
            tuple(partial(judge, f"u_accept {which}") for which in ("of the place", "first", "last")),
        ),
        *mutants(
            judge,
            {
                "from p": "After a rejection the token is drawn from p. The accepted drafts have used up min(p, "
                "q): draw from the residual.",
                "turned round": "The acceptance quotient is turned round: it must be p/q.",
                "no bonus": "When all drafts are accepted, one more token is due: the pass has given p[:, gamma].",
                "bonus from the last draft": "The token after all drafts is drawn from p[:, gamma - 1], the "
                "distribution of the last draft's place; the one behind it is p[:, gamma].",
                "no final token": "The round ends with the drafts. One token of the target's own follows them: from "
                "the residual at a rejection, from p[:, gamma] if all stayed. Put it in place `count`.",
                "first place": "The residual of place 0 is used wherever the rejection was.",
                "goes on": "Drafts behind the rejected one are kept. They continue a text that isn't there any more.",
                "not normalised": "The residual isn't divided by its sum, so its cumulative sums end below 1.",
                "residual after all": "The residual is taken also where nothing was rejected; the last token "
                "then comes from p[:, gamma] as it is.",
                "argmax": "The last token is the likeliest one; it must be drawn with u_final.",
                "accepted at 0": "u <= p/q accepts a draft of probability 0 when u is 0: the comparison is u < p/q.",
                "no clamp": "A sum of float32 numbers may end below 1, and u_final above it gives the index V, "
                "which no token has: clamp(max=V - 1).",
                "at or above": "u_final = 0 draws the first token even if its probability is 0: the sum must be "
                "above u.",
                "keeps the rejected": "The rejected draft stays in the output, with the replacement behind it.",
            },
        ),
    ),
    hints=(
        "You have both parts: accept says how many drafts stay, residual where the next token comes from unless all "
        "stay. Choose one distribution for each row, then draw once.",
        "rows = torch.arange(B); p[rows, count] picks a place for each row. Where count == gamma the distribution is "
        "p[:, gamma], else residual(p[rows, count], q[rows, count]). Draw: the first index whose cumsum exceeds "
        "u_final.",
        "count = accept(p[:, :gamma], q, drafts, u_accept)\nat = count.clamp(max=gamma - 1)\n"
        "last = torch.where((count < gamma)[:, None], residual(p[rows, at], q[rows, at]), p[:, gamma])\n"
        "final = (last.cumsum(dim=-1) <= u_final[:, None]).sum(dim=-1).clamp(max=V - 1)\n"
        "... then drafts before place count, final at it, -1 behind.",
    ),
)

#: In the order of the lab's steps.
SPECULATIVE = (RESIDUAL, ACCEPT, EXPECTED_TOKENS, VERIFY, TREE_MASK)
