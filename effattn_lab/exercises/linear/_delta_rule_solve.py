"""Exercises on the triangular system of a chunk: solve it by forward substitution, and set it up."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.linear._delta_rule_token import FROM_SCRATCH, rates, unit
from effattn_lab.exercises.making import mutants, normal

# ---- forward substitution ----------------------------------------------------------------------------------


def solve(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """(I + strictly lower part of A) X = B, row after row."""
    X = torch.zeros_like(B)
    for i in range(A.shape[-1]):
        X[..., i, :] = B[..., i, :] - (A[..., i, None, :i] @ X[..., :i, :].clone())[..., 0, :]
    return X


def _solve_reference(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, ...]:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return (torch.linalg.solve(eye + A.tril(-1), B),)


def _solve_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, c: int, n: int = 3, *, equal: bool = False, clean: bool = False) -> Case:
        shape = (2, 2)
        A = torch.full((*shape, c, c), 1.5) if equal else 0.7 * normal(rng, *shape, c, c)
        return Case(name, {"A": A.tril(-1) if clean else A, "B": normal(rng, *shape, c, n)})

    return [
        case("solves the system", 8, clean=True),
        case("only the strictly lower part counts", 8),
        case("one row", 1),
        case("a whole chunk of equal keys", 64, equal=True),
        case("as many columns as rows", 6, 6),
    ]


def _solved(M: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """M X = B, by NumPy: torch's own is refused within a check."""
    return torch.from_numpy(np.linalg.solve(M.numpy(), B.numpy()))


