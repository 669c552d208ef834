"""The Triton kernels of XAttention's scores against float64 references.

They run in Triton's interpreter without a GPU. The tolerance is a ratio: at most twice the error of a plain PyTorch
run in the same dtype, both against float64, and one float32 rounding of the result.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels.block_sparse import antidiagonal_scores, xattention_scores

from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.sparse import block_sparse as exact

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr("effattn_kernels.block_sparse.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype=torch.float32, spread=3.0, seed=0):
    """q and k of ``(B, Hq, Hkv, N, D)``."""
    batch, hq, hkv, n, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(batch, hq, n, dim, generator=g)
    return q.to(DEVICE, dtype), torch.randn(batch, hkv, n, dim, generator=g).to(DEVICE, dtype)


def plain_scores(q, k, stride, block_size=None):
    """`antidiagonal_scores` and `xattention_scores` with every step in the dtype of q."""
    rest = -q.shape[2] % stride
    q_, k_ = (torch.nn.functional.pad(x, (0, 0, 0, rest)).unflatten(2, (-1, stride)) for x in (q, k))
    wide_k = repeat_kv(k_.flatten(3), q.shape[1] // k.shape[1])
    t = (q_.flip(3).flatten(3) @ wide_k.mT) * (q.shape[3] ** -0.5 / stride)
    if block_size is None:
        return t
    p = torch.softmax(t.masked_fill(torch.ones_like(t).triu(1).bool(), -math.inf), -1)
    per = block_size // stride
    rest = -p.shape[-1] % per
    p = torch.nn.functional.pad(p, (0, rest, 0, rest))
    return p.unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum((3, 5))


def check_scores(shape, dtype, stride, block_size=None, spread=3.0):
    q, k = draw(shape, dtype, spread)
    wide = (q.double(), k.double())
    if block_size is None:
        got, truth = antidiagonal_scores(q, k, stride=stride), exact.antidiagonal_scores(*wide, stride=stride)
    else:
        sizes = {"stride": stride, "block_size": block_size}
        got, truth = xattention_scores(q, k, **sizes), exact.xattention_scores(*wide, **sizes)
        assert not got.triu(1).any()
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    assert not got.isnan().any(), "unwritten output?"
    error = (got.double() - truth).abs().max().item()
    # One rounding of the result itself on top: a row of one block is exactly 1 in the plain run.
    allowed = 2 * (plain_scores(q, k, stride, block_size).double() - truth).abs().max().item()
    assert error <= allowed + torch.finfo(torch.float32).eps * truth.abs().max().item()


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 64, 131])
def test_antidiagonals(length, stride):
    check_scores((1, 2, 1, length, 20), torch.float32, stride)


# Tiles a block: 4; 1; 6, no power of two; more than a tile of the kernel has; an odd number of them.
SIZES = [(16, 4), (4, 4), (24, 4), (64, 1), (33, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"B{s[0]}-S{s[1]}")
@pytest.mark.parametrize("length", [1, 33, 150])
def test_block_scores(length, sizes):
    check_scores((1, 2, 1, length, 16), torch.float32, sizes[1], sizes[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [17, 64, 128], ids=lambda d: f"D{d}")
def test_scores_dtypes_dims_and_groups(head_dim, dtype):
    check_scores((2, 4, 2, 70, head_dim), DTYPES[dtype], 4)
    check_scores((2, 4, 2, 70, head_dim), DTYPES[dtype], 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_large(dtype):
    check_scores((1, 1, 1, 100, 32), DTYPES[dtype], 4, 16, spread=200.0)


@pytest.mark.parametrize("length", [64, 150])
def test_rows_of_scores_sum_to_their_tiles(length):
    q, k = draw((1, 2, 1, length, 16))
    sums = xattention_scores(q, k, block_size=32, stride=4).sum(-1)
    tiles = torch.tensor([min(8, math.ceil((length - begin) / 4)) for begin in range(0, length, 32)])
    torch.testing.assert_close(sums, tiles.to(sums).expand_as(sums), rtol=0, atol=1e-5)


def test_scores_of_a_block_do_not_see_later_ones():
    q, k = draw((1, 2, 1, 150, 16))
    before = xattention_scores(q, k, block_size=32, stride=4)
    k[:, :, 96:] = math.nan
    after = xattention_scores(q, k, block_size=32, stride=4)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert after[:, :, 3].isnan().any()


def test_scores_in_any_layout():
    q, k = draw((2, 4, 2, 45, 16))
    for fn in (lambda a, b: antidiagonal_scores(a, b, stride=4),
               lambda a, b: xattention_scores(a, b, block_size=16, stride=4, scale=-0.1)):  # fmt: skip
        want = fn(q, k)
        assert torch.equal(fn(*(y.transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k))), want)
        assert torch.equal(fn(*(torch.stack([y, y * 0], -1).flatten(-2)[..., ::2] for y in (q, k))), want)


BAD_SCORES = {
    "stride": (dict(stride=0), "stride: expected an integer of at least 1, got 0"),
    "divisor": (dict(stride=3), "stride: expected a divisor of block_size 32, got 3"),
    "block_size": (dict(block_size=True), "block_size: expected an integer of at least 1, got True"),
    "too-many": (dict(block_size=8192, stride=1), "block_size: expected at most 4096 strides of 1, got 8192"),
    "length": (dict(q=torch.rand(1, 2, 7, 16)), "q: expected as many queries as keys .8., got 7"),
    "scale": (dict(scale="1"), "scale: expected a finite number"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores_are_named(case):
    change, message = BAD_SCORES[case]
    options = {
        "q": torch.rand(1, 2, 8, 16),
        "k": torch.rand(1, 2, 8, 16),
        "block_size": 32,
        "stride": 4,
        **change,
    }
    tensors_ = {n: options.pop(n).to(DEVICE) for n in "qk"}
    with pytest.raises(ValueError, match=message):
        xattention_scores(**tensors_, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [60, 64, 128], ids=lambda d: f"D{d}")
def test_on_gpu(head_dim, dtype):
    check_scores((1, 4, 2, 1111, head_dim), DTYPES[dtype], 8)
    check_scores((1, 4, 2, 1111, head_dim), DTYPES[dtype], 8, 128)
