"""Elastic Attention's kernel against the float64 reference: modes, tiles, one launch, traffic, bad input.

Without a GPU it runs in Triton's interpreter (tiles of 32 by 32); on a machine with one the same tests run compiled.
The tolerance is a ratio: at most twice the error of a plain PyTorch run in the same dtype, both against float64.
"""

from __future__ import annotations

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._tiles import TABLE, choose_tiles
from effattn_kernels.elastic import OWN_TILES, choose_tile, elastic_attention, launches
from effattn_kernels.flash import flash_attention

from effattn_lab.foundations.attention import attention, repeat_kv
from effattn_lab.measure.elastic_traffic import gather_bytes, sparse_keys_read
from effattn_lab.measure.elastic_traffic import rows as traffic_rows
from effattn_lab.measure.traffic import count
from effattn_lab.sparse.elastic import elastic_attention as exact
from effattn_lab.sparse.static_patterns import dense_mask, sinks_and_window
from effattn_lab.sparse.streaming import streaming_attention

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

    monkeypatch.setattr("effattn_kernels.elastic.torch.empty", poisoned)
    monkeypatch.setattr("effattn_kernels.elastic.torch.empty_like", lambda x: torch.full_like(x, math.nan))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype, spread=3.0, seed=0):
    """``(B, Hq, Hkv, Nq, Nk, D)``, spread-out scores, and modes that differ between heads and prompts."""
    batch, hq, hkv, nq, nk, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(batch, hq, nq, dim, generator=g)
    k, v = (torch.randn(batch, hkv, nk, dim, generator=g) for _ in range(2))
    full = (torch.arange(batch)[:, None] + torch.arange(hkv)) % 2 == 0
    return *(x.to(DEVICE).to(dtype) for x in (q, k, v)), full.to(DEVICE)


def plain(q, k, v, full, *, sinks, window):
    """Every step in the dtype of q."""
    groups = q.shape[1] // k.shape[1]
    nq, nk = q.shape[2], k.shape[2]
    few = dense_mask(sinks_and_window(sinks, window), nq, nk, device=q.device)
    all_ = dense_mask(sinks_and_window(0, nk), nq, nk, device=q.device)
    keep = torch.where(full.repeat_interleave(groups, 1)[..., None, None], all_, few)
    s = (q @ repeat_kv(k, groups).mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    return torch.softmax(s, -1) @ repeat_kv(v, groups)


def check(shape, dtype, *, sinks=3, window=20, spread=3.0):
    q, k, v, full = draw(shape, dtype, spread)
    got, lse = elastic_attention(q, k, v, full, sinks=sinks, window=window, return_lse=True)
    wide = [x.double() for x in (q, k, v)]
    truth = exact(*wide, full.double(), sinks=sinks, window=window)
    other = plain(q, k, v, full, sinks=sinks, window=window)
    assert got.dtype == dtype
    assert not got.isnan().any(), "unwritten output?"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (other.double() - truth).abs().max().item()
    assert error <= allowed + 1e-7 * truth.abs().max().item(), f"error {error:.2e}, allowed {allowed:.2e}"
    assert lse.dtype == torch.float32
    assert lse.isfinite().all()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 100])
def test_lengths(length):
    check((2, 2, 2, length, length, 16), torch.float32)


@pytest.mark.parametrize(
    ("sinks", "window"),
    [(0, 1), (0, 32), (1, 31), (4, 33), (33, 5), (40, 40), (64, 1), (100, 3), (2, 99), (2, 100), (7, 5000)],
)
def test_sinks_and_windows(sinks, window):
    """Inside one tile, over a border, meeting each other, longer than the text."""
    check((1, 2, 2, 100, 100, 16), torch.float32, sinks=sinks, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2)], ids=lambda h: f"H{h[0]}-{h[1]}")
def test_dtypes_and_groups(heads, dtype):
    check((2, *heads, 45, 70, 24), DTYPES[dtype])


@pytest.mark.parametrize("head_dim", [16, 17, 60, 64, 128, 256])
def test_head_dims(head_dim):
    check((1, 2, 2, 40, 40, head_dim), torch.float16, sinks=2, window=9)


@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (64, 65)], ids=str)
def test_the_queries_are_the_last_positions(lengths):
    check((1, 2, 2, *lengths, 16), torch.float32)


def test_more_queries_than_keys():
    """The first rows see nothing: output 0, log-sum-exp -inf; the rest is as if they were not there."""
    q, k, v, full = draw((1, 2, 2, 70, 40, 16), torch.float32)
    out, lse = elastic_attention(q, k, v, full, sinks=2, window=5, return_lse=True)
    assert (out[:, :, :30] == 0).all()
    assert lse[:, :, :30].isneginf().all()
    torch.testing.assert_close(
        out[:, :, 30:], elastic_attention(q[:, :, 30:], k, v, full, sinks=2, window=5), rtol=0, atol=1e-6
    )


