"""ZeroS in PyTorch: every form against the reference in float64, gradients, state, leaks, bad input."""

import pytest
import torch

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.rotary import rotate
from effattn_lab.linear.zeros import zeros, zeros_chunked, zeros_recurrent, zeros_sm, zeros_step
from effattn_lab.linear.zeros_state import ZeroSState, init_state
from effattn_lab.linear.zeros_weights import unit, zero_sum_weights

LENGTHS = (1, 63, 64, 65, 1000)
CHUNKS = (1, 7, 48, 64, 2000)


def draw(shape, dtype=torch.float64, seed=0, spread=2.0, zeroth=False):
    """q, k, v, logits, gates of ``(B, Hq, Hkv, Nq, Nk, D, Dv)``; logits spread out: equal ones have weights 0."""
    batch, hq, hkv, nq, nk, dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    q, k, v = rand(batch, hq, nq, dim), rand(batch, hkv, nk, dim), rand(batch, hkv, nk, value_dim)
    logits = spread * rand(batch, hkv, nk)
    gates = [torch.sigmoid(2 * rand(batch, hq, nq)) for _ in range(2)]
    options = {"gate_0": torch.tanh(rand(batch, hq, nq)).to(dtype)} if zeroth else {}
    return [x.to(dtype) for x in (q, k, v, logits, *gates)], options


