"""Gated linear attention in Triton, in the interpreter or on a GPU: output, state and gradients against float64.

The bar, per dtype: at most twice the error of a plain run in the same dtype, both against float64, plus one rounding
of the largest term it adds up, since a plain run may be exact by luck.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._gated_linear_tiles import TABLE, choose_tiles
from effattn_kernels.gated_linear import gated_linear_chunked, launches

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.gated_linear import gated_linear_chunked as exact_chunked
from effattn_lab.linear.gated_linear import gated_linear_recurrent
from effattn_lab.measure.gated_linear_traffic import rows as traffic_rows

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PER = ("head", "channel")
interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr("effattn_kernels.gated_linear.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, per="channel", seed=0, low=-2.0):
    """q, k, v, g of ``(B, Hq, Hkv, N, K, V)``; log decays, float32, spread between ``low`` and almost 0."""
    batch, hq, hkv, n, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, hq, n, key_dim, generator=generator)
    k = torch.randn(batch, hkv, n, key_dim, generator=generator)
    v = torch.randn(batch, hkv, n, value_dim, generator=generator)
    size = (batch, hkv, n) if per == "head" else (batch, hkv, n, key_dim)
    g = low * torch.rand(size, generator=generator) ** 3 - 1e-3
    return [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)] + [g.to(DEVICE).requires_grad_()]


def plain(q, k, v, g, state=None):
    """Output and state, every product and decay in the dtype of the inputs, all weights at once."""
    groups = q.shape[1] // k.shape[1]
    wide = (g if g.dim() == 4 else g[..., None]).double()
    kept = (wide.sum(2, keepdim=True) - wide.cumsum(2)).exp().to(q.dtype)
    end = ((k * kept).transpose(-1, -2) @ v).float()
    if state is not None:
        end = end + wide.sum(2).exp()[..., None].float() * state
    k, v, g = (repeat_kv(x, groups) for x in (k, v, g if g.dim() == 4 else g[..., None]))
    sums = g.double().cumsum(2)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[..., None]
    lags = (sums[:, :, :, None] - sums[:, :, None]).masked_fill(~keep, -math.inf)
    w = ((q[:, :, :, None] * lags.exp().to(q.dtype)) * k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    out = w @ v
    if state is not None:
        s = repeat_kv(state, groups).to(q.dtype)
        out = out + (q * sums.exp().to(q.dtype)) @ s * q.shape[-1] ** -0.5
    return out, end


def assert_rounding_only(name, got, other, truth, dtype, magnitude=0.0):
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (other.double() - truth).abs().max().item() + torch.finfo(dtype).eps * magnitude
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(shape, dtype, per, *, state=False, low=-2.0):
    """Output, final state and every gradient of one case."""
    inputs = draw(shape, dtype, per, low=low)
    batch, _, hkv, _, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(5)
    if state:
        s0 = torch.randn(batch, hkv, key_dim, value_dim, generator=generator)
        inputs.append(s0.to(DEVICE).requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, after = gated_linear_chunked(
        *inputs[:4], initial_state=inputs[4] if state else None, return_state=True
    )
    truth, after_truth = exact_chunked(
        *exact[:4], initial_state=exact[4] if state else None, return_state=True
    )
    other, other_state = plain(*inputs)
    assert got.dtype == dtype
    assert after.dtype == torch.float32
    assert_rounding_only("out", got, other, truth, dtype, truth.abs().max().item())
    largest = after_truth.abs().max().item()
    assert_rounding_only("state", after, other_state, after_truth, dtype, largest)
    do = torch.randn(got.shape, generator=generator).to(DEVICE, dtype)
    want = torch.autograd.grad(truth, exact, do.double())
    ours = torch.autograd.grad(got, inputs, do)
    theirs = torch.autograd.grad(other, inputs, do)
    # dg_t is a sum over tokens of q dq - k dk, in which what lies on one side of t cancels: what is left is the
    # rounding of the products, as in any run that does not keep all pairs.
    products = [(inputs[i].double() * want[i]).abs() for i in (0, 1)]
    term = max(x.max().item() for x in products) * min(32, shape[3]) ** 0.5
    if per == "head":
        term *= key_dim**0.5
    magnitudes = [x.abs().max().item() for x in want[:3]] + [term] + [x.abs().max().item() for x in want[4:]]
    for name, a, b, c, magnitude in zip(("dq", "dk", "dv", "dg", "dS"), ours, theirs, want, magnitudes):
        assert_rounding_only(name, a, b, c, dtype, magnitude)


# The interpreter's chunk is 32: one less, equal, one more, several.
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65])
def test_lengths(length, per):
    check((1, 1, 1, length, 16, 16), torch.float32, per)


@pytest.mark.parametrize("per", PER)
def test_length_1000(per):
    q, k, v, g = draw((1, 1, 1, 1000, 16, 16), torch.float32, per)
    got, state = gated_linear_chunked(q, k, v, g, return_state=True)
    truth, end = gated_linear_recurrent(*(x.double() for x in (q, k, v, g)))
    assert (got - truth).abs().max() <= 2e-6 * truth.abs().max()
    assert (state - end).abs().max() <= 2e-6 * end.abs().max()


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dims", [(3, 5), (32, 60), (60, 32), (64, 64), (128, 128)], ids=str)
def test_dimensions(dims, per):
    """Not powers of two, K and V apart, several tiles of each."""
    check((1, 1, 1, 40, *dims), torch.float16 if dims[0] % 64 else torch.float32, per)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_groups_and_states(dtype, per):
    check((2, 4, 2, 45, 24, 40), DTYPES[dtype], per, state=True)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dims", [(24, 40), (72, 40), (40, 72)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_head_a_query_head(dtype, dims, per):
    """With one tile of a dimension the kernels take a path of their own, with several a loop."""
    check((2, 2, 2, 45, *dims), DTYPES[dtype], per, state=True)


@pytest.mark.gpu
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_tiles_on_a_gpu(dtype, per):
    """What the interpreter's tiles do not show: the shipped ones, several chunks of 64, compiled."""
    if dtype == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    check((2, 4, 2, 300, 64, 64), DTYPES[dtype], per, state=True)
    check((1, 2, 2, 130, 60, 128), DTYPES[dtype], per, low=-20.0)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("rate", [-5.0, -50.0, -math.inf])
