"""The Triton kernels of linear attention against the float64 reference: forward, backward, states, leaks, traffic.

Without a GPU they run in Triton's interpreter (chunks of 32); on a machine with one the same tests run compiled. The
tolerance is a ratio: at most twice the error of a plain PyTorch run in the same dtype, both against float64, plus for
a gradient one rounding of the largest term it adds up, since a plain run may be exact by luck.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._linear_attention_tiles import TABLE, choose_tiles
from effattn_kernels.linear_attention import LinearState, launches, linear_attention_chunked

from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.linear.feature_maps import elu
from effattn_lab.linear.linear_attention import linear_attention_chunked as exact_chunked
from effattn_lab.measure.linear_attention_traffic import rows as traffic_rows

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

    monkeypatch.setattr("effattn_kernels.linear_attention.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, normalize=True, seed=0):
    """Features and values of ``(B, Hq, Hkv, Nq, Nk, K, V)``; spread out, so that weights differ."""
    batch, hq, hkv, nq, nk, key_dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, hq, nq, key_dim, generator=g)
    k = 2 * torch.randn(batch, hkv, nk, key_dim, generator=g)
    v = torch.randn(batch, hkv, nk, value_dim, generator=g)
    q, k = (elu(q), elu(k)) if normalize else (q / 2, k / 2)
    return [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)]


def plain(q, k, v, *, causal, normalize=True, state=None):
    """Every step in the dtype of the inputs, all weights at once."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    w = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    w = w.masked_fill(~visible(q.shape[2], k.shape[2], causal=causal, device=q.device), 0.0)
    num, den = w @ v, w.sum(-1)
    if state is not None:
        s, z = (repeat_kv(x, groups).to(q.dtype) for x in state)
        num, den = num + q @ s * q.shape[-1] ** -0.5, den + (q * z[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    return num / (den + 1e-6)[..., None] if normalize else num


def assert_rounding_only(name, got, other, truth, dtype, magnitude=0.0):
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (other.double() - truth).abs().max().item() + torch.finfo(dtype).eps * magnitude
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(shape, dtype, *, causal=True, normalize=True, state=False):
    """Output, final state and every gradient of one case."""
    inputs = draw(shape, dtype, normalize)
    batch, _, hkv, _, nk, key_dim, value_dim = shape
    g = torch.Generator().manual_seed(5)
    if state:  # what a few tokens leave behind
        s = torch.randn(batch, hkv, key_dim, value_dim, generator=g)
        z = 5 * torch.rand(batch, hkv, key_dim, generator=g)
        inputs += [x.to(DEVICE).requires_grad_() for x in (s, z)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    options = dict(causal=causal, normalize=normalize)
    got, after = linear_attention_chunked(
        *inputs[:3], **options, initial_state=tuple(inputs[3:]) or None, return_state=True
    )
    truth, after_truth = exact_chunked(
        *exact[:3], **options, feature_map=None, initial_state=tuple(exact[3:]) or None, return_state=True
    )
    other = plain(*inputs[:3], **options, state=inputs[3:] or None)
    assert got.dtype == dtype
    # An output is a mean of values or a sum of products: one rounding of the largest it holds.
    assert_rounding_only("out", got, other, truth, dtype, truth.abs().max().item())
    assert isinstance(after, LinearState)
    for x, y in zip(
        after, after_truth
    ):  # a sum of products of half numbers, exact in fp32 but for its length
        assert (x.double() - y).abs().max() <= 4e-7 * max(y.abs().max().item(), 1.0) * math.sqrt(nk)
    do = torch.randn(got.shape, generator=g).to(DEVICE, dtype)
    unused = dict(allow_unused=True, materialize_grads=True)  # without the denominator nobody reads z
    want = torch.autograd.grad(truth, exact, do.double(), **unused)
    ours = torch.autograd.grad(got, inputs, do, **unused)
    theirs = torch.autograd.grad(other, inputs, do, **unused)
    # The gradient of a weight, R (dO . v - delta), is a difference, of two equal numbers where a row sees one key:
    # what is left of it there is the rounding of dO . v, and no run, plain or not, can do better.
    with torch.no_grad():
        ones = torch.ones_like(exact[2])[..., :1]
        factor = torch.full_like(truth[..., :1], key_dim**-0.5)
        if normalize:
            start = (exact[4][..., None], exact[4]) if state else None
            den = exact_chunked(exact[0], exact[1], ones, causal=causal, normalize=False, feature_map=None,
                                initial_state=start)  # fmt: skip
            factor /= (den + 1e-6).clamp(min=1e-6)
        dp = do.double() @ repeat_kv(exact[2], shape[1] // hkv).transpose(-1, -2)
        term = (factor * dp.abs()).max().item()
    magnitudes = [term * exact[1].abs().max().item(), term * exact[0].abs().max().item()]
    magnitudes += [c.abs().max().item() for c in want[2:]]
    for name, a, b, c, magnitude in zip(("dq", "dk", "dv", "dS", "dz"), ours, theirs, want, magnitudes):
        assert_rounding_only(name, a, b, c, dtype, magnitude)


# The interpreter's chunk is 32: one less, equal, one more, several.
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [2, 31, 32, 33, 63, 64, 65])
def test_lengths(length, causal):
    check((1, 2, 2, length, length, 32, 32), torch.float32, causal=causal)


def test_the_lean_case():
    """Without the checks that cannot fail: bf16, 64 by 64, no denominator, one query head a key head."""
    assert "LEAN" in launches(64, torch.bfloat16, "sm80", normalize=False)[0].constexprs
    lean = [x.constexprs.get("LEAN") for x in launches(64, torch.bfloat16, "sm80", normalize=False)]
    assert lean == [True, True, None, True, True, True]
    assert not launches(64, torch.bfloat16, "sm80")[0].constexprs["LEAN"]
    for length in (33, 64):
        check((1, 2, 2, length, length, 64, 64), torch.bfloat16, normalize=False)


def test_length_1():
    """One token: the output is its value, and no change of a weight changes that."""
    q, k, v = draw((1, 1, 1, 1, 1, 32, 32), torch.float32)
    out = linear_attention_chunked(q, k, v, causal=True, eps=0.0)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=1e-6)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq.abs().max() < 1e-5
    assert dk.abs().max() < 1e-5
    torch.testing.assert_close(dv, torch.ones_like(dv), rtol=1e-6, atol=1e-6)


def test_length_1000():
    check((1, 1, 1, 1000, 1000, 32, 16), torch.float16)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("dims", [(3, 5), (32, 60), (60, 32), (64, 64), (128, 128), (273, 16)], ids=str)
def test_dimensions(dims, dtype):
    """Not powers of two, K and V apart, several tiles of each; 273 are the Taylor features of a head of 16."""
    check((1, 1, 1, 40, 40, *dims), DTYPES[dtype])


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_groups_and_states(dtype, causal, normalize):
    check((2, 4, 2, 45, 45, 24, 40), DTYPES[dtype], causal=causal, normalize=normalize, state=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (70, 33), (40, 3)], ids=str)
def test_different_lengths(lengths, causal):
    """Offset rule. More queries than keys: the first see nothing, output 0, no gradient."""
    check((1, 2, 1, *lengths, 16, 16), torch.float32, causal=causal)
    if causal and lengths[0] > lengths[1]:
        q, k, v = draw((1, 2, 1, *lengths, 16, 16), torch.float32)
        for eps in (0.0, 1e-6):
            out = linear_attention_chunked(q, k, v, causal=True, eps=eps)
            blind = lengths[0] - lengths[1]
            assert (out[:, :, :blind] == 0).all()
            (dq,) = torch.autograd.grad(out.sum(), q)
            assert (dq[:, :, :blind] == 0).all()
            assert dq.isfinite().all()


def test_gradients_through_the_final_state():
    """The state goes on into another call; its gradient comes back, with the output's or alone."""
    inputs = draw((1, 4, 2, 40, 70, 16, 24), torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, (s, z) = linear_attention_chunked(*inputs, causal=True, return_state=True)
    out64, (s64, z64) = exact_chunked(*exact, causal=True, feature_map=None, return_state=True)
    for parts, parts64 in (
        ((s, z), (s64, z64)),
        ((out, s), (out64, s64)),
        ((z,), (z64,)),
        ((out, z), (out64, z64)),
    ):
        ours = torch.autograd.grad(
            sum(x.square().sum() for x in parts), inputs, retain_graph=True, allow_unused=True
        )
        want = torch.autograd.grad(
            sum(x.square().sum() for x in parts64), exact, retain_graph=True, allow_unused=True
        )
        for a, b in zip(ours, want):
            b = torch.zeros(()) if b is None else b
            assert (a.double() - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_half_precision_survives_a_large_state():
    """The sum of 2,000 products of 60 passes 65504, where fp16 ends: the states are kept as means."""
    n = 2000
    q, k, v = torch.ones(1, 1, 64, 16), torch.ones(1, 1, n, 16), 60 * torch.ones(1, 1, n, 16)
    q, k, v = (x.to(DEVICE, torch.float16).requires_grad_() for x in (q, k, v))
    out, state = linear_attention_chunked(q, k, v, causal=True, return_state=True)
    assert state.S.max() == 60 * n > 65504
    torch.testing.assert_close(out, torch.full_like(out, 60.0), rtol=2e-3, atol=0)
    (dv,) = torch.autograd.grad(out.sum(), v)
    # Each of the last 64 queries gives each earlier value a weight of one over its position.
    want = sum(1 / (n - i) for i in range(64))
    torch.testing.assert_close(dv[0, 0, 0].float(), torch.full((16,), want, device=DEVICE), rtol=5e-3, atol=0)
    # And one that was large before: handed on in float32, read in fp16.
    last = [x[:, :, -64:] for x in (q, k, v)]
    again = linear_attention_chunked(*last, causal=True, initial_state=state)
    torch.testing.assert_close(again, torch.full_like(again, 60.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("token", [0, 31, 32, 47, 69])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_no_leak(dtype, token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    q, k, v = (x.detach() for x in draw((1, 2, 1, 70, 70, 16, 16), DTYPES[dtype]))
    before = linear_attention_chunked(q, k, v, causal=True)
    for x in (k, v):
        x[:, :, token:] += 3.0
    after = linear_attention_chunked(q, k, v, causal=True)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()


def test_strides_and_same_bits_every_run():
    q, k, v = draw((1, 2, 1, 37, 45, 16, 24), torch.float32)
    want = linear_attention_chunked(q, k, v, causal=True)
    do = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grads = torch.autograd.grad(want, (q, k, v), do)
    layouts = (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    )
    for change in layouts:
        got = linear_attention_chunked(change(q), change(k), change(v), causal=True)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), change(do)), grads):
            assert torch.equal(a, b)


def test_gradients_only_where_asked():
    q, k, v = draw((1, 1, 1, 33, 33, 16, 16), torch.float32)
    full = torch.autograd.grad(linear_attention_chunked(q, k, v, causal=True).sum(), (q, k, v))
    only_q = torch.autograd.grad(linear_attention_chunked(q, k.detach(), v.detach(), causal=True).sum(), q)
    only_v = torch.autograd.grad(linear_attention_chunked(q.detach(), k.detach(), v, causal=True).sum(), v)
    assert torch.equal(full[0], only_q[0])
    assert torch.equal(full[2], only_v[0])


def tensors(**change):
    good = {"q": torch.rand(1, 4, 8, 16), "k": torch.rand(1, 2, 8, 16), "v": torch.rand(1, 2, 8, 12)}
    return {**{name: x.to(DEVICE) for name, x in good.items()}, **change}


BAD = {
    "rank": (dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (dict(q=torch.rand(1, 4, 8, 16).double()), "q: expected float16"),
    "dtype": (dict(v=torch.rand(1, 2, 8, 12).half().to(DEVICE)), "v: expected the dtype of q"),
    "features": (dict(k=torch.rand(1, 2, 8, 15).to(DEVICE)), "k: expected the head dimension of q"),
    "length": (dict(v=torch.rand(1, 2, 9, 12).to(DEVICE)), "v: expected the length of k"),
    "scale": (dict(scale=math.nan), "scale: expected a finite number"),
    "eps": (dict(eps=-1.0), "eps: expected a finite number of at least 0"),
    "state": (
        dict(initial_state=(torch.zeros(1, 4, 16, 12), torch.zeros(1, 2, 16))),
        "initial_state: expected S",
    ),
    "state-type": (dict(initial_state=torch.zeros(2, 2)), "initial_state: expected a pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_attention_chunked(**tensors(**change))


@interpreter
@pytest.mark.parametrize("case", [{}, {"causal": False, "dtype": "bf16"}, {"normalize": False, "dtype": "fp32"},
                                  {"seqlen_q": 90, "seqlen_k": 50}], ids=str)  # fmt: skip
def test_traffic_is_the_formula(case):
    table = traffic_rows(**case)
    assert [row["kernel"][18:-7] for row in table] == [
        name for name in ("states", "outputs", "delta", "dstates", "dqdk", "dv")
        if name != "delta" or case.get("normalize", True)
    ]  # fmt: skip
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


def test_every_architecture_has_tiles():
    for arch, size in TABLE:
        dtype = torch.float32 if size == 4 else torch.float16
        for dims in ((1, 1), (60, 64), (64, 64), (273, 512)):
            tiles = choose_tiles(*dims, dtype, arch)
            assert len({t.chunk for t in tiles}) == 1
        assert [launch.name for launch in launches(64, dtype, arch)] == list(tiles._fields)
    with pytest.raises(ValueError, match="window: expected False"):
        launches(64, torch.float16, "sm80", window=True)


def gpu_dtypes():
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return ["fp16", "fp32"] + (["bf16"] if capable else [])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
@pytest.mark.parametrize(
    "dims", [(16, 16), (60, 60), (64, 128), (128, 64), (256, 256)], ids=lambda d: f"K{d[0]}-V{d[1]}"
)
@pytest.mark.parametrize(
    "lengths", [(1000, 1000), (1, 2049), (300, 1111)], ids=lambda n: f"Tq{n[0]}-Tk{n[1]}"
)
def test_on_gpu(lengths, dims, dtype):
    """Sizes that the interpreter is too slow for, with and without the denominator, with a state to begin with."""
    shape = (2, 4, 2, *lengths, *dims)
    check(shape, DTYPES[dtype])
    check(shape, DTYPES[dtype], normalize=False, state=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
def test_long_sum_on_gpu(dtype):
    """65536 positive keys: their sum passes what fp16 holds, and the mean that is stored in its place does not."""
    q, k, v = draw((1, 1, 1, 65536, 65536, 64, 64), DTYPES[dtype])
    with torch.no_grad():
        out = linear_attention_chunked(q, k, v, causal=True)
        want = exact_chunked(*(x.double() for x in (q, k, v)), causal=True, feature_map=None)
    assert out.isfinite().all()
    # The mean of many values is small; one rounding of the largest value stands for each of its terms.
    assert (out.double() - want).abs().max() <= 4 * torch.finfo(DTYPES[dtype]).eps * v.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
def test_agrees_with_fla_on_gpu(dtype):
    """fla's own chunked kernel on the same inputs, without the denominator; its layout is [B, N, H, D]."""
    fla = pytest.importorskip("fla.ops.linear_attn")
    q, k, v = draw((2, 4, 4, 1024, 1024, 64, 64), DTYPES[dtype], normalize=False)
    ours = linear_attention_chunked(q, k, v, causal=True, normalize=False)
    theirs = fla.chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, v)), normalize=False)[0].transpose(
        1, 2
    )
    error = (ours.double() - theirs.double()).square().mean().sqrt() / ours.double().square().mean().sqrt()
    assert error < {"fp32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}[dtype]  # fla multiplies fp32 in TF32
