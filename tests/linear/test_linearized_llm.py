"""Linearized attention in PyTorch: every form against the reference in float64, gradients, state, leaks, trees."""

import math

import pytest
import torch
import torch.nn.functional as F

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.linearized_llm import (
    init_state,
    linearized_attention,
    linearized_attention_chunked,
    linearized_attention_step,
)
from effattn_lab.linear.linearized_llm_conv import (
    band,
    causal_taps,
    masked_depthwise_conv,
    masked_depthwise_conv_chunked,
    symmetric_depthwise_conv,
)
from effattn_lab.linear.linearized_llm_layer import LinearizedAttention

LENGTHS = (1, 63, 64, 65, 1000)


def draw(shape, dtype=torch.float64, seed=0, lags=5):
    """q, k, v of ``(B, Hq, Hkv, Nq, Nk, D, Dv)`` and a convolution; of length 1, q and k are spread out by nature."""
    batch, hq, hkv, nq, nk, dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, hq, nq, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, hkv, nk, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, hkv, nk, value_dim, generator=g, dtype=torch.float64)
    w = torch.randn(hq, lags, generator=g, dtype=torch.float64) / 2
    return [x.to(dtype) for x in (q, k, v, w)]


def by_hand(q, k, v, alpha, w, group):
    """The definition, pair by pair."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                t = i + k.shape[2] - q.shape[2]
                for j in range(t + 1):
                    x, y = q[b, h, i], k[b, h // groups, j]
                    score = x @ y / (x.norm() * y.norm())
                    weight = max(score, 0) ** 2 if t // group == j // group else alpha * score
                    if t - j < w.shape[1]:
                        weight = weight + w[h, t - j]
                    out[b, h, i] += weight * v[b, h // groups, j]
    return out


@pytest.mark.parametrize("lengths", [(9, 9), (4, 9), (1, 1)], ids=str)
def test_reference_is_the_definition(lengths):
    q, k, v, w = draw((2, 4, 2, *lengths, 3, 2), lags=3)
    got = linearized_attention(q, k, v, alpha=0.3, conv_weight=w, group_size=4)
    torch.testing.assert_close(got, by_hand(q, k, v, 0.3, w, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_size", [1, 48, 64, 2000])
@pytest.mark.parametrize("length", LENGTHS)
def test_groups_equal_the_reference(length, group_size):
    q, k, v, w = draw((1, 2, 2, length, length, 32, 32), lags=32)
    options = dict(alpha=0.3, conv_weight=w, group_size=group_size)
    got = linearized_attention_chunked(q, k, v, **options)
    torch.testing.assert_close(got, linearized_attention(q, k, v, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [(32, 32), (60, 24), (64, 64), (128, 128)], ids=str)
def test_dimensions_and_state(dims):
    """Chunked, step by step and the reference; both end in the same state, of the size that the cost model says."""
    q, k, v, w = draw((1, 4, 2, 70, 70, *dims))
    options = dict(alpha=0.3, conv_weight=w, group_size=16)
    want = linearized_attention(q, k, v, **options)
    got, after = linearized_attention_chunked(q, k, v, **options, return_state=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    state, parts = None, []
    for t in range(70):
        out, state = linearized_attention_step(state, *(x[:, :, t : t + 1] for x in (q, k, v)), **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-12)
    for x, y in zip(state[:4], after[:4]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    assert state.seen == after.seen == 70
    assert state.k.shape[2] == 70 % 16
    unit = k / k.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(state.S, unit[:, :, :64].transpose(-1, -2) @ v[:, :, :64], rtol=0, atol=1e-12)
    torch.testing.assert_close(state.tail, v[:, :, -4:])


@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (64, 65)], ids=str)
def test_fewer_queries_than_keys(lengths):
    q, k, v, w = draw((2, 6, 2, *lengths, 12, 7))
    options = dict(alpha=torch.linspace(-1, 1, 6, dtype=torch.float64), conv_weight=w, group_size=16)
    want = linearized_attention(q, k, v, **options)
    torch.testing.assert_close(linearized_attention_chunked(q, k, v, **options), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cuts", [(37, 80), (16, 32), (1, 2), (63, 65)], ids=str)
def test_a_sequence_in_pieces(cuts):
    """Prefill, hand the state over, prefill again, decode: group borders fall where they would have."""
    q, k, v, w = draw((2, 4, 2, 90, 90, 16, 8))
    options = dict(alpha=0.5, conv_weight=w, group_size=16)
    want, end = linearized_attention_chunked(q, k, v, **options, return_state=True)
    parts, state = [], None
    for a, b in ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], 85)):
        out, state = linearized_attention_chunked(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], **options, initial_state=state, return_state=True
        )
        parts.append(out)
    for t in range(85, 90):
        before = [x.clone() for x in state[:4]]
        out, new = linearized_attention_step(state, *(x[:, :, t : t + 1] for x in (q, k, v)), **options)
        assert all(torch.equal(x, y) for x, y in zip(state[:4], before))  # the old state can be kept
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-13)
    for x, y in zip(state[:4], end[:4]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_step_has_the_numbers_of_the_parallel_form_in_float32():
    q, k, v, w = draw((1, 4, 2, 200, 200, 32, 32), torch.float32)
    options = dict(alpha=0.3, conv_weight=w, group_size=64)
    want = linearized_attention_chunked(q, k, v, **options)
    state = init_state(1, 2, 32, 32, num_lags=5)
    for t in range(200):  # 63, 64 and 127, 128 are the group's borders
        out, state = linearized_attention_step(state, *(x[:, :, t : t + 1] for x in (q, k, v)), **options)
        assert (out - want[:, :, t : t + 1]).abs().max() <= 20 * torch.finfo(
            torch.float32
        ).eps * want.abs().max()


def test_extremes():
    q, k, v, w = draw((1, 2, 2, 40, 40, 8, 6))
    local = linearized_attention(q, k, v, alpha=0.0, group_size=8)
    assert torch.equal(local, linearized_attention(q, k, v, alpha=0.0, conv_weight=0 * w, group_size=8))
    a, b = ((x / x.norm(dim=-1, keepdim=True)).double() for x in (q, k))
    # One group: nothing but the square of ReLU.
    whole = (a @ b.transpose(-1, -2)).relu().square().tril() @ v
    torch.testing.assert_close(
        linearized_attention_chunked(q, k, v, group_size=40), whole, rtol=0, atol=1e-13
    )
    # The first G tokens have no past groups.
    one = linearized_attention_chunked(q, k, v, alpha=7.0, group_size=8)
    torch.testing.assert_close(one[:, :, :8], local[:, :, :8], rtol=0, atol=1e-13)
    # Groups of one: a token's own value times relu(q . k)^2, and linear attention on all before it.
    own = (a * b).sum(-1, keepdim=True).relu().square() * v
    past = (a @ b.transpose(-1, -2)).tril(-1) @ v
    torch.testing.assert_close(
        linearized_attention_chunked(q, k, v, alpha=0.5, group_size=1), own + 0.5 * past, rtol=0, atol=1e-13
    )
    # The group size is part of the function, not a matter of scheduling.
    assert (local - linearized_attention(q, k, v, alpha=0.0, group_size=16)).abs().max() > 0.1
    # Zero vectors (padding) give zeros, and finite gradients.
    zero = torch.zeros_like(q).requires_grad_()
    out = linearized_attention_chunked(zero, k, v, group_size=8)
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), zero)[0].isfinite().all()


@pytest.mark.parametrize("lags", [1, 2, 5, 32, 100])
@pytest.mark.parametrize("length", [1, 31, 64, 65])
def test_convolution_is_torchs_own(length, lags):
    """``F.conv1d`` with the past padded and the future not, the time axis turned, is the oracle."""
    _, _, v, w = draw((2, 4, 2, length, length, 3, 6), lags=lags)
    x = F.pad(repeat_kv(v, 2).permute(0, 3, 1, 2).reshape(-1, 4, length), (lags - 1, 0))
    want = F.conv1d(x, w.flip(1)[:, None], groups=4).reshape(2, 6, 4, length).permute(0, 2, 3, 1)
    torch.testing.assert_close(masked_depthwise_conv(v, w), want, rtol=0, atol=1e-13)
    for chunk in (1, 16, 64):
        torch.testing.assert_close(
            masked_depthwise_conv_chunked(v, w, chunk_size=chunk), want, rtol=0, atol=1e-13
        )
    first, tail = masked_depthwise_conv_chunked(v[:, :, : length // 2 + 1], w, return_tail=True)
    rest = v[:, :, length // 2 + 1 :]
    if rest.shape[2]:
        second, tail = masked_depthwise_conv_chunked(rest, w, initial_tail=tail, return_tail=True)
        torch.testing.assert_close(torch.cat([first, second], 2), want, rtol=0, atol=1e-13)
    if lags > 1:
        torch.testing.assert_close(tail, F.pad(v, (0, 0, lags - 1, 0))[:, :, -(lags - 1) :])


def test_masking_the_kernel_and_dropping_its_taps_are_one():
    _, _, v, _ = draw((1, 4, 2, 40, 40, 3, 6))
    kernel = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masked = kernel.clone()
    masked[:, 5:] = 0
    want = symmetric_depthwise_conv(v, masked)
    torch.testing.assert_close(masked_depthwise_conv(v, causal_taps(kernel)), want, rtol=0, atol=1e-14)
    oracle = F.conv1d(
        repeat_kv(v, 2).permute(0, 3, 1, 2).reshape(-1, 4, 40), kernel[:, None], padding=4, groups=4
    )
    torch.testing.assert_close(
        symmetric_depthwise_conv(v, kernel),
        oracle.reshape(1, 6, 4, 40).permute(0, 2, 3, 1),
        rtol=0,
        atol=1e-13,
    )
    assert band(causal_taps(kernel), 1).tolist() == kernel[:, None, :5].tolist()


def future_in_gradient(fn, v):
    """Does any output depend on a later value?  The Jacobian's part above the diagonal."""
    jacobian = torch.autograd.functional.jacobian(lambda x: fn(x).sum((0, 1, 3)), v)  # [N, B, H, N, D]
    return jacobian.abs().amax((1, 2, 4)).triu(1).max().item()