def test_strong_decay(rate, per):
    """Running sums far past what exp can hold; -inf forgets all. Finite gradients, the numbers of float64."""
    q, k, v, g = draw((1, 1, 1, 100, 16, 16), torch.float32, per)
    g = torch.full_like(g, rate).requires_grad_()
    out, state = gated_linear_chunked(q, k, v, g, return_state=True)
    truth, end = gated_linear_recurrent(*(x.double() for x in (q, k, v, g)))
    assert (out - truth).abs().max() <= 1e-6 * truth.abs().max()
    assert (state - end).abs().max() <= 1e-6 * end.abs().max()
    grads = torch.autograd.grad(out.square().sum() + state.sum(), (q, k, v, g))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("per", PER)
def test_weak_decay_behind_strong_decay(per):
    """In fp32 sums are kept in two parts; one part alone would leave four digits here."""
    q, k, v, g = (x.detach() for x in draw((1, 1, 1, 96, 16, 16), torch.float32, per))
    g = torch.full_like(g, -1e-3)
    g[:, :, ::4] = -100.0
    truth, _ = gated_linear_recurrent(*(x.double() for x in (q, k, v, g)))
    error = (gated_linear_chunked(q, k, v, g) - truth).abs().max()
    assert error <= 1e-6 * truth.abs().max()
    sums = g.cumsum(2)
    single = (sums[:, :, 66] - sums[:, :, 65]).double() + 1e-3  # what is left of a weak decay in one float32
    assert single.abs().max() > 1e-5


@pytest.mark.parametrize("per", PER)
def test_no_decay_is_linear_attention(per):
    from effattn_lab.linear.linear_attention import linear_attention

    q, k, v, g = (x.detach() for x in draw((1, 2, 1, 70, 16, 16), torch.float32, per))
    want = linear_attention(*(x.double() for x in (q, k, v)), causal=True, normalize=False, feature_map=None)
    got = gated_linear_chunked(q, k, v, 0 * g)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_gradients_through_the_final_state():
    """The state goes on into another call; its gradient comes back, with the output's or alone."""
    for per in PER:
        inputs = draw((1, 2, 1, 40, 16, 24), torch.float32, per)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out, s = gated_linear_chunked(*inputs, return_state=True)
        out64, s64 = exact_chunked(*exact, return_state=True)
        for parts, parts64 in (((s,), (s64,)), ((out, s), (out64, s64))):
            kinds = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
            ours = torch.autograd.grad(sum(x.square().sum() for x in parts), inputs, **kinds)
            want = torch.autograd.grad(sum(x.square().sum() for x in parts64), exact, **kinds)
            for a, b in zip(ours, want):
                assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_half_precision_survives_a_large_state():
    """The sum of 96 products of 6,000 passes 65504, where fp16 ends: its states are kept in float32."""
    n = 96
    ones = torch.ones(1, 1, n, 16, device=DEVICE, dtype=torch.float16)
    for per in PER:
        g = torch.zeros(1, 1, n, device=DEVICE) if per == "head" else torch.zeros(1, 1, n, 16, device=DEVICE)
        q = (ones / n).requires_grad_()
        out, state = gated_linear_chunked(q, ones, 6000 * ones, g, scale=1 / 16, return_state=True)
        assert state.max() == 6000 * n > 65504
        torch.testing.assert_close(out[0, 0, -1].float().cpu(), torch.full((16,), 6000.0), rtol=3e-3, atol=0)
    # And one that was large before: handed on in float32, read in fp16.
    again = gated_linear_chunked(
        q[:, :, :64], ones[:, :, :64], 6000 * ones[:, :, :64], g[:, :, :64], scale=1 / 16, initial_state=state
    )
    torch.testing.assert_close(again[0, 0, 0].float().cpu(), torch.full((16,), 6062.5), rtol=3e-3, atol=0)


