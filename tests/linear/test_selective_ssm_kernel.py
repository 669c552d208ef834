"""The Triton kernels of the selective scan against the float64 reference: forward, backward, leaks, traffic.

Without a GPU they run in Triton's interpreter (segments of 64 tokens, chunks of 4); on a machine with one the
same tests run compiled. The tolerance is a ratio: at most twice the error of a plain PyTorch run in the same
dtype, both against float64, plus one rounding of the largest number there is (in a sum: of its largest term),
since a plain run may be exact by luck. The interpreter takes its time for each operation, whatever its width:
few programs, wide ones.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
import torch.nn.functional as F
from effattn_kernels._selective_ssm_tiles import PROGRAMS, TABLE, choose_segment, choose_tiles
from effattn_kernels.selective_ssm import launches, selective_scan_chunked

from effattn_lab.linear.selective_ssm import selective_scan_chunked as exact_chunked
from effattn_lab.measure import selective_ssm_peers
from effattn_lab.measure.selective_ssm_traffic import Case, forward_bytes
from effattn_lab.measure.selective_ssm_traffic import rows as traffic_rows

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")
TIMED = ("u", "delta", "B", "C", "z")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    for make in (torch.empty, torch.empty_like):

        def poisoned(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        monkeypatch.setattr(f"effattn_kernels.selective_ssm.torch.{make.__name__}", poisoned)


def draw(batch=1, channels=6, length=65, size=4, groups=None, dtype=torch.float32, bare=False, seed=0):
    """Everything the scan takes; steps between 0.01 and 3. Channels side by side in memory, as a layer has
    them."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    def timed(*shape):
        return r(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).to(dtype)

    shared = (size, length) if groups is None else (groups, size, length)
    inputs = {"u": timed(batch, channels, length), "delta": (2 * timed(batch, channels, length) - 2).to(dtype),
              "A": -torch.arange(1.0, size + 1).repeat(channels, 1) * torch.exp(0.3 * r(channels, size)),
              "B": timed(batch, *shared), "C": timed(batch, *shared)}  # fmt: skip
    if bare:
        inputs["delta"] = F.softplus(inputs["delta"])
    else:
        inputs |= {"D": r(channels), "z": timed(batch, channels, length), "delta_bias": r(channels),
                   "initial_state": r(batch, channels, size)}  # fmt: skip
    return {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}


def plain(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, softplus=False):
    """Every step in the dtype of u. A may be ``[E, S, N]``, one for each token: its gradient then shows the terms."""
    A, D, delta_bias, h = (None if x is None else x.to(u.dtype) for x in (A, D, delta_bias, initial_state))
    B, C = (x if x.dim() == 4 else x[:, None] for x in (B, C))
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))  # [B, E, S, N]
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h = u.new_zeros(*u.shape[:2], A.shape[1]) if h is None else h
    rows = []
    for t in range(u.shape[2]):
        A_t = A if A.dim() == 2 else A[..., t]
        h = torch.exp(delta[:, :, t, None] * A_t) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        rows.append((h * C[..., t]).sum(-1))
    y = torch.stack(rows, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def assert_rounding_only(name, got, other, truth, dtype, term=0.0):
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got.double() - truth).abs().max().item()
    one = torch.finfo(dtype).eps * max(truth.abs().max().item(), term)
    allowed = 2 * (other.double() - truth).abs().max().item() + one
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(*shape, dtype="fp32", bare=False, **more):
    """Output, final state and every gradient of one case."""
    dtype = DTYPES[dtype]
    inputs = draw(*shape, dtype=dtype, bare=bare, **more)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    option = {} if bare else {"delta_softplus": True}
    got = selective_scan_chunked(**inputs, **option, return_state=True)
    truth = exact_chunked(**exact, **option, return_state=True, recompute=False)
    other = plain(**inputs, softplus=not bare)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    g = torch.Generator().manual_seed(5)
    ask = [torch.randn(x.shape, generator=g).to(DEVICE) for x in got]
    low = [a.to(x.dtype) for a, x in zip(ask, other)]
    ours = torch.autograd.grad(got, list(inputs.values()), [low[0], low[1].float()])
    theirs = torch.autograd.grad(other, list(inputs.values()), low)
    want = torch.autograd.grad(truth, list(exact.values()), [x.double() for x in low])
    assert_rounding_only("out", got[0], other[0], truth[0], dtype)
    assert_rounding_only("state", got[1], other[1], truth[1], dtype)
    # Gradients are sums, over time for A and the bias, over states for delta, whose terms may cancel. And N additions
    # one after the other round N times by up to half a unit: sqrt(N) halves together, where chance decides.
    many = {n: x.detach() for n, x in exact.items()}
    many["A"] = many["A"][..., None].expand(-1, -1, inputs["u"].shape[2]).clone().requires_grad_()
    again = plain(**many, softplus=not bare)
    (terms,) = torch.autograd.grad(again, many["A"], [x.double() for x in low])
    step = F.softplus(many["delta"] + many["delta_bias"][:, None]) if not bare else many["delta"]
    over_states = (
        (many["A"] * terms / step.amin(0)[:, None]).abs().max().item()
    )  # A_s w_s, and terms are delta w_s
    additions = max(1.0, math.sqrt(inputs["u"].shape[2]) / 2)
    over_time = {
        "A": max(terms.abs().max().item(), want[2].abs().max().item()),
        "delta_bias": want[1].abs().max().item(),
    }
    largest = {"delta": over_states} | {n: additions * x for n, x in over_time.items()}
    for name, a, b, c in zip(inputs, ours, theirs, want):
        assert a.shape == inputs[name].shape
        assert a.dtype == inputs[name].dtype
        assert_rounding_only(f"d{name}", a, b, c, dtype, largest.get(name, 0.0))


