"""The weights of ZeroS: their sum, the expansion they come from, the popular formula that has none, the logits."""

import pytest
import sympy as sp
import torch

from effattn_lab.linear.zeros_weights import (
    deviation_logits,
    expand_softmax,
    popular_weights,
    unit,
    zero_sum_weights,
)

# The sum of a thousand numbers around 1/t rounds to about this much.
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("length", [1, 2, 65, 1000])
def test_weights_sum_to_zero_at_every_step(length, spread, dtype):
    scores = (spread * draw(2, length)).to(dtype)[:, None].expand(2, length, length)
    gates = [torch.sigmoid(draw(2, length, seed=i, dtype=dtype)) for i in (1, 2)]
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    r = zero_sum_weights(scores, *gates, keep=keep)
    assert r.dtype == dtype
    assert r.isfinite().all()
    assert r.sum(-1).abs().max() <= ALLOWED[dtype] * max(1.0, spread)
    assert (r.masked_select(~keep) == 0).all()
    assert (r[:, 0] == 0).all()  # one key: no other weight sums to zero
    if length > 1 and spread >= 1:
        assert (r < 0).any()
        assert (r > 0).any()
    # The constant alone carries the sum.
    kept = zero_sum_weights(scores, *gates, gate_0=torch.full_like(gates[0], 0.25), keep=keep)
    torch.testing.assert_close(
        kept.sum(-1), torch.full_like(gates[0], 0.25), rtol=0, atol=ALLOWED[dtype] * max(1.0, spread)
    )


def test_zero_sum_test_can_fail():
    """The same check rejects softmax with the mean of the *scores* taken off, and weights centred over all keys."""
    scores = draw(1, 20).expand(20, 20)
    keep = torch.ones(20, 20, dtype=torch.bool).tril()
    p = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1)
    assert (p - 1 / 20).masked_fill(~keep, 0).sum(-1).abs().max() > 0.1
    assert (p - keep / keep.sum(-1, keepdim=True)).sum(-1).abs().max() < 1e-7


def test_parts_add_up_to_softmax():
    scores = 3 * draw(4, 9, 9)
    keep = torch.ones(9, 9, dtype=torch.bool).tril(-1)  # the first row sees nothing
    parts = expand_softmax(scores, keep)
    want = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1)
    want[:, 0] = 0
    torch.testing.assert_close(sum(parts), want, rtol=0, atol=1e-15)
    assert all((x[:, 0] == 0).all() for x in parts)
    ones = torch.ones(4, 9, dtype=torch.float64)
    t = keep.sum(-1, keepdim=True).clamp(min=1).double()
    torch.testing.assert_close(
        zero_sum_weights(scores, ones, ones, keep=keep), want - keep / t, rtol=0, atol=1e-15
    )


def test_expansion_to_second_order():
    """softmax = 1/t + delta/t + (delta^2 - mean delta^2) / 2t + O(delta^3), for three scores."""
    a, b, e = sp.symbols("a b epsilon")
    delta = [e * a, e * b, -e * (a + b)]
    total = sum(sp.exp(d) for d in delta)
    for d in delta:
        series = sp.series(sp.exp(d) / total, e, 0, 3).removeO()
        second = (d**2 - sum(x**2 for x in delta) / 3) / 6
        assert sp.simplify(series - sp.Rational(1, 3) - d / 3 - second) == 0
    assert sp.simplify(sum((d**2 - sum(x**2 for x in delta) / 3) for d in delta)) == 0


def test_remainder_is_of_second_order():
    """Halving the scores quarters what the first two terms leave out."""
    scores = 0.01 * draw(50)
    sizes = [expand_softmax(scores / c)[2].abs().max() for c in (1, 2)]
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_the_popular_formula_is_degenerate(dtype):
    """It divides by a sum of centred numbers: 0 in exact arithmetic, rounding noise here: NaN or huge."""
    scores = draw(64, seed=3).to(dtype)
    denominator = (torch.exp(scores) - torch.exp(scores).mean()).sum().abs()
    assert denominator <= 64 * torch.finfo(dtype).eps * torch.exp(scores).sum()
    weights = popular_weights(scores)
    honest = torch.softmax(scores.double(), -1).max()
    assert not weights.isfinite().all() or weights.abs().max() > 20 * honest
    # Equal scores: 0 / 0.
    assert popular_weights(torch.zeros(64, dtype=dtype)).isnan().all()
    assert popular_weights(torch.zeros(1, dtype=dtype)).isnan().all()  # the first token of any sequence


