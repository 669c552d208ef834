"""Feature maps: the weights they stand for, their signs and sizes."""

import math

import pytest
import torch

from effattn_lab.linear.feature_maps import FEATURE_MAPS, Hedgehog, dpfp, elu, hedgehog, taylor

X = 3 * torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_size_and_sign(name):
    feature_map = FEATURE_MAPS[name]
    phi = feature_map(X)
    assert phi.shape == (200, feature_map.feature_dim(6))
    assert phi.dtype == X.dtype
    assert ((phi @ phi.T).min() >= 0) == feature_map.positive
    assert feature_map(X.float()).dtype == torch.float32


def test_elu_is_elu_plus_one():
    torch.testing.assert_close(elu(X), torch.nn.functional.elu(X) + 1)
    x = torch.tensor([-40.0, -17.5, 0.0, 2.0], requires_grad=True)
    assert (elu(x) > 0).all()  # torch's elu + 1 is 0 in float32 for the first two
    (grad,) = torch.autograd.grad(elu(x).sum(), x)
    torch.testing.assert_close(grad, torch.exp(torch.tensor([-40.0, -17.5, 0.0, 0.0])))


def test_taylor_is_the_polynomial():
    q, k = X[:100], X[100:]
    s = q @ k.T / math.sqrt(6)
    weights = taylor(q) @ taylor(k).T
    torch.testing.assert_close(weights, 1 + s + s**2 / 2)
    assert weights.min() >= 0.5
    near = torch.linspace(-0.3, 0.3, 7, dtype=torch.float64)
    assert (1 + near + near**2 / 2 - near.exp()).abs().max() < 0.3**3 / 4  # the next term is s^3 / 6


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_dpfp_by_hand(nu):
    r = torch.cat([X.clamp(min=0), (-X).clamp(min=0)], -1)
    phi = dpfp(X, nu)
    assert phi.shape == (200, 12 * nu)
    for j in range(1, nu + 1):
        for i in range(12):
            torch.testing.assert_close(phi[:, 12 * (j - 1) + i], r[:, i] * r[:, (i - j) % 12])
    assert (phi >= 0).all()
    assert (phi == 0).double().mean() > 0.5
    with pytest.raises(ValueError, match="nu: expected an integer of at least 1, got 0"):
        dpfp(X, 0)


def test_hedgehog_is_a_distribution_and_trains():
    phi = hedgehog(X)
    torch.testing.assert_close(phi.sum(-1), torch.ones(200, dtype=torch.float64))
    module = Hedgehog(2, 6).double()
    x = X[:20].view(1, 2, 10, 6)
    torch.testing.assert_close(module(x), hedgehog(x))  # it begins as the identity
    assert module.feature_dim(6) == module(x).shape[-1] == 12
    with torch.no_grad():
        module.weight[1] *= 2
    torch.testing.assert_close(module(x)[:, 0], hedgehog(x[:, 0]))
    torch.testing.assert_close(module(x)[:, 1], hedgehog(2 * x[:, 1]))
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(module, {"weight": w}, x),
                                    module.weight.detach().clone().requires_grad_())  # fmt: skip


@pytest.mark.parametrize("nu", [1, 3])
def test_dpfp_against_fla(nu):
    """flash-linear-attention's own class."""
    other = pytest.importorskip("fla.modules.feature_map", reason="fla-core is not installed (extra peers)")
    torch.testing.assert_close(dpfp(X, nu), other.DPFPFeatureMap(head_dim=6, nu=nu)(X))
