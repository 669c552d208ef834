"""The Triton kernels of linearized attention against float64: outputs, states, leaks, gradients, traffic.

Without a GPU they run in Triton's interpreter (tiles of 32); on a machine with one the same tests run compiled. The
tolerance is a ratio: at most twice the error of a plain PyTorch run in the same dtype, both against float64, plus one
rounding of the largest number, since a plain run may be exact by luck.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._linearized_llm_tiles import TABLE, choose_tiles
from effattn_kernels.linearized_llm import (
    LinearizedState,
    launches,
    linearized_attention_chunked,
    masked_depthwise_conv_chunked,
)

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear import linearized_llm_cost as cost
from effattn_lab.linear.linearized_llm import linearized_attention
from effattn_lab.linear.linearized_llm import linearized_attention_chunked as exact_chunked
from effattn_lab.linear.linearized_llm_conv import masked_depthwise_conv
from effattn_lab.measure import linearized_llm_traffic

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr("effattn_kernels.linearized_llm.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, lags, seed=0):
    """q, k, v of ``(B, Hq, Hkv, Nq, Nk, K, V)`` and a convolution."""
    batch, hq, hkv, nq, nk, key_dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(batch, hq, nq, key_dim, generator=g),
        torch.randn(batch, hkv, nk, key_dim, generator=g),
        torch.randn(batch, hkv, nk, value_dim, generator=g),
        torch.randn(hq, lags, generator=g) / 2,
    ]
    return [x.to(DEVICE, dtype) for x in parts]


def plain(q, k, v, w, *, alpha, group_size):
    """Every step in the dtype of the inputs, all weights at once; the convolution is a band of that matrix."""
    repeat = q.shape[1] // k.shape[1]
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    k, v = repeat_kv(k, repeat), repeat_kv(v, repeat)
    key = torch.arange(k.shape[2], device=q.device)
    query = key[-q.shape[2] :, None]
    scores, lag = q @ k.transpose(-1, -2), query - key
    weights = torch.where((query // group_size == key // group_size) & (lag >= 0), scores.relu().square(), 0)
    weights = weights + alpha * torch.where(key // group_size < query // group_size, scores, 0)
    inside = (lag >= 0) & (lag < w.shape[1])
    weights = weights + torch.where(inside, w[:, lag.clamp(0, w.shape[1] - 1)], 0)
    return (weights.to(v.dtype) @ v).to(v.dtype)


def assert_rounding_only(got, other, truth, dtype, name="out"):
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (other.double() - truth).abs().max().item()
    allowed += torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(shape, dtype, *, lags=5, group_size=32, alpha=0.3):
    q, k, v, w = draw(shape, dtype, lags)
    options = dict(alpha=alpha, group_size=group_size)
    got = linearized_attention_chunked(q, k, v, conv_weight=w, **options)
    assert got.dtype == dtype
    truth = linearized_attention(*(x.double() for x in (q, k, v)), conv_weight=w.double(), **options)
    assert_rounding_only(got, plain(q, k, v, w, **options), truth, dtype)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65])
def test_lengths(length):
    check((1, 2, 2, length, length, 32, 32), torch.float32)


def test_length_1000():
    check((1, 1, 1, 1000, 1000, 32, 16), torch.float16, group_size=64, lags=32)


@pytest.mark.parametrize("group_size", [1, 7, 16, 48, 64, 256])
def test_groups_need_not_fit_the_tile(group_size):
    check((1, 2, 1, 70, 70, 16, 16), torch.float32, group_size=group_size, lags=20)


@pytest.mark.parametrize("lags", [1, 2, 17, 32, 129])
def test_lags(lags):
    """More than the group and than the sequence; with 129, values several groups back."""
    check((1, 2, 1, 70, 70, 16, 16), torch.float32, group_size=16, lags=lags)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("dims", [(3, 5), (32, 60), (60, 32), (64, 64), (128, 128)], ids=str)
def test_dimensions(dims, dtype):
    check((1, 1, 1, 40, 40, *dims), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_heads(dtype):
    alpha = torch.tensor([0.5, -1.0, 0.0, 0.1], device=DEVICE)
    q, k, v, w = draw((2, 4, 2, 70, 70, 24, 40), DTYPES[dtype], 9)
    got = linearized_attention_chunked(q, k, v, conv_weight=w, alpha=alpha, group_size=16)
    truth = linearized_attention(
        *(x.double() for x in (q, k, v)), conv_weight=w.double(), alpha=alpha.double(), group_size=16
    )
    other = plain(q, k, v, w, alpha=alpha[:, None, None].to(q.dtype), group_size=16)
    assert_rounding_only(got, other, truth, DTYPES[dtype])


@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (64, 65)], ids=str)
def test_fewer_queries_than_keys(lengths):
    check((1, 2, 1, *lengths, 16, 16), torch.float32, group_size=20, lags=9)


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "plain"])
@pytest.mark.parametrize("cuts", [(5, 37, 48, 49), (16, 32), (1, 2, 3)], ids=str)
def test_a_sequence_in_pieces(cuts, conv):
    """The state goes in and out as in PyTorch, whose states and ours are the same numbers."""
    q, k, v, w = draw((1, 4, 2, 70, 70, 16, 8), torch.float32, 20)
    options = dict(alpha=0.5, conv_weight=w if conv else None, group_size=16)
    want, end = exact_chunked(q, k, v, **options, return_state=True)
    state, parts = None, []
    for a, b in zip((0, *cuts), (*cuts, 70)):
        out, state = linearized_attention_chunked(
            *(x[:, :, a:b] for x in (q, k, v)), **options, initial_state=state, return_state=True
        )
        parts.append(out)
    assert isinstance(state, LinearizedState)
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=0, atol=1e-5)
    for x, y in zip(state[:4], end[:4]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert state.seen == end.seen == 70


def test_half_precision_survives_a_large_state():
    """Equal keys and values of 60: S passes 65504, where fp16 ends, after 1,100 tokens; states are kept as means."""
    n = 1300
    k = torch.zeros(1, 1, n, 16).to(DEVICE, torch.float16)
    k[..., 0] = 1
    v = torch.full((1, 1, n, 16), 60.0).to(DEVICE, torch.float16)
    _, state = linearized_attention_chunked(k[:, :, -1:], k, v, alpha=1e-3, group_size=64, return_state=True)
    assert state.S.max() == 60 * (n // 64 * 64) > 65504
    out = linearized_attention_chunked(k[:, :, -64:], k, v, alpha=1e-3, group_size=64)
    t = torch.arange(n - 64, n)
    want = 60 * (t % 64 + 1) + 1e-3 * 60 * (t // 64 * 64)
    torch.testing.assert_close(out[0, 0, :, 0].cpu().float(), want.float(), rtol=2e-3, atol=0)
    last, _ = linearized_attention_chunked(  # and one that was large before
        k[:, :, :64],
        k[:, :, :64],
        v[:, :, :64],
        alpha=1e-3,
        group_size=64,
        return_state=True,
        initial_state=state,
    )
    assert last.isfinite().all()


@pytest.mark.parametrize("token", [0, 31, 32, 47, 69])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_no_leak(dtype, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    q, k, v, w = draw((1, 2, 1, 70, 70, 16, 16), DTYPES[dtype], 9)
    before = linearized_attention_chunked(q, k, v, conv_weight=w, group_size=32)
    alone = masked_depthwise_conv_chunked(v, w)
    q, k, v = (torch.cat([x[:, :, :token], x[:, :, token:] + 3.0], 2) for x in (q, k, v))
    after = linearized_attention_chunked(q, k, v, conv_weight=w, group_size=32)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()
    moved = masked_depthwise_conv_chunked(v, w)
    assert torch.equal(alone[:, :, :token], moved[:, :, :token])
    assert (alone[:, :, token] != moved[:, :, token]).any()


@pytest.mark.parametrize(
    ("lags", "dtype"), [(1, "fp32"), (5, "fp32"), (5, "fp16"), (5, "bf16"), (40, "fp16")], ids=str
)
def test_convolution_and_its_gradients(lags, dtype):
    """Values, gradients of values (from both query heads of a group) and of weights, with a tail before the first."""
    _, _, v, w = draw((1, 4, 2, 1, 75, 16, 24), DTYPES[dtype], lags)
    tail = torch.randn(1, 2, lags - 1, 24, generator=torch.Generator().manual_seed(3)).to(DEVICE, v.dtype)
    dy = torch.randn(1, 4, 75, 24, generator=torch.Generator().manual_seed(4)).to(DEVICE, v.dtype)
    v, w = v.requires_grad_(), w.requires_grad_()
    got, left = masked_depthwise_conv_chunked(v, w, initial_tail=tail, return_tail=True)
    torch.testing.assert_close(left, torch.cat([tail, v], 2)[:, :, 75:].float(), rtol=0, atol=0)
    ours = torch.autograd.grad(got, (v, w), dy)

    def shifted(v, w):
        x, length = repeat_kv(torch.cat([tail.to(v.dtype), v], 2), 2), v.shape[2]
        terms = (w[:, l, None, None] * x[:, :, lags - 1 - l :][:, :, :length] for l in range(lags))
        return sum(terms)

    exact = [x.detach().double().requires_grad_() for x in (v, w)]
    truth = shifted(*exact)
    other = shifted(v, w)
    assert_rounding_only(got, other, truth, v.dtype)
    want = torch.autograd.grad(truth, exact, dy.double())
    theirs = torch.autograd.grad(other, (v, w), dy)
    for name, a, b, c in zip(("dv", "dw"), ours, theirs, want):
        assert_rounding_only(a, b, c, v.dtype, name)
    if lags == 5:
        torch.testing.assert_close(
            masked_depthwise_conv_chunked(v, w).double(), masked_depthwise_conv(*exact), rtol=2e-2, atol=4e-2
        )


def test_strides_and_same_bits_every_run():
    q, k, v, w = draw((1, 2, 1, 37, 45, 16, 24), torch.float32, 5)
    want = linearized_attention_chunked(q, k, v, conv_weight=w, group_size=20)
    grad = masked_depthwise_conv_chunked(v, w)
    for change in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    ):
        got = linearized_attention_chunked(change(q), change(k), change(v), conv_weight=w, group_size=20)
        assert torch.equal(got, want)
        assert torch.equal(masked_depthwise_conv_chunked(change(v), w), grad)


def tensors(**change):
    good = {"q": torch.rand(1, 4, 8, 16), "k": torch.rand(1, 2, 8, 16), "v": torch.rand(1, 2, 8, 12)}
    return {**{name: x.to(DEVICE) for name, x in good.items()}, **change}


STATE = (
    torch.zeros(1, 2, 16, 12),
    torch.zeros(1, 2, 0, 16),
    torch.zeros(1, 2, 0, 12),
    torch.zeros(1, 2, 0, 12),
    0,
)
BAD = {
    "rank": (dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (dict(q=torch.rand(1, 4, 8, 16).double()), "q: expected float16"),
    "longer": (dict(q=torch.rand(1, 4, 9, 16)), "q: expected at most as many queries"),
    "wide": (dict(q=torch.rand(1, 4, 8, 300), k=torch.rand(1, 2, 8, 300)), "q: expected a head dimension of at most"),
    "features": (dict(k=torch.rand(1, 2, 8, 15)), "k: expected the head dimension of q"),
    "group": (dict(group_size=0), "group_size: expected an integer from 1 to 256"),
    "alpha": (dict(alpha=math.nan), "alpha: expected a finite number"),
    "alphas": (dict(alpha=torch.ones(3)), "alpha: expected a number or floats"),
    "weight": (dict(conv_weight=torch.ones(2, 5)), "conv_weight: expected a row for each head"),
    "heads": (dict(conv_weight=torch.ones(3, 5)), "conv_weight: expected a number of heads"),
    "taps": (dict(conv_weight=torch.ones(4, 130)), "conv_weight: expected 1 to 129 taps"),
    "gradient": (dict(q=torch.rand(1, 4, 8, 16, requires_grad=True)), "q: expected inputs without gradient"),
    "state": (dict(initial_state=(torch.zeros(1, 4, 16, 12), *STATE[1:])), "initial_state: expected S"),
    "tail": (dict(initial_state=STATE, conv_weight=torch.ones(4, 3)), "initial_state: expected tail"),
    "state-type": (dict(initial_state=torch.zeros(2)), "initial_state: expected a LinearizedState"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        linearized_attention_chunked(**tensors(**change))


def test_bad_input_of_the_convolution_is_named():
    v, w = torch.rand(1, 2, 8, 4), torch.rand(2, 5)
    for message, args, options in (
        ("v: expected float16", (v[0], w), {}),
        ("weight: expected a floating-point", (v, w[0]), {}),
        ("initial_tail: expected shape", (v, w), {"initial_tail": v}),
    ):
        with pytest.raises(ValueError, match=message):
            masked_depthwise_conv_chunked(*args, **options)


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        {},
        dict(dtype="fp32", seqlen_q=64, seqlen_k=64, group=32, lags=32, num_heads=2, num_kv_heads=2),
        dict(dtype="bf16", group=64, seqlen_q=70, seqlen_k=130, lags=1, num_heads=3, num_kv_heads=1),
        dict(group=10, lags=40, num_heads=2, num_kv_heads=1),
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    for row in linearized_llm_traffic.rows(**case):
        assert row["measured_bytes"] == row["formula_bytes"], row


def test_traffic_formulas_of_the_docstring():
    """Whole groups, one block each: the closed forms, less what lies before the first token."""
    n, d, g, lags, e = 4096, 64, 64, 32, 2
    tiles = choose_tiles(d, d, g, torch.float16, "sm80")
    case = linearized_llm_traffic.Case(1, 1, 1, n, n, d, d, e, g, lags)
    before = e * (lags - 1) * d  # the first group has none
    outputs = (
        e * n * 3 * d + n // g * (e * d * d + 4) + e * (n // g) * (lags - 1) * d + e * n * lags + e * n * d
    )
    assert linearized_llm_traffic.outputs_bytes(case, tiles.outputs) == outputs - before
    assert linearized_llm_traffic.states_bytes(case, tiles.states) == e * (n - g) * 2 * d + e * n // g * d * d
    conv = 2 * e * n * d + e * (n // g) * (lags - 1) * d + e * n * lags
    assert linearized_llm_traffic.conv_bytes(case, tiles.conv) == conv - before
    dweight = 2 * e * n * d + e * (n // g) * (lags - 1) * d + 4 * (n // g) * lags
    assert linearized_llm_traffic.dweight_bytes(case, tiles.dweight) == dweight - before


def test_fusing_the_convolution_pays():
    """SmolLM2's heads: inside it adds a sixth to attention's bytes, apart it doubles them."""
    for row in linearized_llm_traffic.fusion_rows(lags=(4, 32)):
        assert row["attention_bytes"] < row["fused_bytes"] < 0.75 * row["separate_bytes"]
        # The cost model's closed forms are the same bytes.
        assert row["attention_bytes"] == cost.attention_bytes(9, 3, 4096, 64, 64)
        assert row["fused_bytes"] - row["attention_bytes"] == cost.fused_conv_bytes(9, 4096, 64, row["lags"])
        assert row["separate_bytes"] - row["attention_bytes"] == cost.separate_conv_bytes(
            9, 4096, 64, row["lags"]
        )
    assert row["fused_adds_percent"] == pytest.approx(16.3, abs=0.1)
    assert row["separate_adds_percent"] == pytest.approx(99.8, abs=0.1)
    with pytest.raises(ValueError, match="dtype: expected one of fp16"):
        linearized_llm_traffic.rows(dtype="fp8")
    with pytest.raises(ValueError, match="causal: expected True"):
        linearized_llm_traffic.rows(causal=False)


def test_every_architecture_has_tiles():
    for arch, size in TABLE:
        dtype = torch.float32 if size == 4 else torch.float16
        for dims in ((1, 1), (60, 64), (64, 64), (128, 128), (256, 256)):
            tiles = choose_tiles(*dims, 64, dtype, arch)
            assert tiles.outputs.block_m <= 64
        assert [launch.name for launch in launches(64, dtype, arch)] == list(tiles._fields)
    with pytest.raises(ValueError, match="window: expected False"):
        launches(64, torch.float16, "sm80", window=True)
    with pytest.raises(ValueError, match="head_dim: expected an integer from 1 to 256"):
        launches(300, torch.float16, "sm80")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (60, 60)], ids=str)
def test_compiled_at_real_sizes(dims, dtype):
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    check((2, 9, 3, 1000, 1000, *dims), DTYPES[dtype], group_size=64, lags=32)


@pytest.mark.gpu
def test_compiled_is_the_same_every_run():
    q, k, v, w = draw((2, 8, 2, 4096, 4096, 64, 64), torch.float16, 32)
    first = linearized_attention_chunked(q, k, v, conv_weight=w)
    for _ in range(5):
        assert torch.equal(linearized_attention_chunked(q, k, v, conv_weight=w), first)
