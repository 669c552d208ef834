"""The short convolution and Mamba's block: beside transformers' own, decoding, leaks, training, costs."""

import pytest
import sympy as sp
import torch
import torch.nn.functional as F

from effattn_lab.linear import selective_ssm_cost as cost
from effattn_lab.linear.selective_ssm import lti_kernel, selective_scan_chunked
from effattn_lab.linear.selective_ssm_conv import causal_conv1d, causal_conv1d_step
from effattn_lab.linear.selective_ssm_layer import Mamba, MambaState


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_is_the_definition(width, length):
    g = torch.Generator().manual_seed(0)
    x, weight, bias, before = (torch.randn(*s, generator=g, dtype=torch.float64)
                               for s in ((2, 5, length), (5, width), (5,), (2, 5, width - 1)))  # fmt: skip
    y, after = causal_conv1d(x, weight, bias, initial_state=before, return_state=True)
    seen = torch.cat([before, x], 2)
    for t in range(length):
        want = bias + sum(weight[:, k] * seen[:, :, t + k] for k in range(width))
        torch.testing.assert_close(y[:, :, t], want, rtol=0, atol=1e-13)
    assert torch.equal(after, seen[:, :, length:])
    state = before
    for t in range(length):
        out, state = causal_conv1d_step(state, x[:, :, t : t + 1], weight, bias, activation="silu")
        torch.testing.assert_close(out, F.silu(y[:, :, t : t + 1]), rtol=0, atol=1e-13)
    assert torch.equal(state, after)
    assert torch.equal(
        causal_conv1d(x, weight, initial_state=before, activation="silu"),
        F.silu(causal_conv1d(x, weight, initial_state=before)),
    )


def test_convolution_hears_no_future():
    x = torch.randn(1, 3, 20)
    weight = torch.randn(3, 4)
    before = causal_conv1d(x, weight)
    x[:, :, 11:] += 1
    after = causal_conv1d(x, weight)
    assert torch.equal(before[:, :, :11], after[:, :, :11])
    assert (before[:, :, 11] != after[:, :, 11]).all()