def _solve_mutant(fault: str, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    L = A.tril(-1)
    if fault == "inclusive triangle":
        return _solved(eye + A.tril(), B)
    if fault == "the whole matrix":
        return _solved(eye + A, B)
    if fault == "upper triangle":
        return _solved(eye + A.triu(1), B)
    if fault == "transposed":
        return _solved(eye + L.mT, B)
    if fault == "one term of the series":
        return B - L @ B
    if fault == "doubling":
        power, X = -L, B - L @ B
        for _ in range(5):
            power = power @ power
            X = X + power @ X
        return X
    if fault == "added":
        return _solved(eye - L, B)
    if fault == "the identity left out":
        return L @ B
    X = solve(A, B)  # "last row left out"
    X[..., -1, :] = B[..., -1, :]
    return X


_SOLVERS = (
    "solve_triangular",
    "solve",
    "solve_ex",
    "lu_solve",
    "inv",
    "inv_ex",
    "inverse",
    "pinv",
    "triangular_solve",
)

SOLVE = Exercise(
    id="linear/delta_rule/solve",
    title="forward substitution",
    signature="solve(A [..., C, C], B [..., C, n]) -> X [..., C, n] with (I + strictly lower part of A) X = B",
    outputs=(Output("X", "B"),),
    make_inputs=_solve_inputs,
    reference=_solve_reference,
    solution=solve,
    from_scratch=(*FROM_SCRATCH, *(f"torch.linalg.{name}" for name in _SOLVERS)),
    properties={
        "solves the system": "Row i: x_i = b_i minus the sum over j < i of A_ij x_j, with the finished x_j.",
        "only the strictly lower part counts": "A has numbers on its diagonal and above. They are not part of the "
        "system.",
        "one row": "The first row is b_0.",
        "a whole chunk of equal keys": "64 rows with all entries 1.5: the solution is small. Powers of the matrix "
        "are not.",
        "as many columns as rows": "With n = C no shape stops you from a wrong transpose.",
    },
    tolerance=Tolerance(
        2e-4,
        2e-4,
        "a row subtracts up to 63 products of which most cancel; float32 leaves 1e-5 of the largest, and random "
        "systems amplify that a few times.",
    ),
    mutants=mutants(
        _solve_mutant,
        {
            "inclusive triangle": "The diagonal of A is used: the triangle is inclusive. A token's own write does "
            "not "
            "enter its own error: only j < i.",
            "the whole matrix": "All of A is used. Row i may only see rows above it: a later token changes nothing.",
            "upper triangle": "The upper part of A is used, not the lower one.",
            "transposed": "The lower part is used transposed: row i needs A_ij with j < i, which is A[i, :i].",
            "one term of the series": "B - A B uses the given rows where the finished ones belong: x_j, not b_j. "
            "It is "
            "the first term of a series.",
            "doubling": "(I - L)(I + L^2)(I + L^4) ... is right on paper; in float32 the powers of 64 equal keys "
            "pass "
            "10^20, and what is left after they cancel is noise. Substitute row by row.",
            "added": "The finished rows are added; they are subtracted from b_i.",
            "the identity left out": "That is a product with A, not a solution of a system.",
            "last row left out": "The last row is never reduced: the loop runs over all C rows.",
        },
    ),
    hints=(
        "Start at the top: the first row has nothing to subtract.",
        "One row at a time: take A[..., i, :i] times the finished rows X[..., :i, :] away from B[..., i, :].",
        "X = torch.zeros_like(B)\nfor i in range(A.shape[-1]):\n"
        "    X[..., i, :] = B[..., i, :] - (A[..., i, None, :i] @ X[..., :i, :].clone())[..., 0, :]\nreturn X",
    ),
)

# ---- the system --------------------------------------------------------------------------------------------


def decay_matrix(g: torch.Tensor) -> torch.Tensor:
    """exp(g_{b+1} + ... + g_a) on and below the diagonal, 0 above."""
    c = g.cumsum(dim=-1)
    between = c[..., :, None] - c[..., None, :]
    below = torch.ones_like(between, dtype=torch.bool).tril()
    return between.masked_fill(~below, float("-inf")).exp()


def system(
    S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R of (I + L) X = R: what each token of a chunk writes."""
    L = (beta[..., None] * decay_matrix(g) * (k @ k.mT)).tril(-1)
    asked = g.cumsum(dim=-1).exp()[..., None] * k
    return L, beta[..., None] * (v - asked @ S)


def _system_reference(
    S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    size = g.shape[-1]
    L = torch.zeros(*g.shape, size, dtype=g.dtype, device=g.device)
    R = torch.zeros_like(v)
    for a in range(size):
        for b in range(a):
            between = g[..., b + 1 : a + 1].sum(dim=-1).exp()
            L[..., a, b] = beta[..., a] * between * (k[..., a, :] * k[..., b, :]).sum(dim=-1)
        decayed = g[..., : a + 1].sum(dim=-1).exp()[..., None, None] * S
        R[..., a, :] = beta[..., a, None] * (v[..., a, :] - (k[..., a, None, :] @ decayed)[..., 0, :])
    return L, R


def _system_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, c: int, *, decay: float = 0.7, empty: bool = False, dv: int = 4, length: float = 1.0
    ) -> Case:
        shape, d = (2,), 6
        S = normal(rng, *shape, d, dv)
        g = -torch.from_numpy(rng.uniform(0.5, 1.5, (*shape, c))).float() * decay
        return Case(name, {
            "S": 0 * S if empty else S, "k": length * unit(rng, *shape, c, d), "v": normal(rng, *shape, c, dv),
            "beta": rates(rng, *shape, c), "g": g,
        })  # fmt: skip

    return [
        case("what each token writes", 6),
        case("no decay", 6, decay=0.0),
        case("an empty state", 5, empty=True),
        case("one token", 1),
        case("strong decay", 12, decay=60.0),
        case("as many tokens as dimensions", 6, dv=6),
        case("keys as they come", 6, length=0.6),
    ]


def _system_mutant(
    fault: str, S: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if fault == "keys normalised":
        k = k / k.norm(dim=-1, keepdim=True)
    c = g.cumsum(dim=-1)
    late = c - g  # without the token's own decay
    between = c[..., :, None] - c[..., None, :]
    if fault == "decay off by one":
        between = late[..., :, None] - c[..., None, :]
    elif fault == "one decay too many":
        between = c[..., :, None] - late[..., None, :]
    if fault == "masked too late":
        gamma = between.exp()
    else:
        below = torch.ones_like(between, dtype=torch.bool).tril()
        gamma = between.masked_fill(~below, float("-inf")).exp()
    if fault == "writes do not decay":
        gamma = torch.ones_like(gamma).tril()
    rate = {"beta of the writer": beta[..., None, :], "no beta in L": torch.ones_like(beta)[..., None]}
    L = rate.get(fault, beta[..., None]) * gamma * (k @ k.mT)
    L = (
        L * torch.ones_like(L).tril(-1)
        if fault == "masked too late"
        else L.tril(0 if fault == "inclusive triangle" else -1)
    )
    asked = {"state not decayed": torch.zeros_like(c), "state decayed too late": late}.get(fault, c).exp()[
        ..., None
    ] * k
    if fault == "state not asked":
        return L, beta[..., None] * v
    if fault == "no beta in R":
        return L, v - asked @ S
    return L, beta[..., None] * (v - asked @ S)


SYSTEM = Exercise(
    id="linear/delta_rule/system",
    title="the system of a chunk",
    signature="system(S [..., D, Dv], k [..., C, D], v [..., C, Dv], beta [..., C], g [..., C]) -> (L [..., C, "
    "C], R)",
    outputs=(Output("L", "k"), Output("R", "v")),
    make_inputs=_system_inputs,
    reference=_system_reference,
    solution=system,
    from_scratch=FROM_SCRATCH,
    properties={
        "what each token writes": "L_ab = beta_a exp(g_{b+1} + .. + g_a) (k_a . k_b) for b < a, "
        "R_a = beta_a (v_a - exp(g_1 + .. + g_a) S^T k_a).",
        "no decay": "With g = 0, L is beta times the strictly lower part of K K^T.",
        "an empty state": "With S = 0, R = beta V.",
        "one token": "L is the number 0.",
        "strong decay": "Above the diagonal c_a - c_b is positive and e to it overflows: inf * 0 is NaN. Mask before "
        "you exponentiate.",
        "as many tokens as dimensions": "With C = D = Dv no shape stops you from a wrong transpose.",
        "keys as they come": "From step 4 on nothing is scaled to length 1 any more: that has been done.",
    },
    tolerance=Tolerance(
        5e-5,
        1e-5,
        "differences of running sums up to 60 in float32 have an error of 4e-6, which the exponential keeps.",
    ),
    loose={
        "strong decay": Tolerance(
            1e-3,
            1e-5,
            "running sums reach 700 here: their differences are off by 6e-5, and so are their exponentials.",
        )
    },
    mutants=mutants(
        _system_mutant,
        {
            "inclusive triangle": "L has a diagonal: the triangle is inclusive. A token's error is taken before "
            "its own "
            "write, so only b < a.",
            "decay off by one": "The decay between b and a lacks a's own: token a decays the state before it "
            "compares. "
            "The sum is g_{b+1} + .. + g_a.",
            "one decay too many": "The write of b is decayed by g_b too. It comes after b's decay: the sum begins "
            "at b + 1.",
            "writes do not decay": "Writes inside the chunk do not decay: e^(c_a - c_b) is missing in L.",
            "masked too late": "The mask comes after the exponential: above the diagonal that is inf, and inf * 0 "
            "is NaN.",
            "beta of the writer": "L has beta_b, the writer's. It is token a that corrects, with its own rate "
            "beta_a.",
            "no beta in L": "beta is missing in L: the value is written with rate beta, but all of the answer is "
            "erased.",
            "no beta in R": "beta is missing in R.",
            "state not decayed": "The tokens ask the state as the chunk found it. By token a it is decayed by "
            "e^(g_1 + .. + g_a).",
            "state decayed too late": "Each token asks the state without its own decay, one token too late.",
            "state not asked": "R = beta V only holds for an empty state: what S answers already is missing.",
            "keys normalised": "k is scaled to length 1 here. From this step on keys come as they are to be used.",
        },
    ),
    hints=(
        "c = g.cumsum(-1). What token b wrote has decayed by e^(c_a - c_b) when a asks; what S held, by e^(c_a).",
        "c[..., :, None] - c[..., None, :], masked with -inf above the diagonal, then .exp(). Then beta[..., None] "
        "times it times k @ k.mT, strictly lower.",
        "c = g.cumsum(-1)\nbetween = c[..., :, None] - c[..., None, :]\n"
        "below = torch.ones_like(between, dtype=torch.bool).tril()\n"
        "gamma = between.masked_fill(~below, float('-inf')).exp()\nL = (beta[..., None] * gamma * (k @ "
        "k.mT)).tril(-1)\n"
        "R = beta[..., None] * (v - (c.exp()[..., None] * k) @ S)",
    ),
)
