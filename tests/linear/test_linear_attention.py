"""Linear attention in PyTorch: every form against the reference in float64, gradients, state, leaks, bad input."""

import math

import pytest
import torch

from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.linear.feature_maps import FEATURE_MAPS, Hedgehog
from effattn_lab.linear.linear_attention import (
    LinearState,
    init_state,
    linear_attention,
    linear_attention_chunked,
    linear_attention_recurrent,
    linear_attention_step,
)
from effattn_lab.linear.linear_attention_layer import LinearAttention

LENGTHS = (1, 63, 64, 65, 1000)
CHUNKS = (1, 48, 64, 2000)
NORMALIZED = [name for name, m in FEATURE_MAPS.items() if m.positive]


def draw(shape, dtype=torch.float64, seed=0):
    """q, k, v of ``(B, Hq, Hkv, Nq, Nk, D, Dv)``, spread out: with equal weights a wrong mask would hardly show."""
    batch, hq, hkv, nq, nk, dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, hq, nq, dim, generator=g, dtype=torch.float64)
    k = 2 * torch.randn(batch, hkv, nk, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, hkv, nk, value_dim, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v)]


def by_hand(q, k, v, phi, causal, scale, normalize, eps):
    """The definition, pair by pair, no broadcasting that could hide an error."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                last = i + k.shape[2] - q.shape[2] if causal else k.shape[2] - 1
                total = eps if normalize else 1.0
                for j in range(last + 1):
                    w = scale * phi(q[b, h, i]) @ phi(k[b, h // groups, j])
                    out[b, h, i] += w * v[b, h // groups, j]
                    total = total + w if normalize else total
                out[b, h, i] /= total
    return out


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_reference_is_the_definition(name, causal):
    q, k, v = draw((2, 4, 2, 5, 7, 3, 2))
    options = dict(scale=0.7, normalize=FEATURE_MAPS[name].positive, eps=1e-3)
    got = linear_attention(q, k, v, feature_map=name, causal=causal, **options)
    want = by_hand(q, k, v, FEATURE_MAPS[name], causal, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_the_reference(length, chunk_size):
    q, k, v = draw((1, 2, 2, length, length, 32, 32))
    got = linear_attention_chunked(q, k, v, causal=True, chunk_size=chunk_size)
    torch.testing.assert_close(got, linear_attention(q, k, v, causal=True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("dims", [(32, 32), (60, 24), (64, 64), (128, 128)], ids=str)
def test_forms_agree_for_every_map(name, dims):
    dim, value_dim = (
        (dims[0] // 4, dims[1]) if name == "taylor" else dims
    )  # Based uses small D: 1 + D + D^2 features
    q, k, v = draw((1, 2, 1, 65, 65, dim, value_dim))
    options = dict(feature_map=name, normalize=FEATURE_MAPS[name].positive)
    want = linear_attention(q, k, v, causal=True, **options)
    size = want.abs().max().item()
    chunked, after = linear_attention_chunked(q, k, v, causal=True, return_state=True, **options)
    recurrent, end = linear_attention_recurrent(q, k, v, **options)
    full = linear_attention_chunked(q, k, v, **options)
    for got, expected in ((chunked, want), (recurrent, want), (full, linear_attention(q, k, v, **options))):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * max(1.0, size))
    phi_k = FEATURE_MAPS[name](k)
    assert after.S.shape == (1, 1, FEATURE_MAPS[name].feature_dim(dim), value_dim)
    for state in (after, end):
        torch.testing.assert_close(state.S, phi_k.transpose(-1, -2) @ v, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(state.z, phi_k.sum(2), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_recurrent_equals_the_reference(length):
    q, k, v = draw((1, 2, 2, length, length, 8, 8))
    got, _ = linear_attention_recurrent(q, k, v)
    torch.testing.assert_close(got, linear_attention(q, k, v, causal=True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (64, 65), (70, 33), (40, 3)], ids=str)
def test_different_lengths_and_groups(lengths, causal):
    """Offset rule; causal with fewer keys than queries: the first rows see nothing and are 0."""
    q, k, v = draw((2, 6, 2, *lengths, 12, 7))
    want = linear_attention(q, k, v, causal=causal)
    got = linear_attention_chunked(q, k, v, causal=causal, chunk_size=16)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    if causal:
        torch.testing.assert_close(linear_attention_recurrent(q, k, v)[0], want, rtol=0, atol=1e-13)
        blind = max(0, lengths[0] - lengths[1])
        assert (got[:, :, :blind] == 0).all()
        assert (linear_attention_chunked(q, k, v, causal=True, eps=0.0)[:, :, :blind] == 0).all()


def test_a_sequence_in_pieces():
    """Prefill, hand the state over, prefill again, then decode token by token: the numbers of one pass."""
    q, k, v = draw((2, 4, 2, 90, 90, 16, 8))
    want, end = linear_attention_chunked(q, k, v, causal=True, return_state=True)
    parts, state = [], None
    for a, b in ((0, 37), (37, 80)):
        out, state = linear_attention_chunked(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b],
            causal=True, chunk_size=16, initial_state=state, return_state=True,
        )  # fmt: skip
        parts.append(out)
    out, state = linear_attention_recurrent(
        q[:, :, 80:85], k[:, :, 80:85], v[:, :, 80:85], initial_state=state
    )
    parts.append(out)
    for t in range(85, 90):
        before = [x.clone() for x in state]
        out, new = linear_attention_step(state, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert all(
            torch.equal(x, y) for x, y in zip(state, before)
        )  # the old state can be kept, for a draft say
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=1e-13, atol=1e-12)
    # Not causal: every query sees the initial state and all keys.
    half, state = linear_attention_chunked(q, k[:, :, :40], v[:, :, :40], return_state=True)
    whole = linear_attention_chunked(q, k[:, :, 40:], v[:, :, 40:], initial_state=state)
    torch.testing.assert_close(whole, linear_attention(q, k, v), rtol=0, atol=1e-13)
    assert (half - whole).abs().max() > 0.01


def test_step_has_the_numbers_of_the_parallel_form_in_float32():
    q, k, v = draw((1, 4, 2, 300, 300, 32, 32), torch.float32)
    want = linear_attention_chunked(q, k, v, causal=True)
    state, size = init_state(1, 2, 32, 32), want.abs().max()
    for t in range(300):
        out, state = linear_attention_step(state, *(x[:, :, t : t + 1] for x in (q, k, v)))
        assert (out - want[:, :, t : t + 1]).abs().max() <= 10 * torch.finfo(torch.float32).eps * size
    assert state.S.shape == (1, 2, 32, 32)


@pytest.mark.parametrize("name", ["elu", "taylor", "dpfp", "hedgehog"])
@pytest.mark.parametrize("form", ["reference", "chunked", "recurrent", "full"])
def test_gradcheck(form, name):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, 1, 5, 7, 3, 2)))
    state = (torch.rand(1, 1, FEATURE_MAPS[name].feature_dim(3), 2, dtype=torch.float64).requires_grad_(),
             torch.rand(1, 1, FEATURE_MAPS[name].feature_dim(3), dtype=torch.float64).requires_grad_())  # fmt: skip
    if form == "reference":
        assert torch.autograd.gradcheck(
            lambda q, k, v: linear_attention(q, k, v, feature_map=name, causal=True), (q, k, v)
        )
        return

    def run(q, k, v, s, z):
        if form == "recurrent":
            out, after = linear_attention_recurrent(
                q, k, v, feature_map=name, initial_state=LinearState(s, z)
            )
        else:
            out, after = linear_attention_chunked(
                q, k, v, feature_map=name, causal=form == "chunked", chunk_size=3,
                initial_state=LinearState(s, z), return_state=True,
            )  # fmt: skip
        return (out, *after)

    assert torch.autograd.gradcheck(run, (q, k, v, *state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype):
    """At most twice the error of a plain run in the same dtype, both against float64."""
    q, k, v = draw((2, 2, 2, 129, 129, 32, 32), dtype)
    truth = linear_attention(*(x.double() for x in (q, k, v)), causal=True)

    def plain():
        phi = FEATURE_MAPS["elu"]
        w = (phi(q) @ phi(k).transpose(-1, -2)) * 32**-0.5
        w = w.masked_fill(~visible(129, 129, causal=True), 0.0)
        return (w @ v) / (w.sum(-1, keepdim=True) + 1e-6)

    allowed = 2 * (plain().double() - truth).abs().max()
    got = [linear_attention_chunked(q, k, v, causal=True)]
    if (
        dtype != torch.float32
    ):  # one token after the other rounds more often than a product does, in fp32 it shows
        got.append(linear_attention_recurrent(q, k, v)[0])
    for out in got:
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= allowed


FORMS = {
    "reference": lambda *x: linear_attention(*x, causal=True),
    "chunked": lambda *x: linear_attention_chunked(*x, causal=True, chunk_size=16),
    "recurrent": lambda *x: linear_attention_recurrent(*x)[0],
}


@pytest.mark.parametrize("token", [0, 15, 16, 17, 63, 69])
@pytest.mark.parametrize("form", FORMS)
def test_no_leak(form, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    q, k, v = draw((1, 2, 1, 70, 70, 16, 8), torch.float32)
    before = FORMS[form](q, k, v)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed[1:]:
        x[:, :, token:] += 3.0
    after = FORMS[form](q, *changed[1:])
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()


def test_features_of_relu_that_are_all_zero():
    """No weight at all: output 0, no NaN, no gradient; also without eps."""
    q, k, v = draw((1, 1, 1, 4, 4, 3, 2))
    q = -q.abs().requires_grad_()
    for eps in (0.0, 1e-6):
        out = linear_attention_chunked(q, k, v, feature_map="relu", causal=True, eps=eps)
        assert (out == 0).all()
        assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("normalize", [False, True])
def test_against_fla(form, normalize):
    """The naive forms of flash-linear-attention, written by others, ``[B, N, H, D]``."""
    naive = pytest.importorskip("fla.ops.linear_attn.naive", reason="fla-core is not installed (extra peers)")
    q, k, v = draw((2, 3, 3, 128, 128, 16, 24), torch.float32)
    phi = FEATURE_MAPS["elu"]
    inputs = [x.transpose(1, 2) for x in (phi(q), phi(k), v)]
    if form == "chunk":
        want = naive.naive_chunk_linear_attn(*inputs, normalize=normalize).transpose(1, 2)
    else:
        want, state = naive.naive_recurrent_linear_attn(*inputs, normalize=normalize, output_final_state=True)
        want = want.transpose(1, 2)
        _, ours = linear_attention_chunked(q, k, v, causal=True, return_state=True)
        torch.testing.assert_close(ours.S, state[0] if normalize else state, rtol=1e-5, atol=1e-4)
    got = linear_attention_chunked(q, k, v, causal=True, normalize=normalize)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("options", [dict(), dict(normalize=False, feature_map="identity"),
                                     dict(feature_map="taylor", head_dim=4, num_kv_heads=1),
                                     dict(feature_map="hedgehog-trained", num_kv_heads=2)], ids=str)  # fmt: skip
def test_layer_trains_and_decodes(options):
    torch.manual_seed(0)
    layer = LinearAttention(16, 4, chunk_size=8, **options)
    x = torch.randn(8, 20, 16)
    target = (
        x.cumsum(1) / torch.arange(1, 21)[:, None]
    )  # the mean of the past: linear attention's home ground
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        want, state = layer(x), None
        first, state = layer(x[:, :15], return_state=True)
        outs = [first]
        for t in range(15, 20):
            out, state = layer.step(state, x[:, t : t + 1])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-5)


def bad(message, fn=linear_attention_chunked, **change):
    q, k, v = draw((1, 4, 2, 8, 8, 16, 12), torch.float32)
    with pytest.raises(ValueError, match=message):
        fn(**{"q": q, "k": k, "v": v, **change})


def test_bad_input_is_named():
    bad("q: expected 4 dimensions", q=torch.randn(4, 8, 16))
    bad("k: expected the head_dim of q", k=torch.randn(1, 2, 8, 15))
    bad("v: expected the batch, heads and length of k", v=torch.randn(1, 2, 9, 12))
    bad("k: expected num_kv_heads to divide", k=torch.randn(1, 3, 8, 16), v=torch.randn(1, 3, 8, 12))
    bad("v: expected the dtype of q", v=torch.randn(1, 2, 8, 12).half())
    bad("feature_map: expected one of elu, relu", feature_map="softmax")
    bad("feature_map: expected a map with non-negative weights", feature_map="identity")
    bad("feature_map: expected q mapped to", feature_map=lambda x: x[..., :4, :])
    bad("scale: expected a finite number", scale=math.inf)
    bad("eps: expected a finite number of at least 0, got -1", eps=-1)
    bad("chunk_size: expected an integer", chunk_size=0)
    bad("initial_state: expected S of shape", initial_state=init_state(1, 4, 16, 12))
    bad(
        "initial_state: expected z in float32",
        initial_state=(torch.zeros(1, 2, 16, 12), torch.zeros(1, 2, 16).half()),
    )
    bad("initial_state: expected a LinearState", initial_state=torch.zeros(1, 2, 16, 12))
    bad("q: expected one token", lambda **x: linear_attention_step(None, **x))
    with pytest.raises(ValueError, match="x: expected shape"):
        LinearAttention(16, 4)(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor"):
        LinearAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="feature_map: expected a map with non-negative"):
        LinearAttention(16, 4, feature_map="identity")
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 2, N, 4\]"):
        Hedgehog(2, 4)(torch.randn(1, 3, 5, 4))


def test_groups_share_one_state():
    q, k, v = draw((1, 6, 2, 20, 20, 8, 8))
    grouped, state = linear_attention_chunked(q, k, v, causal=True, return_state=True)
    alone = linear_attention_chunked(q, repeat_kv(k, 3), repeat_kv(v, 3), causal=True)
    torch.testing.assert_close(grouped, alone, rtol=0, atol=1e-14)
    assert state.S.shape[1] == 2