@pytest.mark.parametrize("token", [0, 31, 32, 47, 69])
@pytest.mark.parametrize("per", PER)
def test_no_leak(per, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    q, k, v, g = (x.detach() for x in draw((1, 2, 1, 70, 16, 16), torch.float16, per))
    before = gated_linear_chunked(q, k, v, g)
    for x in (k, v):
        x[:, :, token:] += 3.0
    g[:, :, token:] *= 2.0
    after = gated_linear_chunked(q, k, v, g)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()


def test_strides_and_same_bits_every_run():
    q, k, v, g = draw((1, 2, 2, 33, 16, 24), torch.float32)
    want = gated_linear_chunked(q, k, v, g)
    do = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grads = torch.autograd.grad(want, (q, k, v, g), do)
    layouts = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    )
    for change in layouts:
        got = gated_linear_chunked(*(change(x) for x in (q, k, v, g)))
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, (q, k, v, g), change(do)), grads):
            assert torch.equal(a, b)
    # Mamba-2's heads share one key: an expanded view is as good as copies.
    shared = k[:, :1].expand_as(k)
    assert torch.equal(
        gated_linear_chunked(q, shared, v, g), gated_linear_chunked(q, shared.contiguous(), v, g)
    )


def test_gradients_only_where_asked():
    q, k, v, g = draw((1, 1, 1, 33, 16, 16), torch.float32, "head")
    full = torch.autograd.grad(gated_linear_chunked(q, k, v, g).sum(), (q, k, v, g))
    for i, name in enumerate("qkvg"):
        inputs = [x if j == i else x.detach() for j, x in enumerate((q, k, v, g))]
        (only,) = torch.autograd.grad(gated_linear_chunked(*inputs).sum(), inputs[i])
        assert torch.equal(full[i], only), name


def tensors(**change):
    good = {
        "q": torch.rand(1, 4, 8, 16), "k": torch.rand(1, 2, 8, 16), "v": torch.rand(1, 2, 8, 12),
        "g": -torch.rand(1, 2, 8),
    }  # fmt: skip
    return {**{name: x.to(DEVICE) for name, x in good.items()}, **change}


BAD = {
    "rank": (dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (dict(q=torch.rand(1, 4, 8, 16).double()), "q: expected float16"),
    "dtype": (dict(v=torch.rand(1, 2, 8, 12).half().to(DEVICE)), "v: expected the dtype of q"),
    "length": (dict(q=torch.rand(1, 4, 9, 16).to(DEVICE)), "k: expected the length of q"),
    "gate": (dict(g=-torch.rand(1, 4, 8).to(DEVICE)), r"g: expected shape \(1, 2, 8\)"),
    "gate-dtype": (dict(g=-torch.rand(1, 2, 8).double().to(DEVICE)), "g: expected float16"),
    "gate-type": (dict(g=0.5), "g: expected a torch.Tensor"),
    "scale": (dict(scale=math.nan), "scale: expected a finite number"),
    "state": (dict(initial_state=torch.zeros(1, 4, 16, 12)), "initial_state: expected float32 of shape"),
    "state-type": (dict(initial_state=(1, 2)), "initial_state: expected float32 of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        gated_linear_chunked(**tensors(**change))


@interpreter
def test_positive_log_decay_is_named():
    with pytest.raises(ValueError, match=r"g: expected log decays of at most 0, got 0\.5"):
        gated_linear_chunked(**tensors(g=torch.full((1, 2, 8), 0.5)))


@interpreter
@pytest.mark.parametrize("case", [{}, {"dtype": "bf16", "per_channel": False},
                                  {"dtype": "fp32", "num_kv_heads": 2, "head_dim": 16, "value_dim": 16},
                                  {"dtype": "bf16", "num_kv_heads": 2, "head_dim": 24, "per_channel": False},
                                  {"dtype": "fp16", "num_kv_heads": 2, "head_dim": 24, "value_dim": 24,
                                   "per_channel": False}],
                         ids=str)  # fmt: skip
def test_traffic_is_the_formula(case):
    table = traffic_rows(**case)
    assert [row["kernel"].removeprefix("_gated_linear_").removesuffix("_kernel") for row in table] == [
        "sums",
        "states",
        "outputs",
        "dstates",
        "dqdk",
        "dv",
    ]
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


def test_every_architecture_has_tiles():
    for arch, size, per_channel in TABLE:
        dtype = torch.float32 if size == 4 else torch.float16
        for dims in ((1, 1), (60, 64), (64, 64), (256, 512)):
            tiles = choose_tiles(*dims, dtype, arch, per_channel)
            assert len({t.chunk for t in tiles}) == 1
        found = launches(64, dtype, arch, per_channel=per_channel)
        assert [launch.name for launch in found] == list(tiles._fields)
    with pytest.raises(ValueError, match="window: expected False"):
        launches(64, torch.float16, "sm80", window=True)
    with pytest.raises(ValueError, match="causal: expected True"):
        launches(64, torch.float16, "sm80", causal=False)