def test_bad_input_of_the_convolution_is_named():
    good = {"x": torch.randn(2, 5, 7), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    for change, message in (
        (dict(x=torch.randn(5, 7)), "x: expected 3 dimensions"),
        (dict(weight=torch.randn(4, 5)), r"weight: expected shape \(5, W\), got \(4, 5\)"),
        (dict(bias=torch.randn(4)), r"bias: expected shape \(5,\)"),
        (dict(weight=torch.randn(5, 4).double()), "weight: expected the dtype of x"),
        (dict(initial_state=torch.randn(2, 5, 4)), r"initial_state: expected shape \(2, 5, 3\)"),
        (dict(activation="gelu"), "activation: expected 'silu' or None"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**{**good, **change})
    with pytest.raises(ValueError, match="x: expected one token"):
        causal_conv1d_step(None, **good)


def mixer(size=16, conv=4, expand=2, width=24):
    """transformers' own block, on its PyTorch path."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra llm)")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(
        hidden_size=width, state_size=size, conv_kernel=conv, expand=expand, num_hidden_layers=1, vocab_size=8
    )
    torch.manual_seed(1)
    theirs = MambaMixer(config, layer_idx=0)
    return theirs.eval(), config


@pytest.mark.parametrize("options", [dict(), dict(size=3, conv=2, expand=3, width=20)], ids=str)
def test_against_transformers(options):
    """Their weights loaded into ours by name: outputs and gradients, prefill and decode from a cache."""
    theirs, config = mixer(**options)
    ours = Mamba(
        config.hidden_size,
        state_size=config.state_size,
        conv_width=config.conv_kernel,
        expand=config.expand,
        chunk_size=8,
    )
    assert ours.dt_rank == config.time_step_rank
    ours.load_state_dict(theirs.state_dict())
    theirs.double()
    ours.double()
    x = torch.randn(2, 37, config.hidden_size, dtype=torch.float64)
    want = theirs(x)
    # They keep A in float32 (`A_log.float()`) in every dtype, which limits what float64 can show.
    torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-6 * want.abs().max().item())
    got = torch.autograd.grad(ours(x).square().sum(), list(ours.parameters()))
    names = [n for n, _ in ours.named_parameters()]
    expected = torch.autograd.grad(
        theirs(x).square().sum(), [dict(theirs.named_parameters())[n] for n in names]
    )
    for (name, _), a, b in zip(ours.named_parameters(), got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * b.abs().max().item(), msg=name)
    from transformers import DynamicCache

    cache, state = DynamicCache(config=config), None
    with torch.no_grad():
        theirs(x[:, :30], cache_params=cache)
        _, state = ours(x[:, :30], return_state=True)
        for t in range(30, 37):
            theirs_now = theirs(x[:, t : t + 1], cache_params=cache)
            ours_now, state = ours.step(state, x[:, t : t + 1])
            torch.testing.assert_close(ours_now, theirs_now, rtol=0, atol=1e-5 * want.abs().max().item())


def test_starts_like_mamba():
    torch.manual_seed(0)
    layer = Mamba(256)
    delta = F.softplus(layer.dt_proj.bias)
    assert 0.001 <= delta.min() < 0.0015
    assert 0.07 < delta.max() <= 0.1
    assert (
        abs(delta.log().mean().item() - (torch.tensor([0.001, 0.1]).log().mean().item())) < 0.1
    )  # log-uniform
    torch.testing.assert_close(-torch.exp(layer.A_log[3]), -torch.arange(1.0, 17))
    assert layer.dt_proj.weight.abs().max() <= 16**-0.5
    kept = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert kept == {"A_log", "D", "dt_proj.bias"}


@pytest.mark.parametrize(
    "options", [dict(), dict(recompute=True, expand=1), dict(conv_width=1, state_size=4, rule="zoh")], ids=str
)
def test_trains_and_decodes(options):
    """The task is selective: the last marked value must come out, however long ago it was."""
    torch.manual_seed(0)
    layer = Mamba(16, 4, chunk_size=8, **options)
    x = torch.randn(16, 20, 16)
    marked = torch.rand(16, 20) < 0.2
    marked[:, 0] = True
    x[..., 15] = marked.float() * 3
    last = torch.where(marked, torch.arange(20), 0).cummax(1).values
    target = x.gather(1, last[..., None].expand(-1, -1, 16))[..., :4]
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x)[..., :4] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        want = layer(x)
        first, state = layer(x[:, :9], return_state=True)
        middle, state = layer(x[:, 9:15], state, return_state=True)
        outs = [first, middle]
        for t in range(15, 20):
            out, state = layer.step(state, x[:, t : t + 1])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-5)
        alone, state = [], None
        for t in range(20):
            out, state = layer.step(state, x[:, t : t + 1])
            alone.append(out)
        torch.testing.assert_close(torch.cat(alone, 1), want, rtol=1e-4, atol=1e-5)
    assert isinstance(state, MambaState)
    assert sum(s[0].numel() for s in state) == layer.state_elements


def test_without_selection_it_is_a_convolution():
    """Behind the short convolution and before the gate: the kernel of S4D, whatever the tokens are."""
    torch.manual_seed(0)
    layer, x = Mamba(8, state_size=4, selective=False).double(), torch.randn(2, 30, 8).double()
    u, z = layer.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    u = causal_conv1d(u, layer.conv1d.weight[:, 0], layer.conv1d.bias, activation="silu")
    kernel = lti_kernel(F.softplus(layer.dt_bias), -torch.exp(layer.A_log), layer.B, layer.C, 30)
    y = F.conv1d(F.pad(u, (29, 0)), kernel.flip(1)[:, None], groups=16) + layer.D[:, None] * u
    torch.testing.assert_close(layer(x), layer.out_proj((y * F.silu(z)).transpose(1, 2)), rtol=0, atol=1e-12)
    state = None
    for t in range(30):
        out, state = layer.step(state, x[:, t : t + 1])
    torch.testing.assert_close(out, layer(x)[:, -1:], rtol=0, atol=1e-12)
    assert (layer.deltas(x) == F.softplus(layer.dt_bias)[:, None]).all()
    chosen = Mamba(8)
    assert chosen.deltas(torch.randn(1, 9, 8)).std(-1).min() > 0
    assert chosen.deltas(torch.randn(1, 9, 8)).min() > 0


@pytest.mark.parametrize("token", [0, 7, 8, 19])
def test_the_layer_does_not_leak(token):
    torch.manual_seed(0)
    layer, x = Mamba(16, chunk_size=8), torch.randn(1, 20, 16)
    before = layer(x)
    x[:, token:] += 1
    after = layer(x)
    assert torch.equal(before[:, :token], after[:, :token])
    assert (before[:, token] != after[:, token]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layer(dtype):
    torch.manual_seed(0)
    layer, x = Mamba(16), torch.randn(2, 70, 16)
    want = layer(x).detach()
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()


def test_bad_layers_are_named():
    for options, message in (
        (dict(head_dim=8), "head_dim: expected None, since Mamba has no heads, got 8"),
        (dict(num_kv_heads=1), "num_kv_heads: expected None"),
        (dict(state_size=0), "state_size: expected an integer of at least 1, got 0"),
        (dict(expand=1.5), "expand: expected an integer"),
        (dict(dt_min=0.0), "dt_min: expected 0 < dt_min <= dt_max"),
        (dict(rule="bilinear"), "rule: expected one of euler, zoh, got 'bilinear'"),
    ):
        with pytest.raises(ValueError, match=message):
            Mamba(16, **options)
    with pytest.raises(ValueError, match="x: expected shape"):
        Mamba(16)(torch.randn(2, 5, 8))


@pytest.mark.parametrize("width", [16, 100])
def test_costs_are_counted(width):
    layer = Mamba(width, state_size=8, conv_width=3, expand=3)
    assert sum(p.numel() for p in layer.parameters()) == cost.layer_parameters(width, 8, 3, 3)
    _, state = layer.to(torch.bfloat16)(torch.randn(1, 5, width).bfloat16(), return_state=True)
    assert sum(s.numel() for s in state) == cost.state_elements(3 * width, 8, 3) == layer.state_elements
    assert sum(s.numel() * s.element_size() for s in state) == cost.state_bytes(3 * width, 8, 3)


def test_chunk_states_are_counted():
    """What training keeps of the states: borders, one a chunk."""
    n, channels, size, chunk = 256, 4, 8, 32
    x = {"u": torch.randn(1, channels, n), "delta": torch.rand(1, channels, n), "A": -torch.rand(channels, size),
         "B": torch.randn(1, size, n), "C": torch.randn(1, size, n)}  # fmt: skip
    x["u"].requires_grad_()
    borders = {}

    def pack(t):
        if t.shape[-2:] == (channels, size) and t.dim() == 4:  # a state with its group axis
            borders[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan_chunked(**x, chunk_size=chunk)
    assert sum(borders.values()) == cost.chunk_states_bytes(channels, n, size, chunk)


def test_known_figures():
    m = sp.symbols("M", positive=True)
    leading = sp.limit(cost.layer_parameters(m, dt_rank=m / 16) / m**2, m, sp.oo)
    assert leading == 6 + sp.Rational(2 * 2, 16)  # six M^2, and a quarter for delta's bottleneck
    # 32 M numbers of state against 2 M a cached token: 16 tokens at equal precision, the convolution aside.
    assert cost.crossover_cache(conv_width=1, itemsize=2, state_itemsize=2) == 16
    assert cost.crossover_cache() == 35  # float32 state, bf16 cache, convolution included
    assert cost.scan_flops(1, 1, 16) == 118
    ratio = cost.materialized_bytes(1, 1, 16, 2) / cost.fused_bytes(1, 1, 0, 2)
    assert ratio == 24
    s, e = sp.symbols("S E", positive=True)
    assert sp.limit(cost.step_bytes(e, s) / e, e, sp.oo) == 8 * s + 8
    assert cost.scan_exponentials(4, 10) == 640
