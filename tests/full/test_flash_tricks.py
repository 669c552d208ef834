"""FlashAttention-4's two savings change the cost and not the answer."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.full.flash_tricks import attend_conditional, exp2_cubic


def test_exp2_cubic_error_is_what_the_chapter_says():
    x = torch.linspace(-30, 4, 100_001, dtype=torch.float64)
    error = (exp2_cubic(x) / torch.exp2(x) - 1).abs().max().item()
    assert 8.7e-5 < error < 8.9e-5
    # At whole numbers the cubic is exact: f = 0.
    assert torch.equal(exp2_cubic(torch.tensor([0.0, 3.0, -5.0])), torch.tensor([1.0, 8.0, 2.0**-5]))
    assert exp2_cubic(torch.tensor([-torch.inf])).item() == 0.0


def test_no_cubic_that_starts_at_one_does_much_better():
    """Remez exchange: the best one has four extremes of equal size, 8.6e-5, against the 8.8e-5 of the one in use."""
    f = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    x = torch.tensor([0.1, 0.45, 0.83, 1.0], dtype=torch.float64)
    for _ in range(8):
        columns = torch.stack([x, x**2, x**3, signs * torch.exp2(x)], dim=1)
        c1, c2, c3, _ = torch.linalg.solve(columns, torch.exp2(x) - 1)
        error = (1 + f * (c1 + f * (c2 + f * c3))) / torch.exp2(f) - 1
        turns = torch.nonzero(error.diff()[1:] * error.diff()[:-1] <= 0).flatten() + 1
        x = torch.cat([f[turns[:3]], f[-1:]])
    assert error.abs().max().item() == pytest.approx(8.56e-5, rel=2e-3)


@pytest.mark.parametrize("threshold", [0.0, 2.0, 8.0, 1e9])
@pytest.mark.parametrize("block", [1, 48, 64, 512])
def test_the_threshold_does_not_change_the_answer(threshold, block):
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(3, 70, 131, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.arange(131) > torch.arange(-1, 69)[:, None], -torch.inf)
    v = torch.randn(3, 131, 5, generator=generator, dtype=torch.float64)
    out, lse, moved = attend_conditional(scores, v, block=block, threshold=threshold)
    want = torch.softmax(scores[:, 1:], dim=-1) @ v
    torch.testing.assert_close(out[:, 1:], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.logsumexp(scores, dim=-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(out[:, 0], torch.zeros(3, 5, dtype=torch.float64))  # the first row sees no key
    assert not moved[0].any()  # nothing had been gathered before the first tile


def test_a_higher_threshold_moves_the_origin_less_often():
    scores = 6 * torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    v = torch.ones(512, 1)
    counts = [attend_conditional(scores, v, block=32, threshold=t)[2].sum().item() for t in (0, 2, 8, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert counts[0] > 2 * counts[2]


@pytest.mark.parametrize(("kwargs", "name"), [({"block": 0}, "block"), ({"threshold": -1.0}, "threshold")])
def test_bad_input_is_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        attend_conditional(torch.zeros(2, 2), torch.zeros(2, 2), **kwargs)
    with pytest.raises(ValueError, match="x: expected"):
        exp2_cubic(torch.arange(3))
