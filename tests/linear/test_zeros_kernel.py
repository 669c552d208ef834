"""The Triton kernels of ZeroS against the float64 reference: outputs, states, leaks, traffic, bad input.

Without a GPU they run in Triton's interpreter (chunks of 32); on a machine with one the same tests run compiled, and
those marked ``gpu`` add sizes that the interpreter is too slow for. The tolerance is a ratio: at most twice the error
of a plain PyTorch run in the same dtype, both against float64.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._zeros_tiles import TABLE, choose_tiles
from effattn_kernels.zeros import ZeroSState, launches, zeros_chunked

from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.linear.zeros import zeros_chunked as exact_chunked
from effattn_lab.linear.zeros import zeros_step
from effattn_lab.measure.zeros_traffic import rows as traffic_rows

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

    monkeypatch.setattr("effattn_kernels.zeros.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, *, zeroth=False, spread=2.0, seed=0):
    """Inputs of ``(B, Hq, Hkv, Nq, Nk, K, V)``; logits and gates stay in float32, where a layer makes them."""
    batch, hq, hkv, nq, nk, key_dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    x = [rand(batch, hq, nq, key_dim), 3 * rand(batch, hkv, nk, key_dim), rand(batch, hkv, nk, value_dim)]
    rows = [spread * rand(batch, hkv, nk), *(torch.sigmoid(2 * rand(batch, hq, nq)) for _ in range(2))]
    options = {"gate_0": torch.tanh(rand(batch, hq, nq))} if zeroth else {}
    return [*(y.to(dtype) for y in x), *rows], options


def plain(q, k, v, s, gate_1, gate_h, gate_0=None, *, causal):
    """Every step in the dtype of q, all weights at once."""
    dtype, (nq, nk), groups = q.dtype, (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    keep = visible(nq, nk, causal=causal, device=q.device)
    t = keep.sum(-1, keepdim=True).clamp(min=1).to(dtype)
    s = repeat_kv(s.to(dtype)[:, :, None], groups).expand(*q.shape[:3], nk)
    delta = (s - s.masked_fill(~keep, 0).sum(-1, keepdim=True) / t) / t
    p = torch.softmax(s.masked_fill(~keep, float("-inf")), -1).nan_to_num() - 1 / t - delta
    r = gate_1.to(dtype)[..., None] * delta + gate_h.to(dtype)[..., None] * p
    if gate_0 is not None:
        r = r + gate_0.to(dtype)[..., None] / t
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return (r.masked_fill(~keep, 0) * (q @ repeat_kv(k, groups).mT)) @ repeat_kv(v, groups)


def check(shape, dtype, *, causal=True, zeroth=False, state=False, spread=2.0):
    """Output and final state of one case."""
    x, options = draw(shape, dtype, zeroth=zeroth, spread=spread)
    exact, exact_options = [y.double() for y in x], {k: v.double() for k, v in options.items()}
    start = exact_start = None
    if state:  # what 20 tokens leave behind
        before, _ = draw((*shape[:3], 20, 20, *shape[5:]), torch.float64, seed=7)
        exact_start = exact_chunked(*before, return_state=True)[1]
        start = ZeroSState(*(y.float() for y in exact_start))
        exact_start = type(exact_start)(*(y.double() for y in start))
    got, after = zeros_chunked(*x, causal=causal, initial_state=start, return_state=True, **options)
    truth, end = exact_chunked(
        *exact, causal=causal, initial_state=exact_start, return_state=True, **exact_options
    )
    other = plain(*x, **options, causal=causal)
    other_truth = exact_chunked(*exact, causal=causal, **exact_options) if state else truth
    assert got.dtype == dtype
    assert not got.isnan().any(), "unwritten output?"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (other.double() - other_truth).abs().max().item()
    assert error <= allowed + 1e-7 * truth.abs().max().item(), f"error {error:.2e}, allowed {allowed:.2e}"
    assert isinstance(after, ZeroSState)
    eps = torch.finfo(dtype).eps
    for name, part, want in zip(ZeroSState._fields, after, end):
        # Sums of products of rounded keys; the scalars never leave float32.
        rounding = eps if name in ("F", "G", "H") else torch.finfo(torch.float32).eps
        size = want.abs().max().item()
        assert (part.double() - want).abs().max() <= 4 * rounding * max(1.0, size), name


# The interpreter's chunk is 32: one less, equal, one more, several.
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65])
def test_lengths(length, causal):
    check((1, 2, 2, length, length, 32, 32), torch.float32, causal=causal)


def test_length_1000():
    check((1, 1, 1, 1000, 1000, 32, 16), torch.float16)


@pytest.mark.parametrize("dims", [(3, 5, "bf16"), (32, 60, "fp32"), (60, 32, "fp16"), (64, 64, "bf16"),
                                  (128, 128, "fp16"), (128, 128, "fp32")], ids=str)  # fmt: skip
def test_dimensions(dims):
    """Not powers of two, K and V apart, several tiles of each: lengths of keys go over all tiles of K."""
    check((1, 1, 1, 40, 40, *dims[:2]), DTYPES[dims[2]])


@pytest.mark.parametrize("zeroth", [False, True], ids=["zero-sum", "constant-kept"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_groups_and_states(dtype, causal, zeroth):
    check((2, 2, 1, 45, 45, 24, 30), DTYPES[dtype], causal=causal, zeroth=zeroth, state=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (70, 33), (40, 3)], ids=str)
def test_different_lengths(lengths, causal):
    """Offset rule. More queries than keys: the first see nothing, the next one key; output 0."""
    check((1, 2, 1, *lengths, 16, 16), torch.float32, causal=causal)
    if causal and lengths[0] > lengths[1]:
        for dtype in DTYPES.values():
            x, _ = draw((1, 2, 1, *lengths, 16, 16), dtype)
            out = zeros_chunked(*x, causal=True)[:, :, : lengths[0] - lengths[1] + 1]
            assert (out == 0).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_near_equal_logits_keep_their_digits(dtype):
    """Weights a thousandth of 1/t. Rounded sums of F, G, H would leave nothing of their differences; the states are
    kept centred, and the error stays at the rounding of the result's own size."""
    x, _ = draw((1, 1, 1, 130, 130, 32, 32), DTYPES[dtype], spread=1e-3)
    truth = exact_chunked(*(y.double() for y in x), causal=True)
    got = zeros_chunked(*x, causal=True)
    rows = truth[:, :, 8:].abs().amax((-1, -2))
    error = (got.double() - truth)[:, :, 8:].abs().amax((-1, -2))
    assert (error <= 8 * torch.finfo(DTYPES[dtype]).eps * rows).all()


