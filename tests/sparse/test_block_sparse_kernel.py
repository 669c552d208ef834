"""The Triton kernel over block lists against float64 references; XAttention's scores: test_xattention_kernel.py.

Without a GPU they run in Triton's interpreter (tiles of 32); on a machine with one the same tests run compiled, and
those marked ``gpu`` add sizes that the interpreter is too slow for. The tolerance is a ratio: at most twice the error
of a plain PyTorch run in the same dtype, both against float64. The log-sum-exp has one unit in the last place of its
largest value on top: kernels work in base 2, which costs two more roundings, and one query's plain run may be exact
by luck.
"""

import dataclasses
import math
import sys

import effattn_kernels
import pytest
import torch
from effattn_kernels import block_sparse as kernels
from effattn_kernels._block_sparse_tiles import TABLE, choose_tiles, cut_to_list
from effattn_kernels.block_sparse import (
    block_list_attention,
    launches,
    xattention_scores,
)
from effattn_kernels.flash import flash_attention

from effattn_lab.foundations.attention import attention, lse, repeat_kv
from effattn_lab.measure.block_sparse_traffic import fwd_bytes
from effattn_lab.measure.block_sparse_traffic import rows as traffic_rows
from effattn_lab.sparse import block_sparse as exact
from effattn_lab.sparse import static_patterns as patterns
from effattn_lab.sparse.block_list import BlockList, block_list, causal_block_list, per_query_block_list
from effattn_lab.sparse.block_list import block_list_attention as exact_block_list_attention
from effattn_lab.sparse.nsa import Blocks, nsa_selection

if effattn_kernels.MODE == "unavailable" and sys.platform != "linux":
    pytest.skip("kernels need triton, which exists for Linux only", allow_module_level=True)

