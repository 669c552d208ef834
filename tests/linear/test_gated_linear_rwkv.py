"""RWKV-6 and RWKV-7: chunks against the recurrence, what they become without their additions, fla's naive forms."""

import pytest
import torch
import torch.nn.functional as F

from effattn_lab.linear.gated_linear import gated_linear, gated_linear_recurrent
from effattn_lab.linear.rwkv import rwkv6, rwkv6_chunked, rwkv6_step, rwkv7, rwkv7_chunked, rwkv7_step


def draw(n, dims=(8, 6), dtype=torch.float64, seed=0, low=-2.0):
    """r, k, v, g for RWKV-6 and kappa, a and u beside them."""
    generator = torch.Generator().manual_seed(seed)
    dim, value_dim = dims
    r, k, kappa = (torch.randn(2, 3, n, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    v = torch.randn(2, 3, n, value_dim, generator=generator, dtype=torch.float64)
    g = low * torch.rand(2, 3, n, dim, generator=generator, dtype=torch.float64) ** 3 - 1e-3
    a = torch.rand(2, 3, n, dim, generator=generator, dtype=torch.float64)
    u = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 3, dim, value_dim, generator=generator, dtype=torch.float64)
    return {
        name: x.to(dtype)
        for name, x in dict(
            r=r, k=k, v=v, g=g, kappa=F.normalize(kappa, dim=-1), a=a, u=u, state=state
        ).items()
    }


def six(x):
    return x["r"], x["k"], x["v"], x["g"], x["u"]


def seven(x):
    return x["r"], x["k"], x["v"], x["g"], x["kappa"], x["a"]


@pytest.mark.parametrize("chunk_size", [1, 16, 48, 2000])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_chunks_are_the_recurrence(length, chunk_size):
    x = draw(length)
    for slow, fast, inputs in ((rwkv6, rwkv6_chunked, six(x)), (rwkv7, rwkv7_chunked, seven(x))):
        want, end = slow(*inputs, initial_state=x["state"])
        got, last = fast(*inputs, chunk_size=chunk_size, initial_state=x["state"])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        torch.testing.assert_close(last, end, rtol=0, atol=1e-11)


def test_steps_are_the_recurrence():
    x = draw(40)
    for slow, step, inputs in ((rwkv6, rwkv6_step, six(x)), (rwkv7, rwkv7_step, seven(x))):
        want, end = slow(*inputs)
        state, outs = None, []
        for t in range(40):
            token = [y[:, :, t : t + 1] if y.dim() == 4 else y for y in inputs]
            out, state = step(state, *token)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


def test_what_rwkv6_adds():
    """With u = 1 the token is written before it is read: what is left is the decay of the state, one step less."""
    x = draw(30)
    r, k, v, g, u = six(x)
    plain, end = gated_linear_recurrent(r, k, v, g, scale=1.0)
    ones, last = rwkv6(r, k, v, g, torch.ones_like(u))
    torch.testing.assert_close(last, end)
    undecayed = (
        gated_linear(r, k, v, g, scale=1.0) - (r * k).sum(-1, keepdim=True) * v
    )  # reads after the decay
    assert (ones - plain).abs().max() > 0.1
    late = rwkv6(r * g.exp(), k, v, g, torch.zeros_like(u))[
        0
    ]  # decay the reader instead: the plain form again
    torch.testing.assert_close(late, undecayed, rtol=0, atol=1e-12)


def test_what_rwkv7_adds():
    """a = 0: the decay alone. g = 0 and one rate for all channels: the delta rule."""
    x = draw(30)
    r, k, v, g, kappa, a = seven(x)
    nothing = rwkv7(r, k, v, g, kappa, 0 * a)[0]
    torch.testing.assert_close(nothing, gated_linear(r, k, v, g, scale=1.0), rtol=0, atol=1e-12)
    beta = a[..., :1]
    got, state = rwkv7_chunked(r, beta * kappa, v, 0 * g, kappa, beta.expand_as(a))
    s = torch.zeros(2, 3, 8, 6, dtype=torch.float64)
    for t in range(30):
        error = v[:, :, t] - torch.einsum("bhk,bhkv->bhv", kappa[:, :, t], s)
        s = s + beta[:, :, t, :, None] * kappa[:, :, t, :, None] * error[:, :, None]
        torch.testing.assert_close(
            got[:, :, t], torch.einsum("bhk,bhkv->bhv", r[:, :, t], s), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(state, s, rtol=0, atol=1e-12)


def test_no_mask_of_decays_gives_rwkv7():
    """Its weights for one pair depend on the keys between them; a decay's depend on decays alone."""
    x = draw(6)
    r, k, v, g, kappa, a = seven(x)
    other = kappa.clone()
    other[:, :, 3] = other[:, :, 3].roll(1, -1)
    change = rwkv7(r, k, v, g, kappa, a)[0] - rwkv7(r, k, v, g, other, a)[0]
    assert (change[:, :, :3] == 0).all()
    assert change[:, :, 4].abs().max() > 0.01


@pytest.mark.parametrize(
    ("fn", "inputs"), [(rwkv6, six), (rwkv6_chunked, six), (rwkv7, seven), (rwkv7_chunked, seven)]
)
def test_gradients_and_leaks(fn, inputs):
    x = draw(5, (3, 2))
    x["g"] = x["g"] - 0.1
    values = [y.requires_grad_() for y in inputs(x)]
    options = {"chunk_size": 2} if "chunked" in fn.__name__ else {}
    assert torch.autograd.gradcheck(lambda *y: fn(*y, **options), values)
    x = draw(20, dtype=torch.float32)
    before = fn(*inputs(x), **options)[0]
    for name in ("k", "v", "kappa", "a"):
        x[name] = x[name].clone()
        x[name][:, :, 11:] *= 0.5
    after = fn(*inputs(x), **options)[0]
    assert torch.equal(before[:, :, :11], after[:, :, :11])
    assert (before[:, :, 11] != after[:, :, 11]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strong_decay_over_a_long_sequence(dtype):
    """RWKV-6's gate has no floor: -exp(4) = -55 a token."""
    x = draw(8200, (8, 8), dtype)
    g = torch.full_like(x["g"], -55.0, dtype=torch.float32)
    out, state = rwkv6_chunked(x["r"], x["k"], x["v"], g, x["u"])
    want, end = rwkv6_chunked(*(y.double() for y in (x["r"], x["k"], x["v"], g, x["u"])))
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    assert (state.double() - end).abs().max() <= 1e-5 * end.abs().max()


def test_against_fla():
    naive6 = pytest.importorskip(
        "fla.ops.rwkv6.recurrent_naive", reason="fla-core is not installed (extra peers)"
    )
    from fla.ops.generalized_delta_rule.dplr import naive as dplr

    x = draw(64, (16, 12), torch.float32)
    close = dict(rtol=1e-3, atol=1e-4)
    want, end = naive6.naive_recurrent_rwkv6(
        *six(x), scale=1.0, initial_state=x["state"], output_final_state=True
    )
    got, last = rwkv6_chunked(*six(x), initial_state=x["state"])
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(last, end, **close)
    r, k, v, g, kappa, a = seven(x)
    got, last = rwkv7_chunked(*seven(x), scale=16**-0.5, initial_state=x["state"])
    for form in (dplr.dplr_recurrence, dplr.dplr_chunkwise):
        want, end = form(r, k, v, -kappa, a * kappa, g, initial_state=x["state"])
        torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close(last, end, **close)


def test_bad_input_is_named():
    x = draw(5)

    def bad(message, fn, inputs, **change):
        with pytest.raises(ValueError, match=message):
            fn(*inputs({**x, **change}))

    bad("g: expected a decay a channel", rwkv6, six, g=x["g"][..., 0])
    bad(r"u: expected shape \(3, 8\)", rwkv6_chunked, six, u=x["u"][:2])
    bad("k: expected the shape of r", rwkv6, six, k=x["k"][:, :1], v=x["v"][:, :1], g=x["g"][:, :1])
    bad("kappa: expected the shape of k", rwkv7, seven, kappa=x["kappa"][..., :3])
    bad("a: expected the shape of k", rwkv7_chunked, seven, a=None)
    bad("g: expected log decays of at most 0", rwkv7, seven, g=-x["g"])
    bad("r: expected one token", lambda *y: rwkv7_step(None, *y), seven)
    bad("q: expected one token", lambda *y: rwkv6_step(None, *y), six)