def by_hand(q, k, v, logits, gate_1, gate_h, causal, gate_0=None):
    """The definition, pair by pair, with Python's own arithmetic on the weights."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                last = i + k.shape[2] - q.shape[2] if causal else k.shape[2] - 1
                s = logits[b, h // groups, : last + 1] if last >= 0 else logits[b, 0, :0]
                t = len(s)
                for j in range(t):
                    delta = (s[j] - s.mean()) / t
                    higher = torch.exp(s[j]) / torch.exp(s).sum() - 1 / t - delta
                    r = gate_1[b, h, i] * delta + gate_h[b, h, i] * higher
                    if gate_0 is not None:
                        r = r + gate_0[b, h, i] / t
                    a, c = q[b, h, i], k[b, h // groups, j]
                    out[b, h, i] += r * (a @ c) / (a.norm() * c.norm()) * v[b, h // groups, j]
    return out


@pytest.mark.parametrize("zeroth", [False, True], ids=["zero-sum", "constant-kept"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 7), (7, 3)], ids=str)
def test_reference_is_the_definition(lengths, causal, zeroth):
    x, options = draw((2, 4, 2, *lengths, 3, 2), zeroth=zeroth)
    got = zeros(*x, causal=causal, **options)
    torch.testing.assert_close(got, by_hand(*x, causal, **options), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_the_reference(length, chunk_size):
    x, _ = draw((1, 2, 2, length, length, 32, 32))
    got = zeros_chunked(*x, causal=True, chunk_size=chunk_size)
    torch.testing.assert_close(got, zeros(*x, causal=True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", LENGTHS)
def test_recurrent_equals_the_reference(length):
    x, _ = draw((1, 2, 2, length, length, 8, 8))
    torch.testing.assert_close(zeros_recurrent(*x)[0], zeros(*x, causal=True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("zeroth", [False, True], ids=["zero-sum", "constant-kept"])
@pytest.mark.parametrize("dims", [(32, 32), (60, 24), (64, 64), (128, 128)], ids=str)
def test_forms_agree_and_leave_one_state(dims, zeroth):
    x, options = draw((2, 4, 2, 70, 70, *dims), zeroth=zeroth)
    want = zeros(*x, causal=True, **options)
    chunked, after = zeros_chunked(*x, causal=True, chunk_size=16, return_state=True, **options)
    recurrent, end = zeros_recurrent(*x, **options)
    full, read = zeros_chunked(*x, return_state=True, **options)
    torch.testing.assert_close(chunked, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(recurrent, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(full, zeros(*x, **options), rtol=0, atol=1e-13)
    _, k, v, s, *_ = x
    m = s.amax(-1)
    for state in (after, end, read):  # the three sums and their shadows, from their definitions
        kt, s0 = unit(k).transpose(-1, -2), (s - m[..., None])[..., None, :]
        want_state = ((kt * s0.exp()) @ v, (kt * s0) @ v, kt @ v, s0.exp().sum((-1, -2)), s0.sum((-1, -2)),
                      torch.full_like(m, 70), m)  # fmt: skip
        for got, expected in zip(state, want_state):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (64, 65), (70, 33), (40, 3)], ids=str)
def test_different_lengths_and_groups(lengths, causal):
    """Offset rule; causal with fewer keys than queries: the first rows see nothing, the next one key, all 0."""
    x, _ = draw((2, 6, 2, *lengths, 12, 7))
    want = zeros(*x, causal=causal)
    got = zeros_chunked(*x, causal=causal, chunk_size=16)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    if causal:
        recurrent, _ = zeros_recurrent(*x)
        torch.testing.assert_close(recurrent, want, rtol=0, atol=1e-13)
        empty = max(0, lengths[0] - lengths[1] + 1)
        for out in (want, got, recurrent):
            assert (out[:, :, :empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_first_token_is_finite_and_zero(dtype):
    """One weight that sums to zero is zero: exactly, in every form, however large the logit."""
    for logit in (0.0, 300.0, -5000.0):
        x, _ = draw((1, 2, 1, 3, 3, 8, 8), dtype)
        x[3] = x[3] + logit
        for out in (
            zeros(*x, causal=True), zeros_chunked(*x, causal=True), zeros_recurrent(*x)[0],
            zeros_sm(*x[:3], *x[4:], causal=True),
        ):  # fmt: skip
            assert out.isfinite().all()
            assert (out[:, :, 0] == 0).all()
            assert logit or (out[:, :, 1:] != 0).any()  # (large half-precision logits round to equal ones)


def test_a_sequence_in_pieces():
    """Prefill, hand the state over, prefill again, then decode token by token: the numbers of one pass."""
    x, options = draw((2, 4, 2, 90, 90, 16, 8), zeroth=True)
    x[3] = x[3] + torch.linspace(-30, 30, 90)  # the maximum moves all the way
    gate_0 = options["gate_0"]
    want, end = zeros_chunked(*x, gate_0=gate_0, causal=True, return_state=True)
    parts, state = [], None

    def piece(a, b):
        return [y[:, :, a:b] for y in x], gate_0[:, :, a:b]

    for a, b in ((0, 37), (37, 80)):
        y, g = piece(a, b)
        out, state = zeros_chunked(
            *y, gate_0=g, causal=True, chunk_size=16, initial_state=state, return_state=True
        )
        parts.append(out)
    y, g = piece(80, 85)
    out, state = zeros_recurrent(*y, gate_0=g, initial_state=state)
    parts.append(out)
    for t in range(85, 90):
        y, g = piece(t, t + 1)
        before = [part.clone() for part in state]
        out, new = zeros_step(state, *y, gate_0=g)
        assert all(
            torch.equal(a, b) for a, b in zip(state, before)
        )  # the old state can be kept, for a draft say
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=1e-11, atol=1e-11)
    # Not causal: every query sees the initial state and all keys.
    q, k, v, s, *gates = x
    _, state = zeros_chunked(q, k[:, :, :40], v[:, :, :40], s[:, :, :40], *gates, return_state=True)
    whole = zeros_chunked(q, k[:, :, 40:], v[:, :, 40:], s[:, :, 40:], *gates, initial_state=state)
    torch.testing.assert_close(whole, zeros(*x), rtol=0, atol=1e-13)


def test_step_has_the_numbers_of_the_parallel_form_in_float32():
    x, _ = draw((1, 4, 2, 300, 300, 32, 32), torch.float32)
    want = zeros_chunked(*x, causal=True)
    state, size = init_state(1, 2, 32, 32), want.abs().max()
    for t in range(300):
        out, state = zeros_step(state, *(y[:, :, t : t + 1] for y in x))
        assert (out - want[:, :, t : t + 1]).abs().max() <= 10 * torch.finfo(torch.float32).eps * size
    assert state.F.shape == (1, 2, 32, 32)


@pytest.mark.parametrize("form", ["reference", "chunked", "recurrent", "full", "softmax"])
def test_gradcheck(form):
    x, options = draw((1, 2, 1, 5, 7, 3, 2), zeroth=True)
    x = [y.requires_grad_() for y in x]
    gate_0 = options["gate_0"].requires_grad_()
    if form == "softmax":
        assert torch.autograd.gradcheck(
            lambda q, k, v, a, b, c: zeros_sm(q, k, v, a, b, gate_0=c, causal=True, cosine=True),
            (*x[:3], *x[4:], gate_0),
        )
        return
    if form == "reference":
        assert torch.autograd.gradcheck(lambda *y: zeros(*y[:6], gate_0=y[6], causal=True), (*x, gate_0))
        return
    _, state = zeros_recurrent(*(y.detach() for y in draw((1, 2, 1, 4, 4, 3, 2), seed=1)[0]))
    # t counts tokens and is given; the other six parts have gradients.
    parts = [y.requires_grad_() for name, y in state._asdict().items() if name != "t"]

    def run(*y):
        start = ZeroSState(*y[7:12], state.t, y[12])
        if form == "recurrent":
            out, after = zeros_recurrent(*y[:6], gate_0=y[6], initial_state=start)
        else:
            out, after = zeros_chunked(
                *y[:6], gate_0=y[6], causal=form == "chunked", chunk_size=3,
                initial_state=start, return_state=True,
            )  # fmt: skip
        return (out, *(part for name, part in after._asdict().items() if name != "t"))

    assert torch.autograd.gradcheck(run, (*x, gate_0, *parts))


def plain(q, k, v, logits, gate_1, gate_h):
    """Every step in the dtype of the inputs, all weights at once: what one writes before knowing better."""
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    t = torch.arange(1, n + 1, dtype=q.dtype)[:, None]
    s = logits[:, :, None].expand(-1, -1, n, -1)
    delta = (s - s.masked_fill(~keep, 0).sum(-1, keepdim=True) / t) / t
    p = torch.softmax(s.masked_fill(~keep, float("-inf")), -1) - 1 / t - delta
    r = (gate_1[..., None] * delta + gate_h[..., None] * p).masked_fill(~keep, 0)
    cosine = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).transpose(-1, -2)
    return (r * cosine) @ v


@pytest.mark.parametrize("spread", [0.1, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype, spread):
    """At most twice the error of a plain run in the same dtype, both against float64."""
    x, _ = draw((2, 2, 2, 129, 129, 32, 32), dtype, spread=spread)
    truth = zeros(*(y.double() for y in x), causal=True)
    allowed = 2 * (plain(*x).double() - truth).abs().max()
    got = [zeros_chunked(*x, causal=True)]
    if (
        dtype != torch.float32
    ):  # one token after the other rounds more often than a product does, in fp32 it shows
        got.append(zeros_recurrent(*x)[0])
    for out in got:
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= allowed


def test_rising_logits_in_float32():
    """From -20 to 20 over 150 steps: measured from the maximum of the whole sequence, as the published code does,
    the first sums are e^-40 and 1e-12 added to them is all that one sees."""
    x, _ = draw((1, 2, 2, 150, 150, 16, 16), torch.float32)
    x[3] = torch.linspace(-20, 20, 150).expand(1, 2, 150).contiguous()
    truth = zeros(*(y.double() for y in x), causal=True)
    for out in (zeros_chunked(*x, causal=True), zeros_recurrent(*x)[0], zeros(*x, causal=True)):
        assert (out - truth).abs().max() <= 4e-7 * truth.abs().max() * 4
    q, k, v, s, _, gate_h = x
    e = torch.exp(s - s.amax(-1, keepdim=True))
    alpha = gate_h / (e.cumsum(-1) + 1e-12)
    softmax_part = alpha[..., None] * e[..., None, :].tril() * (unit(q) @ unit(k).mT)
    exact = torch.softmax(s.double()[..., None, :].expand(-1, -1, 150, -1).masked_fill(
        ~torch.ones(150, 150, dtype=torch.bool).tril(), float("-inf")), -1)  # fmt: skip
    exact = gate_h[..., None] * exact * (unit(q.double()) @ unit(k.double()).mT)
    half = (softmax_part @ v - exact @ v.double())[:, :, :40].abs().max()
    assert half > 0.5 * (exact @ v.double())[:, :, :40].abs().max()


@pytest.mark.parametrize("shift", [50.0, 1000.0, -1000.0])
def test_only_differences_of_logits_count(shift):
    """``s + c`` has the weights of ``s``; in float32 too, since G and P are measured from the maximum."""
    x, _ = draw((1, 2, 2, 300, 300, 16, 16), torch.float32)
    x[3] = (x[3] * 64).round() / 64  # exact after the shift
    moved = [*x[:3], x[3] + shift, *x[4:]]
    for form in (lambda *y: zeros_chunked(*y, causal=True), lambda *y: zeros_recurrent(*y)[0]):
        torch.testing.assert_close(form(*moved), form(*x), rtol=0, atol=1e-6)


FORMS = {
    "reference": lambda *x: zeros(*x, causal=True),
    "chunked": lambda *x: zeros_chunked(*x, causal=True, chunk_size=16),
    "recurrent": lambda *x: zeros_recurrent(*x)[0],
    "softmax": lambda q, k, v, s, a, b: zeros_sm(q, k, v, a, b, causal=True),
}


@pytest.mark.parametrize("token", [1, 15, 16, 17, 63, 69])
@pytest.mark.parametrize("form", FORMS)
def test_no_leak(form, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own; a logit above all
    others too, which a maximum over the whole sequence would let through."""
    x, _ = draw((1, 2, 1, 70, 70, 16, 8), torch.float32)
    before = FORMS[form](*x)
    changed = [y.clone() for y in x]
    for y in changed[1:4]:
        y[:, :, token:] = y[:, :, token:] * 1.5 + 30.0 * torch.arange(1, y[0, 0, token:].numel() + 1).view(
            y[0, 0, token:].shape
        )
    after = FORMS[form](*changed)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()


