"""Gates and layers: the published formulas and initial values, training, decoding, transformers' Mamba-2."""

import math

import pytest
import torch
import torch.nn.functional as F

from effattn_lab.linear import gated_linear_cost as cost
from effattn_lab.linear.gated_linear_layer import GatedLinear
from effattn_lab.linear.gates import GLAGate, RetNetGate, RWKV6Gate, RWKV7Gate, SSDGate, retnet_log_decay

GATES = ("retnet", "ssd", "gla", "rwkv6")


def test_retnet_decays():
    decay = retnet_log_decay(8).exp()
    assert decay[:2].tolist() == pytest.approx([0.96875, 0.984375], abs=1e-15)
    assert [round(cost.half_life(x)) for x in retnet_log_decay(3).tolist()] == [22, 44, 88]
    gate = RetNetGate(4)
    g = gate(torch.randn(2, 7, 16))
    assert g.shape == (2, 4, 7)
    assert (g == gate.log_decay[:, None]).all()
    assert not list(gate.parameters())


def test_ssd_gate():
    torch.manual_seed(0)
    gate = SSDGate(16, 200)
    assert 1 <= gate.A_log.exp().min() < gate.A_log.exp().max() <= 16
    dt = F.softplus(gate.dt_bias)
    assert dt.min() * 1.001 >= 0.001
    assert dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.3)  # uniform in the logarithm
    x = torch.randn(2, 5, 16)
    g, dt = gate(x)
    want = F.softplus(x @ gate.proj.weight.T + gate.dt_bias).transpose(1, 2)
    torch.testing.assert_close(dt, want)
    torch.testing.assert_close(g, -gate.A_log.exp()[:, None] * want)


def test_gla_gate():
    torch.manual_seed(0)
    gate = GLAGate(32, 2, 8)
    x = torch.randn(3, 5, 32)
    g = gate(x)
    by_hand = torch.sigmoid(x @ gate.down.weight.T @ gate.up.weight.T + gate.up.bias) ** (1 / 16)
    torch.testing.assert_close(g.exp(), by_hand.view(3, 5, 2, 8).transpose(1, 2))
    assert sum(p.numel() for p in gate.parameters()) == 32 * 16 + 16 * 16 + 16
    assert g.exp().min() > 0.9


def test_rwkv_gates():
    torch.manual_seed(0)
    gate = RWKV6Gate(32, 2, 8)
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(gate(x)[0, :, 0], -torch.exp(gate.base).view(2, 8))  # the low rank begins at 0
    assert gate.base[0] == -6
    assert gate.base[-1] == -1
    with torch.no_grad():
        gate.base += 5
    assert gate(x).min() < -50  # no floor
    gate = RWKV7Gate(32, 2, 8)
    k = torch.randn(3, 2, 5, 8)
    with torch.no_grad():
        gate.base.copy_(torch.linspace(-100, 100, 16))
    g, a, kappa, written = gate(x, k)
    assert g.min().item() == pytest.approx(-math.exp(-0.5))
    assert g.exp().min() > 0.545
    torch.testing.assert_close(a, torch.full_like(a, 0.5))
    torch.testing.assert_close(kappa.norm(dim=-1), torch.ones(3, 2, 5))
    torch.testing.assert_close(written, 0.5 * k)  # half the erase, half the write


