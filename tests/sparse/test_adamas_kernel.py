"""The Triton kernels of Adamas: codes and distances exactly, decode over a list against float64, traffic, bad input.

Without a GPU they run in Triton's interpreter; on a machine with one the same tests run compiled. Codes and distances
are integers, and equal. Of the decode kernel the tolerance is a ratio: at most twice the error of a plain PyTorch run
in the same dtype, both against float64, plus one rounding of the largest number.
"""

import itertools
import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels._adamas_tiles import TABLE, choose_tiles
from effattn_kernels.adamas import code_distances, encode, launches, sparse_decode

from effattn_lab.foundations.attention import attention, repeat_kv
from effattn_lab.measure import adamas_traffic, sparse_decode_traffic
from effattn_lab.sparse import adamas, cache, codes

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN or as the least integer: what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(torch.iinfo(x.dtype).min)

    monkeypatch.setattr("effattn_kernels.adamas.torch.empty", poisoned)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def matrix(dim):
    """Sylvester's, entries 1 and -1, by its definition."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < dim:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# ---- codes


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_pytorch_and_of_the_matrix(dim, dtype):
    x = 9 * random(1, 3, 33, dim, dtype=DTYPES[dtype])
    got = encode(x)
    assert torch.equal(got, adamas.encode(x)), "the same additions in the same order"
    true = x.double().cpu() @ matrix(dim) / dim**0.5
    mine = codes.unpack(got.cpu()).int()
    assert torch.unique(mine).numel() == 4
    # The rounding of a number near 10, and of sums of up to 256 numbers in float32.
    error = 16 * torch.finfo(DTYPES[dtype]).eps + 1e-4
    assert true.abs().max() < 60
    want = sum((true > t).int() for t in (-10, 0, 10))
    doubt = torch.stack([(true - t).abs() < error for t in (-10, 0, 10)]).any(0)
    assert torch.equal(mine[~doubt], want[~doubt])
    assert doubt.double().mean() < 0.05


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_numbers_of_rows(rows):
    x = 9 * random(rows, 32, seed=rows)
    assert torch.equal(encode(x), adamas.encode(x))


@pytest.mark.parametrize("options", [{"transform": False}, {"thresholds": (-0.7, 0.1, 0.7)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_of_encode(options, dtype):
    x = random(2, 3, 40, 64, dtype=DTYPES[dtype])
    x[0, 0, 0, :8] = 0.7  # on a threshold, as the dtype rounds it
    assert torch.equal(encode(x, **options), adamas.encode(x, **options))


def test_shapes_and_strides_of_encode():
    x = 9 * random(2, 2, 3, 10, 32)
    want = adamas.encode(x)
    assert torch.equal(encode(x), want), "five dimensions"
    assert torch.equal(encode(x[0, 0, 0, 0]), want[0, 0, 0, 0]), "one vector"
    assert torch.equal(encode(x[0].transpose(0, 2)), want[0].transpose(0, 2)), "moved heads"
    wide = torch.stack([x[0], 0 * x[0]], -1).flatten(-2)
    assert torch.equal(encode(wide[..., ::2]), want[0]), "every other column"


def test_numbers_that_are_none():
    x = random(3, 16)
    x[0, 3], x[1, 5], x[2, 7] = math.nan, math.inf, -math.inf
    assert torch.equal(encode(x), adamas.encode(x))
    assert encode(x)[0].item() == 0, "NaN is below every threshold, and the transform spreads it"
    assert torch.equal(encode(x, transform=False), adamas.encode(x, transform=False))


# ---- distances


def random_codes(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, shape, generator=g, dtype=torch.uint8)


def test_distance_of_all_pairs_at_every_place():
    """A query code x at one place, in its batch, against keys with 0, 1, 2, 3 there."""
    queries = list(itertools.product(range(16), range(4)))
    a, b = torch.zeros(64, 1, 1, 16, dtype=torch.uint8), torch.zeros(64, 1, 4, 16, dtype=torch.uint8)
    for row, (place, x) in enumerate(queries):
        a[row, 0, 0, place] = x
        b[row, 0, :, place] = torch.arange(4)
    packed = codes.pack(a).to(DEVICE), codes.pack(b).to(DEVICE)
    got = code_distances(*packed)[:, 0]
    assert got.tolist() == [[abs(x - y) for y in range(4)] for _, x in queries]
    other = code_distances(*packed, estimator="released")[:, 0]
    assert other.tolist() == [[3 if {x, y} == {1, 2} else abs(x - y) for y in range(4)] for _, x in queries]


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("dim", [16, 64, 256])
def test_distances_against_brute_force(n, dim):
    a, b = random_codes(2, 6, 1, dim, seed=n), random_codes(2, 2, n, dim, seed=n + 1)
    got = code_distances(codes.pack(a).to(DEVICE), codes.pack(b).to(DEVICE))
    assert (got.dtype, got.shape) == (torch.int16, (2, 6, n))
    want = (a.int() - b.int().repeat_interleave(3, dim=1)).abs().sum(-1)
    assert torch.equal(got.cpu().int(), want)
    assert torch.equal(got, adamas.code_distances(codes.pack(a).to(DEVICE), codes.pack(b).to(DEVICE)))


def test_the_largest_distances():
    """All words full: the sums within a word come as high as they can, and the sign bit is set."""
    low, high = torch.zeros(1, 1, 1, 256, dtype=torch.uint8), torch.full((1, 1, 5, 256), 3, dtype=torch.uint8)
    assert code_distances(codes.pack(low).to(DEVICE), codes.pack(high).to(DEVICE)).tolist() == [
        [[3 * 256] * 5]
    ]
    assert code_distances(codes.pack(high[:, :, :1]).to(DEVICE), codes.pack(low).to(DEVICE)).item() == 3 * 256


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (8, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("estimator", ["l1", "released"])
def test_groups_and_a_longer_cache(heads, estimator):
    """A cache with room to spare: the codes are a view into it, the rest is not looked at."""
    hq, hkv = heads
    a = codes.pack(random_codes(2, hq, 1, 64)).to(DEVICE)
    room = codes.pack(random_codes(2, hkv, 400, 64, seed=1)).to(DEVICE)
    got = code_distances(a, room[:, :, 30:300], estimator=estimator)
    assert torch.equal(got, adamas.code_distances(a, room[:, :, 30:300].contiguous(), estimator=estimator))
    swapped = room.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(got, code_distances(a, swapped[:, :, 30:300], estimator=estimator))


# ---- attention over a list


def draw(n, dim, dtype, *, heads=(4, 2), batch=2, seed=0):
    """Scores are spread out: a wrong token shows."""
    q = 3 * random(batch, heads[0], 1, dim, seed=seed)
    k, v = random(batch, heads[1], n, dim, seed=seed + 1), random(batch, heads[1], n, dim, seed=seed + 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def lists(count, n, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(n, generator=g)[:count] for _ in range(shape[0] * shape[1])]
    return torch.stack(rows).view(*shape, -1).to(DEVICE)


def tokens_of(index, valid, page, n, num_heads):
    """bool ``[B, Hq, n]``: what is read, by loops."""
    chosen = torch.zeros(index.shape[0], index.shape[1], n, dtype=torch.bool)
    for b, h, i in itertools.product(*(range(s) for s in index.shape)):
        if (valid is None or valid[b, h, i]) and index[b, h, i] >= 0:
            chosen[b, h, int(index[b, h, i]) * page : int(index[b, h, i] + 1) * page] = True
    return chosen.repeat_interleave(num_heads // index.shape[1], dim=1).to(DEVICE)


def plain(q, k, v, chosen, scale):
    """Every step in the dtype of q."""
    groups = q.shape[1] // k.shape[1]
    s = (q @ repeat_kv(k, groups).mT) * scale
    s = s.masked_fill(~chosen[:, :, None], float("-inf"))
    return torch.softmax(s, -1).nan_to_num() @ repeat_kv(v, groups)


def check(q, k, v, index, *, valid=None, page_size=1, scale=None):
    chosen = tokens_of(index, valid, page_size, k.shape[2], q.shape[1])
    got = sparse_decode(q, k, v, index, valid=valid, page_size=page_size, scale=scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    exact = [x.double() for x in (q, k, v)]
    truth = attention(*exact, mask=chosen[:, :, None], scale=scale).nan_to_num()
    efficient = cache.sparse_decode(*exact, index, valid=valid, page_size=page_size, scale=scale)
    torch.testing.assert_close(efficient, truth, rtol=0, atol=1e-12)
    assert got.dtype == q.dtype
    assert got.shape == q.shape
    assert not got.isnan().any(), "unwritten output?"
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (plain(q, k, v, chosen, scale).double() - truth).abs().max().item()
    allowed += torch.finfo(q.dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    return got


# One tile and one split less, equal, one more: the interpreter's are 64 and 256 tokens.
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 255, 256, 257, 700])
def test_lengths_of_lists(count):
    q, k, v = draw(700, 32, torch.float32)
    check(q, k, v, lists(count, 700, (2, 4), seed=count))


@pytest.mark.parametrize("dim", [16, 60, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dimensions(dim, dtype):
    q, k, v = draw(150, dim, DTYPES[dtype], seed=dim)
    check(q, k, v, lists(90, 150, (2, 4)))


@pytest.mark.parametrize("page", [1, 2, 16, 64, 128])
@pytest.mark.parametrize("per_group", [False, True], ids=["own lists", "shared lists"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_and_shared_lists(dtype, per_group, page):
    """The last page is never whole. Pages of 128 are two of the interpreter's tiles."""
    n = 301 if page < 64 else 701
    q, k, v = draw(n, 32, DTYPES[dtype], heads=(6, 2))
    pages = -(-n // page)
    index = lists(max(1, pages // 2), pages - 1, (2, 2 if per_group else 6), seed=page)
    index[:, :, 0] = pages - 1
    check(q, k, v, index, page_size=page)


@pytest.mark.parametrize("page", [1, 16, 64])
def test_entries_that_do_not_count(page):
    """Marked, negative, past the end; a list of nothing gives 0, and so may a split among others."""
    q, k, v = draw(640, 32, torch.float32)
    pages = 640 // page
    index = lists(pages, pages, (2, 4))
    valid = torch.rand(index.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) < 0.5
    valid[0, 1] = False
    valid[1, 2, : pages // 2] = False  # the whole first split
    index[0, 2, ::3] = -1
    index[1, 3, ::2] = pages + 7
    got = check(q, k, v, index, valid=valid, page_size=page)
    assert (got[0, 1] == 0).all()
    assert (got[1, 2] != 0).all()
    assert (sparse_decode(q, k, v, torch.full_like(index, -1), page_size=page) == 0).all()


@pytest.mark.parametrize("page", [1, 16])
def test_what_is_not_named_is_not_read(page):
    """NaN everywhere else: one product of it would reach the output."""
    q, k, v = draw(320, 32, torch.float16)
    index = lists(4 * 16 // page, 160 // page, (2, 2), seed=3)
    want = sparse_decode(q, k, v, index, page_size=page)
    hidden = ~tokens_of(index, None, page, 320, 2)
    k[hidden], v[hidden] = math.nan, math.nan
    assert torch.equal(sparse_decode(q, k, v, index, page_size=page), want)


def test_all_tokens_are_full_attention_and_one_is_its_value():
    for dtype in DTYPES.values():
        q, k, v = draw(333, 64, dtype, heads=(9, 3))
        everything = torch.arange(333, device=DEVICE).expand(2, 3, -1)
        truth = attention(q.double(), k.double(), v.double())
        got = check(q, k, v, everything)
        assert (got.double() - truth).abs().max() <= 8 * torch.finfo(dtype).eps
        last = sparse_decode(q, k, v, torch.full((2, 3, 1), 332, device=DEVICE))
        assert torch.equal(last, v[:, :, -1:].repeat_interleave(3, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_scale(dtype):
    """Scores of thousands: exponentials would overflow without the running maximum, and without the merge's."""
    q, k, v = draw(600, 32, DTYPES[dtype])
    check(100 * q, k, v, lists(600, 600, (2, 4)))
    check(q, k, v, lists(300, 600, (2, 2)), scale=-0.3)
    check(q, k, v, lists(300, 600, (2, 2)), scale=0.0)


def test_a_token_named_twice_counts_twice():
    q, k, v = draw(50, 16, torch.float32)
    once = torch.arange(10, device=DEVICE).expand(2, 4, -1)
    twice = torch.cat([once, once[..., :4]], -1)
    got = sparse_decode(q, k, v, twice)
    more = [torch.cat([x[:, :, :10], x[:, :, :4]], 2) for x in (k, v)]
    torch.testing.assert_close(got, attention(q, *more), rtol=0, atol=1e-6)


def test_strides_batches_and_runs_give_the_same_bits():
    q, k, v = draw(400, 24, torch.float16, batch=3)
    index = lists(270, 400, (3, 4))
    want = sparse_decode(q, k, v, index)
    for change in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    ):
        moved = index.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(sparse_decode(change(q), change(k), change(v), moved), want)
    alone = sparse_decode(q[1:2], k[1:2], v[1:2], index[1:2])
    assert torch.equal(alone, want[1:2]), "whatever else is in the batch"


@pytest.mark.parametrize("share", [False, True])
def test_the_whole_step_is_the_cache(share):
    """Codes, distances, selection and attention by kernels: what `AdamasCache` gives."""
    q, k, v = draw(400, 64, torch.float32, heads=(6, 2))
    q, k = 4 * q, 8 * k  # so that all codes occur; scores of thousands would show nothing but their rounding
    mechanism = adamas.AdamasCache(share=share, scale=2**-8)
    mechanism.append(k, v)
    distance = code_distances(encode(q), encode(k))
    assert torch.equal(distance, mechanism.distances(q))
    if share:
        distance = distance.unflatten(1, (2, 3)).amin(2)
    index = adamas.select_nearest(distance, 40)
    got = sparse_decode(q, k, v, index, scale=2**-8)
    torch.testing.assert_close(got, mechanism.attend(q, 40), rtol=0, atol=2e-6)


# ---- traffic


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        {},
        dict(share=True, page_size=16, budget=320, dtype="bf16"),
        dict(share=True, page_size=128, budget=384),
        dict(valid=True, budget=100, dtype="fp32", num_heads=3, num_kv_heads=1),
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    table = adamas_traffic.rows(**case)
    kernels = ["encode", "distances", "decode", "merge"][: len(table)]
    assert [row["kernel"] for row in table] == [f"_adamas_{name}_kernel" for name in kernels]
    assert len(table) == (3 if "valid" in case else 4), "one split needs no merge"
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


@interpreter
def test_the_table_of_methods_is_counted_and_predicted():
    case = dict(seqlen=500, budgets=(64, 272), num_heads=4, num_kv_heads=2, head_dim=32)
    counted = sparse_decode_traffic.rows(**case)
    assert counted == sparse_decode_traffic.predicted_rows(**case, arch="interpreter")
    assert [row["method"] for row in counted[::2]] == [*sparse_decode_traffic.METHODS]
    assert counted[0]["of_full_percent"] == 100


def test_what_the_table_says_of_llama_at_32k():
    """The formulas' leading terms: a sixteenth to scan, k / N to attend, and all GPUs ask for the same."""
    table = {(r["method"], r["budget"]): r for r in sparse_decode_traffic.predicted_rows()}
    full = table["full", 32768]["total_bytes"]
    assert full == pytest.approx(4 * 128 * 32 * 32768, rel=0.02), "keys and values once"
    for budget in (64, 256, 1024, 4096):
        row = table["adamas", budget]
        assert row["scan_bytes"] / full == pytest.approx(1 / 16 + 2 / 512, rel=0.04)
        assert row["attend_bytes"] / full == pytest.approx(budget / 32768, rel=0.05)
        quest = table["quest", budget]
        assert quest["scan_bytes"] / full == pytest.approx(1 / 16 + 4 / 16 / 512, rel=0.04)
        assert quest["total_bytes"] < row["total_bytes"] < full / 4
    for arch in ("sm75", "sm89", "sm90", "sm100", "sm120", "gfx942", "interpreter"):
        assert sparse_decode_traffic.predicted_rows(arch=arch) == list(table.values()), arch


def test_sharing_a_list_saves_the_group():
    """Llama-3-8B's heads: own lists attend to up to four times the bytes of a shared one."""
    table = sparse_decode_traffic.predicted_rows(num_heads=32, num_kv_heads=8, budgets=(1024,))
    attend = {r["method"]: r["attend_bytes"] for r in table}
    for method in ("quest", "adamas"):
        assert attend[method] / attend[f"{method} shared"] == pytest.approx(4, rel=0.06)


# ---- bad input, tiles


def tensors(**change):
    q, k, v = draw(8, 16, torch.float32)
    return {"q": q, "k": k, "v": v, "index": torch.zeros(2, 4, 3, dtype=torch.int64, device=DEVICE), **change}


WORDS = torch.zeros(1, 2, 1, 4, dtype=torch.int32)
BAD = [
    (lambda: encode(torch.zeros(2, 48)), "x: expected a last axis of 16, 32, 64, 128, 256, got shape"),
    (lambda: encode(torch.zeros(2, 16).double()), "x: expected a non-empty float16"),
    (lambda: encode(torch.zeros(0, 16)), "x: expected a non-empty float16"),
    (lambda: encode(torch.zeros(2, 16), thresholds=(1, 0, 2)), "thresholds: expected three ascending"),
    (lambda: encode(torch.zeros(2, 16), thresholds=(0, 1)), "thresholds: expected three ascending"),
    (lambda: code_distances(WORDS, WORDS, estimator="l2"), "estimator: expected one of l1, released, got 'l2'"),
    (lambda: code_distances(WORDS, WORDS.long()), "k_codes: expected a non-empty int32"),
    (lambda: code_distances(WORDS[..., :3], WORDS[..., :3]), "q_codes: expected one query"),
    (lambda: code_distances(WORDS.expand(1, 2, 3, 4), WORDS), "q_codes: expected one query"),
    (lambda: code_distances(WORDS, WORDS.expand(3, 2, 1, 4)), "k_codes: expected .1, a divisor of 2"),
    (lambda: code_distances(WORDS[:, :1], WORDS), "k_codes: expected .1, a divisor of 1"),
    (lambda: sparse_decode(**tensors(q=torch.zeros(2, 4, 2, 16))), "q: expected one query"),
    (lambda: sparse_decode(**tensors(k=torch.zeros(2, 2, 8, 16).half())), "k: expected the dtype of q"),
    (lambda: sparse_decode(**tensors(index=torch.zeros(2, 4, 3).int())), "index: expected an int64"),
    (lambda: sparse_decode(**tensors(index=torch.zeros(2, 3, 3).long())), "index: expected .2, 4 or 2, n"),
    (lambda: sparse_decode(**tensors(index=torch.zeros(2, 4, 0).long())), "index: expected .2, 4 or 2, n"),
    (lambda: sparse_decode(**tensors(valid=torch.zeros(2, 4, 3))), "valid: expected bool of the shape"),
    (lambda: sparse_decode(**tensors(valid=torch.zeros(2, 4, 2).bool())), "valid: expected bool of the shape"),
    (lambda: sparse_decode(**tensors(page_size=12)), "page_size: expected a power of two, got 12"),
    (lambda: sparse_decode(**tensors(scale="x")), "scale: expected a finite number"),
    (lambda: sparse_decode(**tensors(v=torch.zeros(2, 2, 8, 16, requires_grad=True))), "v: expected a tensor that"),
    (lambda: adamas.code_distances(WORDS, WORDS.long()), "k_codes: expected a non-empty int32"),
    (lambda: adamas.code_distances(WORDS, WORDS, estimator=""), "estimator: expected one of l1"),
    (lambda: adamas.code_distances(WORDS.expand(1, 2, 3, 4), WORDS), "q_codes: expected one query"),
    (lambda: adamas.code_distances(WORDS, WORDS.expand(3, 2, 1, 4)), "k_codes: expected .1, a divisor of 2"),
    (lambda: cache.sparse_decode(**tensors(q=torch.zeros(2, 4, 2, 16))), "q: expected one query"),
    (lambda: cache.sparse_decode(**tensors(index=torch.zeros(2, 3, 3).long())), "index: expected .2, 4 or 2"),
    (lambda: cache.sparse_decode(**tensors(index=torch.zeros(2, 4, 3).int())), "index: expected int64"),
    (lambda: cache.sparse_decode(**tensors(valid=torch.zeros(2, 4, 3))), "valid: expected bool"),
    (lambda: cache.sparse_decode(**tensors(page_size=0)), "page_size: expected an integer of at least 1"),
    (lambda: sparse_decode_traffic.rows(budgets=(40,)), "budgets: expected multiples of 16"),
    (lambda: sparse_decode_traffic.predicted_rows(methods=("best",)), "methods: expected some of full"),
    (lambda: adamas_traffic.rows(dtype="fp8"), "dtype: expected one of fp16"),
    (lambda: adamas_traffic.rows(causal=False), "causal: expected True"),
    (lambda: launches(64, torch.float16, "sm80", window=True), "window: expected False"),
    (lambda: launches(96, torch.float16, "sm80"), "head_dim: expected one of 16, 32"),
]  # fmt: skip


@interpreter
@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_architecture_has_tiles():
    for arch, size in TABLE:
        dtype = torch.float32 if size == 4 else torch.float16
        for dim in (16, 60, 64, 128, 256):
            tiles = choose_tiles(dim, dtype, arch)
            assert tiles.decode.split % tiles.decode.block == 0
        assert [launch.name for launch in launches(64, dtype, arch)] == list(tiles._fields)
    assert choose_tiles(64, torch.float16, "sm61") == choose_tiles(64, torch.float16, "sm75")


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """All four kernels; ``effattn xray adamas --gpu all`` has the other GPUs and dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("adamas", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        what = f"{row['kernel']} on {row['gpu']}: {row['spill_bytes']} bytes"
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_compiled_at_real_sizes(dim, dtype):
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    q, k, v = draw(32768, dim, DTYPES[dtype], heads=(32, 8))
    q, k = 4 * q, 8 * k
    assert torch.equal(encode(k), adamas.encode(k))
    distance = code_distances(encode(q), encode(k))
    assert torch.equal(distance, adamas.code_distances(encode(q), encode(k)))
    index = adamas.select_nearest(distance, 1024)
    got = sparse_decode(q, k, v, index)
    truth = cache.sparse_decode(q.double(), k.double(), v.double(), index)
    assert (got.double() - truth).abs().max() <= 16 * torch.finfo(DTYPES[dtype]).eps * truth.abs().max()
    assert torch.equal(sparse_decode(q, k, v, index), got), "the same bits"