def test_symmetric_convolution_leaks_and_the_masked_one_does_not():
    _, _, v, _ = draw((1, 2, 2, 20, 20, 3, 4))
    kernel = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changed = v.clone()
    changed[:, :, 10] += 1
    moved = symmetric_depthwise_conv(changed, kernel) - symmetric_depthwise_conv(v, kernel)
    assert [bool(moved[:, :, t].any()) for t in (6, 7, 9, 13, 14)] == [False, True, True, True, False]
    assert future_in_gradient(lambda x: symmetric_depthwise_conv(x, kernel), v) > 0.1
    weight = causal_taps(kernel)
    for fn in (masked_depthwise_conv, lambda x, w: masked_depthwise_conv_chunked(x, w, chunk_size=4)):
        assert torch.equal(fn(v, weight)[:, :, :10], fn(changed, weight)[:, :, :10])
        assert not torch.equal(fn(v, weight)[:, :, 10], fn(changed, weight)[:, :, 10])
        assert future_in_gradient(lambda x, fn=fn: fn(x, weight), v) == 0


FORMS = {
    "reference": linearized_attention,
    "chunked": linearized_attention_chunked,
}


@pytest.mark.parametrize("token", [0, 15, 16, 17, 63, 69])
@pytest.mark.parametrize("form", FORMS)
def test_no_leak(form, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    q, k, v, w = draw((1, 2, 1, 70, 70, 16, 8), torch.float32)
    options = dict(alpha=0.3, conv_weight=w, group_size=16)
    before = FORMS[form](q, k, v, **options)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, token:] += 3.0
    after = FORMS[form](*changed, **options)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = FORMS[form](*leaves, **options)[:, :, : token + 1].square().sum()
    for grad in torch.autograd.grad(out, leaves):
        assert (grad[:, :, token + 1 :] == 0).all()