def test_rising_logits():
    """The running maximum: from -40 to 40 over 150 steps in float32, and far from 0."""
    for shift in (0.0, 500.0):
        x, _ = draw((1, 2, 2, 150, 150, 16, 16), torch.float32)
        x[3] = (torch.linspace(-40, 40, 150) + shift).expand(1, 2, 150).contiguous().to(DEVICE)
        truth = exact_chunked(*(y.double() for y in x), causal=True)
        assert (zeros_chunked(*x, causal=True) - truth).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("token", [1, 31, 32, 47, 69])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_no_leak(dtype, token):
    """Changing token t, its logit too, leaves every output before t as it was, to the bit, and changes its own."""
    x, _ = draw((1, 2, 1, 70, 70, 16, 16), DTYPES[dtype])
    before = zeros_chunked(*x, causal=True)
    for y in x[1:4]:
        y[:, :, token:] += 3.0 + 10 * torch.rand(
            y[:, :, token:].shape, generator=torch.Generator().manual_seed(1)
        ).to(y)
    after = zeros_chunked(*x, causal=True)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()


def test_its_state_goes_on_in_pytorch():
    """Prefill by the kernel, decode by `zeros_step`: the numbers of one pass."""
    x, _ = draw((1, 4, 2, 50, 50, 16, 24), torch.float32)
    want = exact_chunked(*x, causal=True)
    _, state = zeros_chunked(*(y[:, :, :45] for y in x), causal=True, return_state=True)
    for t in range(45, 50):
        out, state = zeros_step(tuple(state), *(y[:, :, t : t + 1] for y in x))
        torch.testing.assert_close(out, want[:, :, t : t + 1], rtol=0, atol=2e-6)


def test_strides_and_same_bits_every_run():
    x, _ = draw((1, 2, 1, 37, 45, 16, 24), torch.float32)
    q, k, v, *rows = x
    want = zeros_chunked(*x, causal=True)
    for change in (
        lambda y: y,
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: torch.stack([y, y * 0], -1).flatten(-2)[..., ::2],
    ):
        moved = [r.transpose(1, 2).contiguous().transpose(1, 2) for r in rows]
        assert torch.equal(zeros_chunked(change(q), change(k), change(v), *moved, causal=True), want)


def tensors(**change):
    x, _ = draw((1, 4, 2, 8, 8, 16, 12), torch.float32)
    return {**dict(zip(("q", "k", "v", "logits", "gate_1", "gate_h"), x)), **change}


GRAD = torch.rand(1, 2, 8, 12).to(DEVICE).requires_grad_()
BAD = {
    "rank": (lambda: dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (lambda: dict(q=torch.rand(1, 4, 8, 16).double()), "q: expected float16"),
    "dtype": (lambda: dict(v=torch.rand(1, 2, 8, 12).half().to(DEVICE)), "v: expected the dtype of q"),
    "logits": (lambda: dict(logits=torch.rand(1, 4, 8)), r"logits: expected a floating-point tensor of shape \(1, 2"),
    "gate": (lambda: dict(gate_h=torch.ones(1, 4, 8).int()), "gate_h: expected a floating-point tensor"),
    "gate_0": (lambda: dict(gate_0=0.5), "gate_0: expected a floating-point tensor"),
    "state-type": (lambda: dict(initial_state=torch.zeros(2)), "initial_state: expected a ZeroSState"),
    "state": (lambda: dict(initial_state=(torch.zeros(1, 2, 16, 12),) * 7), "initial_state: expected E in float32"),
    "gradient": (lambda: dict(v=GRAD), "v: expected a tensor that needs no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        zeros_chunked(**tensors(**change()))


def test_without_gradients_it_takes_parameters():
    x = tensors(v=GRAD)
    with torch.no_grad():
        assert zeros_chunked(**x).isfinite().all()


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"causal": False, "dtype": "bf16"},
        {"zeroth": True, "dtype": "fp32"},
        {"seqlen_q": 90, "seqlen_k": 50},
        {"head_dim": 24, "value_dim": 24},
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    table = traffic_rows(**case)
    assert [row["kernel"] for row in table] == ["_zeros_states_kernel", "_zeros_outputs_kernel"]
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
    with pytest.raises(ValueError, match="head_dim: expected an integer"):
        launches(0, torch.float16, "sm80")


def gpu_dtypes():
    return ["fp16", "fp32"] + (
        ["bf16"] if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else []
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
@pytest.mark.parametrize("dims", [(60, 64), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("lengths", [(4096, 4096), (1000, 3000)], ids=str)
def test_on_gpu(lengths, dims, dtype):
    check((2, 8, 2, *lengths, *dims), DTYPES[dtype], state=True)