@pytest.mark.parametrize("form", FORMS)
def test_no_leak_by_gradient(form):
    x, _ = draw((1, 2, 1, 20, 20, 4, 3))
    x = [y.requires_grad_() for y in x]
    out = FORMS[form](*x)
    grads = torch.autograd.grad(out[:, :, :11].square().sum(), x, allow_unused=True)
    for name, grad in zip(("q", "k", "v", "logits", "gate_1", "gate_h"), grads):
        if form == "softmax" and name == "logits":
            continue
        assert (grad[:, :, 11:] == 0).all(), name
        assert grad[:, :, 10].abs().max() > 0, name


def test_only_the_direction_of_q_and_k_counts():
    x, _ = draw((1, 2, 1, 20, 20, 8, 8))
    q, k, *rest = x
    scale = torch.rand(1, 1, 20, 1, dtype=torch.float64) * 100 + 0.01
    torch.testing.assert_close(
        zeros_chunked(q * scale, k * scale, *rest, causal=True),
        zeros_chunked(*x, causal=True),
        rtol=1e-10,
        atol=1e-13,
    )
    k[:, :, 3] = 0.0  # no direction: cosine 0, no NaN
    assert zeros_chunked(q, k, *rest, causal=True).isfinite().all()


def test_equal_logits_have_no_weight():
    x, _ = draw((1, 2, 1, 50, 50, 8, 8), spread=0.0)
    x[3] += 3.7
    for form in FORMS.values():
        if form is not FORMS["softmax"]:
            assert form(*x).abs().max() < 1e-15