# One less, equal, one more than a segment; a chunk is 4.
@pytest.mark.parametrize("length", [1, 3, 4, 5, 64, 65])
def test_lengths(length):
    check(1, 6, length)


@interpreter
def test_length_1000():
    """Sixteen segments; forward, in half precision."""
    x = {n: v.detach() for n, v in draw(1, 32, 1000, 2, dtype=torch.bfloat16, bare=True).items()}
    out, state = selective_scan_chunked(**x, return_state=True)
    exact = {n: v.double() for n, v in x.items()}
    truth, end = exact_chunked(**exact, return_state=True)
    assert_rounding_only("out", out, plain(**x)[0], truth, torch.bfloat16)
    torch.testing.assert_close(state.double(), end, rtol=0, atol=1e-5 * end.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bare", [False, True], ids=["all", "bare"])
def test_dtypes_and_what_may_be_left_out(dtype, bare):
    check(2, 5, 9, dtype=dtype, bare=bare)


@pytest.mark.parametrize("channels", [32, 60, 64, 128])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_widths(channels, dtype):
    """Blocks of channels with a ragged end, and more than one of them: parts of dB and dC are added."""
    check(1, channels, 9, 16, dtype=dtype)


@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_state_sizes(size):
    check(1, 4, 9, size)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups(groups):
    check(2, 6, 6, 3, groups)


def test_gradients_of_some_inputs_only():
    """Of the output alone, of the state alone, and for inputs that not all want one."""
    x = draw(1, 4, 9)
    exact = {n: v.detach().double().requires_grad_() for n, v in x.items()}
    for part in (0, 1):
        got = selective_scan_chunked(**x, delta_softplus=True, return_state=True)[part].square().sum()
        want = exact_chunked(**exact, delta_softplus=True, return_state=True)[part].square().sum()
        unused = dict(allow_unused=True, materialize_grads=True)
        grads = torch.autograd.grad(got, list(x.values()), **unused)
        for name, a, b in zip(x, grads, torch.autograd.grad(want, list(exact.values()), **unused)):
            assert (a.double() - b).abs().max() <= 2e-6 * max(b.abs().max().item(), 1e-3), name
    some = {n: v if n in ("u", "B") else v.detach() for n, v in x.items()}
    out = selective_scan_chunked(**some, delta_softplus=True)
    full = selective_scan_chunked(**x, delta_softplus=True)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (x["u"], x["B"])), torch.autograd.grad(full.sum(), (x["u"], x["B"]))
    ):
        assert torch.equal(a, b)


