"""Elastic Attention: hard choices and their law, routes by boundary keys, two sparsities, multipliers that ascend."""

from __future__ import annotations

import math

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.linear.rotary import rotate
from effattn_lab.sparse import elastic as el
from effattn_lab.sparse.block_sparse import xattention
from effattn_lab.sparse.streaming import streaming_attention


def draw(n, seed=0, batch=2, heads=6, kv_heads=3, dim=16):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64)
    return q, *(torch.randn(batch, kv_heads, n, dim, generator=g, dtype=torch.float64) for _ in range(2))


def router(dim=16, boundary=10, seed=0):
    torch.manual_seed(seed)
    made = el.AttentionRouter(dim, boundary=boundary).double()
    with torch.no_grad():
        made.router[-1].weight *= 30  # answers that differ between heads, half of them full
        made.router[-1].bias -= (
            made.eval()(draw(50, 99, batch=32, dim=dim)[1]).logits.flatten(0, 1).median(0).values
        )
    return made.train()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("z", [[0.0, 0.0], [0.0, 1.5], [2.0, -1.0]])
def test_the_choice_has_the_probability_of_softmax(temperature, z):
    """Gumbel-max: 40,000 draws, five standard deviations; temperature must not matter."""
    n = 40_000
    logits = torch.tensor(z, dtype=torch.float64).expand(n, 2)
    r = el.straight_through(logits, temperature=temperature, generator=torch.Generator().manual_seed(3))
    p = torch.softmax(logits[0], 0)[el.FULL].item()
    assert abs(r[:, el.FULL].mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_sampled_routes_have_the_frequencies_of_softmax():
    """The router itself in training: 20,000 draws for each of three heads, five standard deviations."""
    r, n = router(), 20_000
    with torch.no_grad():
        r.router[-1].weight *= 10  # heads that differ, none of them sure
        route = r(draw(40, 7, batch=1)[1].expand(n, -1, -1, -1), generator=torch.Generator().manual_seed(8))
    p = torch.softmax(route.logits[0], -1)[:, el.FULL]
    assert ((p > 0.1) & (p < 0.9)).all(), p
    assert p.max() - p.min() > 0.05, p
    deviation = (p * (1 - p) / n).sqrt()
    assert ((route.full.mean(0) - p).abs() < 5 * deviation).all()


def test_one_gumbel_for_a_sigmoid_has_another_law():
    """The paper's appendix: sigmoid((z + g) / tau) with one Gumbel gives 1 - exp(-e^z), 0.632 in the place of 0.5."""
    n = 40_000
    g = el.gumbel(torch.Size([n]), torch.Generator().manual_seed(4), like=torch.zeros(1, dtype=torch.float64))
    for z in (-1.0, 0.0, 1.0):
        share = (torch.sigmoid((z + g) / 0.7) > 0.5).double().mean().item()
        law = 1 - math.exp(-math.exp(z))
        assert abs(share - law) < 5 * math.sqrt(law * (1 - law) / n)
        assert abs(share - 1 / (1 + math.exp(-z))) > 10 * math.sqrt(0.25 / n)


def test_forward_is_hard_and_backward_soft():
    logits = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    make = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    hard = el.straight_through(logits, temperature=0.8, generator=make())
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(-1), torch.ones(50, dtype=torch.float64))
    weights = torch.randn(50, 2, dtype=torch.float64)
    (got,) = torch.autograd.grad((hard * weights).sum(), logits)
    soft = torch.softmax((logits + el.gumbel(logits.shape, make(), like=logits)) / 0.8, dim=-1)
    (want,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    assert got.abs().max() > 0


@pytest.mark.parametrize("n", [1, 5, 10, 11, 20, 50])
def test_boundary_mean(n):
    _, k, _ = draw(n)
    tokens = [*range(min(10, n)), *range(max(0, n - 10), n)]
    torch.testing.assert_close(el.boundary_mean(k, 10), k[:, :, tokens].mean(2))


def test_router_sees_the_ends_alone_and_each_head_for_itself():
    r = router().eval()
    _, k, _ = draw(50, 1, batch=8)
    route = r(k)
    assert set(route.full.unique().tolist()) == {0.0, 1.0}
    middle = k.clone()
    middle[:, :, 10:-10] += 100
    assert torch.equal(r(middle).logits, route.logits)
    end = k.clone()
    end[:, :, -1] += 5
    assert not torch.equal(r(end).logits, route.logits)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(r(k[:, order]).logits, route.logits[:, order])
    rows = torch.randperm(8)
    torch.testing.assert_close(r(k[rows]).logits, route.logits[rows])
    assert not torch.equal(route.full[:4], route.full[4:]), "prompts of one batch differ"
    assert torch.equal(r(k).logits, route.logits), "no noise at inference"
    one_head = k.clone()
    one_head[:, 1] += 3
    changed = (r(one_head).logits != route.logits).any(-1)
    assert changed[:, 1].all()
    assert not changed[:, [0, 2]].any()


def test_keys_before_rope_make_the_answer_free_of_position():
    """The same prompt further on in a text: unrotated keys give the same decision, rotated ones do not."""
    r = router().eval()
    _, k, _ = draw(40, 2)
    at = torch.arange(40)
    assert torch.equal(r(k).logits, r(k.clone()).logits)
    assert not torch.allclose(r(rotate(k, at)).logits, r(rotate(k, at + 500)).logits)


def test_training_draws_and_evaluation_does_not():
    r = router()
    with torch.no_grad():
        r.router[-1].weight *= 0.01
    _, k, _ = draw(40, 3)
    draws = [r(k, generator=torch.Generator().manual_seed(s)).full for s in range(20)]
    assert torch.stack(draws).double().std(0).max() > 0
    draws[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in r.parameters())
    again = [r.eval()(k).full for _ in range(3)]
    assert torch.equal(again[0], again[1])


def test_parameters():
    assert sum(p.numel() for p in el.AttentionRouter(128).parameters()) == 263_682


def test_all_full_all_sparse_and_a_mixture():
    q, k, v = draw(50, 4)
    full = torch.zeros(2, 3, dtype=torch.float64)
    dense = attention(q, k, v, causal=True)
    few = streaming_attention(q, k, v, sinks=2, window=8)
    options = {"sinks": 2, "window": 8}
    assert torch.equal(el.elastic_attention(q, k, v, full, **options), few)
    assert torch.equal(el.elastic_attention(q, k, v, full + 1, **options), dense)
    full[0, 1] = full[1, 2] = 1
    got = el.elastic_attention(q, k, v, full, **options)
    for b in range(2):
        for h in range(6):
            want = dense if full[b, h // 2] else few
            assert torch.equal(got[b, h], want[b, h]), "query heads 2 g and 2 g + 1 share KV head g's mode"
    short = el.elastic_attention(q[:, :, :10], k[:, :, :10], v[:, :, :10], full, **options)
    torch.testing.assert_close(short, dense[:, :, :10], rtol=0, atol=1e-12)


def test_other_modes():
    q, k, v = draw(40, 5)
    sparse = lambda q, k, v: xattention(q, k, v, tau=0.2, block_size=8, stride=4)  # noqa: E731
    full = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    got = el.elastic_attention(q, k, v, full, sparse_mode=sparse)
    want = torch.where(
        full.repeat_interleave(2, 1)[..., None, None] == 1, attention(q, k, v, causal=True), sparse(q, k, v)
    )
    assert torch.equal(got, want)
    swapped = el.elastic_attention(q, k, v, full, full_mode=sparse, sinks=2, window=4)
    assert torch.equal(swapped[0, :2], sparse(q, k, v)[0, :2])


def test_the_gradient_of_a_decision_is_what_the_loss_would_gain():
    q, k, v = draw(30, 6)
    full = torch.tensor([[1.0, 0, 1], [0, 1, 0]], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(q.shape, dtype=torch.float64)
    (got,) = torch.autograd.grad(
        (el.elastic_attention(q, k, v, full, sinks=1, window=4) * weights).sum(), full
    )
    gap = attention(q, k, v, causal=True) - streaming_attention(q, k, v, sinks=1, window=4)
    want = (weights * gap).sum((2, 3)).unflatten(1, (3, 2)).sum(2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_sparsities():
    full = torch.tensor([[[1.0, 0, 0, 0]], [[1, 1, 0, 0]]])  # two layers, one prompt, four heads
    assert el.model_sparsity(full).tolist() == [0.625]
    assert el.model_sparsity(full[0]).tolist() == [0.75]
    assert el.effective_sparsity(full, 0.8).item() == pytest.approx(0.5)
    assert el.effective_sparsity(full * 0, 0.8).item() == pytest.approx(0.8)
    assert el.effective_sparsity(full * 0 + 1, 0.8).item() == 0
    assert el.effective_sparsity(full, 0.8, 0.4).item() == pytest.approx(0.625 * 0.8 + 0.375 * 0.4)


def test_the_papers_points_of_effective_sparsity():
    """Its XA-SSA curve is the share of a sparse head, 1 - 1152 / N, at 8 k to 256 k; FA-SSA is 0.745 of it."""
    for length, curve in zip((8, 16, 32, 64, 128, 256), (0.86, 0.93, 0.96, 0.98, 0.99, 0.995)):
        assert el.pruned_share(length * 1024, 128, 1024) == pytest.approx(curve, abs=0.006)
    n = 8192
    assert el.pruned_share(n, 128, 1024, queries="all") < el.pruned_share(n, 128, 1024)
    w = 1152 / n
    assert el.pruned_share(n, 128, 1024, queries="all") == pytest.approx(1 - (2 * w - w * w), abs=2e-3)
    assert el.pruned_share(1000, 128, 1024) == 0
    assert el.pruned_share(1000, 128, 1024, queries="all") == 0


@pytest.mark.parametrize("signed", [True, False])
def test_multipliers_step_uphill(signed):
    """Too sparse for task 0, too full for task 1."""
    m = el.SparsityMultipliers([0.5, 1.0], signed=signed, start=0.2)
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0, maximize=True)
    sparsity = torch.tensor([0.9, 0.8], requires_grad=True)
    m(sparsity, torch.tensor([0, 1])).backward()
    optimizer.step()
    moved = m.linear.detach() - 0.2
    assert moved[0] > 0
    assert (moved[1] < 0) == signed, "signed: the price of a task that is not sparse enough falls below zero"
    assert (m.square.detach() > 0.2).all()
    assert sparsity.grad[0] > 0, "descent makes task 0 less sparse"


def test_multipliers_average_over_tasks_not_prompts():
    m = el.SparsityMultipliers([0.0, 0.0, 0.0], start=1.0)
    loss = m(torch.tensor([0.5, 0.5, 0.5, 0.2]), torch.tensor([0, 0, 0, 2]))
    assert loss.item() == pytest.approx(((0.5 + 0.25) + (0.2 + 0.04)) / 2)
    loss.backward()
    assert m.linear.grad[1] == 0, "a task that does not occur"


def test_signed_prices_turn_back_and_absolute_ones_cannot():
    """One head, one task: sparsity sigmoid(a) is driven to 0.5 against a loss that wants none."""
    ends = {}
    for signed in (True, False):
        a = torch.nn.Parameter(torch.tensor(3.0))
        m = el.SparsityMultipliers([0.5], signed=signed)
        down = torch.optim.SGD([a], lr=0.5)
        up = torch.optim.SGD(m.parameters(), lr=0.5, maximize=True)
        path = []
        for _ in range(400):
            omega = torch.sigmoid(a)[None]
            loss = 0.1 * omega.square().sum() + m(omega, torch.tensor([0]))
            for optimizer in (down, up):
                optimizer.zero_grad()
            loss.backward()
            down.step()
            up.step()
            path.append(m.linear.item())
        ends[signed] = path, torch.sigmoid(a).item()
    steps = torch.tensor(ends[True][0]).diff()
    assert (steps > 0).any()
    assert (steps < 0).any()
    assert ends[True][1] == pytest.approx(0.5, abs=0.02)
    assert (torch.tensor(ends[False][0]).diff() >= 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: el.AttentionRouter(0), "head_dim: expected an integer of at least 1, got 0"),
        (lambda: el.straight_through(torch.zeros(2), temperature=0.0), "temperature: expected a number above 0"),
        (lambda: el.elastic_attention(*draw(3), torch.zeros(2, 6)), "full: expected one number a KV head"),
        (lambda: el.pruned_share(8, 1, 2, queries="mean"), "queries: expected last or all, got 'mean'"),
        (lambda: el.effective_sparsity(torch.zeros(1, 1), 1.5), "rho_sparse: expected a share from 0 to 1, got 1.5"),
        (lambda: el.SparsityMultipliers([]), "targets: expected at least one share from 0 to 1"),
        (
            lambda: el.SparsityMultipliers([0.5])(torch.zeros(2), torch.zeros(3).long()),
            "task: expected one for each of .2,. prompts, got .3,.",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