def test_softmax_variant_is_attention_without_its_mean():
    """Both gates 1: softmax attention minus the mean of the values seen."""
    from effattn_lab.foundations.attention import attention

    x, _ = draw((2, 4, 2, 30, 30, 8, 8))
    q, k, v = x[:3]
    ones = torch.ones(2, 4, 30, dtype=torch.float64)
    mean = v.cumsum(2) / torch.arange(1, 31, dtype=torch.float64)[:, None]
    want = attention(q, k, v, causal=True) - repeat_kv(mean, 2)
    torch.testing.assert_close(zeros_sm(q, k, v, ones, ones, causal=True), want, rtol=0, atol=1e-13)
    # And constant values vanish: no zero-sum head can see the mean.
    assert zeros_sm(q, k, torch.ones_like(v), *x[4:], causal=True).abs().max() < 1e-14


def test_zero_sum_is_lost_with_the_cosine():
    """``sum r = 0`` to rounding, ``sum r cos`` is not: the paper's remark holds for r alone."""
    x, _ = draw((1, 1, 1, 64, 64, 16, 16))
    q, k, _, s, a, b = x
    keep = torch.ones(64, 64, dtype=torch.bool).tril()
    r = zero_sum_weights(s[:, :, None].expand(1, 1, 64, 64), a, b, keep=keep)
    product = r * (unit(q) @ unit(k).transpose(-1, -2))
    assert r.sum(-1).abs().max() < 1e-15
    assert product.sum(-1).abs().mean() > 0.1 * product.abs().sum(-1).mean()


