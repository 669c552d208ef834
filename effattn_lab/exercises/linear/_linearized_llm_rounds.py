"""Rounds of drafts for the exercises, away from every threshold, and the ways to judge one wrongly."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Tolerance

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.linear.speculative",
    "effattn_lab.linear.speculative_cost",
    "effattn_lab.linear.speculative_decode",
    "effattn_lab.linear.speculative_drafts",
    "effattn_lab.linear.speculative_proof",
    "effattn_lab.linear.speculative_tree",
    "effattn_lab.foundations.serving.speculative_tokens",
)
EXACT = Tolerance(
    0.0, 0.0, "tokens and counts are whole numbers, and inputs keep 1e-4 away from every threshold."
)
MARGIN = 1e-4


def distributions(rng: np.random.Generator, *shape: int, size: float = 1.2) -> np.ndarray:
    """Softmax of normal numbers over the last axis, rounded to float32, as float64."""
    x = np.exp(rng.standard_normal(shape) * size)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32).astype(np.float64)


def round_of(
    rng: np.random.Generator, rows: int, gamma: int, vocab: int, like: str = ""
) -> dict[str, torch.Tensor]:
    """p ``[rows, gamma + 1, V]``, q ``[rows, gamma, V]``, drafts drawn from q, and uniform numbers.

    ``like``: "target" makes q equal p; "guess" q one-hot; "apart" gives p and q no token in common; "hole" gives the
    first token probability 0 in p, and u_final = 0 in half of the rows.
    Numbers nearer than ``MARGIN`` to a threshold (of an acceptance, of the last draw) are drawn again.
    """
    p, q = distributions(rng, rows, gamma + 1, vocab), distributions(rng, rows, gamma, vocab)
    if like == "target":
        q = p[:, :gamma].copy()
    elif like == "guess":
        q = np.eye(vocab)[rng.integers(0, vocab, (rows, gamma))]
    elif like == "apart":
        half = vocab // 2
        p[..., half:], q[..., :half] = 0, 0
    elif like == "hole":
        p[..., 0] = 0
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    p, q = (x.astype(np.float32).astype(np.float64) for x in (p, q))
    drafts = (q.cumsum(-1) <= rng.random((rows, gamma, 1)) * 0.9999).sum(-1)
    u_accept = _uniform(rng, (rows, gamma))
    while True:
        p_x, q_x = (np.take_along_axis(x, drafts[..., None], -1)[..., 0] for x in (p[:, :gamma], q))
        near = (np.abs(u_accept * q_x - p_x) < MARGIN) & (p_x < q_x)
        if not near.any():
            break
        u_accept[near] = _uniform(rng, int(near.sum()))
    count = (u_accept * q_x < p_x).astype(int).cumprod(1).sum(1)
    u_final = _uniform(rng, rows)
    fixed = np.zeros(rows, dtype=bool)
    if like == "hole":
        fixed[::2] = True
        u_final[fixed] = 0.0
    sums = _last(p, q, count).cumsum(-1)
    while True:
        near = (np.abs(sums - u_final[:, None]) < MARGIN).any(-1) & ~fixed
        if not near.any():
            break
        u_final[near] = _uniform(rng, int(near.sum()))
    tensors = {"p": p, "q": q, "u_accept": u_accept, "u_final": u_final}
    made = {name: torch.from_numpy(x).float() for name, x in tensors.items()}
    made["drafts"] = torch.from_numpy(drafts)
    return made


def _uniform(rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    return rng.uniform(MARGIN, 1 - 2 * MARGIN, shape).astype(np.float32).astype(np.float64)


def _last(p: np.ndarray, q: np.ndarray, count: np.ndarray) -> np.ndarray:
    gamma, rows = q.shape[1], np.arange(len(p))
    at = np.minimum(count, gamma - 1)
    over = np.maximum(p[rows, at] - q[rows, at], 0)
    total = over.sum(-1, keepdims=True)
    rest = np.where(total > 0, over / np.where(total > 0, total, 1), p[rows, at])
    return np.where((count < gamma)[:, None], rest, p[:, gamma])


def round_case(name: str, rng: np.random.Generator, **how: object) -> Case:
    """A case of the exercise ``verify``."""
    given = round_of(rng, **how)  # type: ignore[arg-type]
    return Case(name, {n: given[n] for n in ("p", "q", "drafts", "u_accept", "u_final")})


def judge(
    fault: str,
    p: torch.Tensor,
    q: torch.Tensor,
    drafts: torch.Tensor,
    u_accept: torch.Tensor,
    u_final: torch.Tensor,
) -> torch.Tensor:
    """A round judged with one fault."""
    batch, gamma = drafts.shape
    p_x, q_x = (x.gather(-1, drafts[..., None])[..., 0] for x in (p[:, :gamma], q))
    taken = u_accept * p_x < q_x if fault == "turned round" else u_accept * q_x < p_x
    if fault == "accepted at 0":
        taken = u_accept * q_x <= p_x
    count = taken.long().cumprod(dim=1).sum(dim=1)
    rows, at = torch.arange(batch), count.clamp(max=gamma - 1)
    place = torch.zeros_like(at) if fault == "first place" else at
    over = torch.clamp(p[rows, place] - q[rows, place], min=0.0)
    total = over.sum(dim=-1, keepdim=True)
    rest = torch.where(total > 0, over / torch.where(total > 0, total, 1.0), p[rows, place])
    if fault == "not normalised":
        rest = torch.where(total > 0, over, rest)
    if fault == "from p":
        rest = p[rows, at]
    bonus = p[:, gamma - 1] if fault == "bonus from the last draft" else p[:, gamma]
    last = torch.where((count < gamma)[:, None], rest, bonus)
    if fault == "residual after all":
        over = torch.clamp(p[:, gamma] - q[:, gamma - 1], min=0.0)
        last = torch.where((count < gamma)[:, None], rest, over / over.sum(dim=-1, keepdim=True))
    draw = u_final
    if fault == "u twice":
        draw = torch.where(count < gamma, u_accept[rows, at], u_final)
    if fault.startswith("u_accept"):
        draw = {"of the place": u_accept[rows, at], "first": u_accept[:, 0], "last": u_accept[:, -1]}[
            fault[9:]
        ]
    sums = last.cumsum(dim=-1)
    final = ((sums < draw[:, None]) if fault == "at or above" else (sums <= draw[:, None])).sum(dim=-1)
    if fault != "no clamp":
        final = final.clamp(max=p.shape[-1] - 1)
    if fault == "argmax":
        final = last.argmax(dim=-1)
    slots = torch.arange(gamma + 1)
    tokens = torch.cat([drafts, final[:, None]], dim=1)
    if fault == "keeps the rejected":
        shown = (count + 1).clamp(max=gamma)
        tokens = tokens.masked_fill(slots > shown[:, None], -1)
        return torch.where(slots == shown[:, None], final[:, None], tokens)
    if fault == "no final token":
        return tokens.masked_fill(slots >= count[:, None], -1)
    if fault != "goes on":
        tokens = tokens.masked_fill(slots > count[:, None], -1)
    else:
        tokens = torch.where((slots == gamma) & (count < gamma)[:, None], -1, tokens)
    tokens = torch.where(slots == count[:, None], final[:, None], tokens)
    if fault == "no bonus":
        tokens = tokens.masked_fill((slots == gamma) & (count == gamma)[:, None], -1)
    return tokens