DEVICE = torch.device("cuda" if effattn_kernels.MODE == "compiled" else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
interpreter = pytest.mark.skipif(effattn_kernels.MODE != "interpreter", reason="counted in the interpreter")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def fill(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return fill

    monkeypatch.setattr("effattn_kernels.block_sparse.torch.empty", poisoned(empty))
    monkeypatch.setattr("effattn_kernels.block_sparse.torch.empty_like", poisoned(empty_like))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def draw(shape, dtype=torch.float32, spread=3.0, seed=0):
    """q, k, v of ``(B, Hq, Hkv, Nq, Nk, D)`` with spread-out scores: uniform weights would hide most mistakes."""
    batch, hq, hkv, nq, nk, dim = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((hq, nq, spread), (hkv, nk, 1.0), (hkv, nk, 1.0))
    return [(s * torch.randn(batch, h, n, dim, generator=g)).to(DEVICE, dtype) for h, n, s in sizes]


def written_out(blocks, batch, heads):
    """The mask that a list means, bool ``[B, Hq, Nq, Nk]``, entry by entry."""
    m, n = blocks.tiles.shape[1:]
    lines, columns = blocks.count.shape[2], -(-blocks.seqlen_k // n)
    keep = torch.zeros(batch, heads, lines * m, columns * n, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            lb, lh = min(b, blocks.count.shape[0] - 1), min(h, blocks.count.shape[1] - 1)
            for line in range(lines):
                for entry in range(int(blocks.count[lb, lh, line])):
                    column, which = (int(x[lb, lh, line, entry]) for x in (blocks.index, blocks.tile))
                    see = torch.ones(m, n, dtype=torch.bool) if which == 0 else blocks.tiles[which - 1].cpu()
                    if blocks.rows is not None:
                        see = see & blocks.rows[lb, lh, line, entry].cpu()[:, None]
                    keep[b, h, line * m : line * m + m, column * n : column * n + n] |= see
    return keep[:, :, : blocks.seqlen_q, : blocks.seqlen_k].to(DEVICE)


def plain(q, k, v, keep, scale=None):
    """Three lines of PyTorch, every one of them in the dtype of the inputs: the yardstick."""
    k, v = (repeat_kv(x, q.shape[1] // k.shape[1]) for x in (k, v))
    blind = ~keep.any(-1, keepdim=True)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(scores.masked_fill(~keep & ~blind, -math.inf), -1).masked_fill(blind, 0.0) @ v


def assert_rounding_only(name, got, other, truth, units=0):
    """Error at most twice the plain run's, both against float64."""
    got, other = got.double(), other.double()
    assert not got.isnan().any(), f"{name}: NaN (unwritten output?)"
    error = (got - truth).nan_to_num(0.0).abs().max().item()  # -inf - -inf, where both agree
    allowed = 2 * (other - truth).nan_to_num(0.0).abs().max().item()
    allowed += units * torch.finfo(torch.float32).eps * truth.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    assert torch.equal(got.isinf(), truth.isinf()), f"{name}: infinities differ"


def check(x, blocks, *, scale=None):
    """Output and log-sum-exp of one list."""
    q, k, v = x
    keep = written_out(blocks, *q.shape[:2])
    out, rows = block_list_attention(q, k, v, blocks, scale=scale)
    assert (out.dtype, rows.dtype) == (q.dtype, torch.float32)
    wide = [y.double() for y in x]
    assert_rounding_only("out", out, plain(q, k, v, keep, scale), attention(*wide, mask=keep, scale=scale))
    truth = lse(*wide[:2], mask=keep, scale=scale)
    assert_rounding_only("lse", rows, lse(q.float(), k.float(), mask=keep, scale=scale), truth, 1)
    return out, rows


# The interpreter's tile is 32 x 32: 31, 32 and 33 are one less, equal and one more.
@pytest.mark.parametrize("tile", [(32, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 111])
def test_sinks_and_window(length, tile):
    blocks = block_list(patterns.sinks_and_window(4, 20), length, length, block_m=tile[0], block_n=tile[1])
    check(draw((1, 2, 1, length, length, 16)), blocks)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [16, 17, 32, 60, 64, 128, 256], ids=lambda d: f"D{d}")
def test_head_dims(head_dim, dtype):
    blocks = block_list(patterns.strided(7), 40, 40, block_m=32, block_n=32)
    check(draw((1, 1, 1, 40, 40, head_dim), DTYPES[dtype]), blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=lambda h: f"H{h[0]}-{h[1]}")
def test_grouped_heads(heads, dtype):
    check(
        draw((2, *heads, 37, 37, 32), DTYPES[dtype]),
        block_list(patterns.causal(), 37, 37, block_m=16, block_n=32),
    )


PATTERNS = {
    "strided": lambda n: (patterns.strided(9), 1),
    "fixed, two heads": lambda n: (patterns.fixed(16, 4, heads=2), 2),
    "longformer": lambda n: (patterns.longformer(16, (0, 50)), 1),
    "bigbird, two heads": lambda n: (patterns.bigbird(n, 16, random=1, heads=2), 2),
    "dilated, rows without keys": lambda n: (patterns.dilated(64, 4), 1),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_static_patterns(pattern):
    mask, heads = PATTERNS[pattern](100)
    x = draw((1, 2, 1, 100, 100, 16), torch.float16)
    out, rows = check(x, block_list(mask, 100, 100, block_m=32, block_n=32, heads=heads))
    if "without" in pattern:
        assert (out[:, :, 1] == 0).all()
        assert (rows[:, :, 1] == -math.inf).all()


@pytest.mark.parametrize("lengths", [(1, 70), (33, 70), (64, 65)], ids=lambda n: f"Tq{n[0]}-Tk{n[1]}")
def test_different_lengths(lengths):
    """Queries are the last positions; the tiles of the two lie askew."""
    check(
        draw((1, 2, 1, *lengths, 32)),
        block_list(patterns.sinks_and_window(3, 40), *lengths, block_m=16, block_n=32),
    )


@pytest.mark.parametrize("tile", [(128, 128), (48, 80), (16, 128), (64, 16)], ids=str)
def test_tiles_of_the_list_are_cut_to_the_gpus(tile):
    n = 150
    blocks = block_list(patterns.sinks_and_window(2, 50), n, n, block_m=tile[0], block_n=tile[1])
    check(draw((1, 1, 1, n, n, 16)), blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_of_its_own_for_each_sequence_and_head(dtype):
    selected = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    blocks = causal_block_list(selected, 111, 32)
    assert (blocks.count == 0).any(), "some queries see nothing"
    check(draw((2, 4, 2, 111, 111, 32), DTYPES[dtype]), blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [32, 100, 129])
def test_full_list_is_flash(length, dtype):
    """All causal tiles listed: the same numbers as the dense kernel, which visits the same tiles."""
    x = draw((1, 4, 2, length, length, 64), DTYPES[dtype])
    out, rows = check(x, block_list(patterns.causal(), length, length, block_m=32, block_n=32))
    dense, dense_rows = flash_attention(*x, causal=True, return_lse=True)
    eps = torch.finfo(DTYPES[dtype]).eps
    assert (out - dense).abs().max() <= 2 * eps * dense.abs().max()
    assert (rows - dense_rows).abs().max() <= 1e-6 * dense_rows.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 99])
def test_moba(top_k, dtype):
    """Each query its own blocks, through one bit a query and listed tile."""
    x = draw((1, 4, 2, 100, 100, 32), DTYPES[dtype])
    chosen = exact.moba_selection(*x[:2], block_size=32, top_k=top_k)
    for tile in ((32, 32), (64, 16)):
        out, _ = check(x, per_query_block_list(chosen, 32, block_m=tile[0], block_n=tile[1]))
        keep = chosen.repeat_interleave(32, -1)[..., :100]
        truth = attention(*(y.double() for y in x), causal=True, mask=keep)
        assert (out - truth).abs().max() <= 4 * torch.finfo(DTYPES[dtype]).eps * truth.abs().max()


@pytest.mark.parametrize("length", [1, 31, 33, 64])
def test_moba_lengths(length):
    x = draw((2, 2, 1, length, length, 16))
    chosen = exact.moba_selection(*x[:2], block_size=16, top_k=2)
    blocks = per_query_block_list(chosen, 16, block_m=16, block_n=16)
    out, _ = check(x, blocks)
    truth = exact.moba_attention(*(y.double() for y in x), block_size=16, top_k=2)
    assert (out - truth).abs().max() <= 2e-6
    again, _ = exact_block_list_attention(*(y.double() for y in x), blocks)
    torch.testing.assert_close(again, truth, rtol=0, atol=1e-12)


def test_nsa_fine_branch():
    """One choice a KV head and query."""
    x = draw((1, 4, 2, 70, 70, 16))
    sizes = Blocks(length=8, stride=8, select=16, count=3, first=1, local=1, window=16)
    weights = torch.rand(1, 4, 70, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    chosen = nsa_selection(weights, sizes, 2).repeat_interleave(2, dim=1)
    keep = chosen.repeat_interleave(16, -1)[..., :70]
    out, _ = check(x, per_query_block_list(chosen, 16, block_m=32, block_n=16))
    truth = attention(*(y.double() for y in x), causal=True, mask=keep)
    assert (out - truth).abs().max() <= 2e-6


@pytest.mark.parametrize("tile", [(16, 16), (64, 16), (16, 48), (48, 16), (96, 48)], ids=str)
def test_per_query_lists_mean_the_choice(tile):
    g = torch.Generator().manual_seed(3)
    chosen = torch.rand(2, 3, 110, 3, generator=g) < 0.3
    blocks = per_query_block_list(chosen, 48, block_m=tile[0], block_n=tile[1])
    want = chosen.repeat_interleave(48, -1)[..., :110] & torch.ones(110, 110).tril().bool()
    assert torch.equal(written_out(blocks, 2, 3).cpu(), want)
    listed = torch.arange(blocks.index.shape[3]) < blocks.count[..., None]
    assert not blocks.rows[~listed].any()
    assert blocks.rows.any(-1)[listed].all(), "a tile that nobody asks for is not listed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_xattention_by_kernels_alone(dtype):
    """Scores, list and attention: softmax over what was chosen, and at tau = 1 over everything."""
    x = draw((1, 4, 2, 150, 150, 32), DTYPES[dtype])
    scores = xattention_scores(*x[:2], block_size=32, stride=4)
    wide = [y.double() for y in x]
    for tau in (0.5, 1.0):
        selected = exact.select_by_mass(scores, tau)
        out, _ = check(x, causal_block_list(selected, 150, 32))
        keep = selected.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :150, :150]
        truth = attention(*wide, causal=True, mask=keep)
        assert (out - truth).abs().max() <= 4 * torch.finfo(DTYPES[dtype]).eps * truth.abs().max()


def test_unlisted_tiles_are_not_read():
    """NaN in every key and value that no tile lists, in keys alone that one head lists and another does not."""
    length = 160
    q, k, v = draw((1, 1, 1, 1, length, 16))
    blocks = block_list(patterns.sinks_and_window(4, 20), 1, length, block_m=16, block_n=32)
    want, rows = block_list_attention(q, k, v, blocks)
    for y in (k, v):
        y[:, :, 32:128] = math.nan
    got, again = block_list_attention(q, k, v, blocks)
    assert torch.equal(got, want)
    assert torch.equal(rows, again)
    q, k, v = draw((1, 2, 2, 64, 64, 16))
    selected = torch.tensor([[[[1, 0], [0, 1]], [[1, 0], [1, 1]]]]).bool()
    k[:, 0, :32] = math.nan
    out, _ = block_list_attention(q, k, v, causal_block_list(selected, 64, 32))
    assert out[:, 0, 32:].isfinite().all()
    assert out[:, 1].isfinite().all()
    assert out[:, 0, :32].isnan().all()


@pytest.mark.parametrize("token", [1, 31, 32, 47, 69])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_no_leak(dtype, token):
    """Changing token t leaves every output before it as it was, to the bit, and changes its own."""
    before = draw((1, 2, 1, 70, 70, 16), DTYPES[dtype])
    after = [y.clone() for y in before]
    for y in after:
        y[:, :, token] += 3.0

    def moba(q, k, v):
        chosen = exact.moba_selection(q, k, block_size=16, top_k=2)
        return block_list_attention(q, k, v, per_query_block_list(chosen, 16, block_m=32, block_n=16))[0]

    def window(q, k, v):
        blocks = block_list(patterns.sinks_and_window(2, 24), 70, 70, block_m=32, block_n=32)
        return block_list_attention(q, k, v, blocks)[0]

    for fn in (moba, window):
        a, b = fn(*before), fn(*after)
        assert torch.equal(a[:, :, :token], b[:, :, :token])
        assert not torch.equal(a[:, :, token], b[:, :, token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    x = draw((1, 1, 1, 40, 40, 64), DTYPES[dtype], spread=100.0)
    _, rows = check(x, block_list(patterns.causal(), 40, 40, block_m=32, block_n=32), scale=1.0)
    assert rows.abs().max() > 700


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_scale(scale):
    check(draw((1, 2, 1, 40, 40, 16), spread=1.0), block_list(patterns.strided(5), 40, 40, block_m=32, block_n=32),
          scale=scale)  # fmt: skip


def test_strides_and_same_bits_every_run():
    q, k, v = draw((2, 4, 2, 37, 45, 32))
    blocks = block_list(patterns.sinks_and_window(4, 20), 37, 45, block_m=32, block_n=32)
    want = block_list_attention(q, k, v, blocks)[0]
    spaced = dataclasses.replace(
        blocks,
        **{
            n: torch.stack([getattr(blocks, n)] * 2, -1).flatten(-2)[..., ::2]
            for n in ("index", "tile", "tiles")
        },
    )
    for change in (
        lambda y: y,
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: torch.stack([y, y * 0], -1).flatten(-2)[..., ::2],
    ):
        assert torch.equal(block_list_attention(change(q), change(k), change(v), spaced)[0], want)
    shown_twice = block_list_attention(q, *(y.repeat_interleave(2, 1) for y in (k, v)), blocks)[0]
    assert torch.equal(shown_twice, want)


def test_its_own_list_type():
    """The kernels' package has no need of the book's."""
    theirs = block_list(patterns.causal(), 20, 20, block_m=16, block_n=16)
    ours = kernels.BlockList(theirs.index, theirs.count, theirs.tile, theirs.tiles, 20, 20)
    x = draw((1, 1, 1, 20, 20, 16))
    assert torch.equal(
        block_list_attention(*x, ours)[0], block_list_attention(*x, theirs, check_list=False)[0]
    )


# Costs


@interpreter
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dtype": "fp32", "seqlen_q": 1, "seqlen_k": 97},
        {"block_size": 96, "stride": 1, "seqlen_k": 131, "num_heads": 2, "num_kv_heads": 1},
    ],
    ids=str,
)
def test_traffic_is_the_formula(case):
    table = traffic_rows(**case)
    assert [row["what"] for row in table] == ["sinks and window", "MoBA", "all tiles", "blocks", "blocks"]
    for row in table:
        assert row["measured_bytes"] == row["formula_bytes"], row


def test_bytes_follow_the_budget():
    """Twice the prompt: twice the bytes of a window, four times those of everything."""

    def moved(mask, n):
        return fwd_bytes(block_list(mask, n, n, block_m=64, block_n=64), 1, 1, 64, block_m=64, block_n=64)

    window, everything = patterns.sinks_and_window(64, 128), patterns.causal()
    assert 1.9 < moved(window, 4096) / moved(window, 2048) < 2.1
    assert 3.7 < moved(everything, 4096) / moved(everything, 2048) < 4.0


# Bad input


def tensors(**change):
    q, k, v = draw((1, 4, 2, 40, 40, 16))
    return {
        "q": q,
        "k": k,
        "v": v,
        "blocks": block_list(patterns.causal(), 40, 40, block_m=16, block_n=16),
        **change,
    }


def with_list(**change):
    return lambda: {"blocks": dataclasses.replace(tensors()["blocks"], **change)}


def edited(name, value):
    """The list with one entry of one field set."""

    def make():
        blocks = tensors()["blocks"]
        field = getattr(blocks, name).clone()
        field[(0,) * field.dim()] = value
        return {"blocks": dataclasses.replace(blocks, **{name: field})}

    return make


BAD = {
    "rank": (lambda: dict(q=torch.rand(4, 8, 16)), "q: expected 4 dimensions"),
    "float64": (lambda: dict(q=torch.rand(1, 4, 40, 16).double()), "q: expected float16"),
    "head-dim": (
        lambda: dict(zip("qkv", (x[..., :8] for x in draw((1, 4, 2, 40, 40, 16))))),
        "q: expected a head dimension from 16",
    ),
    "scale": (lambda: dict(scale=math.nan), "scale: expected a finite number"),
    "gradient": (lambda: dict(q=draw((1, 4, 2, 40, 40, 16))[0].requires_grad_()), "q: .* needs no gradient"),
    "no-list": (lambda: dict(blocks=None), "blocks: expected index in torch.int32, got NoneType"),
    "int64": (with_list(count=torch.zeros(1, 1, 3).long()), "blocks: expected count in torch.int32, got torch.int64"),
    "lengths": (with_list(seqlen_k=41), "blocks: expected a list for lengths 40 and 40, got 40 and 41"),
    "small-tiles": (with_list(tiles=torch.ones(1, 8, 16).bool()), "multiples of 16, got shape .1, 8, 16."),
    "lines": (with_list(count=torch.ones(1, 1, 2).int()), "blocks: expected count .Bl, Hl, 3."),
    "heads": (with_list(count=torch.ones(1, 3, 3).int()), "blocks: expected 1 or 4 query heads, got 3"),
    "batch": (with_list(count=torch.ones(2, 1, 3).int()), "blocks: expected 1 or 1 sequences, got 2"),
    "index-shape": (with_list(index=torch.zeros(1, 1, 3, 9).int()), "blocks: expected index and tile"),
    "rows": (with_list(rows=torch.ones(1, 1, 3, 3, 8).bool()), "blocks: expected rows in torch.bool of shape"),
    "index": (edited("index", 3), "blocks: expected index from 0 to 2, got 0 to 3"),
    "negative": (edited("index", -1), "blocks: expected index from 0 to 2, got -1 to 2"),
    "count": (edited("count", 4), "blocks: expected count from 0 to 3, got"),
    "tile": (edited("tile", 9), r"blocks: expected tile from 0 to \d, got 0 to 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        block_list_attention(**tensors(**change()))


@pytest.mark.parametrize(
    ("chosen", "options", "words"),
    [
        (torch.ones(1, 1, 40, 2), {}, "chosen: expected bool"),
        (torch.ones(1, 1, 40, 3).bool(), {}, r"chosen: expected bool \[B, Hq, N, ceil"),
        (
            torch.ones(1, 1, 40, 2).bool(),
            {"block_n": 24},
            "block_n: expected a divisor of block_size 32, got 24",
        ),
        (torch.ones(1, 1, 40, 2).bool(), {"block_m": 0}, "block_m: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_choices_are_named(chosen, options, words):
    with pytest.raises(ValueError, match=words):
        per_query_block_list(chosen, 32, **{"block_n": 16, **options})


# Tiles


@pytest.mark.parametrize("arch", sorted({arch for arch, _ in TABLE}))
def test_tile_table_is_complete(arch):
    for dtype in DTYPES.values():
        for head_dim in (16, 60, 64, 128, 256):
            tiles = choose_tiles(head_dim, dtype, arch)
            fwd, scores = cut_to_list(tiles.fwd, 48, 512), tiles.scores
            assert (fwd.block_m, fwd.block_n) == (16, tiles.fwd.block_n)
            sizes = [*fwd[:3], *scores[:4]]
            assert all(n & (n - 1) == 0 for n in sizes), "triton wants powers of two"
            assert min(*fwd[:2], *scores[:3]) >= 16, "tl.dot wants 16"
        assert [launch.name for launch in launches(64, dtype, arch)] == ["fwd", "scores", "mass"]
    assert choose_tiles(64, torch.float16, "sm999") == choose_tiles(64, torch.float16, "sm75")
    with pytest.raises(ValueError, match="head_dim: expected 16 to 256, got 8"):
        launches(8, torch.float16, "sm80")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_shipped_tiles_do_not_spill(dtype):
    """Three GPUs; ``effattn xray block_sparse --gpu all`` has the others. In fp32 no tensor core, that is TF32."""
    from effattn_lab.measure.xray import xray, xray_rows

    for row in xray_rows("block_sparse", gpus="A100,B200,MI300X", head_dims=(64,), dtypes=(dtype,)):
        what = (row["kernel"], row["gpu"])
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        matrices = row["kernel"] != "_block_sparse_mass_kernel" and (
            dtype == "fp16" or row["gpu"] == "MI300X"
        )
        assert (row["tensor_core_instructions"] > 0) == matrices, what
    for gpu, arch, head_dim in (("B200", "sm100", 64), ("A100", "sm80", 128)):
        per_row = launches(head_dim, DTYPES[dtype], arch, per_row=True)[0]
        (one,) = xray(per_row.kernel, per_row.signature, per_row.constexprs, gpu, *per_row.tile[2:])
        assert one.spill_bytes == 0, gpu
        assert (one.tensor_core_instructions > 0) == (dtype == "fp16"), gpu


def gpu_dtypes():
    return ["fp16", "fp32"] + (
        ["bf16"] if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else []
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu_dtypes())
@pytest.mark.parametrize("head_dim", [60, 64, 128], ids=lambda d: f"D{d}")
def test_on_gpu(head_dim, dtype):
    x = draw((1, 4, 2, 1111, 1111, head_dim), DTYPES[dtype])
    scores = xattention_scores(*x[:2])
    check(x, causal_block_list(exact.select_by_mass(scores, 0.8), 1111, 128))
    chosen = exact.moba_selection(*x[:2], block_size=128, top_k=3)
    check(x, per_query_block_list(chosen, 128))


def test_same_list_type_as_the_book():
    """Every field of the book's list is one of the kernels'."""
    ours = {f.name for f in dataclasses.fields(kernels.BlockList)}
    assert {f.name for f in dataclasses.fields(BlockList)} == ours