def test_rotation_keeps_lengths_and_sees_distances_only():
    g = torch.Generator().manual_seed(0)
    for dim in (2, 5, 16):
        a, b = (torch.randn(dim, generator=g, dtype=torch.float64) for _ in range(2))
        places = torch.tensor([0, 1, 7, 40, 100_000])
        for distance in (0, 3):
            turned_a = rotate(a.expand(5, dim), places + distance)
            turned_b = rotate(b.expand(5, dim), places)
            products = (turned_a * turned_b).sum(-1)
            torch.testing.assert_close(products, products[:1].expand(5), rtol=0, atol=1e-9)
            torch.testing.assert_close(turned_a.norm(dim=-1), a.norm().expand(5))
        assert not torch.allclose(rotate(a[None], torch.tensor([1])), a[None])


def bad(message, fn=zeros_chunked, **change):
    names = ("q", "k", "v", "logits", "gate_1", "gate_h")
    x, _ = draw((1, 4, 2, 8, 8, 16, 12), torch.float32)
    with pytest.raises(ValueError, match=message):
        fn(**{**dict(zip(names, x)), **change})


def test_bad_input_is_named():
    bad("q: expected 4 dimensions", q=torch.randn(4, 8, 16))
    bad("k: expected the head_dim of q", k=torch.randn(1, 2, 8, 15))
    bad("v: expected the batch, heads and length of k", v=torch.randn(1, 2, 9, 12))
    bad("k: expected num_kv_heads to divide", k=torch.randn(1, 3, 8, 16), v=torch.randn(1, 3, 8, 12))
    bad(r"logits: expected a floating-point tensor of shape \(1, 2, 8\)", logits=torch.randn(1, 4, 8))
    bad("gate_1: expected a floating-point tensor", gate_1=torch.randn(1, 2, 8))
    bad("gate_h: expected a floating-point tensor", gate_h=torch.ones(1, 4, 8, dtype=torch.int64))
    bad("gate_0: expected a floating-point tensor", gate_0=1.0)
    bad("chunk_size: expected an integer", chunk_size=0)
    bad("initial_state: expected F of shape", initial_state=init_state(1, 4, 16, 12))
    state = init_state(1, 2, 16, 12)
    bad("initial_state: expected E in float32", initial_state=state._replace(E=state.E.half()))
    bad("initial_state: expected a ZeroSState", initial_state=torch.zeros(1, 2, 16, 12))
    bad("q: expected one token", lambda **x: zeros_step(None, **x))
    x, _ = draw((1, 4, 2, 8, 8, 16, 16), torch.float32)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        zeros_sm(*x[:3], *x[4:], scale=float("nan"))
