"""Gated linear attention in PyTorch: every form in float64, decays of every size, state, leaks."""

import math

import pytest
import torch

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.decay import after, before, channel_scores, head_scores, segment_sums, up_to
from effattn_lab.linear.gated_linear import (
    gated_linear,
    gated_linear_chunked,
    gated_linear_recurrent,
    gated_linear_step,
    init_state,
)
from effattn_lab.linear.linear_attention import linear_attention_chunked

LENGTHS = (1, 63, 64, 65, 1000)
CHUNKS = (1, 48, 64, 2000)
PER = ("head", "channel")


def draw(shape, per="channel", dtype=torch.float64, seed=0, low=-2.0):
    """q, k, v, g of ``(B, Hq, Hkv, N, K, V)``; log decays spread between ``low`` and almost 0."""
    batch, hq, hkv, n, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    q, k, v = rand(batch, hq, n, dim), rand(batch, hkv, n, dim), rand(batch, hkv, n, value_dim)
    size = (batch, hkv, n) if per == "head" else (batch, hkv, n, dim)
    g = low * torch.rand(size, generator=generator, dtype=torch.float64) ** 3 - 1e-3
    return [x.to(dtype) for x in (q, k, v, g)]


def by_hand(q, k, v, g, scale, state):
    """The definition, number by number."""
    batch, hq, n, dim = q.shape
    groups, value_dim = hq // k.shape[1], v.shape[3]
    out, end = torch.zeros(batch, hq, n, value_dim, dtype=q.dtype), state.clone()
    for b in range(batch):
        for h in range(hq):
            s = state[b, h // groups].clone()
            for t in range(n):
                for d in range(dim):
                    log_decay = g[b, h // groups, t] if g.dim() == 3 else g[b, h // groups, t, d]
                    for e in range(value_dim):
                        s[d, e] = (
                            math.exp(log_decay) * s[d, e] + k[b, h // groups, t, d] * v[b, h // groups, t, e]
                        )
                out[b, h, t] = scale * sum(q[b, h, t, d] * s[d] for d in range(dim))
            end[b, h // groups] = s
    return out, end


@pytest.mark.parametrize("per", PER)
def test_reference_is_the_definition(per):
    q, k, v, g = draw((2, 4, 2, 5, 3, 2), per)
    state = torch.randn(2, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want, end = by_hand(q, k, v, g, 0.7, state)
    got, after_it = gated_linear(q, k, v, g, scale=0.7, initial_state=state, return_state=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after_it, end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gated_linear(q, k, v, g), by_hand(q, k, v, g, 3**-0.5, 0 * state)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("length", LENGTHS)
def test_forms_agree_at_every_length_and_chunk(length, per):
    dim = 8 if length == 1000 and per == "channel" else 32
    q, k, v, g = draw((1, 2, 2, length, dim, dim), per)
    want, end = gated_linear(q, k, v, g, return_state=True)
    got, state = gated_linear_recurrent(q, k, v, g)
    forms = [(got, state)]
    forms += [gated_linear_chunked(q, k, v, g, chunk_size=c, return_state=True) for c in CHUNKS]
    for out, last in forms:
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(last, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dims", [(32, 32), (60, 24), (64, 64), (128, 128)], ids=str)
def test_forms_agree_at_every_width(dims, per):
    q, k, v, g = draw((1, 6, 2, 65, *dims), per)
    state = torch.randn(1, 2, *dims, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want, end = gated_linear(q, k, v, g, initial_state=state, return_state=True)
    recurrent = gated_linear_recurrent(q, k, v, g, initial_state=state)
    chunked = gated_linear_chunked(q, k, v, g, chunk_size=16, initial_state=state, return_state=True)
    for out, last in (recurrent, chunked):
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(last, end, rtol=0, atol=1e-12)


def test_sums_of_decays():
    g = -torch.rand(2, 13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = g.sum(1, keepdim=True)
    torch.testing.assert_close(up_to(g), before(g) + g)
    torch.testing.assert_close(up_to(g) + after(g), total.expand_as(g))
    sums = segment_sums(g[..., 0])
    for i in range(13):
        for j in range(13):
            want = g[:, j + 1 : i + 1, 0].sum(1) if j <= i else torch.full((2,), -math.inf).double()
            torch.testing.assert_close(sums[:, i, j], want)
    q, k = (torch.randn(2, 13, 5, dtype=torch.float64) for _ in range(2))
    same = g[..., :1].expand_as(g)  # every channel the head's decay
    torch.testing.assert_close(
        channel_scores(q, k, same), head_scores(q, k, g[..., 0]), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("per", PER)
def test_no_decay_is_linear_attention(per):
    q, k, v, g = draw((1, 4, 2, 130, 16, 24), per)
    want, state = linear_attention_chunked(
        q, k, v, causal=True, normalize=False, feature_map=None, return_state=True
    )
    for form in (
        lambda *x: gated_linear(*x, return_state=True),
        lambda *x: gated_linear_chunked(*x, return_state=True),
        gated_linear_recurrent,
    ):
        out, end = form(q, k, v, 0 * g)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(end, state.S, rtol=0, atol=1e-12)


def test_equal_channels_are_a_head():
    q, k, v, g = draw((1, 2, 2, 100, 16, 8), "head")
    wide = g[..., None].expand_as(k)
    torch.testing.assert_close(
        gated_linear_chunked(q, k, v, wide), gated_linear_chunked(q, k, v, g), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("rate", [-5.0, -20.0, -50.0, -1e4])
def test_strong_decay_over_a_long_sequence(rate, per):
    """8,200 tokens: nothing overflows, no NaN, forward or backward. Running sums reach -8e7, a chunk's -6e5."""
    q, k, v, _ = draw((1, 1, 1, 8200, 8, 8), per, torch.float32)
    g = torch.full((1, 1, 8200) if per == "head" else (1, 1, 8200, 8), rate)
    assert torch.isinf(torch.exp(-g.cumsum(2))).any()  # what dividing by the running product would meet
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)] + [g.clone().requires_grad_()]
        out, state = gated_linear_chunked(*inputs, return_state=True)
        truth, end = gated_linear_recurrent(*(x.detach().double() for x in inputs))
        bound = 2 * torch.finfo(dtype).eps * truth.abs().max()
        assert (out.double() - truth).abs().max() <= bound
        assert (state.double() - end).abs().max() <= 1e-6 * end.abs().max()
        grads = torch.autograd.grad(out.float().square().sum() + state.sum(), inputs)
        assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("per", PER)
def test_weak_decay_behind_strong_decay(per):
    """Tokens that forget all, and behind them tokens that forget nearly nothing. A difference of running sums keeps
    -20,000 +- 0.001: three digits of the weight. A sum from the border keeps all of it."""
    q, k, v, g = draw((1, 1, 1, 2048, 16, 16), per, torch.float32)
    g = -1e-3 * torch.ones_like(g)
    g[:, :, ::16] = -50.0
    truth, _ = gated_linear_recurrent(*(x.double() for x in (q, k, v, g)))
    plain, _ = gated_linear_recurrent(q, k, v, g)
    chunked = gated_linear_chunked(q, k, v, g)
    error = (chunked.double() - truth).abs().max()
    assert error <= 2 * (plain.double() - truth).abs().max()
    if per == "head":  # the textbook's difference, for comparison, in chunks of the whole sequence
        total = g.cumsum(2)
        weights = ((q @ k.transpose(-1, -2)) * (total[..., None] - total[:, :, None]).exp()).tril() / 4
        assert (weights @ v - truth).abs().nan_to_num(nan=math.inf).max() > 100 * error


@pytest.mark.parametrize("per", PER)
def test_minus_infinity_begins_a_new_sequence(per):
    """A document border: log decay -inf. Also through every gradient."""
    q, k, v, g = draw((1, 2, 2, 90, 8, 8), per)
    g[:, :, 50] = -math.inf
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    whole, state = gated_linear_chunked(*inputs, return_state=True)
    second, end = gated_linear_chunked(*(x[:, :, 50:] for x in inputs), return_state=True)
    torch.testing.assert_close(whole[:, :, 50:], second, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-13)
    grads = torch.autograd.grad(whole[:, :, 50:].sum(), inputs)
    assert all((x[:, :, :50] == 0).all() for x in grads)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("per", PER)
def test_a_sequence_in_pieces(per):
    """Prefill, hand the state over, prefill again, then decode token by token: the numbers of one pass."""
    q, k, v, g = draw((2, 4, 2, 90, 16, 8), per)
    want, end = gated_linear_chunked(q, k, v, g, return_state=True)

    def piece(a, b):
        return [x[:, :, a:b] for x in (q, k, v, g)]

    parts, state = [], None
    for a, b in ((0, 37), (37, 80)):
        out, state = gated_linear_chunked(*piece(a, b), chunk_size=16, initial_state=state, return_state=True)
        parts.append(out)
    out, state = gated_linear_recurrent(*piece(80, 85), initial_state=state)
    parts.append(out)
    for t in range(85, 90):
        kept = state.clone()
        out, new = gated_linear_step(state, *piece(t, t + 1))
        assert torch.equal(state, kept)  # the old state can be kept, for a draft say
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


def test_step_has_the_numbers_of_the_parallel_form_in_float32():
    q, k, v, g = draw((1, 4, 2, 300, 32, 32), "channel", torch.float32)
    want = gated_linear_chunked(q, k, v, g)
    state, size = init_state(1, 2, 32, 32), want.abs().max()
    for t in range(300):
        out, state = gated_linear_step(state, *(x[:, :, t : t + 1] for x in (q, k, v, g)))
        assert (out - want[:, :, t : t + 1]).abs().max() <= 10 * torch.finfo(torch.float32).eps * size
    assert state.shape == (1, 2, 32, 32)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("form", ["reference", "chunked", "recurrent"])
def test_gradcheck(form, per):
    q, k, v, g = (x.requires_grad_() for x in draw((1, 2, 1, 7, 3, 2), per))
    g = (g.detach() - 0.1).requires_grad_()  # finite differences must stay below 0
    state = torch.rand(1, 1, 3, 2, dtype=torch.float64).requires_grad_()

    def run(q, k, v, g, s):
        if form == "recurrent":
            return gated_linear_recurrent(q, k, v, g, initial_state=s)
        if form == "chunked":
            return gated_linear_chunked(q, k, v, g, chunk_size=3, initial_state=s, return_state=True)
        return gated_linear(q, k, v, g, initial_state=s, return_state=True)

    assert torch.autograd.gradcheck(run, (q, k, v, g, state))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype, per):
    """At most twice the error of a plain run in the same dtype, both against float64."""
    q, k, v, g = draw((2, 2, 2, 129, 32, 32), per, dtype)
    truth, _ = gated_linear_recurrent(*(x.double() for x in (q, k, v, g)))
    wide = g[..., None] if per == "head" else g
    lags = torch.stack([wide[:, :, : i + 1].flip(2).cumsum(2).flip(2)[:, :, 0] for i in range(129)], 2)
    lags = lags[:, :, :, None] - torch.cat([torch.zeros_like(lags[:, :, :1]), lags[:, :, :-1]], 2)[:, :, None]
    lags = lags - wide[:, :, None]  # sum over j < t <= i, as a difference of running sums
    weights = ((q[:, :, :, None] * k[:, :, None] * lags.clamp(max=0).exp()).sum(-1) * 32**-0.5).tril()
    allowed = 2 * ((weights @ v).double() - truth).abs().max()
    for out in (
        gated_linear_chunked(q, k, v, g),
        gated_linear_recurrent(q, k, v, g)[0],
        gated_linear(q, k, v, g),
    ):
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= allowed


FORMS = {
    "reference": gated_linear,
    "chunked": lambda *x: gated_linear_chunked(*x, chunk_size=16),
    "recurrent": lambda *x: gated_linear_recurrent(*x)[0],
}


@pytest.mark.parametrize("token", [0, 15, 16, 17, 63, 69])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("form", FORMS)
def test_no_leak(form, per, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    q, k, v, g = draw((1, 2, 1, 70, 16, 8), per, torch.float32)
    before_it = FORMS[form](q, k, v, g)
    changed = [x.clone() for x in (k, v, g)]
    for x in changed[:2]:
        x[:, :, token:] += 3.0
    changed[2][:, :, token:] *= 2.0
    after_it = FORMS[form](q, *changed)
    assert torch.equal(before_it[:, :, :token], after_it[:, :, :token])
    assert (before_it[:, :, token] != after_it[:, :, token]).any()
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    out = FORMS[form](*inputs)
    grads = torch.autograd.grad(out[:, :, token].sum(), inputs)
    assert all((x[:, :, token + 1 :] == 0).all() for x in grads)
    # The first token's own decay has nothing to act on.
    assert all(x[:, :, token].abs().max() > 0 for x in grads[: 3 if token == 0 else 4])


def test_groups_share_one_state():
    q, k, v, g = draw((1, 6, 2, 20, 8, 8))
    grouped, state = gated_linear_chunked(q, k, v, g, return_state=True)
    alone = gated_linear_chunked(q, *(repeat_kv(x, 3) for x in (k, v, g)))
    torch.testing.assert_close(grouped, alone, rtol=0, atol=1e-14)
    assert state.shape == (1, 2, 8, 8)


def test_against_fla():
    """The naive forms of flash-linear-attention, written by others, ``[B, N, H, D]`` and float32."""
    gla = pytest.importorskip("fla.ops.gla.naive", reason="fla-core is not installed (extra peers)")
    from fla.ops.simple_gla import naive as simple

    close = dict(rtol=1e-4, atol=1e-5)
    q, k, v, g = draw((2, 3, 3, 128, 16, 24), "channel", torch.float32)
    swap = [x.transpose(1, 2) for x in (q, k, v, g)]
    state = torch.randn(2, 3, 16, 24)
    want, end = gla.naive_recurrent_gla(*swap, initial_state=state, output_final_state=True)
    got, last = gated_linear_chunked(q, k, v, g, initial_state=state, return_state=True)
    torch.testing.assert_close(got, want.transpose(1, 2), **close)
    torch.testing.assert_close(last, end, **close)
    q, k, v, g = draw((2, 3, 3, 128, 16, 24), "head", torch.float32)
    swap = [x.transpose(1, 2) for x in (q, k, v, g)]
    got, last = gated_linear_chunked(q, k, v, g, return_state=True)
    for want, end in (
        simple.naive_recurrent_simple_gla(*swap),
        simple.naive_chunk_simple_gla(*swap, output_final_state=True),
    ):
        torch.testing.assert_close(got, want.transpose(1, 2), **close)
        torch.testing.assert_close(last, end, **close)
    torch.testing.assert_close(got, simple.naive_parallel_simple_gla(*swap)[0].transpose(1, 2), **close)


def bad(message, fn=gated_linear_chunked, **change):
    q, k, v, g = draw((1, 4, 2, 8, 16, 12), "channel", torch.float32)
    with pytest.raises(ValueError, match=message):
        fn(**{"q": q, "k": k, "v": v, "g": g, **change})


def test_bad_input_is_named():
    bad("q: expected 4 dimensions", q=torch.randn(4, 8, 16))
    bad("k: expected the head_dim of q", k=torch.randn(1, 2, 8, 15))
    bad("k: expected the length of q", q=torch.randn(1, 4, 5, 16))
    bad("v: expected the dtype of q", v=torch.randn(1, 2, 8, 12).half())
    bad(r"g: expected shape \(1, 2, 8\)", g=-torch.rand(1, 4, 8))
    bad("g: expected a torch.Tensor, got float", g=-0.1)
    bad("g: expected a floating dtype", g=torch.zeros(1, 2, 8, dtype=torch.int64))
    bad("g: expected log decays of at most 0, got 0.9", g=torch.full((1, 2, 8), 0.9))
    bad("g: expected log decays of at most 0, got nan", g=torch.full((1, 2, 8), math.nan))
    bad("scale: expected a finite number", scale=math.inf)
    bad("chunk_size: expected an integer", chunk_size=0)
    bad(r"initial_state: expected shape \(1, 2, 16, 12\)", initial_state=init_state(1, 4, 16, 12))
    bad("initial_state: expected float32 or float64", initial_state=init_state(1, 2, 16, 12).half())
    bad("q: expected one token", lambda **x: gated_linear_step(None, **x))
    bad("state: expected shape", lambda **x: gated_linear_step(torch.zeros(2), **x))
    for fn in (gated_linear, gated_linear_recurrent):
        bad("q: expected a torch.Tensor", fn, q=None)
