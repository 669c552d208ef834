"""Mamba-1's selective scan in PyTorch: every form against the reference in float64, oracles, gradients, leaks, bad
input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effattn_lab.linear import scans
from effattn_lab.linear.selective_ssm import (
    discretize,
    implicit_attention,
    lti_kernel,
    selective_scan,
    selective_scan_chunked,
    selective_scan_parallel,
    selective_scan_step,
)

LENGTHS = (1, 63, 64, 65, 1000)
FORMS = {
    "reference": selective_scan,
    "blelloch": selective_scan_parallel,
    "hillis-steele": lambda *x, **o: selective_scan_parallel(*x, algorithm="hillis-steele", **o),
    "chunked": lambda *x, **o: selective_scan_chunked(*x, chunk_size=16, **o),
    "chunked, kept": lambda *x, **o: selective_scan_chunked(*x, chunk_size=16, recompute=False, **o),
}
FAST = [name for name in FORMS if name != "reference"]


def draw(batch=2, channels=6, length=65, size=4, groups=None, dtype=torch.float64, seed=0):
    """Everything the scan takes. Steps between 0.01 and 3, so that some states last and others are gone at once."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shared = (batch, size, length) if groups is None else (batch, groups, size, length)
    inputs = {
        "u": r(batch, channels, length), "delta": 2 * r(batch, channels, length) - 2,
        "A": -torch.arange(1.0, size + 1, dtype=torch.float64).repeat(channels, 1) * torch.exp(0.3 * r(channels,
        size)), "B": r(*shared), "C": r(*shared), "D": r(channels), "z": r(batch, channels, length), "delta_bias":
        r(channels),
    }  # fmt: skip
    half = ("u", "delta", "B", "C", "z")
    cast = {name: x.to(dtype) if name in half or dtype == torch.float32 else x for name, x in inputs.items()}
    return {**cast, "delta_softplus": True}


def start(batch=2, channels=6, size=4, dtype=torch.float64):
    return torch.randn(
        batch, channels, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    ).to(dtype)


def by_hand(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state):
    """The definition, number by number, no broadcasting that could hide an error."""
    out, h = torch.zeros_like(u), state.clone()
    for b in range(u.shape[0]):
        for e in range(u.shape[1]):
            group = e // (u.shape[1] // B.shape[1])
            for t in range(u.shape[2]):
                step = math.log1p(math.exp(delta[b, e, t] + delta_bias[e]))
                y = D[e] * u[b, e, t]
                for s in range(A.shape[1]):
                    h[b, e, s] = math.exp(step * A[e, s]) * h[b, e, s] + step * B[b, group, s, t] * u[b, e, t]
                    y = y + C[b, group, s, t] * h[b, e, s]
                out[b, e, t] = y * z[b, e, t] / (1 + math.exp(-z[b, e, t]))
    return out, h


