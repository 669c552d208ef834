"""The Triton kernels of the delta rule against the float64 reference: outputs, states, leaks, traffic.

Without a GPU they run in Triton's interpreter (chunks of 32); on a machine with one the same tests run compiled. The
tolerance is a ratio: at most twice the error of a plain PyTorch run of the same formula in the same dtype, both
against float64, and one rounding of the largest output, since a plain run may be exact by luck.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._delta_rule_tiles import TABLE, Tiles, choose_tiles
from effattn_kernels.delta_rule import delta_rule_chunked, launches

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.delta_rule import delta_rule, l2_normalize
from effattn_lab.measure.delta_rule_traffic import rows as traffic_rows

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")
GATES = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr("effattn_kernels.delta_rule.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, gated, seed=0, decay=0.3):
    """q, k, v, beta, g of ``(B, Hq, Hkv, N, K, V)``: unit keys that overlap, beta up to 2."""
    batch, hq, hkv, n, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    inputs = [2 * randn(batch, hq, n, key_dim), l2_normalize(randn(batch, hkv, n, key_dim) + 1)]
    inputs += [randn(batch, hkv, n, value_dim), 2 * torch.sigmoid(randn(batch, hkv, n))]
    inputs += [-decay * randn(batch, hkv, n).abs()] if gated else []
    return [x.to(DEVICE, dtype) for x in inputs]


def plain(q, k, v, beta, g=None, *, size, state=None):
    """The chunked formulas in the dtype of the inputs throughout, with an explicit inverse; the state in fp32."""
    groups, dtype = q.shape[1] // k.shape[1], q.dtype
    k, v, beta = repeat_kv(k, groups), repeat_kv(v, groups), beta.repeat_interleave(groups, 1)
    g = torch.zeros_like(beta) if g is None else g.repeat_interleave(groups, 1)
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], device=q.device)
    else:
        state = repeat_kv(state, groups)
    q, outs = q * q.shape[3] ** -0.5, []
    for a in range(0, q.shape[2], size):
        Q, K, V, b, G = (x[:, :, a : a + size] for x in (q, k, v, beta, g))
        c = G.float().cumsum(-1)
        gamma = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
        lower = (b[..., None].float() * gamma * (K @ K.mT).float()).tril(-1)
        T = torch.linalg.inv(torch.eye(K.shape[2], device=q.device) + lower).to(dtype)
        U, W = T @ (b[..., None] * V), T @ ((b * c.exp())[..., None] * K).to(dtype)
        X = U - W @ state.to(dtype)
        scores = ((Q @ K.mT).float() * gamma).to(dtype)
        outs.append(c.exp().to(dtype)[..., None] * (Q @ state.to(dtype)) + scores @ X)
        last = c[..., -1, None]
        written = (K.float() * (last - c).exp()[..., None]).to(dtype).mT @ X
        state = last[..., None].exp() * state + written.float()
    return torch.cat(outs, dim=2), state[:, ::groups]


def assert_rounding_only(name, got, other, truth, dtype):
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got.double() - truth).abs().max().item()
    rounding = torch.finfo(dtype).eps * truth.abs().max().item()
    allowed = 2 * (other.double() - truth).abs().max().item() + rounding
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(shape, dtype, gated, *, state=False, decay=0.3):
    """Output and final state of one case."""
    inputs = draw(shape, dtype, gated, decay=decay)
    batch, _, hkv, _, key_dim, value_dim = shape
    start = None
    if state:
        start = torch.randn(batch, hkv, key_dim, value_dim, generator=torch.Generator().manual_seed(5)).to(
            DEVICE
        )
    got, after = delta_rule_chunked(*inputs, initial_state=start, return_state=True)
    exact = [x.double() for x in inputs]
    truth, end = delta_rule(
        *exact, initial_state=None if start is None else start.double(), return_state=True
    )
    arch = "interpreter" if effattn_kernels.MODE == "interpreter" else None
    size = choose_tiles(key_dim, value_dim, dtype, arch).states.chunk if arch else 64
    other, other_end = plain(*inputs, size=size, state=start)
    assert got.dtype == dtype
    assert after.dtype == torch.float32
    assert_rounding_only("out", got, other, truth, dtype)
    assert_rounding_only("state", after, other_end, end, dtype)


# The interpreter's chunk is 32, its blocks 16: one less, equal, one more, several.
@GATES
@pytest.mark.parametrize("length", [1, 15, 32, 33, 63, 64, 65])
def test_lengths(length, gated):
    check((1, 2, 2, length, 32, 32), torch.float32, gated)


def test_a_long_sequence():
    check((1, 1, 1, 1000, 32, 32), torch.float32, True, decay=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", [(32, 32), (60, 24), (64, 64), (128, 16), (16, 130), (256, 16), (5, 3)], ids=str
)
def test_head_dims(dims, dtype):
    check((1, 2, 1, 50, *dims), DTYPES[dtype], True, state=True)


@GATES
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_groups_and_states(dtype, gated):
    check((2, 4, 2, 40, 24, 40), DTYPES[dtype], gated, state=True)


@pytest.mark.parametrize("chunk", [16, 64])
@GATES
def test_other_chunks(monkeypatch, gated, chunk):
    """One and four blocks of 16 on the diagonal, as the table has them for real GPUs."""
    for key in [key for key in TABLE if key[0] == "interpreter"]:
        (tiles,) = TABLE[key].values()
        monkeypatch.setitem(TABLE, key, {256: Tiles(*(t._replace(chunk=chunk) for t in tiles))})
    for length in (1, 33, 70):
        check((1, 2, 1, length, 32, 24), torch.float32, gated, state=True)


def test_equal_keys_are_solved_exactly():
    """64 equal keys, beta 2: the powers of L that doubling adds up pass 10^27, the solution is small."""
    n = 64
    k = torch.ones(1, 1, n, 16, device=DEVICE) / 4
    v = torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    beta = torch.full((1, 1, n), 2.0, device=DEVICE)
    truth = delta_rule(k.double(), k.double(), v.double(), beta.double())
    got = delta_rule_chunked(k, k, v, beta)
    assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_token_that_forgets_everything():
    """g = -1e4 or -inf: no NaN, and what follows keeps its digits."""
    q, k, v, beta, g = draw((1, 1, 1, 64, 16, 16), torch.float32, True, decay=0.02)
    for reset in (-1e4, -math.inf):
        g[:, :, [20, 40]] = reset
        truth = delta_rule(*(x.double() for x in (q, k, v, beta, g)))
        got = delta_rule_chunked(q, k, v, beta, g)
        assert (got - truth).abs().max() <= 2e-5 * truth.abs().max()


def test_in_two_calls():
    inputs = draw((1, 2, 1, 90, 16, 24), torch.float32, True)
    want, end = delta_rule_chunked(*inputs, return_state=True)
    first, state = delta_rule_chunked(*(x[:, :, :37] for x in inputs), return_state=True)
    second, state = delta_rule_chunked(
        *(x[:, :, 37:] for x in inputs), initial_state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], 2), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-5)


@GATES
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_leak(dtype, gated):
    """Changing token t leaves every output before t as it was, to the bit, and changes its own."""
    inputs = draw((1, 2, 1, 70, 16, 16), DTYPES[dtype], gated)
    before = delta_rule_chunked(*inputs)
    for token in (0, 15, 16, 31, 32, 69):
        changed = [x.clone() for x in inputs]
        for x in changed[1:]:
            x[:, :, token:] -= 0.3
        after = delta_rule_chunked(*changed)
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert (before[:, :, token] != after[:, :, token]).any()


def test_strides_and_same_bits_every_run():
    inputs = draw((1, 2, 1, 37, 16, 24), torch.float32, True)
    want = delta_rule_chunked(*inputs)
    assert torch.equal(want, delta_rule_chunked(*inputs))
    q, k, v, *gates = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    assert torch.equal(want, delta_rule_chunked(q, k, v, *gates))
    spread = [torch.stack([x, x * math.nan], -1).flatten(-2)[..., ::2] for x in inputs]
    assert torch.equal(want, delta_rule_chunked(*spread))
    mixed = [*inputs[:3], inputs[3].half(), inputs[4].bfloat16()]  # gates in any dtype, computed in fp32
    torch.testing.assert_close(
        delta_rule_chunked(*mixed), delta_rule_chunked(*(x.float() for x in mixed)), rtol=0, atol=0
    )


def tensors(**change):
    q, k, v, beta, g = draw((1, 4, 2, 8, 16, 12), torch.float32, True)
    return {"q": q, "k": k, "v": v, "beta": beta, "g": g, **change}


BAD = {
    "rank": (dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (dict(q=torch.rand(1, 4, 8, 16).double()), "q: expected float16"),
    "dtype": (dict(v=torch.rand(1, 2, 8, 12).half().to(DEVICE)), "v: expected the dtype of q"),
    "keys": (dict(k=torch.rand(1, 2, 8, 15).to(DEVICE)), "k: expected the head dimension of q"),
    "length": (dict(q=torch.rand(1, 4, 9, 16).to(DEVICE)), "k: expected the length of q, 9, got 8"),
    "wide": (
        dict(q=torch.rand(1, 4, 8, 300).to(DEVICE), k=torch.rand(1, 2, 8, 300).to(DEVICE)),
        "q: expected a head dimension of at most 256, got 300",
    ),
    "beta": (dict(beta=torch.rand(1, 4, 8).to(DEVICE)), "beta: expected one number a token and key head"),
    "beta-type": (dict(beta=0.5), r"beta: .* got float"),
    "beta-dtype": (dict(beta=torch.rand(1, 2, 8).double().to(DEVICE)), "beta: expected float16, bfloat16"),
    "g": (dict(g=torch.rand(1, 2, 7).to(DEVICE)), "g: expected one number a token and key head"),
    "scale": (dict(scale=math.nan), "scale: expected a finite number"),
    "state": (dict(initial_state=torch.zeros(1, 4, 16, 12)), "initial_state: expected float32 of shape"),
    "gradient": (
        dict(k=torch.rand(1, 2, 8, 16, device=DEVICE, requires_grad=True)),
        "k: expected a tensor that wants no gradient",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        delta_rule_chunked(**tensors(**change))


def test_without_gradients_what_wants_one_is_taken():
    with torch.no_grad():
        delta_rule_chunked(**tensors(k=torch.rand(1, 2, 8, 16, device=DEVICE, requires_grad=True)))


@interpreter
@pytest.mark.parametrize("case", [{}, {"gated": False, "dtype": "bf16"}, {"dtype": "fp32", "with_states": True}],
                         ids=str)  # fmt: skip
def test_traffic_is_the_formula(case):
    table = traffic_rows(**case)
    assert [row["kernel"][12:-7] for row in table] == ["transform", "states", "outputs"]
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


def test_every_architecture_has_tiles():
    for arch, size in TABLE:
        dtype = torch.float32 if size == 4 else torch.float16
        for dims in ((1, 1), (60, 64), (64, 64), (256, 512)):
            tiles = choose_tiles(*dims, dtype, arch)
            assert len({t.chunk for t in tiles}) == 1
            assert 4 * tiles.states.block_k >= dims[0]
        assert [launch.name for launch in launches(64, dtype, arch)] == list(tiles._fields)
    with pytest.raises(ValueError, match="window: expected False"):
        launches(64, torch.float16, "sm80", window=True)
    with pytest.raises(ValueError, match="causal: expected True"):
        launches(64, torch.float16, "sm80", causal=False)
    with pytest.raises(ValueError, match="head_dim: expected an integer from 1 to 256"):
        launches(300, torch.float16, "sm80")


@pytest.mark.gpu
@GATES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (60, 60), (256, 256)], ids=str)
def test_on_the_gpu(dims, dtype, gated):
    check((2, 4, 2, 777, *dims), DTYPES[dtype], gated, state=True, decay=0.05)