def test_a_sequence_in_pieces():
    x = {n: v.detach() for n, v in draw(1, 4, 40).items()}
    want, end = selective_scan_chunked(**x, delta_softplus=True, return_state=True)
    state, parts = x.pop("initial_state"), []
    for a, b in ((0, 7), (7, 31), (31, 40)):
        piece = {n: v[..., a:b] if n in TIMED else v for n, v in x.items()}
        out, state = selective_scan_chunked(
            **piece, delta_softplus=True, initial_state=state, return_state=True
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, -1), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token", [0, 64])
def test_no_leak(token):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own. In the
    gradient too."""
    x = {n: v.detach() for n, v in draw(1, 4, 66).items()}
    before = selective_scan_chunked(**x, delta_softplus=True)
    changed = {n: v.clone() for n, v in x.items()}
    for name in TIMED:
        changed[name][..., token:] += 3.0
    after = selective_scan_chunked(**changed, delta_softplus=True)
    assert torch.equal(before[..., :token], after[..., :token])
    assert (before[..., token] != after[..., token]).any()
    leaves = {n: v.requires_grad_() for n, v in x.items()}
    out = selective_scan_chunked(**leaves, delta_softplus=True)[..., token].sum()
    for name, grad in zip(TIMED, torch.autograd.grad(out, [leaves[n] for n in TIMED])):
        assert (grad[..., token + 1 :] == 0).all(), name
        assert (grad[..., token] != 0).any(), name


def test_strong_and_weak_decay():
    """Steps of 50 with A = -16: the state is new at each token. Steps of 1e-4 beside it: nothing is
    forgotten."""
    n = 130
    x = {name: v.detach() for name, v in draw(1, 2, n, 16, bare=True).items()}
    x["A"] = -torch.arange(1.0, 17, device=DEVICE).repeat(2, 1)
    x["delta"] = torch.tensor([50.0, 1e-4], device=DEVICE)[None, :, None].expand(1, 2, n)
    leaves = {name: v.requires_grad_() for name, v in x.items()}
    out = selective_scan_chunked(**leaves)
    truth = exact_chunked(**{name: v.detach().double() for name, v in x.items()})
    assert (out.double() - truth).abs().amax((0, 2)).le(2e-6 * truth.abs().amax((0, 2))).all()
    for grad in torch.autograd.grad(out.sum(), list(leaves.values())):
        assert grad.isfinite().all()


@pytest.mark.parametrize("where", [-20.0, -7.0, -1.0, 0.0, 3.0, 25.0, 90.0])
def test_softplus_has_all_its_digits(where):
    """Steps as small as exp(-20): the hardware's log(1 + e) would lose them."""
    delta = (where + 0.5 * torch.rand(1, 8, 1, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    one = torch.ones(1, 1, 1, device=DEVICE)
    got = selective_scan_chunked(
        torch.ones_like(delta), delta, -torch.zeros(8, 1, device=DEVICE), one, one, delta_softplus=True
    )
    # exp(x) is 2 to the power x / ln 2, and that quotient is rounded: an error of |x| roundings in the result.
    rtol = (4 + abs(where)) * 2**-24
    torch.testing.assert_close(got.double(), F.softplus(delta.double(), threshold=1e9), rtol=rtol, atol=0)


def test_strides_and_same_bits_every_run():
    x = draw(1, 6, 9, 4, 2)
    want = selective_scan_chunked(**x, delta_softplus=True)
    do = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grads = torch.autograd.grad(want, list(x.values()), do)
    for change in (
        lambda v: v,
        torch.Tensor.contiguous,
        lambda v: torch.stack([v, v * 0], -1).flatten(-2)[..., ::2],
    ):
        moved = {n: change(v) if n in TIMED else v for n, v in x.items()}
        got = selective_scan_chunked(**moved, delta_softplus=True)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, list(x.values()), change(do)), grads):
            assert torch.equal(a, b)


def tensors(**change):
    good = {k: v.detach() for k, v in draw(2, 6, 8).items()}
    return {**good, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}}


