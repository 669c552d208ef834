"""Exercises on one token: the write that corrects, and the whole step with decay and read."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = ("effattn_lab.linear.delta_rule", "effattn_kernels.delta_rule")


def unit(rng: np.random.Generator, *shape: int, overlap: float = 0.7) -> torch.Tensor:
    """Keys of length 1 that lean the same way: orthogonal ones would have nothing to erase."""
    x = normal(rng, *shape) + overlap
    return x / x.norm(dim=-1, keepdim=True)


def rates(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Numbers between 0 and 2."""
    return torch.from_numpy(rng.uniform(0.1, 1.9, shape)).float()


# ---- write -------------------------------------------------------------------------------------------------


def write(S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """A step of gradient descent on |S^T k - v|^2 / 2 with rate beta."""
    answer = (k[..., None, :] @ S)[..., 0, :]
    return S + (beta[..., None] * k)[..., :, None] * (v - answer)[..., None, :]


def _write_reference(
    S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    outer = beta[..., None, None] * torch.einsum("...i,...j->...ij", k, k)
    return ((eye - outer) @ S + beta[..., None, None] * torch.einsum("...i,...j->...ij", k, v),)


def _write_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str,
        d: int = 6,
        dv: int = 4,
        *,
        beta: float | None = None,
        empty: bool = False,
        length: float = 1,
    ) -> Case:
        shape = (2, 3)
        S, k = normal(rng, *shape, d, dv), length * unit(rng, *shape, d)
        b = rates(rng, *shape) if beta is None else torch.full(shape, beta)
        return Case(name, {"S": 0 * S if empty else S, "k": k, "v": normal(rng, *shape, dv), "beta": b})

    return [
        case("a step down the slope"),
        case("beta 1 overwrites", beta=1.0),
        case("beta 0 leaves the state", beta=0.0),
        case("beta 2 mirrors", beta=2.0),
        case("an empty state", empty=True),
        case("as many values as keys", d=5, dv=5),
        case("a longer key", length=1.8),
    ]


def _write_mutant(
    fault: str, S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    if fault == "key shortened":
        k = k / k.norm(dim=-1, keepdim=True)
    answer = (k[..., None, :] @ S)[..., 0, :]
    kb = beta[..., None] * k

    def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a[..., :, None] * b[..., None, :]

    if fault == "never erases":
        return S + outer(kb, v)
    if fault == "beta on the value only":
        return S + outer(kb, v) - outer(k, answer)
    if fault == "beta on the erasure only":
        return S + outer(k, v) - outer(kb, answer)
    if fault == "no beta":
        return S + outer(k, v - answer)
    if fault == "uphill":
        return S - outer(kb, v - answer)
    if fault == "answer added":
        return S + outer(kb, v + answer)
    if fault == "state replaced":
        return outer(kb, v - answer)
    if fault == "decay instead of erasure":
        return (1 - beta)[..., None, None] * S + outer(kb, v)
    if fault == "transposed" and S.shape[-1] == S.shape[-2]:  # elsewhere the shapes do not allow it
        answer = (S @ k[..., None])[..., 0]
    return S + outer(kb, v - answer)


WRITE = Exercise(
    id="linear/delta_rule/write",
    title="a write that corrects",
    signature="write(S [..., D, Dv], k [..., D], v [..., Dv], beta [...]) -> S [..., D, Dv]",
    outputs=(Output("S", "S"),),
    make_inputs=_write_inputs,
    reference=_write_reference,
    solution=write,
    from_scratch=FROM_SCRATCH,
    properties={
        "a step down the slope": "The loss |S^T k - v|^2 / 2 has the gradient k (S^T k - v)^T. Go beta of it, "
        "downwards.",
        "beta 1 overwrites": "With |k| = 1 and beta 1 the new state answers v to k, exactly.",
        "beta 0 leaves the state": "Nothing happens with rate 0.",
        "beta 2 mirrors": "With beta 2 the error changes its sign.",
        "an empty state": "An empty state answers 0, so all of v is missing.",
        "as many values as keys": "With D = Dv no shape stops you from a wrong transpose: the answer is S^T k.",
        "a longer key": "The gradient is that of the key as it comes, whatever its length.",
    },
    tolerance=Tolerance(
        1e-5, 1e-5, "a handful of products and sums of numbers of size 1 to 4 in float32: 1e-6."
    ),
    mutants=mutants(
        _write_mutant,
        {
            "never erases": "v is added whatever the state answers already: that is linear attention. Add what is "
            "missing, v - S^T k.",
            "beta on the value only": "beta scales what is written, but the erasure is done in full: S loses more "
            "than "
            "it gets. Both belong to one step of rate beta.",
            "beta on the erasure only": "beta scales the erasure, but v is written in full.",
            "no beta": "beta is not used: the step always has rate 1.",
            "uphill": "The step goes up the slope: the error grows. Add beta k (v - S^T k)^T.",
            "answer added": "The answer is added to v; the error is their difference.",
            "state replaced": "The old state is gone: the step is added to it.",
            "decay instead of erasure": "All of S is multiplied by 1 - beta. Only the direction of k is to be "
            "corrected; "
            "what is stored under other keys stays.",
            "transposed": "The answer is S^T k, a vector of Dv numbers: k meets the rows of S, not its columns.",
            "key shortened": "k is divided by its length. The step goes down the slope for the key as it comes; "
            "lengths are the business of the next step.",
        },
    ),
    hints=(
        "First ask: what does the state answer to k? Then write what is missing.",
        "answer = S^T k, as a row k @ S. The step is beta times the outer product of k with v - answer.",
        "answer = (k[..., None, :] @ S)[..., 0, :]\n"
        "return S + (beta[..., None] * k)[..., :, None] * (v - answer)[..., None, :]",
    ),
)

# ---- token -------------------------------------------------------------------------------------------------


def token(
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale q and k to length 1; forget, compare and write, read."""
    q, k = (x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    S = write(g.exp()[..., None, None] * S, k, v, beta)
    return scale * (q[..., None, :] @ S)[..., 0, :], S


def _token_reference(
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    (S,) = _write_reference(torch.exp(g)[..., None, None] * S, k, v, beta)
    return scale * torch.einsum("...i,...ij->...j", q, S), S


def _token_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, *, size: float = 1.0, g: float | None = None, empty: bool = False, scale: float = 0.5
    ) -> Case:
        shape, d, dv = (2, 3), 6, 4
        S = normal(rng, *shape, d, dv)
        decay = -torch.from_numpy(rng.uniform(0.3, 2.0, shape)).float() if g is None else torch.full(shape, g)
        return Case(name, {
            "S": 0 * S if empty else S, "q": size * (normal(rng, *shape, d) + 0.5),
            "k": size * (normal(rng, *shape, d) + 0.5), "v": normal(rng, *shape, dv),
            "beta": rates(rng, *shape), "g": decay, "scale": scale,
        })  # fmt: skip

    return [
        case("forget, compare, write, read"),
        case("no decay", g=0.0),
        case("all forgotten", g=-1e4),
        case("the first token", empty=True),
        case("long keys", size=30.0),
        case("a zero key", size=0.0),
        case("scale", scale=1.7),
    ]


def _token_mutant(
    fault: str,
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    def unit_length(x: torch.Tensor) -> torch.Tensor:
        if fault == "0 / 0":
            return x / x.norm(dim=-1, keepdim=True)
        return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()

    q = q if fault in ("keys only", "unnormalised") else unit_length(q)
    k = k if fault in ("queries only", "unnormalised") else unit_length(k)
    decay = g.exp()[..., None, None]
    answer = {"compared before forgetting": S, "forgotten after writing": S}.get(fault, decay * S)
    error = v - (k[..., None, :] @ answer)[..., 0, :]
    step = (beta[..., None] * k)[..., :, None] * error[..., None, :]
    if fault == "forgotten after writing":
        new = decay * (S + step)
    elif fault == "never forgets":
        new = write(S, k, v, beta)
    elif fault == "decay not exponentiated":
        new = write((1 + g)[..., None, None] * S, k, v, beta)
    else:
        new = decay * S + step
    read = {"read before writing": decay * S, "read from the old state": S}.get(fault, new)
    out = (q[..., None, :] @ read)[..., 0, :]
    return out if fault == "scale forgotten" else scale * out, new


TOKEN = Exercise(
    id="linear/delta_rule/token",
    title="one token, with decay",
    signature="token(S [..., D, Dv], q, k [..., D], v [..., Dv], beta [...], g [...], scale) -> (out [..., Dv], S)",
    outputs=(Output("out", "q"), Output("S", "S")),
    make_inputs=_token_inputs,
    reference=_token_reference,
    solution=token,
    from_scratch=FROM_SCRATCH,
    properties={
        "forget, compare, write, read": "In this order: S is multiplied by e^g, then compared with v, then "
        "corrected, "
        "then read.",
        "no decay": "g = 0: e^0 = 1, plain DeltaNet.",
        "all forgotten": "g = -1e4: nothing is left of the old state, and nothing of it may be erased either.",
        "the first token": "From an empty state: out = scale (q . k) beta v, with q and k of length 1.",
        "long keys": "q and k are divided by their length first, so that their size does not matter.",
        "a zero key": "Length 0: divide by sqrt(|k|^2 + 1e-6), and a zero vector stays zero.",
        "scale": "scale multiplies out, what is read; the state does not know it.",
    },
    tolerance=Tolerance(
        2e-5,
        1e-5,
        "a root, an exponential and a handful of products of numbers of size 1 to 4 in float32: 1e-6.",
    ),
    mutants=mutants(
        _token_mutant,
        {
            "compared before forgetting": "The error is taken from the state as it was before the decay: more is "
            "erased "
            "than is left. Decay first.",
            "forgotten after writing": "The decay comes after the write, so the new value is weakened at once: it "
            "is off "
            "by one token.",
            "never forgets": "g is not used.",
            "decay not exponentiated": "g is a logarithm: the factor is e^g, not 1 + g.",
            "read before writing": "The state is read before the token's own write. A token sees itself.",
            "read from the old state": "The state that came in is read, undecayed and without the token's write.",
            "scale forgotten": "out is not multiplied by scale.",
            "unnormalised": "q and k keep their length: with |k| = 3 and beta = 1 the state is multiplied by 1 - "
            "9 along "
            "k, and a few tokens later it has exploded.",
            "keys only": "k is divided by its length, q is not.",
            "queries only": "q is divided by its length, k is not: it is k that makes the state explode.",
            "0 / 0": "A zero key divided by its length is 0 / 0. Put 1e-6 under the root.",
        },
    ),
    hints=(
        "Four lines: lengths, decay, your write of step 1, the read.",
        "x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for q and k; then S = g.exp()[..., None, None] * S.",
        "q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))\n"
        "S = write(g.exp()[..., None, None] * S, k, v, beta)\nreturn scale * (q[..., None, :] @ S)[..., 0, :], S",
    ),
)