def test_reference_is_the_definition():
    x = draw(length=7, groups=3)
    got = selective_scan(**x, initial_state=start(), return_state=True)
    torch.testing.assert_close(got, by_hand(**x, state=start()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FAST)
def test_forms_equal_the_reference(form, length):
    x = draw(length=length)
    options = dict(initial_state=start(), return_state=True)
    want, state = selective_scan(**x, **options)
    got, after = FORMS[form](**x, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13 * max(1.0, want.abs().max().item()))
    torch.testing.assert_close(after, state, rtol=0, atol=1e-13 * max(1.0, state.abs().max().item()))


@pytest.mark.parametrize("chunk_size", [1, 7, 48, 64, 2000])
def test_any_chunk(chunk_size):
    x = draw(length=130)
    got = selective_scan_chunked(**x, chunk_size=chunk_size)
    torch.testing.assert_close(got, selective_scan(**x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [32, 60, 64, 128])
@pytest.mark.parametrize("size", [1, 16])
def test_widths_groups_and_what_may_be_left_out(channels, size):
    for groups in (None, 1, 4):
        x = draw(1, channels, 40, size, groups)
        want = selective_scan(**x)
        for form in FAST:
            torch.testing.assert_close(FORMS[form](**x), want, rtol=0, atol=1e-12)
        if groups == 4:  # a group is a scan of its own
            part = slice(0, channels // 4)
            one = {n: v[:, part] if n in ("u", "delta", "z") else v for n, v in x.items()}
            one |= {n: x[n][part] for n in ("A", "D", "delta_bias")} | {n: x[n][:, 0] for n in ("B", "C")}
            torch.testing.assert_close(selective_scan(**one), want[:, part], rtol=0, atol=1e-13)
    bare = {n: x[n] for n in ("u", "A", "B", "C")}
    delta = F.softplus(x["delta"] + x["delta_bias"][:, None])
    y = selective_scan(**bare, delta=delta)
    torch.testing.assert_close((y + x["D"][:, None] * x["u"]) * F.silu(x["z"]), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_rules_of_discretization(rule):
    """ZOH solves the equation for an input that is held; the matrix exponential says what the solution is."""
    delta, A, B = (
        torch.tensor(0.7),
        torch.tensor([-0.5, -3.0, 0.0, 1e-7]),
        torch.tensor([2.0, -1.0, 3.0, 1.0]),
    )
    delta, A, B = (x.double() for x in (delta, A, B))
    A_bar, B_bar = discretize(delta, A, B, rule=rule)
    for s in range(4):
        system = torch.tensor([[A[s], B[s]], [0.0, 0.0]], dtype=torch.float64)  # h' = A h + B u, u' = 0
        exact = torch.linalg.matrix_exp(delta * system)[0]
        torch.testing.assert_close(A_bar[s], exact[0], rtol=1e-12, atol=0)
        if rule == "zoh":
            torch.testing.assert_close(B_bar[s], exact[1], rtol=1e-9, atol=0)
        else:  # off by a term of second order in the step, delta^2 |A B| / 2
            assert (B_bar[s] - exact[1]).abs() <= delta**2 * (A[s] * B[s]).abs() / 2 + 1e-12
    small = delta / 1000
    gap = [
        (discretize(d, A, B, rule="zoh")[1] - discretize(d, A, B)[1])[1].item() for d in (small, small / 2)
    ]
    assert gap[0] / gap[1] == pytest.approx(4, rel=1e-2)
    x = draw(length=20)
    want = selective_scan(**x, rule=rule)
    for form in FAST:
        torch.testing.assert_close(FORMS[form](**x, rule=rule), want, rtol=0, atol=1e-12)
    at_zero = torch.zeros(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: discretize(delta, a, B[:3], rule=rule), at_zero, eps=1e-5)


@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_constant_parameters_are_a_convolution(rule):
    """Nothing depends on the token: a linear time-invariant system, S4D, computed here by an FFT and by NumPy."""
    n, channels, size = 200, 5, 4
    x = draw(1, channels, n, size)
    delta = F.softplus(x["delta"][0, :, 0])
    B, C = torch.randn(2, channels, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def each(m):
        return m[None, :, :, None].expand(1, channels, size, n)  # a group to each channel

    got = selective_scan(
        x["u"], delta[None, :, None].expand(1, channels, n), x["A"], each(B), each(C), rule=rule
    )
    kernel = lti_kernel(delta, x["A"], B, C, n, rule=rule)
    spectrum = torch.fft.rfft(kernel, 2 * n) * torch.fft.rfft(x["u"][0], 2 * n)
    torch.testing.assert_close(got[0], torch.fft.irfft(spectrum, 2 * n)[:, :n], rtol=0, atol=1e-11)
    for e in range(channels):
        direct = np.convolve(x["u"][0, e].numpy(), kernel[e].numpy())[:n]
        np.testing.assert_allclose(got[0, e].numpy(), direct, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_the_scan_is_a_matrix(rule):
    x = draw(length=33, groups=2)
    delta = F.softplus(x["delta"] + x["delta_bias"][:, None])
    m = implicit_attention(delta, x["A"], x["B"], x["C"], rule=rule)
    assert (m.triu(1) == 0).all()
    want = selective_scan(x["u"], delta, x["A"], x["B"], x["C"], rule=rule)
    torch.testing.assert_close((m @ x["u"][..., None])[..., 0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("initial", [False, True])
def test_against_fla(initial):
    """Gated linear attention with a head for each channel, values of size 1 and decays ``delta A``: the same scan,
    written by others. fla-core 0.6.0 has no Mamba-1 of its own."""
    naive = pytest.importorskip("fla.ops.gla.naive", reason="fla-core is not installed (extra peers)")
    x = draw(2, 6, 65, 4, dtype=torch.float32)
    state = start(dtype=torch.float32) if initial else None
    delta = F.softplus(x["delta"] + x["delta_bias"][:, None]).transpose(1, 2)  # [B, N, E]
    heads = (2, 65, 6, 4)
    q, k = (x[name].transpose(1, 2)[:, :, None].expand(heads) for name in ("C", "B"))
    v = (delta * x["u"].transpose(1, 2))[..., None]
    y, after = naive.naive_recurrent_gla(
        q * 2, k, v, delta[..., None] * x["A"],  # times 2: fla multiplies by the root of 1 / 4
        initial_state=None if state is None else state[..., None], output_final_state=True,
    )  # fmt: skip
    want = (y[..., 0].transpose(1, 2) + x["D"][:, None] * x["u"]) * F.silu(x["z"])
    for form in FORMS:
        got, mine = FORMS[form](**x, initial_state=state, return_state=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine, after[..., 0], rtol=1e-5, atol=1e-5)


def test_a_sequence_in_pieces():
    """Prefill, hand the state over, prefill again, then decode token by token: the numbers of one pass."""
    x = draw(length=90, groups=2)
    want, end = selective_scan_chunked(**x, return_state=True)

    def part(a, b):
        return {n: v[..., a:b] if n in ("u", "delta", "B", "C", "z") else v for n, v in x.items()}

    parts, state = [], None
    for a, b, form in ((0, 37, "chunked"), (37, 80, "blelloch"), (80, 85, "reference")):
        out, state = FORMS[form](**part(a, b), initial_state=state, return_state=True)
        parts.append(out)
    for t in range(85, 90):
        before = state.clone()
        out, new = selective_scan_step(state, **part(t, t + 1))
        assert torch.equal(state, before)  # the old state can be kept, for a draft say
        parts.append(out)
        state = new
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


def test_step_has_the_numbers_of_the_parallel_form_in_float32():
    x = draw(length=300, size=16, dtype=torch.float32)
    want = selective_scan_parallel(**x)
    state, size = None, want.abs().max()
    for t in range(300):
        now = {n: v[..., t : t + 1] if n in ("u", "delta", "B", "C", "z") else v for n, v in x.items()}
        out, state = selective_scan_step(state, **now)
        assert (out - want[..., t : t + 1]).abs().max() <= 10 * torch.finfo(torch.float32).eps * size
    assert state.shape == (2, 6, 16)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    x = draw(1, 4, 5, 2, groups=2)
    softplus = x.pop("delta_softplus")
    names, state = list(x), start(1, 4, 2)
    rule = "zoh" if form == "reference" else "euler"
    inputs = [v.requires_grad_() for v in (*x.values(), state)]
    chunk = dict(chunk_size=2) if "chunked" in form else {}
    fn = selective_scan_chunked if chunk else FORMS[form]
    chunk |= dict(recompute=form == "chunked") if chunk else {}

    def run(*values):
        *rest, s = values
        return fn(
            **dict(zip(names, rest)),
            delta_softplus=softplus,
            initial_state=s,
            return_state=True,
            rule=rule,
            **chunk,
        )

    assert torch.autograd.gradcheck(run, inputs)


def test_recomputing_keeps_border_states_only():
    """Same gradients; neither decays nor states of all tokens are among what is saved for the backward pass."""
    x = draw(1, 8, 512, 16, dtype=torch.float32)
    leaves = [x[n].requires_grad_() for n in ("u", "delta", "A", "B", "C")]
    saved, grads = [], []
    for recompute in (False, True):
        held = {}

        def pack(t, held=held):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = selective_scan_chunked(**x, recompute=recompute)
            saved.append(sum(held.values()))
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    everywhere = 4 * 512 * 8 * 16  # bytes of one [N, E, S]
    assert saved[0] - saved[1] >= 2 * everywhere, saved
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_rounding(dtype):
    """At most twice the error of a plain run in the same dtype, both against float64."""
    x = draw(2, 16, 200, 16, dtype=dtype)
    exact = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    truth = selective_scan(**exact)
    low = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    delta = F.softplus(low["delta"] + low["delta_bias"][:, None])
    h, rows = torch.zeros(2, 16, 16, dtype=dtype), []
    for t in range(200):
        step = delta[:, :, t, None]
        h = torch.exp(step * low["A"]) * h + step * low["B"][:, None, :, t] * low["u"][:, :, t, None]
        rows.append((h * low["C"][:, None, :, t]).sum(-1) + low["D"] * low["u"][:, :, t])
    plain = torch.stack(rows, -1) * F.silu(low["z"])
    allowed = 2 * (plain.double() - truth).abs().max()
    for form in FORMS:
        out = FORMS[form](**x)
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= allowed, form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FAST)
def test_strong_decay_over_8k_tokens(form, dtype):
    """Steps up to 50 and A down to -16: a decay of exp(-800) a token, exp(-3 million) in all. Nothing is divided by
    it, so nothing overflows, forward or backward; weak decay beside it in another channel lasts the whole
    sequence."""
    n, channels, size = 8192, 2, 16
    x = draw(1, channels, n, size, dtype=dtype)
    delta = torch.stack([torch.full((1, n), 50.0), torch.full((1, n), 1e-6)], 1).to(dtype)
    x |= {"delta": delta, "delta_softplus": False, "delta_bias": None}
    x["A"] = -torch.arange(1.0, size + 1).repeat(channels, 1)
    x["u"] = (x["u"] + 1).requires_grad_()
    x["delta"].requires_grad_()
    chunk = {"chunk_size": 512} if "chunked" in form else {}
    out = (selective_scan_chunked if chunk else FORMS[form])(**x, **chunk)
    exact = {k: v.detach().double() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    gate, rest = F.silu(exact["z"]), exact["D"][:, None] * exact["u"]
    now = (
        50 * exact["u"][:, 0] * (exact["B"] * exact["C"]).sum(1)
    )  # only the token itself is left of the past
    want = (now + rest[:, 0]) * gate[:, 0]
    assert (out[:, 0] - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    assert out.isfinite().all()
    long_ago = exact["B"].mul(exact["u"][:, 1:2] * exact["delta"][:, 1:2]).cumsum(-1)
    lasting = ((long_ago * exact["C"]).sum(1) + rest[:, 1]) * gate[:, 1]  # decays of 0.88 or more
    assert (out[:, 1] - lasting).abs().max() <= 0.02 * lasting.abs().max()
    for grad in torch.autograd.grad(out.float().sum(), (x["u"], x["delta"])):
        assert grad.isfinite().all()


@pytest.mark.parametrize("token", [0, 15, 16, 17, 63, 69])
@pytest.mark.parametrize("form", FORMS)
def test_no_leak(form, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    x = draw(1, 4, 70, 8, dtype=torch.float32)
    before = FORMS[form](**x)
    changed = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    for name in ("u", "delta", "B", "C", "z"):
        changed[name][..., token:] += 3.0
    after = FORMS[form](**changed)
    assert torch.equal(before[..., :token], after[..., :token])
    assert (before[..., token] != after[..., token]).any()


@pytest.mark.parametrize("form", FORMS)
def test_no_leak_in_the_gradient(form):
    x = draw(1, 4, 40, 4)
    names = ("u", "delta", "B", "C", "z")
    leaves = [x[n].requires_grad_() for n in names]
    for t in (0, 15, 16, 38):
        grads = torch.autograd.grad(FORMS[form](**x)[..., t].sum(), leaves, allow_unused=True)
        for name, grad in zip(names, grads):
            assert (grad[..., t + 1 :] == 0).all(), name
            assert (grad[..., t] != 0).any(), name


@pytest.mark.parametrize("name", scans.SCANS)
def test_scans_count_what_they_combine(name, monkeypatch):
    """Work and depth of the formulas are those of the code."""
    calls = []

    def counted(first, then, combine=scans.combine):
        calls.append(len(first[0]))
        return combine(first, then)

    monkeypatch.setattr(scans, "combine", counted)
    for n in (1, 2, 3, 4, 5, 31, 32, 33, 1000):
        calls.clear()
        a = torch.rand(n, 3, dtype=torch.float64)
        products, h = scans.SCANS[name](a, a)
        assert sum(calls) == scans.combines(name, n)
        assert sum(c > 0 for c in calls) == scans.depth(name, n)
        torch.testing.assert_close(products, a.cumprod(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(h, scans.scan_sequential(a, a, torch.zeros(3, dtype=torch.float64)))
    assert scans.combines("sequential", 1000) == scans.depth("sequential", 1000) == 999
    for count in (scans.combines, scans.depth):
        with pytest.raises(ValueError, match="name: expected sequential, blelloch"):
            count("kogge", 3)


def test_combining_is_associative_and_not_commutative():
    g = torch.Generator().manual_seed(0)
    x, y, z = ((torch.rand(4, generator=g), torch.randn(4, generator=g)) for _ in range(3))
    left, right = scans.combine(scans.combine(x, y), z), scans.combine(x, scans.combine(y, z))
    torch.testing.assert_close(left, right)
    assert (scans.combine(x, y)[1] - scans.combine(y, x)[1]).abs().max() > 0.1


BAD = {
    "type": (dict(u=[1.0]), "u: expected a torch.Tensor, got list"),
    "rank": (dict(u=torch.randn(6, 8)), "u: expected 3 dimensions"),
    "integers": (dict(u=torch.ones(2, 6, 8, dtype=torch.int64)), "u: expected float16 or bfloat16"),
    "empty": (dict(u=torch.randn(2, 6, 0)), "u: expected every dimension"),
    "dtype": (dict(B=torch.randn(2, 4, 8).half()), "B: expected the dtype of u"),
    "delta": (dict(delta=torch.randn(2, 6, 7)), r"delta: expected shape \(2, 6, 8\), got \(2, 6, 7\)"),
    "A": (dict(A=torch.randn(5, 4)), r"A: expected shape \(6, S\), got \(5, 4\)"),
    "B": (dict(B=torch.randn(2, 5, 8)), r"B: expected shape \(2, 4, 8\), got \(2, 5, 8\)"),
    "groups": (dict(B=torch.randn(2, 4, 4, 8)), "B: expected shape .* with G a divisor of 6"),
    "C": (dict(C=torch.randn(2, 1, 4, 8)), r"C: expected shape \(2, 4, 8\)"),
    "D": (dict(D=torch.randn(6, 1)), r"D: expected shape \(6,\)"),
    "z": (dict(z=torch.randn(2, 8, 6)), r"z: expected shape \(2, 6, 8\)"),
    "bias": (dict(delta_bias=torch.randn(1)), r"delta_bias: expected shape \(6,\)"),
    "state": (dict(initial_state=torch.randn(2, 4, 6)), r"initial_state: expected shape \(2, 6, 4\)"),
    "half state": (dict(initial_state=torch.zeros(2, 6, 4).half()), "initial_state: expected float32 or float64"),
    "rule": (dict(rule="bilinear"), "rule: expected 'euler' or 'zoh', got 'bilinear'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    for fn in (selective_scan, selective_scan_parallel, selective_scan_chunked):
        with pytest.raises(ValueError, match=message):
            fn(**{**draw(length=8, dtype=torch.float32), **change})


def test_bad_options_are_named():
    x = draw(length=8)
    with pytest.raises(ValueError, match="chunk_size: expected an integer"):
        selective_scan_chunked(**x, chunk_size=0)
    with pytest.raises(ValueError, match="algorithm: expected one of blelloch"):
        selective_scan_parallel(**x, algorithm="brent")
    with pytest.raises(ValueError, match="u: expected one token"):
        selective_scan_step(None, **x)
    with pytest.raises(ValueError, match="state: expected shape"):
        selective_scan_step(torch.zeros(1, 6, 4), **draw(length=1))
    with pytest.raises(ValueError, match="rule: expected"):
        discretize(x["delta"], x["delta"], x["delta"], rule="tustin")
    with pytest.raises(ValueError, match="length: expected"):
        lti_kernel(x["D"], x["A"], x["A"], x["A"], 0)
