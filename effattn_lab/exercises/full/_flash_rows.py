"""Exercises on one row or one tile of scores: safe softmax, merge, tile step."""

from __future__ import annotations

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Output, Tolerance
from effattn_lab.exercises.making import mutants, normal

INF = float("inf")

#: What the lab asks to write: gone from the environment in which its exercises are graded.
FROM_SCRATCH = (
    "effattn_lab.full.flash",
    "effattn_lab.full.flash_tricks",
    "effattn_kernels.flash",
    "effattn_lab.foundations.attention.attention",
    "effattn_lab.foundations.attention.lse",
    "torch.nn.functional.scaled_dot_product_attention",
    "torch.nn.functional.multi_head_attention_forward",
    "torch.softmax",
    "torch.log_softmax",
    "torch.softmin",
)


def finite(m: torch.Tensor) -> torch.Tensor:
    """-inf becomes 0: where nothing was seen any origin will do, but -inf - -inf is NaN."""
    return torch.where(torch.isneginf(m), torch.zeros_like(m), m)


# ---- safe softmax ------------------------------------------------------------------------------------------


def safe_softmax(s: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis that no score can overflow; a row of -inf gives zeros."""
    m = s.amax(dim=-1, keepdim=True)
    m = torch.where(torch.isneginf(m), torch.zeros_like(m), m)  # a row that sees nothing
    p = torch.exp(s - m)
    l = p.sum(dim=-1, keepdim=True)
    return p / torch.where(l == 0, torch.ones_like(l), l)


def _softmax_reference(s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    blind = torch.isneginf(s).all(dim=-1, keepdim=True)
    return (torch.softmax(s.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0),)


def _softmax_inputs(rng: np.random.Generator) -> list[Case]:
    hidden = normal(rng, 6, 37, size=2.0)
    hidden[torch.from_numpy(rng.random((6, 37)) < 0.4)] = -INF
    hidden[0, 0] = 0.5
    blind = normal(rng, 4, 9)
    blind[int(rng.integers(0, 4))] = -INF
    apart = normal(rng, 5, 33) + torch.tensor([0.0, 300.0, -300.0, 2000.0, -2000.0])[:, None]
    return [
        Case("rows are distributions", {"s": normal(rng, 4, 7, 50)}),
        Case("one score", {"s": normal(rng, 5, 1, size=3.0)}),
        Case("spread-out scores", {"s": normal(rng, 3, 200, size=12.0)}),
        Case("large scores", {"s": torch.from_numpy(rng.uniform(-1e4, 1e4, (6, 64))).float()}),
        Case("large scores", {"s": -1e4 + normal(rng, 3, 40)}),
        Case("rows far apart", {"s": apart}),
        Case("hidden scores", {"s": hidden}),
        Case("a row that sees nothing", {"s": blind}),
    ]


def _softmax_mutant(fault: str, s: torch.Tensor, guard: bool = True) -> torch.Tensor:
    """``guard=False``: the same fault without any care for rows of -inf or for a sum of 0."""
    guard = guard and fault != "no guard"
    dim = -1
    m = s.amax(dim=-1, keepdim=True)
    if fault == "global max":
        m = s.max()
    elif fault == "wrong axis":
        m = s.amax(dim=-2, keepdim=True)
    elif fault == "mean":
        m = s.mean(dim=-1, keepdim=True)
    elif fault == "abs max":
        m = s.abs().amax(dim=-1, keepdim=True)
    elif fault == "no max":
        m = torch.zeros_like(m)
    elif fault == "max clamped":
        m = m.clamp(min=0.0)
    elif fault == "clamp":
        m, s = torch.zeros_like(m), s.clamp(max=80.0)
    elif fault == "finite hidden":
        s = s.clamp(min=-1e9)
        m = s.amax(dim=-1, keepdim=True)
    if fault == "half":
        s, m = s.half(), m.half()
    m = finite(m) if guard else m
    p = torch.exp(s - m)
    if fault == "base 2":
        p = torch.exp2(s - m)
    if fault == "sum axis":
        dim = -2
    l = p.sum(dim=dim, keepdim=True)
    if fault == "unshifted sum":
        l = torch.exp(s).sum(dim=-1, keepdim=True)
    if fault == "no division":
        l = torch.ones_like(l)
    if guard:
        l = torch.where(l == 0, torch.ones_like(l), l)
    return (p / l).to(torch.float32)


SAFE_SOFTMAX = Exercise(
    id="full/flash/safe_softmax",
    title="a softmax that does not overflow",
    signature="safe_softmax(s [..., N]) -> p [..., N]",
    outputs=(Output("p", "s"),),
    make_inputs=_softmax_inputs,
    reference=_softmax_reference,
    solution=safe_softmax,
    from_scratch=(*FROM_SCRATCH, "torch.logsumexp"),
    properties={
        "rows are distributions": "Each row along the *last* axis is normalised by itself. Check the axis of the "
        "maximum and of the sum, and keepdim=True.",
        "one score": "With a single score the answer is 1, whatever the score is.",
        "spread-out scores": "Only differences s - m may enter exp, and the same m must serve numerator and sum.",
        "large scores": "exp(x) overflows in float32 above x = 88.7 and is 0 below about -103. Which number, taken "
        "off every score of a row, leaves the quotient unchanged and the largest exponent at 0?",
        "rows far apart": "One row's scores lie hundreds above another's: every row needs its own origin.",
        "hidden scores": "A score of -inf must get weight exactly 0, and must not disturb the others.",
        "a row that sees nothing": "If all scores are -inf then m is -inf, and -inf - -inf is NaN. Such a row has "
        "nothing to look at: return zeros for it.",
    },
    tolerance=Tolerance(
        1e-5,
        1e-7,
        "float32 rounds s - m to 6e-8 of its size; weights above 1e-7 have |s - m| < 17, so their exponent is off by "
        "at most 1e-6 and the quotient by a few 1e-6.",
    ),
    mutants=mutants(
        _softmax_mutant,
        {
            "no max": "Nothing is subtracted before exp, so exp overflows to inf (or underflows to 0/0) for large "
            "scores. Subtract each row's largest score first.",
            "global max": "One maximum is taken for the whole tensor: rows far below it underflow to 0.",
            "wrong axis": "The maximum runs over the second-last axis (down the columns), so scores larger than it "
            "remain in the row. Use dim=-1.",
            "sum axis": "The sum runs over the second-last axis, so columns add up to 1 instead of rows. Use dim=-1.",
            "mean": "The mean is subtracted instead of the maximum: the largest exponent is then above 0 and can "
            "still overflow.",
            "abs max": "The largest absolute value is subtracted. In a row of very negative scores that pushes all "
            "exponents further down, to 0/0. Take the maximum itself.",
            "clamp": "Scores are clamped instead of shifted: two different large scores then count the same.",
            "unshifted sum": "The numerator is shifted by the maximum, the sum is not: both need the same origin.",
            "no division": "The exponentials are never divided by their sum.",
            "base 2": "exp2 is used without multiplying the scores by log2(e) = 1/ln 2: that is another softmax, "
            "at another temperature.",
            "no guard": "A row whose scores are all -inf becomes NaN: its maximum is -inf, and -inf - -inf is NaN.",
            "max clamped": "The origin is never allowed below 0, so a row of very negative scores underflows: all "
            "its exponentials are 0, and so is their sum.",
            "finite hidden": "Hidden scores are replaced by a large negative number. In a row with nothing visible "
            "they then win, and hidden entries share the weight. Keep -inf.",
            "half": "The exponentials are computed in half precision: three digits are left. Stay in float32.",
        },
        unguarded=True,
    ),
    hints=(
        "softmax(s) and softmax(s - c) are the same for any c. Which c makes the largest exponent exactly 0?",
        "Three lines: the row's maximum with keepdim=True, exp of the difference, division by its sum. Then think "
        "about a row that is -inf throughout: which value must the origin have there, and which the divisor?",
        "m = s.amax(dim=-1, keepdim=True)\nm = torch.where(torch.isneginf(m), 0.0, m)\np = torch.exp(s - m)\n"
        "l = p.sum(dim=-1, keepdim=True)\n... then p / l, with l = 0 replaced by 1.",
    ),
)


# ---- merge -------------------------------------------------------------------------------------------------


def merge(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both parts, from the two parts' outputs and log-sum-exps."""
    m = torch.maximum(lse_a, lse_b)
    m = torch.where(torch.isneginf(m), torch.zeros_like(m), m)  # neither part saw a key
    w_a, w_b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    l = w_a + w_b
    o = (w_a[..., None] * o_a + w_b[..., None] * o_b) / torch.where(l == 0, torch.ones_like(l), l)[..., None]
    return o, m + torch.log(l)


def _merge_reference(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    lse = torch.logaddexp(lse_a, lse_b)
    origin = finite(lse)
    return torch.exp(lse_a - origin)[..., None] * o_a + torch.exp(lse_b - origin)[..., None] * o_b, lse


def _part(s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) of attention with scores ``s [..., N]`` over values ``v [N, D]``, in float32."""
    lse = torch.logsumexp(s.double(), dim=-1)
    p = torch.exp(s.double() - finite(lse)[..., None])
    return (p @ v.double()).float(), lse.float()


def _merge_case(
    name: str,
    rng: np.random.Generator,
    n_a: int,
    n_b: int,
    size: float = 1.0,
    shift: tuple[float, float] = (0, 0),
) -> Case:
    rows, width = (3, 8), 16
    s_a, s_b = normal(rng, *rows, n_a, size=size) + shift[0], normal(rng, *rows, n_b, size=size) + shift[1]
    o_a, lse_a = _part(s_a, normal(rng, n_a, width))
    o_b, lse_b = _part(s_b, normal(rng, n_b, width))
    return Case(name, {"o_a": o_a, "lse_a": lse_a, "o_b": o_b, "lse_b": lse_b})


def _merge_inputs(rng: np.random.Generator) -> list[Case]:
    blind_a, blind_b = _merge_case("", rng, 6, 6), _merge_case("", rng, 6, 6)
    nothing = {"o_a": torch.zeros(3, 8, 16), "lse_a": torch.full((3, 8), -INF)}
    return [
        _merge_case("two parts give the whole", rng, 20, 20, size=2.0),
        _merge_case("parts of unequal length", rng, 1, 300),
        _merge_case("spread-out scores", rng, 50, 30, size=8.0),
        _merge_case("large scores", rng, 12, 12, shift=(1e4, 1e4)),
        _merge_case("large scores", rng, 12, 12, shift=(-1e4, -1e4)),
        _merge_case("one part far above the other", rng, 12, 12, shift=(-500.0, 500.0)),
        Case("a part that sees nothing", {**blind_a.kwargs, **nothing}),
        Case("both parts see nothing", {**nothing, "o_b": nothing["o_a"].clone(), "lse_b": nothing["lse_a"].clone()}),
        Case("a part that sees nothing", {
            "o_a": blind_b.kwargs["o_a"], "lse_a": blind_b.kwargs["lse_a"],
            "o_b": nothing["o_a"].clone(), "lse_b": nothing["lse_a"].clone(),
        }),
    ]  # fmt: skip


def _merge_mutant(
    fault: str,
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    guard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    guard = guard and fault != "no guard"
    if fault == "half":
        o_a, lse_a, o_b, lse_b = o_a.half(), lse_a.half(), o_b.half(), lse_b.half()
    m = torch.maximum(lse_a, lse_b)
    if guard:
        m = finite(m)
    if fault == "no max":
        m = torch.zeros_like(m)
    exp = torch.exp2 if fault == "base 2" else torch.exp
    w_a, w_b = exp(lse_a - m), exp(lse_b - m)
    if fault == "swapped":
        w_a, w_b = w_b, w_a
    if fault == "average":
        w_a = w_b = torch.ones_like(m)
    l = w_a + w_b
    divisor = torch.where(l == 0, torch.ones_like(l), l) if guard else l
    if fault == "no division":
        divisor = torch.ones_like(l)
    lse = m + (torch.log2(l) if fault == "base 2" else torch.log(l))
    o = (w_a[..., None] * o_a + w_b[..., None] * o_b) / divisor[..., None]
    if fault == "average":
        lse = torch.logaddexp(lse_a, lse_b)
    if fault == "hard choice":
        o = torch.where((lse_a >= lse_b)[..., None], o_a, o_b)
    if fault == "lse without m":
        lse = torch.log(l)
    if fault == "lse is the max":
        lse = torch.maximum(lse_a, lse_b)
    if fault == "lse is a sum":
        lse = lse_a + lse_b
    if fault == "lse as weight":
        total = lse_a + lse_b
        o = (lse_a[..., None] * o_a + lse_b[..., None] * o_b) / total[..., None]
    return o.float(), lse.float()


MERGE = Exercise(
    id="full/flash/merge",
    title="merge attention over two sets of keys",
    signature="merge(o_a [..., D], lse_a [...], o_b [..., D], lse_b [...]) -> (o [..., D], lse [...])",
    outputs=(Output("o", "o_a"), Output("lse", "lse_a")),
    make_inputs=_merge_inputs,
    reference=_merge_reference,
    solution=merge,
    from_scratch=FROM_SCRATCH,
    properties={
        "two parts give the whole": "A part's weight is its share of the total sum of exponentials: e^lse_a against "
        "e^lse_b.",
        "parts of unequal length": "A part of 300 keys weighs more than a part of one key: the weights come from lse "
        "alone.",
        "spread-out scores": "Weights must be e^lse, normalised to add up to 1.",
        "large scores": "e^lse overflows for lse = 10000. Subtract the larger lse from both before exp, and put it "
        "back into the new lse.",
        "one part far above the other": "The lower part's weight is 0 and the result is the upper part.",
        "a part that sees nothing": "lse = -inf means weight 0: the result is the other part.",
        "both parts see nothing": "With -inf on both sides the maximum is -inf and -inf - -inf is NaN. The answer is "
        "o = 0 and lse = -inf.",
    },
    tolerance=Tolerance(
        1e-5,
        1e-5,
        "lse arrives rounded to float32, and differences of lse below 100 are then known to 1e-5 or better; outputs "
        "are weighted means of numbers of size 1.",
    ),
    loose={
        "large scores": Tolerance(
            1e-6,
            2e-3,
            "float32 near 10000 is spaced 1e-3: an lse computed by another order of operations differs by "
            "that much, and a weight by the same fraction.",
        ),
        "one part far above the other": Tolerance(1e-6, 1e-4, "float32 near 500 is spaced 3e-5."),
    },
    mutants=mutants(
        _merge_mutant,
        {
            "average": "The two outputs are averaged with equal weights. A part's weight is e^lse over the sum "
            "of both.",
            "swapped": "The weights are swapped: o_a is multiplied by the weight of part b.",
            "no max": "e^lse is computed directly and overflows (or underflows to 0/0) for large lse. Subtract the "
            "larger of the two first.",
            "no division": "The weights e^(lse - m) are used without dividing by their sum, so they do not add "
            "up to 1.",
            "lse without m": "The new lse lacks the maximum: log(w_a + w_b) is measured from m, so add m back.",
            "lse is the max": "The new lse is the larger of the two. Adding keys adds to the sum: lse = log(e^a "
            "+ e^b).",
            "lse is a sum": "The two lse are added. It is their exponentials that add: lse = log(e^lse_a + e^lse_b).",
            "lse as weight": "The lse themselves serve as weights. They are logarithms: the weights are e^lse.",
            "hard choice": "The output is taken from the part with the larger lse alone; the other part still "
            "counts.",
            "base 2": "Powers of two are mixed with natural logarithms: lse is natural here, so use exp and log.",
            "no guard": "When both lse are -inf the result is NaN: the larger is -inf, and -inf - -inf is NaN.",
            "half": "The merge is computed in half precision: three digits are left. Stay in float32.",
        },
        unguarded=True,
    ),
    hints=(
        "e^lse is the sum of exponentials that a part divided its output by. Multiply it back: e^lse * o. Such "
        "unnormalised parts simply add.",
        "o = (e^lse_a o_a + e^lse_b o_b) / (e^lse_a + e^lse_b). Take m = max(lse_a, lse_b) out of all exponents; the "
        "output does not change, lse gets m back. And if m is -inf?",
        "w_a, w_b = torch.exp(lse_a - m), torch.exp(lse_b - m)\nl = w_a + w_b\n"
        "o = (w_a[..., None] * o_a + w_b[..., None] * o_b) / l[..., None]\nlse = m + torch.log(l)\n"
        "... with m = -inf replaced by 0 first, and l = 0 by 1 in the division only.",
    ),
)
