"""Exercise: the backward pass of one chunk."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._linear_attention_parts import FROM_SCRATCH
from effattn_lab.exercises.making import mutants, normal


def chunk_backward(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, dS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of o = q S + tril(q k^T) v and S' = S + k^T v, given do and the gradient dS of S'."""
    p, dp = (q @ k.T).tril(), (do @ v.T).tril()
    dq = do @ S.T + dp @ k
    dk = dp.T @ q + v @ dS.T
    dv = p.T @ do + k @ dS
    return dq, dk, dv, dS + q.T @ do


def _backward_reference(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, dS: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """By autograd, through the recurrence."""
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, S)]
        q_, k_, v_, state = leaves
        loss = torch.zeros((), dtype=q.dtype)
        for t in range(q.shape[0]):
            state = state + torch.outer(k_[t], v_[t])
            loss = loss + (q_[t] @ state) @ do[t]
        return tuple(torch.autograd.grad(loss + (state * dS).sum(), leaves))


def _backward_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, c: int, f: int = 8, dv: int = 6, *, past: float = 1.0, later: float = 1.0) -> Case:
        return Case(name, {
            "S": normal(rng, f, dv, size=past), "q": normal(rng, c, f), "k": normal(rng, c, f),
            "v": normal(rng, c, dv), "do": normal(rng, c, dv), "dS": normal(rng, f, dv, size=later),
        })  # fmt: skip

    return [
        case("equals autograd", 16),
        case("the first chunk", 12, past=0.0),
        case("the last chunk", 12, later=0.0),
        case("a chunk of one token", 1),
        case("as many tokens as features", 8, f=8, dv=8),
        case("a long chunk", 64),
    ]


def _backward_mutant(
    fault: str,
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    dS: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    p, dp = q @ k.T, do @ v.T
    p = (
        p
        if fault in ("mask forgotten", "weights unmasked")
        else p.triu()
        if fault == "mask transposed"
        else p.tril()
    )
    dp = (
        dp
        if fault in ("mask forgotten", "gradient unmasked")
        else dp.triu()
        if fault == "mask transposed"
        else dp.tril()
    )
    dq, dk, dv = do @ S.T + dp @ k, dp.T @ q, p.T @ do
    if fault == "past forgotten":
        dq = dp @ k
    if fault != "border lost":
        dk = dk + v @ (S if fault == "S in place of dS" else dS).T
        dv = dv + k @ (S if fault == "S in place of dS" else dS)
    back = {"dS replaced": q.T @ do, "dS passed on": dS.clone()}.get(fault, dS + q.T @ do)
    return dq, dk, dv, back


BACKWARD = Exercise(
    id="linear/linear_attention/chunk_backward",
    title="the backward pass of one chunk",
    signature="chunk_backward(S [F, Dv], q [C, F], k [C, F], v [C, Dv], do [C, Dv], dS [F, Dv]) -> (dq, dk, "
    "dv, dS)",
    outputs=(Output("dq", "q"), Output("dk", "k"), Output("dv", "v"), Output("dS", "S")),
    make_inputs=_backward_inputs,
    reference=_backward_reference,
    solution=chunk_backward,
    from_scratch=(*FROM_SCRATCH, "torch.autograd.grad", "torch.autograd.backward"),
    properties={
        "equals autograd": "o = q S + P v with P = tril(q k^T), and S' = S + k^T v. Differentiate each product.",
        "the first chunk": "S = 0: dq comes from inside the chunk alone.",
        "the last chunk": "dS = 0: nothing comes from later chunks.",
        "a chunk of one token": "P is one number, q . k.",
        "as many tokens as features": "With C = F = Dv no shape stops you from a wrong transpose.",
        "a long chunk": "P and its gradient are masked alike.",
    },
    tolerance=Tolerance(
        3e-5,
        2e-4,
        "sums of up to 64 terms, each a float32 sum of 8 products itself: terms reach 50, so their rounding "
        "adds up to a few 1e-5, also where they cancel.",
    ),
    mutants=mutants(
        _backward_mutant,
        {
            "border lost": "dk and dv lack what comes back through the border: this chunk's keys and values "
            "are in the state that later chunks read, so dS reaches them.",
            "past forgotten": "dq lacks do S^T: the queries read the state that the chunk found.",
            "dS replaced": "The gradient handed to the earlier chunk lacks dS: S is part of S', so it all "
            "passes through.",
            "dS passed on": "The gradient handed to the earlier chunk lacks q^T do: this chunk's queries read "
            "S too.",
            "S in place of dS": "dk and dv use the state S. What flows back into the keys is the gradient dS.",
            "mask forgotten": "Neither P nor its gradient is masked: what the forward pass cut away gets "
            "gradients.",
            "weights unmasked": "P is not masked in dv: it has to be the P of the forward pass.",
            "gradient unmasked": "do v^T is not masked in dq and dk: entries that were cut away have no gradient.",
            "mask transposed": "The mask keeps the wrong half. P and dP are masked as in the forward pass: "
            "query rows, keys up to the diagonal.",
        },
    ),
    hints=(
        "Four products in the forward pass: q S, q k^T, P v, k^T v. The product Y = A B has dA = dY B^T and dB "
        "= A^T dY.",
        "From P v: dP = do v^T (masked as P is) and dv = P^T do. From q k^T: dq = dP k, dk = dP^T q. From q S: "
        "dq gets do S^T, dS gets q^T do. From k^T v, whose gradient is dS: dk gets v dS^T, dv gets k dS.",
        "p, dp = (q @ k.T).tril(), (do @ v.T).tril()\ndq = do @ S.T + dp @ k\ndk = dp.T @ q + v @ dS.T\n"
        "dv = p.T @ do + k @ dS\nreturn dq, dk, dv, dS + q.T @ do",
    ),
)
