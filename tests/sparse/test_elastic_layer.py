"""The layer around a trained attention: all full is that layer, decisions reach heads, decoding reads everything."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.models.softmax_layer import SoftmaxAttention, rope
from effattn_lab.models.tiny import TinyDecoder
from effattn_lab.sparse.elastic_layer import ElasticAttention
from effattn_lab.sparse.streaming import streaming_attention


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(**options):
    torch.manual_seed(0)
    inner = SoftmaxAttention(32, 4, num_kv_heads=2)
    layer = ElasticAttention(inner, boundary=3, sinks=1, window=4, **options).eval()
    return layer, torch.randn(3, 20, 32)


def test_all_full_is_the_layer_it_was_given():
    layer, x = make()
    layer.fixed = torch.ones(2)
    torch.testing.assert_close(layer(x), layer.attention(x), rtol=0, atol=1e-13)
    assert layer.route is None


def test_all_sparse_is_sinks_and_window_and_a_mixture_goes_by_kv_head():
    layer, x = make()
    inner = layer.attention
    q, k, v = (
        p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (inner.q_proj, inner.k_proj, inner.v_proj)
    )
    q, k = rope(q), rope(k)
    few = streaming_attention(q, k, v, sinks=1, window=4)
    layer.fixed = torch.zeros(2)
    got = layer(x)
    torch.testing.assert_close(got, inner.o_proj(few.transpose(1, 2).flatten(2)), rtol=0, atol=1e-13)
    layer.fixed = torch.ones(2)
    dense = layer(x)
    layer.fixed = torch.tensor([[1.0, 0], [0, 0], [1, 1]])
    mixture = layer(x)
    torch.testing.assert_close(mixture[1], got[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(mixture[2], dense[2], rtol=0, atol=1e-13)
    # linear output projection: the first prompt's full heads are 0 and 1, its sparse ones 2 and 3
    inner.o_proj.weight.data[:, 16:] = 0
    layer.fixed = torch.ones(2)
    torch.testing.assert_close(
        layer(x)[0], _with(layer, x, [[1.0, 0], [0, 0], [1, 1]])[0], rtol=0, atol=1e-13
    )
    assert (_with(layer, x, [0.0, 1.0]) - layer(x)).abs().max() > 1e-3


def _with(layer, x, fixed):
    kept, layer.fixed = layer.fixed, torch.tensor(fixed)
    out = layer(x)
    layer.fixed = kept
    return out


def test_the_router_reads_keys_before_rope():
    """The same tokens, the middle moved: in a first layer the ends decide alone, wherever they stand."""
    layer, x = make()
    with torch.no_grad():
        layer.router.router[-1].weight *= 30
    layer(x)
    logits = layer.route.logits
    longer = torch.cat([x[:, :10], torch.randn(3, 13, 32), x[:, 10:]], dim=1)
    layer(longer)
    torch.testing.assert_close(layer.route.logits, logits, rtol=0, atol=1e-12)


def test_training_sends_a_gradient_to_the_router_alone():
    layer, x = make()
    layer.attention.requires_grad_(False)
    layer.train()
    layer.generator = torch.Generator().manual_seed(1)
    out = layer(x)
    assert set(layer.route.full.unique().tolist()) <= {0.0, 1.0}
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.router.parameters())
    assert all(p.grad is None for p in layer.attention.parameters())


def test_decoding_reads_everything_whatever_the_route():
    """After an all-sparse prompt a step sees the whole cache: the same as the inner layer's step on that cache."""
    layer, x = make()
    layer.fixed = torch.zeros(2)
    _, state = layer(x, return_state=True)
    token = torch.randn(3, 1, 32)
    _, full_state = layer.attention(x, return_state=True)
    torch.testing.assert_close(state.k, full_state.k, rtol=0, atol=1e-13)
    got, after = layer.step(state, token)
    want, _ = layer.attention.step(full_state, token)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert after.k.shape[2] == 21
    torch.testing.assert_close(layer(token, state), want, rtol=0, atol=1e-13)


def test_inside_a_decoder():
    torch.manual_seed(0)
    model = TinyDecoder(20, 32, [SoftmaxAttention(32, 4) for _ in range(2)])
    ids = torch.randint(20, (2, 16))
    want = model(ids)
    for block in model.blocks:
        block.mixer = ElasticAttention(block.mixer, boundary=2, sinks=1, window=3)
        block.mixer.fixed = torch.ones(4)
    torch.testing.assert_close(model(ids), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"boundary": 0}, "boundary: expected an integer of at least 1, got 0"),
        ({"sinks": -1}, "sinks: expected an integer of at least 0, got -1"),
        ({"window": 0}, "window: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        ElasticAttention(SoftmaxAttention(16, 2), **options)


def test_bad_input_is_named():
    layer, x = make()
    with pytest.raises(ValueError, match=r"x: expected shape .B, N, 32. with N at least 1, got .3, 20, 16."):
        layer(x[..., :16])
    layer.fixed = torch.ones(4)
    with pytest.raises(ValueError, match=r"fixed: expected shape .2,. or .3, 2., got .4,."):
        layer(x)