def test_layer_does_not_leak_after_training_steps():
    """The released code masks before each forward, so a leak would show after an optimizer step, not at the start."""
    torch.manual_seed(0)
    layer = LinearizedAttention(16, 4, num_kv_heads=2, group_size=8, conv_taps=5, rope_base=100.0)
    x = torch.randn(2, 30, 16)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    changed = x.clone()
    changed[:, 17:] += 1
    with torch.no_grad():
        assert torch.equal(layer(x)[:, :17], layer(changed)[:, :17])


@pytest.mark.parametrize("form", ["reference", "chunked", "conv"])
def test_gradcheck(form):
    q, k, v, w = (x.requires_grad_() for x in draw((1, 2, 1, 7, 7, 3, 2), lags=3))
    alpha = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    if form == "conv":
        tail = torch.rand(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)

        def conv(v, w, tail):
            return masked_depthwise_conv_chunked(v, w, chunk_size=4, initial_tail=tail, return_tail=True)

        assert torch.autograd.gradcheck(conv, (v, w, tail))
        return
    if form == "reference":

        def run(q, k, v, w, alpha):
            return linearized_attention(q, k, v, alpha=alpha, conv_weight=w, group_size=3)

        assert torch.autograd.gradcheck(run, (q, k, v, w, alpha))
        return
    _, state = linearized_attention_chunked(q, k, v, conv_weight=w, group_size=3, return_state=True)
    parts = [x.detach().requires_grad_() for x in state[:4]]

    def go_on(q, k, v, w, alpha, *parts):
        out, after = linearized_attention_chunked(
            q, k, v, alpha=alpha, conv_weight=w, group_size=3, return_state=True,
            initial_state=type(state)(*parts, state.seen),
        )  # fmt: skip
        return (out, *(x for x in after[:4] if x.numel()))

    assert torch.autograd.gradcheck(go_on, (q, k, v, w, alpha, *parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype):
    """At most twice the error of a plain run in the same dtype, both against float64."""
    q, k, v, w = draw((2, 2, 2, 129, 129, 32, 32), dtype)
    options = dict(alpha=0.3, conv_weight=w, group_size=32)
    truth = linearized_attention(*(x.double() for x in (q, k, v)), **{**options, "conv_weight": w.double()})

    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    scores, t = a @ b.transpose(-1, -2), torch.arange(129)
    same = (t[:, None] // 32 == t // 32) & (t <= t[:, None])
    weights = torch.where(same, scores.relu().square(), 0) + 0.3 * torch.where(
        t // 32 < t[:, None] // 32, scores, 0
    )
    plain = weights @ v + masked_depthwise_conv(v, w)
    allowed = 2 * (plain.double() - truth).abs().max()
    got = linearized_attention_chunked(q, k, v, **options)
    assert got.dtype == dtype
    assert (got.double() - truth).abs().max() <= allowed


def test_against_fla():
    """fla's naive form: the global branch is causal linear attention less what lies in the group."""
    naive = pytest.importorskip("fla.ops.linear_attn.naive", reason="fla-core is not installed (extra peers)")
    q, k, v, _ = draw((2, 3, 3, 128, 128, 16, 24), torch.float32)
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))

    def linear(a, b, v):
        inputs = [x.transpose(1, 2) for x in (a, b, v)]
        return naive.naive_recurrent_linear_attn(*inputs, normalize=False, scale=1.0)[0].transpose(1, 2)

    def in_groups(x):
        return x.unflatten(2, (4, 32)).transpose(1, 2).flatten(0, 1)  # every group a sequence of its own

    inside = linear(*map(in_groups, (a, b, v))).unflatten(0, (2, 4)).transpose(1, 2).flatten(2, 3)
    want = 0.3 * (linear(a, b, v) - inside)
    options = dict(group_size=32)
    got = linearized_attention_chunked(q, k, v, alpha=0.3, **options)
    got = got - linearized_attention_chunked(q, k, v, alpha=0.0, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(grouped=False),
        dict(conv_taps=0),
        dict(num_kv_heads=2, rope_base=100.0, head_dim=6, value_dim=3),
    ],
    ids=str,
)
def test_layer_trains_and_decodes(options):
    torch.manual_seed(0)
    layer = LinearizedAttention(16, 4, **{"group_size": 8, "conv_taps": 5, **options})
    x = torch.randn(8, 20, 16)
    target = (
        F.pad(x, (0, 0, 3, 0))[:, :20] if options.get("conv_taps", 5) else x.cumsum(1) / 8
    )  # what was 3 ago
    optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        want = layer(x)
        first, state = layer(x[:, :15], return_state=True)
        outs = [first]
        for t in range(15, 20):
            out, state = layer.step(state, x[:, t : t + 1])
            outs.append(out)
            held = sum(y[:1].numel() for y in state[:4])
            assert held <= layer.state_elements
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-5)
        _, fullest = layer(x[:, :15], return_state=True)  # 7 of 8 open
        assert sum(y[:1].numel() for y in fullest[:4]) == layer.state_elements


