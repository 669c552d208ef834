"""Speculative sampling: cheap guesses, one pass of the target to judge them all, and exactly the target's samples.

Notation of Leviathan et al. 2023: **p is the target's distribution, q the draft's** (Chen et al. 2023 call them q
and p). A round drafts ``gamma`` tokens ``x_i ~ q_i``, gets the target's ``p_1 .. p_{gamma+1}`` from one pass over
them and

* accepts ``x_i`` with probability ``min(1, p_i(x_i) / q_i(x_i))``, from left to right, until the first rejection;
* there draws the token from the residual ``max(0, p_i - q_i) / sum max(0, p_i - q_i)``;
* if nothing was rejected, draws one more token from ``p_{gamma+1}``, which the pass has given anyway.

Everything here is a pure function. The random numbers are arguments, uniform in [0, 1): the same numbers give the
same tokens, and a test can hold every branch against the formula.

Sources: Leviathan, Kalman, Matias 2023 (algorithm 1, appendix A.1); Chen et al. 2023 (algorithm 2, theorem 1).
"""

from __future__ import annotations

import torch

#: How far a row may be from summing to 1: float32 rounding over a vocabulary of 2^18.
SUM_TOLERANCE = 1e-3
#: Stands where a round produced no token.
NO_TOKEN = -1