@pytest.mark.parametrize("options", [
    dict(gate="retnet"), dict(gate="retnet", num_kv_heads=2, value_dim=6), dict(gate="ssd"),
    dict(gate="ssd", head_dim=8), dict(gate="gla"), dict(gate="gla", num_kv_heads=1, head_dim=6), dict(gate="rwkv6"),
    dict(gate="rwkv6", head_dim=6, value_dim=5),
], ids=str)  # fmt: skip
def test_layer_trains_and_decodes(options):
    torch.manual_seed(0)
    layer = GatedLinear(16, 4, chunk_size=8, **options)
    x = torch.randn(8, 20, 16)
    past = torch.zeros(8, 16)
    target = torch.stack([past := 0.8 * past + 0.2 * x[:, t] for t in range(20)], 1)  # a leaky mean
    optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert losses[-1] < 0.5 * losses[0], losses
    with torch.no_grad():
        want, end = layer(x, return_state=True)
        assert sum(y.numel() for y in (end.S, end.tail)) == 8 * layer.state_elements
        first, state = layer(x[:, :7], return_state=True)
        second, state = layer(x[:, 7:15], state, return_state=True)
        outs = [first, second]
        for t in range(15, 20):
            out, state = layer.step(state, x[:, t : t + 1])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.S, end.S, rtol=1e-4, atol=1e-5)
        assert state.position == end.position == 20
        alone, state = layer.step(None, x[:, :1])
        torch.testing.assert_close(alone, want[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_layer_does_not_leak(gate):
    torch.manual_seed(0)
    layer = GatedLinear(16, 2, gate=gate, chunk_size=4).double()
    x = torch.randn(1, 13, 16, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    for t in (0, 3, 4, 12):
        (grad,) = torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all()
        assert grad[:, : t + 1].abs().max() > 0


def test_rotation_makes_retention_relative():
    """RetNet: the same tokens later in the text, from an empty state, give the same outputs."""
    torch.manual_seed(0)
    layer = GatedLinear(16, 2, gate="retnet").double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    want, state = layer(x, return_state=True)
    later = state._replace(S=torch.zeros_like(state.S), position=1000)
    torch.testing.assert_close(layer(x, later), want, rtol=0, atol=1e-9)


def test_retnet_against_fla():
    naive = pytest.importorskip("fla.ops.retention.naive", reason="fla-core is not installed (extra peers)")
    from effattn_lab.linear.gated_linear import gated_linear_chunked

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 100, 16) for _ in range(3))
    g = RetNetGate(4)(torch.zeros(2, 100, 1))
    torch.testing.assert_close(
        gated_linear_chunked(q, k, v, g), naive.naive_retention(q, k, v), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("training", [False, True])
def test_ssd_is_transformers_mamba2(training):
    """The whole block against transformers' slow path, with its weights; also its decode with a cache."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra llm)")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        num_heads=4, head_dim=8, hidden_size=16, state_size=12, expand=2, n_groups=1, conv_kernel=4, chunk_size=8,
        num_hidden_layers=1, use_bias=False, use_conv_bias=True,
    )  # fmt: skip
    mixer = Mamba2Mixer(config, 0).train(training)
    layer = GatedLinear(16, 4, gate="ssd", head_dim=12, value_dim=8, chunk_size=5)
    z, xbc, dt = mixer.in_proj.weight.split([32, 32 + 24, 4])
    with torch.no_grad():
        mixer.norm.weight.uniform_(0.5, 2)
        layer.inputs.z_proj.weight.copy_(z)
        layer.inputs.xbc_proj.weight.copy_(xbc)
        layer.inputs.gate.proj.weight.copy_(dt)
        layer.inputs.conv.load_state_dict(mixer.conv1d.state_dict())
        layer.inputs.gate.A_log.copy_(mixer.A_log)
        layer.inputs.gate.dt_bias.copy_(mixer.dt_bias)
        layer.inputs.D.copy_(mixer.D)
        layer.norm.inner.weight.copy_(mixer.norm.weight)
        layer.o_proj.weight.copy_(mixer.out_proj.weight)
    x = torch.randn(2, 21, 16)
    want = mixer(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-6)
    first, state = layer(x[:, :10], return_state=True)
    outs = [first]
    for t in range(10, 21):
        out, state = layer.step(state, x[:, t : t + 1])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x: expected shape"):
        GatedLinear(16, 4)(torch.randn(2, 5, 8))
    for message, options in (
        ("gate: expected one of retnet, ssd, gla, rwkv6, got 'lstm'", dict(gate="lstm")),
        ("num_kv_heads: expected a divisor", dict(num_kv_heads=3)),
        ("num_kv_heads: expected num_heads", dict(gate="ssd", num_kv_heads=2)),
        ("num_kv_heads: expected num_heads", dict(gate="rwkv6", num_kv_heads=2)),
        ("head_dim: expected an even number", dict(gate="retnet", head_dim=5)),
        ("chunk_size: expected an integer", dict(chunk_size=0)),
    ):
        with pytest.raises(ValueError, match=message):
            GatedLinear(16, 4, **options)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of width"):
        GatedLinear(15, 4)


def test_costs_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from effattn_lab.linear.gated_linear import gated_linear_chunked

    heads, n, dim, value_dim, chunk = 3, 128, 16, 24, 32
    q, k, v = torch.rand(1, heads, n, dim), torch.rand(1, heads, n, dim), torch.rand(1, heads, n, value_dim)
    for per_channel, g in ((False, -torch.rand(1, heads, n)), (True, -torch.rand(1, heads, n, dim))):
        with FlopCounterMode(display=False) as counter:
            _, state = gated_linear_chunked(q, k, v, g, chunk_size=chunk, return_state=True)
        # The diagonal of the halving is a sum of products, which PyTorch does not count as a product.
        aside = heads * n * 2 * dim if per_channel else 0
        assert (
            counter.get_total_flops()
            == cost.chunked_flops(heads, n, dim, value_dim, chunk, per_channel) - aside
        )
        assert state.numel() == cost.state_elements(heads, dim, value_dim)
    assert cost.exponentials(1, 1, 64) == 66
    assert cost.exponentials(1, 1, 64, per_channel=True) == 64 * 8 < 64 * 64 / 2


def test_known_sizes():
    """State in tokens of KV cache (2 M numbers each): the defaults of the published models."""
    width = 2048
    assert cost.cache_length(width // 256, 256, 512, 2 * width) == 256  # RetNet: key 256, value 512
    assert cost.cache_length(4, width // 8, width // 4, 2 * width) == 128  # GLA: 4 heads, expand_k 0.5
    assert cost.cache_length(2 * width // 64, 128, 64, 2 * width) == 128  # Mamba-2
    assert cost.cache_length(width // 64, 64, 64, 2 * width) == 32  # RWKV-6, RWKV-7
    assert cost.tokens_until(math.log(0.5), 1 / 8) == 3
    assert cost.step_bytes(8, 8, 64, 64) - 2 * cost.state_bytes(8, 64, 64) == 16 * 128 * 2 + 32
    assert cost.step_flops(8, 8, 64, 64) == cost.recurrent_flops(8, 1, 64, 64)
    with pytest.raises(ValueError, match="log_decay: expected a number below 0"):
        cost.half_life(0.0)
    with pytest.raises(ValueError, match="weight: expected a number between 0 and 1"):
        cost.tokens_until(-1.0, 1.0)
