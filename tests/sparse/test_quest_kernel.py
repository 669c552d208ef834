"""The Triton kernels of Quest: bounds exactly, scores against float64 and the definition, traffic, bad input.

Without a GPU they run in Triton's interpreter; on a machine with one the same tests run compiled.
"""

import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._quest_tiles import TABLE, choose_tiles
from effattn_kernels.adamas import sparse_decode
from effattn_kernels.quest import launches, page_bounds, page_scores

from effattn_lab.measure import quest_traffic
from effattn_lab.sparse import quest
from effattn_lab.sparse.cache import decode_scores

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

    monkeypatch.setattr("effattn_kernels.quest.torch.empty", poisoned)


def draw(n, dim, dtype, *, heads=(4, 2), seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], 1, dim, generator=g)
    k = 3 * torch.randn(2, heads[1], n, dim, generator=g)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def bounds_by_loops(k, page):
    parts = [k[:, :, p : p + page] for p in range(0, k.shape[2], page)]
    return [torch.stack([getattr(part, name)(2) for part in parts], 2) for name in ("amin", "amax")]


# The interpreter's block is 16 pages: 16 * 4 tokens.
@pytest.mark.parametrize("n", [1, 3, 4, 5, 63, 64, 65, 150])
@pytest.mark.parametrize("page", [1, 4, 5])
def test_bounds_at_all_lengths(n, page):
    _, k = draw(n, 16, torch.float32, seed=n)
    got = page_bounds(k, page)
    for mine, want in zip(got, bounds_by_loops(k, page)):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("dim", [16, 60, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_in_all_dtypes(dim, dtype):
    _, k = draw(75, dim, DTYPES[dtype])
    for sign in (k.abs(), -k.abs(), k):  # what a masked 0 would spoil
        for mine, want, other in zip(page_bounds(sign), bounds_by_loops(sign, 16), quest.page_bounds(sign)):
            assert mine.dtype == DTYPES[dtype]
            assert torch.equal(mine, want)
            assert torch.equal(mine, other)


def test_keys_that_are_no_numbers():
    _, k = draw(40, 16, torch.float32)
    k[0, 0, 17, 3], k[0, 1, 2, 5], k[1, 0, 39, 7] = math.nan, math.inf, -math.inf
    for mine, want in zip(page_bounds(k), quest.page_bounds(k)):
        torch.testing.assert_close(mine, want, rtol=0, atol=0, equal_nan=True)
    assert page_bounds(k)[0].isnan().sum() == 1


@pytest.mark.parametrize("dim", [16, 60, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_by_their_definition(dim, heads, dtype):
    """At most twice the error of the PyTorch form, and its inputs' products are exact in float32."""
    q, k = draw(33 * 4 - 1, dim, DTYPES[dtype], heads=heads)
    least, greatest = page_bounds(k, 4)
    got = page_scores(q, least, greatest)
    assert (got.dtype, got.shape) == (torch.float32, (2, heads[0], 33))
    low, high = (x.double().repeat_interleave(heads[0] // heads[1], dim=1) for x in (least, greatest))
    terms = torch.maximum(q.double() * high, q.double() * low)
    truth = terms.sum(-1)
    error = (got.double() - truth).abs()
    plain = (quest.page_scores(q, least, greatest).double() - truth).abs().max()
    rounding = torch.finfo(torch.float32).eps * terms.abs().sum(-1)
    assert (error <= 2 * plain + rounding).all()


@pytest.mark.parametrize("pages", [1, 31, 32, 33, 65])
def test_numbers_of_pages(pages):
    q, k = draw(pages * 2, 24, torch.float32, seed=pages)
    bounds = page_bounds(k, 2)
    torch.testing.assert_close(
        page_scores(q, *bounds).double(),
        quest.page_scores(q.double(), *(x.double() for x in bounds)),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_score_is_a_bound_for_every_key_of_the_page(dtype, seed):
    q, k = draw(90, 32, DTYPES[dtype], seed=seed)
    q = q * torch.tensor([1.0, -1.0, 100.0, 1e-3], device=DEVICE, dtype=q.dtype)[:, None, None]
    bound = page_scores(q, *page_bounds(k, 8)).double()
    true = decode_scores(q.double(), k.double(), scale=1.0)
    size = (q.double().abs().sum(-1)[..., 0] * k.double().abs().amax()) * torch.finfo(torch.float32).eps
    loose = 0
    for p in range(12):
        best = true[..., 8 * p : 8 * p + 8].amax(-1)
        assert (bound[..., p] >= best - size).all()
        loose += (bound[..., p] > best + 1e-3).sum()
    assert loose > 0, "and no estimate"


def test_strides_and_same_bits_every_run():
    q, k = draw(100, 24, torch.float16)
    want = page_bounds(k, 8)
    scores = page_scores(q, *want)
    for change in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    ):
        for mine, other in zip(page_bounds(change(k), 8), want):
            assert torch.equal(mine, other)
        assert torch.equal(page_scores(change(q), change(want[0]), want[1]), scores)
        assert torch.equal(page_scores(q, want[0], change(want[1])), scores)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("n", [160, 165])
def test_the_whole_step_is_the_cache(n, share):
    """Bounds, scores, selection and attention over pages by kernels: what `QuestCache` gives."""
    q, k = draw(n, 32, torch.float32, heads=(6, 2))
    v = k.flip(2) / 3
    mechanism = quest.QuestCache(share=share)
    mechanism.append(k, v)
    scores = page_scores(q, *page_bounds(k))
    if share:
        scores = scores.unflatten(1, (2, 3)).amax(2)
    index = quest.select_pages(scores, 4)
    got = sparse_decode(q, k, v, index, page_size=16)
    torch.testing.assert_close(got, mechanism.attend(q, 64), rtol=0, atol=2e-6)
    assert mechanism.read == 64 - (-n % 16)


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        {},
        dict(dtype="fp32", seqlen=64, head_dim=64),
        dict(dtype="bf16", page_size=3, num_heads=6, seqlen=500),
        dict(seqlen=1, num_kv_heads=4),
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    table = quest_traffic.rows(**case)
    assert [row["kernel"] for row in table] == ["_quest_bounds_kernel", "_quest_scores_kernel"]
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


def zeros(*shape, **options):
    return torch.zeros(*shape, device=DEVICE, **options)


BAD = [
    (lambda: page_bounds(zeros(1, 1, 4, 16), 0), "page_size: expected an integer of at least 1, got 0"),
    (lambda: page_bounds(zeros(1, 1, 0, 16)), "k: expected a non-empty float16"),
    (lambda: page_bounds(zeros(1, 4, 16)), "k: expected a non-empty float16"),
    (lambda: page_bounds(zeros(1, 1, 4, 8)), "k: expected a head dimension from 16 to 256, got 8"),
    (lambda: page_bounds(zeros(1, 1, 4, 16).double()), "k: expected a non-empty float16"),
    (lambda: page_bounds(zeros(1, 1, 4, 16, requires_grad=True)), "k: expected a tensor that needs no gradient"),
    (lambda: page_scores(zeros(1, 1, 2, 16), *[zeros(1, 1, 3, 16)] * 2), "q: expected one query"),
    (lambda: page_scores(zeros(1, 3, 1, 16), *[zeros(1, 2, 3, 16)] * 2), "least: expected .1, a divisor of 3"),
    (lambda: page_scores(zeros(1, 1, 1, 16), *[zeros(1, 1, 3, 32)] * 2), "least: expected .1, a divisor of 1"),
    (lambda: page_scores(zeros(1, 1, 1, 16), zeros(1, 1, 2, 16), zeros(1, 1, 3, 16)), "greatest: expected the shape"),
    (lambda: page_scores(zeros(1, 1, 1, 16), *[zeros(1, 1, 3, 16).half()] * 2), "least: expected torch.float32 on"),
    (lambda: quest_traffic.rows(dtype="fp8"), "dtype: expected one of fp16"),
    (lambda: quest_traffic.rows(causal=False), "causal: expected True"),
    (lambda: launches(64, torch.float16, "sm80", window=True), "window: expected False"),
    (lambda: launches(8, torch.float16, "sm80"), "head_dim: expected an integer from 16 to 256, got 8"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_architecture_has_tiles():
    for arch in TABLE:
        for dim in (16, 60, 64, 128, 256):
            tiles = choose_tiles(dim, torch.float16, arch)
        assert [launch.name for launch in launches(64, torch.float16, arch)] == list(tiles._fields)
    assert choose_tiles(64, torch.float16, "sm61") == choose_tiles(64, torch.float16, "sm75")


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """Both kernels; ``effattn xray quest --gpu all`` has the other GPUs and dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("quest", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        what = f"{row['kernel']} on {row['gpu']}: {row['spill_bytes']} bytes"
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_at_real_sizes(dtype):
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    q, k = draw(32768, 128, DTYPES[dtype], heads=(32, 8))
    bounds = page_bounds(k)
    for mine, want in zip(bounds, quest.page_bounds(k)):
        assert torch.equal(mine, want)
    truth = quest.page_scores(q.double(), *(x.double() for x in bounds))
    assert (page_scores(q, *bounds).double() - truth).abs().max() <= 1e-5 * truth.abs().max()