def sample(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-transform sampling: the first token whose cumulative probability exceeds ``u``.

    Args:
        probs: ``[..., V]``, distributions over the last axis.
        u: ``[...]``, uniform in [0, 1).

    Returns:
        int64 ``[...]``. A token of probability 0 is never drawn, whatever ``u`` and the rounding of the sums.
    """
    _check_probs("probs", probs)
    _check_uniform("u", u, probs.shape[:-1])
    return _sample(probs, u)


def acceptance(p: torch.Tensor, q: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Probability with which a drafted token is accepted: ``min(1, p(x) / q(x))``.

    Args:
        p, q: ``[..., V]``, the target's and the draft's distribution.
        token: int64 ``[...]``, drawn from ``q``, so that ``q(x) > 0``.

    Returns:
        ``[...]``, in (0, 1] where ``p(x) > 0``, else 0.
    """
    _check_pair(p, q)
    _check_token("token", token, q)
    p_x, q_x = (x.gather(-1, token[..., None])[..., 0] for x in (p, q))
    return torch.clamp(p_x / q_x, max=1.0)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Where a rejected position is drawn from: ``max(0, p - q)``, normalised.

    Args:
        p, q: ``[..., V]``.

    Returns:
        ``[..., V]``. For ``p = q`` nothing is ever rejected and the residual is 0/0: then ``p`` is returned.
    """
    _check_pair(p, q)
    return _residual(p, q)


def overlap(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Probability that a draft from ``q`` is accepted: ``beta = sum min(p, q) = 1 - TV(p, q)``, ``[...]``."""
    _check_pair(p, q)
    return torch.minimum(p, q).sum(dim=-1)


def emitted(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Distribution of the token that one position emits, by its two ways: accepted draft, or residual.

    ``q(x) min(1, p(x)/q(x)) + (1 - beta) residual(x)``, ``[..., V]``. Equal to ``p``; computed as it comes about.
    """
    _check_pair(p, q)
    accepted = torch.minimum(p, q)
    return accepted + (1 - accepted.sum(dim=-1, keepdim=True)) * _residual(p, q)


def one_hot(tokens: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Distribution of a draft that isn't random, ``[..., V]``: the guess has q = 1, all others 0.

    Accepted with probability ``p(x)``; the residual is then ``p`` without ``x``.
    """
    return torch.nn.functional.one_hot(tokens, vocab_size).to(dtype)


def verify(
    p: torch.Tensor,
    q: torch.Tensor,
    drafts: torch.Tensor,
    u_accept: torch.Tensor,
    u_final: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judge one round of drafts for each of B sequences.

    Args:
        p: ``[B, gamma + 1, V]``, the target's distribution before each draft and after the last.
        q: ``[B, gamma, V]``, what each draft was drawn from.
        drafts: int64 ``[B, gamma]``, gamma at least 0.
        u_accept: ``[B, gamma]``, uniform in [0, 1): draft i is accepted iff ``u < p(x) / q(x)``.
        u_final: ``[B]``, draws the last token. It must be independent of ``u_accept``: given a rejection that number
            is no longer uniform.

    Returns:
        tokens int64 ``[B, gamma + 1]``: the accepted drafts, one token of the target's, then :data:`NO_TOKEN`;
        accepted int64 ``[B]``, 0 to gamma. A round yields ``accepted + 1`` tokens.

    Raises:
        ValueError: shapes that don't fit, rows that are no distributions, a draft that ``q`` can't draw.
    """
    _check_round(p, q, drafts)
    batch, gamma = drafts.shape
    _check_uniform("u_accept", u_accept, (batch, gamma))
    _check_uniform("u_final", u_final, (batch,))
    p_x = p[:, :gamma].gather(-1, drafts[..., None])[..., 0]
    q_x = q.gather(-1, drafts[..., None])[..., 0]
    # u < p / q without the division; u < 1 makes p >= q a sure acceptance.
    run = (u_accept * q_x < p_x).long().cumprod(dim=1)  # 1 until the first rejection
    accepted = run.sum(dim=1)  # [B]
    rows = torch.arange(batch, device=p.device)
    last = p[rows, accepted]  # [B, V]
    if gamma:
        rejected = accepted < gamma
        there = _residual(last, q[rows, accepted.clamp(max=gamma - 1)])
        last = torch.where(rejected[:, None], there, last)
    return _joined(drafts, accepted, _sample(last, u_final)), accepted


def verify_greedy(best: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same at temperature 0: a draft is accepted iff it is the target's most probable token.

    Args:
        best: int64 ``[B, gamma + 1]``, the target's argmax before each draft and after the last.
        drafts: int64 ``[B, gamma]``.

    Returns:
        tokens and accepted, as :func:`verify`.
    """
    for name, x in (("best", best), ("drafts", drafts)):
        if x.dim() != 2 or x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 [B, ...], got {x.dtype} of shape {tuple(x.shape)}")
    if best.shape != (drafts.shape[0], drafts.shape[1] + 1):
        raise ValueError(
            f"best: expected [B, gamma + 1] = {(drafts.shape[0], drafts.shape[1] + 1)}, got {tuple(best.shape)}"
        )
    accepted = (best[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1)
    return _joined(drafts, accepted, best.gather(1, accepted[:, None])[:, 0]), accepted


def _joined(drafts: torch.Tensor, accepted: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """``[B, gamma + 1]``: the first ``accepted`` drafts, then ``last``, then NO_TOKEN."""
    place = torch.arange(drafts.shape[1] + 1, device=drafts.device)
    tokens = torch.nn.functional.pad(drafts, (0, 1), value=NO_TOKEN)
    tokens = tokens.masked_fill(place > accepted[:, None], NO_TOKEN)
    return torch.where(place == accepted[:, None], last[:, None], tokens)


def _sample(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    sums = probs.cumsum(dim=-1)
    # Sums may end a rounding below 1, and u above them: then the last token that has any probability.
    possible = torch.arange(probs.shape[-1], device=probs.device) * (probs > 0)
    return torch.minimum((sums <= u[..., None]).sum(dim=-1), possible.amax(dim=-1))


def _residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    over = torch.clamp(p - q, min=0.0)
    total = over.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, over / torch.where(total > 0, total, 1.0), p)


# ---- bad input ---------------------------------------------------------------------------------------------


def _check_probs(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 1 or x.shape[-1] < 1:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected floating-point [..., V], V at least 1, got {got}")
    # `not (...)` refuses NaN too.
    if x.numel() and not (bool((x >= 0).all()) and bool(((x.sum(dim=-1) - 1).abs() < SUM_TOLERANCE).all())):
        raise ValueError(f"{name}: expected rows >= 0 that add up to 1, got one that isn't a distribution")


def _check_pair(p: torch.Tensor, q: torch.Tensor) -> None:
    _check_probs("p", p)
    _check_probs("q", q)
    if p.shape != q.shape or p.dtype != q.dtype:
        raise ValueError(
            f"q: expected shape and dtype of p {tuple(p.shape)} {p.dtype}, got {tuple(q.shape)} {q.dtype}"
        )


def _check_uniform(name: str, u: torch.Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(u, torch.Tensor) or not u.is_floating_point() or tuple(u.shape) != tuple(shape):
        got = f"{u.dtype} {tuple(u.shape)}" if isinstance(u, torch.Tensor) else type(u).__name__
        raise ValueError(f"{name}: expected floating-point numbers of shape {tuple(shape)}, got {got}")
    if not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError(f"{name}: expected numbers in [0, 1), got one outside")


def _check_token(name: str, token: torch.Tensor, q: torch.Tensor) -> None:
    if (
        not isinstance(token, torch.Tensor)
        or token.dtype != torch.int64
        or tuple(token.shape) != tuple(q.shape[:-1])
    ):
        got = (
            f"{token.dtype} {tuple(token.shape)}" if isinstance(token, torch.Tensor) else type(token).__name__
        )
        raise ValueError(f"{name}: expected int64 of shape {tuple(q.shape[:-1])}, got {got}")
    if token.numel() == 0:
        return
    if int(token.min()) < 0 or int(token.max()) >= q.shape[-1]:
        raise ValueError(
            f"{name}: expected tokens from 0 to {q.shape[-1] - 1}, got {int(token.min())} to {int(token.max())}"
        )
    if not bool((q.gather(-1, token[..., None]) > 0).all()):
        raise ValueError(f"{name}: expected tokens that q can draw, got one with q = 0")


def _check_round(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor) -> None:
    _check_probs("p", p)
    _check_probs("q", q)
    if p.dim() != 3 or q.dim() != 3 or q.shape != (p.shape[0], p.shape[1] - 1, p.shape[2]):
        raise ValueError(
            f"q: expected [B, gamma, V] to p [B, gamma + 1, V] = {tuple(p.shape)}, got {tuple(q.shape)}"
        )
    if q.dtype != p.dtype:
        raise ValueError(f"q: expected the dtype of p ({p.dtype}), got {q.dtype}")
    _check_token("drafts", drafts, q)
