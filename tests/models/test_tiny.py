"""The tiny decoder: any mixer fits, step is forward, no token sees the future, equal parameters, text comes out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab.foundations.attention import attention
from effattn_lab.linear.mixers import available, build_mixer
from effattn_lab.models.conv_mixer import GatedConvolution, ShortConvolution
from effattn_lab.models.softmax_layer import SoftmaxAttention, rope
from effattn_lab.models.tiny import TinyDecoder, count_parameters, match_parameters, state_elements

WIDTH, VOCAB = 16, 23
MIXERS = available()


def tiny(name="softmax", *, size=4, layers=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    mixers = [build_mixer(name, WIDTH, size, 2, positions=True) for _ in range(layers)]
    return TinyDecoder(VOCAB, WIDTH, mixers, **{"conv": 3, **options}).to(dtype)


def draw(batch=2, length=21, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ the baseline mixer


def test_softmax_layer_is_the_reference():
    layer = SoftmaxAttention(12, 6, num_kv_heads=2, head_dim=4, value_dim=4).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q = rope(layer.q_proj(x).view(2, 9, 6, 4).transpose(1, 2))
    k = rope(layer.k_proj(x).view(2, 9, 2, 4).transpose(1, 2))
    v = layer.v_proj(x).view(2, 9, 2, 4).transpose(1, 2)
    want = layer.o_proj(attention(q, k, v, causal=True).transpose(1, 2).reshape(2, 9, 24))
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_rope_is_a_rotation_by_the_position_and_sees_distances_alone():
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    angle = 3 * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4, dtype=torch.float64), angle)
    torch.testing.assert_close(rope(x, 3), torch.cat([pairs.real, pairs.imag], dim=-1))
    y = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    near, far = ((rope(x, t + 5) * rope(y, t)).sum() for t in (0, 1000))
    torch.testing.assert_close(near, far)
    assert abs((rope(x, 6) * rope(y, 0)).sum() - near) > 1e-3
    with pytest.raises(ValueError, match="x: expected an even head_dim, got 7"):
        rope(x[..., :7])


@pytest.mark.parametrize("cut", [1, 8, 20])
def test_softmax_layer_goes_on_from_its_cache(cut):
    layer = SoftmaxAttention(12, 2).double()
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    whole, cache = layer(x, return_state=True)
    first, state = layer(x[:, :cut], return_state=True)
    rest, state = layer(x[:, cut:], state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, cache, rtol=1e-12, atol=1e-12)
    assert cache.k.numel() + cache.v.numel() == 2 * 21 * layer.cache_elements_per_token


def test_convolution_is_the_sum_and_goes_on_from_its_tail():
    conv = ShortConvolution(5, 4).double()
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    want = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight.flip(-1)[:, None], groups=5).transpose(1, 2)
    whole, tail = conv(x, return_state=True)
    torch.testing.assert_close(whole, want)
    assert tail.shape == (2, 3, 5)
    first, state = conv(x[:, :2], return_state=True)
    rest, state = conv(x[:, 2:], state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    assert torch.equal(state, tail)
    one = ShortConvolution(5, 1)
    assert one(x.float(), return_state=True)[1].shape == (2, 0, 5)


# ------------------------------------------------------------------------------------------------ every mixer


@pytest.mark.parametrize("name", MIXERS)
def test_step_equals_forward(name):
    model, ids = tiny(name, dtype=torch.float64), draw()
    want, last = model(ids, return_state=True)
    state, got = None, []
    for t in range(ids.shape[1]):
        logits, state = model.step(state, ids[:, t : t + 1])
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-9, atol=1e-9)
    # And a state left by forward is one that step can go on from.
    one, _ = model.step(last, ids[:, :1])
    two, _ = model.step(state, ids[:, :1])
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_sees_the_future(name):
    model, ids = tiny(name), draw()
    base = model(ids)
    for t in (1, 10, 20):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        out = model(changed)
        assert torch.equal(out[:, :t], base[:, :t])
        assert not torch.equal(out[:, t:], base[:, t:])


@pytest.mark.parametrize("name", MIXERS)
def test_no_gradient_reaches_the_future(name):
    model = tiny(name)
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])
    model(draw())[:, 8].sum().backward()
    grad = seen[0].grad.abs().sum(dim=(0, 2))
    assert torch.equal(grad[9:], torch.zeros_like(grad[9:]))
    assert grad[8] > 0


@pytest.mark.parametrize("name", MIXERS)
def test_overfits_a_batch(name):
    model, ids = tiny(name, size=8, conv=3), draw(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    targets = ids.roll(-1, dims=1)
    for _ in range(80):
        loss = model.loss(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # 12 random tokens a row: by its neighbours alone (the convolution sees three) a token is all but known.
    assert loss < 0.3
    assert model.accuracy(ids, targets) > 0.9


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_learns(name):
    model = tiny(name)
    model.loss(draw(), draw(seed=2)).backward()
    # The last query of a sequence reads more than its own key, so that nothing may stay without a gradient.
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", MIXERS)
def test_state_is_counted(name):
    short, long = (state_elements(build_mixer(name, WIDTH, 4), WIDTH, n) for n in (32, 64))
    if name == "softmax":
        layer = build_mixer(name, WIDTH, 4)
        assert (short, long) == (32 * layer.cache_elements_per_token, 64 * layer.cache_elements_per_token)
        assert layer.cache_elements_per_token == 4 + WIDTH
    else:
        assert short == long
        declared = getattr(build_mixer(name, WIDTH, 4), "state_elements", None)
        assert declared is None or declared == short


def test_state_of_linear_attention():
    assert state_elements(build_mixer("linear_attention", WIDTH, 4), WIDTH) == 4 * WIDTH + 4
    # Taylor's map has 1 + d + d^2 features, d(d - 1)/2 of them twice.
    layer = build_mixer("linear_taylor", WIDTH, 4)
    assert state_elements(layer, WIDTH) in (21 * (WIDTH + 1), 15 * (WIDTH + 1))


# ------------------------------------------------------------------------------------------------ the model


def test_loss_asks_only_what_is_asked():
    model, ids = tiny(layers=1, conv=0), draw()
    targets = torch.full_like(ids, -100)
    targets[0, 3], targets[1, 20] = 5, 7
    logits = model(ids)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(model.loss(ids, targets), want)
    targets[0, 3], targets[1, 20] = logits[0, 3].argmax(), logits[1, 20].argmin()
    assert model.accuracy(ids, targets) == 0.5


@pytest.mark.parametrize("name", MIXERS)
def test_generation_is_what_forward_would_say(name):
    model, ids = tiny(name), draw(2, 5)
    got = model.generate(ids, 4)
    for _ in range(4):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids[:, 5:])
    g = torch.Generator().manual_seed(0)
    drawn = model.generate(ids, 6, temperature=2.0, generator=g)
    again = model.generate(ids, 6, temperature=2.0, generator=g.manual_seed(0))
    assert torch.equal(drawn, again)


def test_sampling_follows_the_distribution():
    model, ids = tiny(layers=1), draw(1, 5)
    probs = torch.softmax(model(ids)[0, -1] / 0.7, dim=-1)
    g = torch.Generator().manual_seed(0)
    n = 20_000
    drawn = model.generate(ids.expand(n, -1), 1, temperature=0.7, generator=g)[:, 0]
    counts = torch.bincount(drawn, minlength=VOCAB)
    chi2 = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi2 < 48.3  # 22 degrees of freedom, p = 0.001


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_equal_parameters(mlp):
    def build(name):
        return lambda h: TinyDecoder(
            64, 32, [build_mixer(name, 32, 8), build_mixer(name, 32, 8)], mlp=mlp, mlp_width=h
        )

    counts = {n: count_parameters(build(n)(match_parameters(build(n), 40_000))) for n in MIXERS}
    assert all(abs(c - 40_000) <= 400 for c in counts.values()), counts
    with pytest.raises(ValueError, match="target: expected a number that an MLP of at least 1 units"):
        match_parameters(build("softmax"), 3_000)


def test_parts():
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == VOCAB * WIDTH
    assert tied.head.weight is tied.embed.weight
    bare = tiny(mlp_width=0, conv=0, layers=1)
    assert bare.blocks[0].mlp is None
    assert count_parameters(bare) == VOCAB * WIDTH + 2 * WIDTH + 2 * WIDTH * 8 + 2 * WIDTH * WIDTH
    mixers = [GatedConvolution(WIDTH), SoftmaxAttention(WIDTH, 2)]
    mixed = TinyDecoder(VOCAB, WIDTH, mixers, mlp="gelu", mlp_width=[0, 5])
    assert [b.mlp is None for b in mixed.blocks] == [True, False]
    assert mixed(draw()).shape == (2, 21, VOCAB)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TinyDecoder(0, 8, [nn.Identity()]), "vocab_size: expected an integer of at least 1, got 0"),
        (lambda: TinyDecoder(8, 8, []), "mixers: expected at least one nn.Module"),
        (lambda: TinyDecoder(8, 8, [GatedConvolution(8)] * 2), "mixers: expected a module of its own"),
        (lambda: TinyDecoder(8, 8, [GatedConvolution(8)], mlp="relu"), "mlp: expected one of swiglu, gelu"),
        (lambda: TinyDecoder(8, 8, [GatedConvolution(8)], mlp_width=-1), "mlp_width: expected"),
        (
            lambda: TinyDecoder(8, 8, [GatedConvolution(8)], mlp_width=[1, 2]),
            "mlp_width: expected one for each",
        ),
        (lambda: tiny()(torch.zeros(2, 3)), r"ids: expected int64 token numbers \[B, N\], got torch.float32"),
        (lambda: tiny()(torch.tensor([[VOCAB]])), "ids: expected numbers from 0 to 22, got 23 to 23"),
        (lambda: tiny()(draw(), []), "state: expected one entry for each of 2 blocks, got 0"),
        (lambda: tiny().step(None, draw()), r"ids: expected one token a sequence \[B, 1\]"),
        (lambda: tiny().loss(draw(), draw(3)), r"targets: expected the shape of ids \(2, 21\)"),
        (lambda: tiny().loss(draw(), torch.full((2, 21), -100)), "targets: expected at least one position"),
        (lambda: tiny().generate(draw(), 0), "max_new_tokens: expected"),
        (lambda: tiny().generate(draw(), 1, temperature=-1), "temperature: expected"),
        (lambda: SoftmaxAttention(8, 3), "num_heads: expected a divisor of width"),
        (lambda: SoftmaxAttention(8, 4, num_kv_heads=3), "num_kv_heads: expected a divisor"),
        (lambda: SoftmaxAttention(8, 1, head_dim=3), "head_dim: expected an even number"),
        (lambda: SoftmaxAttention(8, 1)(torch.zeros(1, 2, 9)), r"x: expected shape \[B, N, 8\]"),
        (lambda: SoftmaxAttention(8, 1).step(None, torch.zeros(1, 2, 8)), "x: expected one token"),
        (lambda: ShortConvolution(8)(torch.zeros(1, 0, 8)), r"x: expected shape \[B, N, 8\]"),
        (lambda: build_mixer("none", 8, 4), "name: expected one of softmax"),
        (lambda: build_mixer("softmax", 8, 4, 3), "heads: expected a divisor of width"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