def test_all_full_is_flash_and_all_sparse_is_streaming():
    q, k, v, full = draw((2, 4, 2, 90, 110, 32), torch.float32)
    dense, dense_lse = flash_attention(q, k, v, causal=True, return_lse=True)
    out, lse = elastic_attention(q, k, v, torch.ones_like(full), sinks=3, window=20, return_lse=True)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, dense_lse, rtol=0, atol=4e-6)
    few = streaming_attention(q.double(), k.double(), v.double(), sinks=3, window=20)
    out = elastic_attention(q, k, v, torch.zeros_like(full), sinks=3, window=20)
    torch.testing.assert_close(out.double(), few, rtol=0, atol=4e-6)


def test_each_head_of_each_prompt_has_its_own_mode():
    """Query heads may differ too. The released kernel takes the modes of prompt 0 for the whole batch."""
    q, k, v, _ = draw((3, 4, 2, 50, 50, 16), torch.float32)
    g = torch.Generator().manual_seed(5)
    modes = torch.randint(2, (3, 4), generator=g).to(DEVICE)
    assert len({tuple(row.tolist()) for row in modes}) > 1
    out = elastic_attention(q, k, v, modes, sinks=2, window=8)
    dense = attention(q, k, v, causal=True)
    few = streaming_attention(q, k, v, sinks=2, window=8)
    assert (dense - few).abs().amax((2, 3)).min() > 1e-2
    want = torch.where(modes[..., None, None] == 1, dense, few)
    torch.testing.assert_close(out, want, rtol=0, atol=4e-6)


def test_a_kv_heads_mode_is_its_groups_mode():
    q, k, v, full = draw((2, 6, 2, 40, 40, 16), torch.float32)
    out = elastic_attention(q, k, v, full, sinks=2, window=8)
    for kind in (full.int(), full.double(), full.repeat_interleave(3, 1)):
        assert torch.equal(elastic_attention(q, k, v, kind, sinks=2, window=8), out)


def test_large_scores():
    check((1, 2, 2, 70, 70, 16), torch.float32, spread=300.0)


@pytest.mark.parametrize("scale", [-0.3, 2.5])
def test_scale(scale):
    q, k, v, full = draw((1, 2, 2, 40, 40, 16), torch.float32, spread=0.5)
    got = elastic_attention(q, k, v, full, sinks=2, window=8, scale=scale)
    want = exact(*(x.double() for x in (q, k, v)), full.double(), sinks=2, window=8, scale=scale)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter, on a full head of NaN
