"""The byte counter: against kernels whose traffic one can count by hand, and the flash kernels' formulas."""

import sys

import effattn_kernels  # first: it switches triton to its interpreter where there is no GPU
import pytest
import torch

from effattn_lab.foundations.cost_model import attention_flops
from effattn_lab.measure import flash_traffic
from effattn_lab.measure.traffic import count, traffic_rows

if effattn_kernels.MODE == "compiled":
    pytest.skip(
        "traffic is counted in Triton's interpreter; here a GPU runs the kernels", allow_module_level=True
    )
if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _naive_matmul(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    """One output tile a program, whole rows of A and columns of B read for it; N = grid size x BLOCK."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = tl.num_programs(1) * BLOCK
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + i[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * width + j[None, :])
        acc += tl.dot(a, b)
    tl.store(c_ptr + i[:, None] * width + j[None, :], acc)


@triton.jit
def _histogram(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.atomic_add(out_ptr + x, 1, mask=x < 3)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.float16, 2), (torch.int8, 1)], ids=str
)
def test_masked_lanes_are_not_counted(dtype, size):
    """100 elements in blocks of 64: the second block's 28 idle lanes move nothing."""
    x, y = torch.ones(100, dtype=dtype), torch.zeros(100, dtype=dtype)
    with count() as t:
        _copy[(2,)](x, y, 100, BLOCK=64)
    assert (t.loads_bytes, t.stores_bytes, t.bytes, t.flops) == (100 * size, 100 * size, 200 * size, 0)
    assert torch.equal(x, y)


def test_matmul_by_hand():
    """64 x 48 times 48 x 32, tile 16: A is read once for each of 2 tile columns, B for each of 4 tile rows."""
    a, b, c = torch.randn(64, 48), torch.randn(48, 32), torch.empty(64, 32)
    with count() as t:
        _naive_matmul[(4, 2)](a, b, c, 48, BLOCK=16)
    torch.testing.assert_close(c, a @ b)
    assert t.loads_bytes == 4 * (2 * a.numel() + 4 * b.numel())
    assert t.stores_bytes == 4 * c.numel()
    assert t.flops == 2 * 64 * 48 * 32


def test_atomics_read_and_write():
    x, out = torch.tensor([0, 1, 1, 5], dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with count() as t:
        _histogram[(1,)](x, out, BLOCK=4)
    assert out.tolist()[:3] == [1, 2, 0]
    assert (t.loads_bytes, t.stores_bytes) == (4 * 4 + 3 * 4, 3 * 4)


def test_by_kernel_and_nesting():
    x, y = torch.ones(64), torch.zeros(64)
    with count() as outer:
        _copy[(1,)](x, y, 64, BLOCK=64)
        with count() as inner:
            _copy[(2,)](x, y, 64, BLOCK=32)
            _histogram[(1,)](torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), BLOCK=4)
    assert (inner.by_kernel["_copy"].launches, inner.by_kernel["_copy"].programs) == (1, 2)
    assert inner.bytes == 512 + 16 + 32
    assert (outer.by_kernel["_copy"].launches, outer.by_kernel["_copy"].programs) == (2, 3)
    assert outer.by_kernel["_copy"].bytes == 1024
    after = outer.bytes
    _copy[(1,)](x, y, 64, BLOCK=64)
    assert outer.bytes == after, "closed counters count no more"


def test_a_failing_kernel_leaves_nothing_behind():
    with pytest.raises(Exception, match="boom"), count():
        raise RuntimeError("boom")
    x, y = torch.ones(64), torch.zeros(64)
    with count() as t:
        _copy[(1,)](x, y, 64, BLOCK=64)
    assert t.bytes == 512


CASES = {
    "standard": {},
    "full": dict(causal=False, seqlen_q=111, seqlen_k=111),
    "one-query": dict(seqlen_q=1, seqlen_k=70),
    "fewer-keys": dict(seqlen_q=100, seqlen_k=40),
    "fp32-D60": dict(seqlen_q=65, seqlen_k=65, head_dim=60, dtype="fp32"),
    "bf16-H6-3": dict(
        batch=2, num_heads=6, num_kv_heads=3, seqlen_q=33, seqlen_k=33, head_dim=16, dtype="bf16"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_flash_formulas(case):
    """Measured bytes equal the chapter's formulas. They promise 1 %; tile by tile they are exact."""
    rows = traffic_rows("flash", **CASES[case])
    assert [r["kernel"] for r in rows] == [
        "_flash_fwd_kernel",
        "_flash_bwd_preprocess_kernel",
        "_flash_bwd_dkdv_kernel",
        "_flash_bwd_dq_kernel",
    ]
    for r in rows:
        assert abs(r["measured_bytes"] / r["formula_bytes"] - 1) < 0.01, r["kernel"]
        assert r["measured_bytes"] == r["loads_bytes"] + r["stores_bytes"]


def test_flash_flops():
    """Whole tiles, no mask: the kernel multiplies what the formula counts; the backward 3.5 times that, not 2.5."""
    shape = dict(batch=1, num_heads=2, num_kv_heads=2, seqlen_q=64, seqlen_k=64, head_dim=16, causal=False)
    flops = {r["kernel"]: r["flops"] for r in traffic_rows("flash", **shape)}
    forward = attention_flops(1, 2, 64, 64, 16)
    assert flops["_flash_fwd_kernel"] == forward
    assert flops["_flash_bwd_dkdv_kernel"] + flops["_flash_bwd_dq_kernel"] == 3.5 * forward  # S and dP twice


@pytest.mark.parametrize("causal", [False, True])
def test_queries_read_by_brute_force(causal):
    for nq, nk, m, n in [(7, 7, 2, 3), (5, 11, 4, 2), (11, 5, 2, 4), (1, 9, 4, 4)]:
        total = 0
        for start_n in range(0, nk, n):
            for start_m in range(0, nq, m):
                rows = range(start_m, min(start_m + m, nq))
                keys = range(start_n, min(start_n + n, nk))
                if not causal or any(j <= i + nk - nq for i in rows for j in keys):
                    total += len(rows)
        assert flash_traffic.queries_read(nq, nk, m, n, causal) == total


@pytest.mark.parametrize("mode", ["compiled", "unavailable"])
def test_only_in_the_interpreter(monkeypatch, mode):
    monkeypatch.setattr(effattn_kernels, "MODE", mode)
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|Linux"), count():
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traffic_rows("mamba"), "slug: expected one of .*flash.*, got .mamba."),
        (lambda: traffic_rows("flash", dtype="fp8"), "dtype: expected one of fp16"),
    ],
    ids=["kernel", "dtype"],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
