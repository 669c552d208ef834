"""Exercises on the parts of a gated recurrence: one token, a gate, the mask of decays."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.linear.gated_linear",
    "effattn_lab.linear.gated_linear_layer",
    "effattn_lab.linear.decay",
    "effattn_lab.linear.gates",
    "effattn_lab.linear.rwkv",
    "effattn_kernels.gated_linear",
)


def decays(rng: np.random.Generator, *shape: int, low: float = -2.0) -> torch.Tensor:
    """Log decays between ``low`` and almost 0, most of them weak."""
    return torch.from_numpy(low * rng.uniform(0, 1, shape) ** 3 - 1e-3).float()


# ---- one token ---------------------------------------------------------------------------------------------


def step(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay, write, read."""
    S = torch.exp(g)[..., None] * S + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ S)[..., 0, :], S


def _step_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, dim: int = 6, value_dim: int = 5, *, past: float = 1.0, low: float = -2.0) -> Case:
        shape = (2, 3)
        return Case(name, {
            "S": normal(rng, *shape, dim, value_dim, size=past), "q": normal(rng, *shape, dim),
            "k": normal(rng, *shape, dim), "v": normal(rng, *shape, value_dim),
            "g": decays(rng, *shape, dim, low=low),
        })  # fmt: skip

    return [
        case("equals the definition"),
        case("the first token", past=0.0),
        case("as many values as channels", 5, 5),
        case("strong decay", low=-60.0),
        case("a large state", past=100.0),
    ]


def _step_mutant(
    fault: str, S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.exp(g)[..., None]
    new = k[..., :, None] * v[..., None, :]
    if fault == "log used as decay":
        kept = g[..., None]
    elif fault == "no decay":
        kept = torch.ones_like(kept)
    elif fault == "one decay a head":
        kept = torch.exp(g.mean(-1))[..., None, None]
    after = kept * S + new
    if fault == "values decay" and S.shape[-1] == S.shape[-2]:
        after = torch.exp(g)[..., None, :] * S + new
    if fault == "decay after the write":
        after = kept * (S + new)
    read = {"read before the write": kept * S, "read before all": S}.get(fault, after)
    return (q[..., None, :] @ read)[..., 0, :], after


STEP = Exercise(
    id="linear/gated_linear/step",
    title="one token: decay, write, read",
    signature="step(S [B, H, K, V], q [B, H, K], k [B, H, K], v [B, H, V], g [B, H, K]) -> (out [B, H, V], S)",
    outputs=(Output("out", "q"), Output("S", "S")),
    make_inputs=_step_inputs,
    reference=lambda **x: step(**x),
    solution=step,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the definition": "Row d of S is multiplied by exp(g[d]); then k v^T is added; then q reads.",
        "the first token": "From an empty state the output is (q . k) v: nothing has decayed yet.",
        "as many values as channels": "With K = V no shape stops you: the decay belongs to the rows of S, one a "
        "key channel.",
        "strong decay": "exp(-60) is 9e-27: the old state is gone, and the token itself stays whole.",
        "a large state": "What is kept of S has to be exp(g) of it, channel by channel.",
    },
    tolerance=Tolerance(
        1e-5, 1e-5, "an exponential and a sum of 7 float32 products: a few units in the last place."
    ),
    mutants=mutants(
        _step_mutant,
        {
            "read before the write": "q reads the state before the token is written into it: a token sees itself.",
            "read before all": "q reads the state that was given: it has neither decayed nor got the token.",
            "decay after the write": "The decay hits the new token too. Decay the old state first, then write.",
            "log used as decay": "g is a log decay: multiply by exp(g).",
            "no decay": "The state is not multiplied by exp(g): nothing is forgotten.",
            "one decay a head": "All channels decay alike. Row d of S has its own factor exp(g[d]).",
            "values decay": "The decay is laid over the columns of S, the values. It belongs to the rows.",
        },
    ),
    hints=(
        "Three lines in this order: decay, write, read.",
        "exp(g) is [B, H, K], S is [B, H, K, V]: give it an axis for the values. k v^T for a batch is "
        "k[..., :, None] * v[..., None, :].",
        "S = torch.exp(g)[..., None] * S + k[..., :, None] * v[..., None, :]\n"
        "out = (q[..., None, :] @ S)[..., 0, :]\nreturn out, S",
    ),
)

# ---- a gate ------------------------------------------------------------------------------------------------