def test_a_sparse_head_reads_no_other_keys():
    """NaN where a sparse head has nothing to read: whole tiles, so that none is even loaded."""
    q, k, v, _ = draw((1, 2, 2, 32, 160, 16), torch.float32)
    for x in (k, v):
        x[:, :, 32:96] = math.nan
    out = elastic_attention(q, k, v, torch.zeros(1, 2, dtype=torch.bool, device=DEVICE), sinks=3, window=33)
    assert out.isfinite().all()
    out = elastic_attention(q, k, v, torch.tensor([[1, 0]], device=DEVICE), sinks=3, window=33)
    assert out[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize("token", [1, 32, 47])
def test_no_leak(token):
    q, k, v, full = draw((1, 2, 2, 64, 64, 16), torch.float32)
    before = elastic_attention(q, k, v, full, sinks=2, window=8)
    k[:, :, token:] += 3
    v[:, :, token:] -= 5
    after = elastic_attention(q, k, v, full, sinks=2, window=8)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert (before[:, :, token] != after[:, :, token]).any()


def test_strides():
    q, k, v, full = draw((1, 2, 2, 37, 45, 16), torch.float32)
    want = elastic_attention(q, k, v, full, sinks=2, window=8)
    for change in (
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: torch.stack([y, y * 0], -1).flatten(-2)[..., ::2],
    ):
        got = elastic_attention(change(q), change(k), change(v), full.T.contiguous().T, sinks=2, window=8)
        assert torch.equal(got, want)


@interpreter
def test_one_launch_and_the_work_of_its_heads():
    """FLOPs: a mixture does the sum of its heads' work, and one launch does it."""
    q, k, v, _ = draw((1, 2, 2, 128, 128, 16), torch.float32)

    def cost(modes):
        with count() as traffic:
            elastic_attention(q, k, v, torch.tensor([modes]), sinks=2, window=16)
        assert list(traffic.by_kernel) == ["_elastic_fwd_kernel"]
        assert traffic.by_kernel["_elastic_fwd_kernel"].launches == 1
        return traffic.by_kernel["_elastic_fwd_kernel"].flops

    both, none = cost([1, 1]), cost([0, 0])
    assert cost([1, 0]) == cost([0, 1]) == (both + none) // 2
    keys = sparse_keys_read(128, 128, 2, 16, block_m=32, block_n=32)
    assert none == 2 * 4 * 16 * 32 * keys
    assert keys == 32 + 64 + 96 + 96, "own tile, the one before, and from the third on the sinks'"


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dtype": "fp32", "seqlen_q": 100, "seqlen_k": 100, "sinks": 40, "window": 3},
        {"dtype": "bf16", "sinks": 0, "window": 1, "batch": 1, "num_kv_heads": 4},
        {"seqlen_q": 90, "seqlen_k": 50},
        {"window": 1000},
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    (row,) = traffic_rows(**case)
    assert row["measured_bytes"] == row["formula_bytes"], row
    assert row["launches"] == 1


def test_bytes_of_the_two_launch_way():
    """Q and O of 4 heads, K and V of 2: 12 rows of 10 numbers a token, each read and written, fp16."""
    assert gather_bytes(1, 4, 2, 7, 7, 10) == 2 * 12 * 7 * 10 * 2


GRAD = torch.rand(1, 2, 8, 16).to(DEVICE).requires_grad_()
BAD = {
    "rank": (lambda: dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (lambda: dict(q=torch.rand(1, 4, 8, 16).double()), "q: expected float16"),
    "mode list": (lambda: dict(full=[[1, 0]]), "full: expected a torch.Tensor, got list"),
    "mode shape": (lambda: dict(full=torch.ones(2, 2)), r"full: expected one mode a head .* got \(2, 2\)"),
    "soft mode": (lambda: dict(full=torch.tensor([[0.5, 1.0]]).to(DEVICE)), "full: expected 0 and 1 alone"),
    "complex": (lambda: dict(full=torch.ones(1, 2, dtype=torch.complex64).to(DEVICE)), "full: expected bool, an int"),
    "sinks": (lambda: dict(sinks=-1), "sinks: expected an integer of at least 0, got -1"),
    "window": (lambda: dict(window=0), "window: expected an integer of at least 1, got 0"),
    "window bool": (lambda: dict(window=True), "window: expected an integer of at least 1, got True"),
    "scale": (lambda: dict(scale=math.inf), "scale: expected a finite number"),
    "gradient": (lambda: dict(v=GRAD), "v: expected a tensor that needs no gradient"),
}  # fmt: skip


def call(**change):
    q, k, v, full = draw((1, 4, 2, 8, 8, 16), torch.float32)
    return elastic_attention(**{"q": q, "k": k, "v": v, "full": full, **change})


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(**change())


def test_without_gradients_it_takes_parameters():
    with torch.no_grad():
        assert call(v=GRAD).isfinite().all()


@pytest.mark.parametrize("arch", sorted({arch for arch, _ in TABLE}))
def test_every_architecture_has_a_launch(arch):
    for head_dim in (16, 60, 128, 256):
        (launch,) = launches(head_dim, torch.float16, arch)
        assert set(launch.signature) == set(launch.kernel.arg_names)
    with pytest.raises(ValueError, match="head_dim: expected 16 to 256, got 8"):
        launches(8, torch.float16, arch)


def test_tiles_are_flashs_where_those_do_not_spill():
    for arch in ("sm80", "sm90", "sm999"):
        assert choose_tile(64, torch.float16, arch) == choose_tiles(64, torch.float16, arch).fwd
    assert (
        choose_tile(60, torch.bfloat16, "sm86")
        == OWN_TILES["sm89", 2, 64]
        != choose_tiles(60, torch.bfloat16, "sm89").fwd
    )
    assert choose_tile(200, torch.float32, "sm80") == OWN_TILES["sm80", 4, 256]
    for (arch, _, dim), tile in OWN_TILES.items():
        assert launches(dim, torch.float32 if dim == 256 else torch.float16, arch)[0].tile == tile


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "dim", "dtype"), [("L4,H100", 64, "fp16"), ("T4,A100,MI300X", 256, "fp32")])
def test_shipped_tiles_do_not_spill(gpus, dim, dtype):
    """Where a tile is the kernel's own; ``effattn xray elastic --gpu all`` has the other GPUs and dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("elastic", gpus=gpus, head_dims=(dim,), dtypes=(dtype,)):
        what = f"{row['gpu']}: {row['spill_bytes']} bytes"
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        assert (row["tensor_core_instructions"] > 0) == (dtype == "fp16" or row["gpu"] == "MI300X"), what


def test_shapes_of_the_compared_errors():
    """The plain run that sets the tolerance computes the same thing, in float64 to rounding."""
    q, k, v, full = draw((2, 4, 2, 40, 50, 16), torch.float64)
    want = exact(q, k, v, full.double(), sinks=3, window=10)
    torch.testing.assert_close(plain(q, k, v, full, sinks=3, window=10), want, rtol=0, atol=1e-12)