def bad(message, fn=linearized_attention_chunked, **change):
    q, k, v, w = draw((1, 4, 2, 8, 8, 16, 12), torch.float32)
    with pytest.raises(ValueError, match=message):
        fn(**{"q": q, "k": k, "v": v, "conv_weight": w, **change})


def test_bad_input_is_named():
    bad("q: expected 4 dimensions", q=torch.randn(4, 8, 16))
    bad("q: expected at most as many queries as keys", q=torch.randn(1, 4, 9, 16))
    bad("k: expected the head_dim of q", k=torch.randn(1, 2, 8, 15))
    bad("v: expected the batch, heads and length of k", v=torch.randn(1, 2, 9, 12))
    bad("group_size: expected an integer", group_size=0)
    bad("alpha: expected a finite number", alpha=math.inf)
    bad("alpha: expected a number or floats", alpha=torch.ones(3))
    bad("conv_weight: expected a floating-point tensor", conv_weight=torch.ones(4))
    bad("conv_weight: expected a number of heads that the 2", conv_weight=torch.ones(3, 5))
    bad("conv_weight: expected a row for each head of q", conv_weight=torch.ones(2, 5))
    good = init_state(1, 2, 16, 12, num_lags=5)
    bad("initial_state: expected S of shape", initial_state=init_state(1, 4, 16, 12, num_lags=5))
    bad("initial_state: expected tail of shape", initial_state=init_state(1, 2, 16, 12))
    bad("initial_state: expected S in float32", initial_state=good._replace(S=good.S.half()))
    long = good._replace(k=torch.zeros(1, 2, 9, 16), v=torch.zeros(1, 2, 9, 12))
    bad("initial_state: expected an open group shorter than 8, got 9", initial_state=long, group_size=8)
    bad("initial_state: expected a LinearizedState", initial_state=torch.zeros(1))
    bad("q: expected one token", lambda **x: linearized_attention_step(None, **x))
    v, w = torch.randn(1, 2, 8, 4), torch.randn(2, 5)
    for message, call in {
        "kernel: expected an odd number": lambda: symmetric_depthwise_conv(v, torch.randn(2, 4)),
        r"kernel: expected shape \[H, 2p": lambda: causal_taps(torch.randn(2, 4)),
        "v: expected a floating-point": lambda: masked_depthwise_conv(v[0], w),
        "weight: expected a number of heads": lambda: masked_depthwise_conv(v, torch.randn(3, 5)),
        "initial_tail: expected shape": lambda: masked_depthwise_conv_chunked(v, w, initial_tail=v),
        "chunk_size: expected": lambda: masked_depthwise_conv_chunked(v, w, chunk_size=0),
        "x: expected shape": lambda: LinearizedAttention(16, 4)(torch.randn(2, 5, 8)),
        "num_kv_heads: expected a divisor": lambda: LinearizedAttention(16, 4, num_kv_heads=3),
        "conv_taps: expected an integer": lambda: LinearizedAttention(16, 4, conv_taps=-1),
        "head_dim: expected an even": lambda: LinearizedAttention(16, 4, head_dim=3, rope_base=1.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