def gla_gate(
    x: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor, b: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log sigmoid(x W1 W2 + b) / temperature."""
    return F.logsigmoid(x @ W1 @ W2 + b) / temperature


def _gate_inputs(rng: np.random.Generator) -> list[Case]:
    def case(name: str, *, size: float = 1.0, shift: float = 0.0, temperature: float = 16.0) -> Case:
        return Case(name, {
            "x": normal(rng, 9, 12, size=size), "W1": normal(rng, 12, 4, size=0.3), "W2": normal(rng, 4, 8, size=0.5),
            "b": normal(rng, 8) + shift, "temperature": temperature,
        })  # fmt: skip

    return [
        case("equals the definition"),
        case("another temperature", temperature=1.0),
        case("far left", size=0.1, shift=-150.0),
        case("far right", size=0.1, shift=25.0),
        case("the bias alone", size=0.0),
    ]


def _gate_mutant(
    fault: str, x: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor, b: torch.Tensor, temperature: float
) -> torch.Tensor:
    z = x @ W1 @ W2 + (0 * b if fault == "bias forgotten" else b)
    made = {
        "decay, not its log": lambda: torch.sigmoid(z) ** (1 / temperature),
        "log of a sigmoid": lambda: torch.log(torch.sigmoid(z)) / temperature,
        "log with a floor": lambda: torch.log(torch.sigmoid(z) + 1e-8) / temperature,
        "temperature forgotten": lambda: F.logsigmoid(z),
        "temperature multiplied": lambda: F.logsigmoid(z) * temperature,
        "temperature inside": lambda: F.logsigmoid(z / temperature),
        "no sigmoid": lambda: z / temperature,
        "sign lost": lambda: -F.logsigmoid(z) / temperature,
        "bias forgotten": lambda: F.logsigmoid(z) / temperature,
    }
    return made[fault]()


GATE = Exercise(
    id="linear/gated_linear/gla_gate",
    title="GLA's gate",
    signature="gla_gate(x [N, M], W1 [M, R], W2 [R, K], b [K], temperature) -> g [N, K]",
    outputs=(Output("g", "x"),),
    make_inputs=_gate_inputs,
    reference=lambda **x: (gla_gate(**x),),
    solution=gla_gate,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the definition": "g = log sigmoid(x W1 W2 + b) / temperature: never above 0.",
        "another temperature": "The temperature divides the logarithm, outside the sigmoid.",
        "far left": "sigmoid(-150) is 7e-66, which float32 rounds to 0, and log 0 is -inf. The logarithm itself "
        "is -150.",
        "far right": "sigmoid(25) rounds to 1 in float32, and log 1 is 0. The logarithm itself is -1.4e-11.",
        "the bias alone": "With x = 0 the bias alone decides.",
    },
    tolerance=Tolerance(
        3e-4,
        1e-14,
        "sums of 12 float32 products end in an error of some 1e-6 of z; far right g is -exp(-z), which errs by as "
        "much relatively, and no absolute error hides it.",
    ),
    mutants=mutants(
        _gate_mutant,
        {
            "decay, not its log": "That is the decay itself, a number between 0 and 1. Its logarithm is asked for.",
            "log of a sigmoid": "log(sigmoid(z)) rounds twice: far left the sigmoid is 0 and its log -inf, far "
            "right it is "
            "1 and its log 0. There is one function for both.",
            "log with a floor": "A small number is added inside the log: far left g stops at log 1e-8, far right it "
            "becomes positive.",
            "temperature forgotten": "g is not divided by the temperature: at 16 a decay forgets 16 times slower.",
            "temperature multiplied": "g is multiplied by the temperature. Divide: the 16th root of a decay is "
            "nearer to 1.",
            "temperature inside": "The temperature divides z, inside the sigmoid. It divides the logarithm.",
            "no sigmoid": "z itself is divided: g can be positive, and the state would grow.",
            "sign lost": "The sign is wrong: log sigmoid is negative.",
            "bias forgotten": "The bias b is missing.",
        },
    ),
    hints=(
        "Two small matrices, a bias, a logarithm of a sigmoid, a division.",
        "torch.nn.functional.logsigmoid computes log(sigmoid(z)) without rounding the sigmoid first.",
        "z = x @ W1 @ W2 + b\nreturn torch.nn.functional.logsigmoid(z) / temperature",
    ),
)

# ---- the mask of decays ------------------------------------------------------------------------------------


def decay_mask(g: torch.Tensor) -> torch.Tensor:
    """exp(g_(j+1) + ... + g_i) for j <= i, else 0: each column sums from its own key on."""
    n = g.shape[-1]
    seen = torch.ones(n, n, dtype=torch.bool)
    steps = g[..., :, None].expand(*g.shape, n).masked_fill(~seen.tril(-1), 0.0)
    return steps.cumsum(dim=-2).exp() * seen.tril()


def _mask_reference(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pair by pair."""
    n = g.shape[-1]
    out = torch.zeros(*g.shape, n, dtype=g.dtype)
    for i in range(n):
        for j in range(i + 1):
            out[..., i, j] = g[..., j + 1 : i + 1].sum(dim=-1).exp()
    return (out,)


def _mask_inputs(rng: np.random.Generator) -> list[Case]:
    weak = torch.full((1, 2, 64), -0.01)
    weak[..., ::4] = -700.0
    border = decays(rng, 1, 2, 12)
    border[..., 7] = -torch.inf
    return [
        Case("equals the products", {"g": decays(rng, 2, 3, 12)}),
        Case("one token", {"g": decays(rng, 2, 2, 1)}),
        Case("no decay", {"g": torch.zeros(1, 2, 9)}),
        Case("strong decay", {"g": -20 - 30 * decays(rng, 1, 2, 40).abs()}),
        Case("weak decay behind strong decay", {"g": weak}),
        Case("-inf forgets everything", {"g": border}),
    ]


def _mask_mutant(fault: str, g: torch.Tensor) -> torch.Tensor:
    n = g.shape[-1]
    total = g.cumsum(dim=-1)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    apart = total[..., :, None] - total[..., None, :]
    if fault == "divided by the running product":
        product = g.exp().cumprod(dim=-1)
        return torch.where(seen, product[..., :, None] / product[..., None, :], 0.0)
    if fault == "masked after the exponential":
        return apart.exp() * seen
    if fault == "difference of running sums":
        return apart.masked_fill(~seen, -torch.inf).exp()
    right = decay_mask(g)
    if fault == "leaky mask":
        return right + right.transpose(-1, -2) * ~seen
    if fault == "key's own decay counted":
        return right * g.exp()[..., None, :]
    if fault == "query's own decay forgotten":
        early = torch.cat([torch.zeros_like(right[..., :1, :]), right[..., :-1, :]], dim=-2)
        return early + torch.eye(n)
    if fault == "transposed":
        return right.transpose(-1, -2)
    return right * ~torch.eye(n, dtype=torch.bool)  # diagonal lost


MASK = Exercise(
    id="linear/gated_linear/decay_mask",
    title="the mask of decays",
    signature="decay_mask(g [B, H, N]) -> mask [B, H, N, N]",
    outputs=(Output("mask", "g"),),
    make_inputs=_mask_inputs,
    reference=_mask_reference,
    solution=decay_mask,
    from_scratch=FROM_SCRATCH,
    properties={
        "equals the products": "Row i, column j: exp(g[j+1] + ... + g[i]) for j <= i, else 0.",
        "one token": "It sees itself, undecayed: 1.",
        "no decay": "The causal mask: ones on the diagonal and below.",
        "strong decay": "Nothing may overflow: a sum of negative numbers never does, its negative can.",
        "weak decay behind strong decay": "Running sums reach -11,000 here, where float32 keeps three digits "
        "after the "
        "point: their differences are not the small sums between them.",
        "-inf forgets everything": "-inf - -inf is NaN; a sum that begins behind the border never meets it.",
    },
    tolerance=Tolerance(
        5e-6,
        1e-7,
        "a float32 sum of up to 64 log decays and an exponential, 3e-7 relatively; a difference of running sums "
        "is off "
        "by 1e-3 and is rejected.",
    ),
    mutants=mutants(
        _mask_mutant,
        {
            "leaky mask": "Above the diagonal the mask is not 0: a token sees later ones.",
            "key's own decay counted": "Off by one: key j's own decay g[j] is counted. It acted before j was "
            "written.",
            "query's own decay forgotten": "Off by one: query i's own decay g[i] is missing. The state decays "
            "before i "
            "is written and read.",
            "divided by the running product": "A running product is divided by another one: both underflow to 0, "
            "and 0 / 0 "
            "is NaN. Add log decays between j and i.",
            "masked after the exponential": "Above the diagonal the exponent is positive and exp overflows to "
            "inf; 0 * inf "
            "is NaN. Mask first.",
            "difference of running sums": "Two running sums are subtracted: what is small between them is lost in "
            "rounding, and -inf - -inf is NaN. Let each column's sum begin at its own key.",
            "transposed": "Rows are queries: row i holds what query i sees, left of the diagonal.",
            "diagonal lost": "A token sees itself, undecayed: the diagonal is 1.",
        },
    ),
    hints=(
        "Column j: a running sum that begins after key j. So put 0 in the place of g[t] for t <= j, then sum "
        "downwards.",
        "g[..., :, None] is a column for every key. masked_fill the diagonal and what is above with 0, cumsum "
        "along the "
        "rows, exp, and 0 above the diagonal.",
        "n = g.shape[-1]\nseen = torch.ones(n, n, dtype=torch.bool)\n"
        "steps = g[..., :, None].expand(*g.shape, n).masked_fill(~seen.tril(-1), 0.0)\n"
        "return steps.cumsum(dim=-2).exp() * seen.tril()",
    ),
)