def test_the_popular_formula_by_algebra():
    """Its denominator is identically zero; and whatever divides by its own sum sums to one, not to zero."""
    s = sp.symbols("s1:6", real=True)
    mean = sum(map(sp.exp, s)) / len(s)
    assert sp.expand(sum(sp.exp(x) - mean for x in s)) == 0
    w = sp.Symbol("w")  # any other constant
    total = sum(sp.exp(x) - w for x in s)
    assert sp.simplify(sum((sp.exp(x) - w) / total for x in s)) == 1
    # Normalise first, centre then: the denominator keeps the exponentials whole, and the sum is zero.
    whole = sum(map(sp.exp, s))
    assert sp.simplify(sum(sp.exp(x) / whole - sp.Rational(1, 5) for x in s)) == 0


def test_deviation_logits_are_the_definition():
    u, mu, tau = draw(2, 3, 7, 4), draw(3, 4, seed=1), draw(3, seed=2)
    got = deviation_logits(u, mu, tau)
    full = deviation_logits(u, mu, tau, causal=False)
    for b in range(2):
        for h in range(3):
            prior = torch.exp(tau[h])
            for i in range(7):
                mean = (prior * mu[h] + u[b, h, : i + 1].sum(0)) / (prior + i + 1)
                assert got[b, h, i].item() == pytest.approx((-(u[b, h, i] @ mean) / 2).item(), abs=1e-12)
                mean = (prior * mu[h] + u[b, h].sum(0)) / (prior + 7)
                assert full[b, h, i].item() == pytest.approx((-(u[b, h, i] @ mean) / 2).item(), abs=1e-12)
    # A token that points away from the mean gets more.
    assert (
        deviation_logits(torch.tensor([[[[1.0], [1.0], [-1.0]]]]), torch.zeros(1, 1), torch.zeros(1))[
            0, 0
        ].argmax()
        == 2
    )


def test_deviation_logits_go_on_from_before():
    u, mu, tau = draw(2, 3, 12, 4), draw(3, 4, seed=1), draw(3, seed=2)
    whole = deviation_logits(u, mu, tau)
    before = (u[:, :, :5].sum(2), torch.full((2, 3), 5.0, dtype=torch.float64))
    torch.testing.assert_close(
        deviation_logits(u[:, :, 5:], mu, tau, before=before), whole[:, :, 5:], rtol=0, atol=1e-14
    )
    assert deviation_logits(u.half(), mu, tau).dtype == torch.float32
    assert torch.autograd.gradcheck(
        deviation_logits, [x.requires_grad_() for x in (u[:1, :, :3].clone(), mu, tau)]
    )
    # tau is clipped where the authors' code clips it: e^1000 would be infinite.
    assert deviation_logits(u.detach(), mu, torch.full((3,), 1000.0)).isfinite().all()


def test_unit():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0]])
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))


def test_bad_input_is_named():
    u, mu, tau = draw(2, 3, 7, 4), draw(3, 4), draw(3)
    for message, call in (
        ("u: expected 4 dimensions", lambda: deviation_logits(u[0], mu, tau)),
        (r"mu: expected shape \(3, 4\)", lambda: deviation_logits(u, mu[0], tau)),
        (r"tau: expected shape \(3,\)", lambda: deviation_logits(u, mu, 0.0)),
        ("before: expected a pair", lambda: deviation_logits(u, mu, tau, before=u)),
        ("before: expected shapes", lambda: deviation_logits(u, mu, tau, before=(u[0], tau))),
        ("scores: expected a torch.Tensor", lambda: popular_weights([1.0])),
        ("scores: expected float16", lambda: expand_softmax(torch.zeros(3, dtype=torch.int64))),
        ("keep: expected a bool tensor", lambda: expand_softmax(u, torch.ones(4))),
        (
            "keep: expected a shape that broadcasts",
            lambda: expand_softmax(u, torch.ones(5, dtype=torch.bool)),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