BAD = {
    "type": (dict(u=1.0), "u: expected a torch.Tensor, got float"),
    "rank": (dict(u=torch.rand(6, 8)), "u: expected 3 dimensions"),
    "float64": (dict(u=torch.rand(2, 6, 8).double()), "u: expected float16, bfloat16, float32"),
    "dtype": (dict(z=torch.rand(2, 6, 8).half()), "z: expected the dtype of u"),
    "A": (dict(A=torch.rand(6, 300)), "A: expected a state size of at most 256"),
    "B": (dict(B=torch.rand(2, 4, 9)), r"B: expected shape \(2, 4, 8\)"),
    "groups": (dict(B=torch.rand(2, 5, 4, 8)), "B: expected shape .*G a divisor of 6"),
    "bias": (dict(delta_bias=torch.rand(5)), r"delta_bias: expected shape \(6,\)"),
    "state": (dict(initial_state=torch.rand(2, 6, 4).half()), "initial_state: expected float32"),
    "state-shape": (dict(initial_state=torch.rand(2, 4, 6)), "initial_state: expected shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        selective_scan_chunked(**tensors(**change))


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        dict(batch=1, channels=34, seqlen=66),
        dict(batch=1, options=False, dtype="fp32", channels=40, seqlen=65),
        dict(batch=2, groups=1, channels=20, seqlen=9, dtype="bf16"),
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    table = traffic_rows(**case)
    assert len(table) == (3 if case.get("seqlen", 70) <= 64 else 4)
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


def test_traffic_against_a_plain_scan():
    """What the chapter says: an order of magnitude less than a scan that keeps its states in memory."""
    tiles = choose_tiles(16, torch.bfloat16, "sm90")
    case = Case(8, 4096, 1, 16, 8192, 2, 8192, initial=False)
    per_token = forward_bytes(case, tiles) / (8 * 4096 * 8192)
    assert 8 < per_token < 10
    with pytest.raises(ValueError, match="dtype: expected one of fp16"):
        traffic_rows(dtype="fp8")


def test_every_architecture_has_tiles():
    for arch, size in TABLE:
        dtype = torch.float32 if size == 4 else torch.float16
        for state_size in (1, 5, 16, 60, 256):
            tiles = choose_tiles(state_size, dtype, arch)
            assert tiles.dreads.chunk == tiles.dwrites.chunk
            assert all(t.block_s >= state_size and t.block_e >= 1 for t in tiles)
            assert (
                64 % tiles.dreads.chunk == 64 % tiles.scan.unroll == 0
            )  # segments are whole chunks and turns
        assert [x.name for x in launches(64, dtype, arch)] == ["states", "carry", "scan", "dreads", "dwrites"]
    assert choose_tiles(16, torch.bfloat16, "sm77") == TABLE["sm75", 2]
    for options, message in (
        (dict(window=True), "window: expected False"),
        (dict(causal=False), "causal: expected True"),
    ):
        with pytest.raises(ValueError, match=message):
            launches(64, torch.float16, "sm80", **options)
    with pytest.raises(ValueError, match="head_dim: expected an integer"):
        launches(0, torch.float16, "sm80")


def test_segments():
    assert choose_segment(8192, PROGRAMS, "sm90") == 8192  # enough programs: one walk
    assert choose_segment(8192, PROGRAMS // 8, "sm90") == 1024
    assert choose_segment(300, 1, "sm90") == 320  # too short to cut
    assert choose_segment(10**6, 1, "sm90") >= 256
    assert choose_segment(1, 1, "sm90") == choose_segment(500, 1, "interpreter") == 64


def test_xray_beside_fla():
    """Other sizes and types than the recorded table's, which test_selective_ssm_letters compiles again.

    Here hgrn's loop is the shorter one: it converts nothing, and does not sum over the states.
    """
    pytest.importorskip("fla.ops.hgrn", reason="fla-core is not installed (extra peers)")
    ours, recurrent, hgrn = selective_ssm_peers.rows("A100", 32, "fp32")
    assert [x["by"] for x in (ours, recurrent, hgrn)] == ["ours", "fla fused_recurrent", "fla hgrn"]
    assert ours["spill_bytes"] == 0
    assert ours["instructions_per_token"] < recurrent["instructions_per_token"]
    assert ours["bytes_per_token"] < hgrn["bytes_per_token"] / 8
    with pytest.raises(ValueError, match="dtype: expected one of bf16"):
        selective_ssm_peers.rows("A100", dtype="fp8")
    with pytest.raises(ValueError, match="state_size: expected 8, 16 or 32, got 12"):
        selective_ssm_peers.rows("A100", 12)
    with pytest.raises(ValueError, match="gpus: expected NVIDIA's"):
        selective_ssm_peers.rows("MI300X")


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """The largest kernels; ``effattn xray selective_ssm --gpu all`` has the other GPUs, dtypes and widths."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("selective_ssm", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        assert row["spill_bytes"] == 0, (row["kernel"], row["gpu"])
        assert row["fits"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    """Real sizes, several segments and blocks, both passes."""
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("not run: this GPU has no bf16")
    check(2, 200, 1500, 16, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 255, 4097])
def test_strong_decay_on_a_gpu(length):
    x = {n: v.detach() for n, v in draw(1, 512, length, 16, dtype=torch.float16).items()}
    x["delta_bias"] = x["delta_bias"] + 20
    out = selective_scan_chunked(**x, delta_softplus=True)
    truth = exact_chunked(**{n: v.double() for n, v in x.items()}, delta_softplus=True)
    assert (out.double() - truth).abs().max() <= 2e-3 * truth.abs().max()
