"""Static patterns against brute force, against FlexAttention, and against the counts in closed form."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from effattn_lab.foundations.attention import attention
from effattn_lab.sparse import static_patterns as sp
from effattn_lab.sparse import static_patterns_cost as cost
from effattn_lab.sparse.block_list import BlockList, block_list, block_list_attention

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100)


def brute(rule, n, heads=1):
    """A pattern from a rule for two numbers, by two loops."""
    return torch.tensor([[[rule(h, i, j) for j in range(n)] for i in range(n)] for h in range(heads)])


RULES = {
    "strided": (sp.strided(5), lambda h, i, j: j <= i and (i - j <= 5 or (i - j) % 5 == 0)),
    "strided local": (sp.strided(4, "local"), lambda h, i, j: i - 4 <= j <= i),
    "strided column": (sp.strided(4, "column"), lambda h, i, j: j <= i and (i - j) % 4 == 0),
    "fixed": (sp.fixed(8, 2), lambda h, i, j: j <= i and (i // 8 == j // 8 or j % 8 in (6, 7))),
    "fixed heads": (
        sp.fixed(8, 2, "summary", heads=3),
        lambda h, i, j: j <= i and j % 8 in ((6, 7), (4, 5), (2, 3))[h % 3],
    ),
    "longformer": (
        sp.longformer(6, (0, 9)),
        lambda h, i, j: abs(i - j) <= 3 or i in (0, 9) or j in (0, 9),
    ),
    "longformer dilated": (
        sp.longformer(4, dilation=3),
        lambda h, i, j: i - j in (-6, -3, 0, 3, 6),
    ),
    "dilated": (
        sp.dilated(12, 3, heads=2),
        lambda h, i, j: j <= i and i // 12 == j // 12 and i % 12 % 3 == h % 2 and j % 12 % 3 == h % 2,
    ),
    "sinks and window": (sp.sinks_and_window(3, 7), lambda h, i, j: j <= i and (j < 3 or i - j < 7)),
    "no sinks": (sp.sinks_and_window(0, 7), lambda h, i, j: 0 <= i - j < 7),
    "causal": (sp.causal(), lambda h, i, j: j <= i),
}  # fmt: skip
CAUSAL = ["strided", "strided local", "strided column", "fixed", "dilated", "sinks and window", "no sinks"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n", LENGTHS)
def test_pattern_is_its_rule(name, n):
    mask, rule = RULES[name]
    assert torch.equal(sp.dense_mask(mask, n, n, heads=4), brute(rule, n, 4))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_patterns_hide_the_future_and_show_something(name):
    keep = sp.dense_mask(RULES[name][0], 70, 70, heads=4)
    assert not keep.triu(1).any()
    if name != "dilated":
        assert keep.diagonal(dim1=1, dim2=2).all()


def test_queries_are_the_last_positions():
    whole = sp.dense_mask(sp.strided(5), 40, 40)
    assert torch.equal(sp.dense_mask(sp.strided(5), 7, 40), whole[:, -7:])


def test_bigbird_draws_outside_what_is_seen_anyway():
    n, block, heads = 150, 10, 3
    mask = sp.bigbird(n, block, window=3, random=2, heads=heads, seed=1)
    keep = sp.dense_mask(mask, n, n, heads=heads)
    blocks = keep.view(heads, 15, block, 15, block)
    assert torch.equal(blocks.any(dim=(2, 4)), blocks.all(dim=(2, 4))), "whole blocks"
    blocks = blocks[:, :, 0, :, 0]
    r = torch.arange(15)
    always = ((r[:, None] - r).abs() <= 1) | (r == 0) | (r == 14) | (r[:, None] == 0) | (r[:, None] == 14)
    assert (blocks | ~always).all()
    inner = (blocks & ~always)[:, 1:14]
    assert (inner.sum(-1) == 2).all(), "two random blocks in each row that is not global"
    assert not torch.equal(blocks[0], blocks[1]), "each head draws for itself"
    again = sp.dense_mask(sp.bigbird(n, block, window=3, random=2, heads=heads, seed=1), n, n, heads=heads)
    assert torch.equal(keep, again)
    assert not torch.equal(keep, sp.dense_mask(sp.bigbird(n, block, 3, 2, heads, seed=2), n, n, heads=heads))
    few = sp.dense_mask(sp.bigbird(40, 10, random=3), 40, 40)
    assert few.all(), "where fewer are left than wanted, all are taken"


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("mask", [sp.strided(8), sp.fixed(8, 1)], ids=["strided", "fixed"])
def test_everything_is_reached_in_two_layers_of_the_union(mask, hops):
    """Child et al.: with p = 2 patterns any position reaches any later one in p + 1 steps; the union head in 2."""
    keep = sp.dense_mask(mask, 64, 64)[0].float()
    reached = torch.matrix_power(keep, hops) > 0
    assert reached[torch.ones(64, 64).tril() > 0].all() == (hops == 2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (64, 64), (65, 65), (20, 65), (1, 100)], ids=str)
def test_block_lists_equal_the_reference(name, shape):
    nq, nk = shape
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, nq, 32, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 2, nk, 32, generator=g, dtype=torch.float64) for _ in range(2))
    mask = RULES[name][0]
    want = sp.pattern_attention(q, k, v, mask)
    for bm, bn in ((16, 16), (32, 8), (5, 64)):
        out, lse = block_list_attention(q, k, v, block_list(mask, nq, nk, block_m=bm, block_n=bn, heads=4))
        torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
        keep = sp.dense_mask(mask, nq, nk, heads=4)
        scores = 32**-0.5 * q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)
        torch.testing.assert_close(
            lse, scores.masked_fill(~keep, -math.inf).logsumexp(-1), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", ["strided", "fixed", "sinks and window", "longformer"])
def test_flex_attention_takes_the_same_functions(name):
    """An implementation of its own: PyTorch's FlexAttention, the function handed over as it is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 200, 32, generator=g, dtype=torch.float64) for _ in range(3))
    mask = RULES[name][0]
    theirs = create_block_mask(mask, 1, 2, 200, 200, device="cpu", BLOCK_SIZE=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        want = flex_attention(q, k, v, block_mask=theirs)
    ours = block_list(mask, 200, 200, heads=2)
    torch.testing.assert_close(block_list_attention(q, k, v, ours)[0], want, rtol=0, atol=1e-12)
    assert torch.equal(ours.count, theirs.kv_num_blocks.int() + theirs.full_kv_num_blocks.int())


def test_a_list_reads_only_what_it_names():
    """Keys of tiles that are not listed may be NaN."""
    mask = sp.sinks_and_window(4, 20)
    g = torch.Generator().manual_seed(2)
    q = torch.randn(1, 1, 16, 8, generator=g)
    k, v = (torch.randn(1, 1, 256, 8, generator=g) for _ in range(2))
    blocks = block_list(mask, 16, 256, block_m=16, block_n=16)
    want, _ = block_list_attention(q, k, v, blocks)
    unread = torch.ones(16, dtype=torch.bool)
    unread[blocks.index[0, 0, 0, : blocks.count[0, 0, 0]].long()] = False
    assert unread.sum() > 10
    for x in (k, v):
        x.view(1, 1, 16, 16, 8)[:, :, unread] = math.nan
    assert torch.equal(block_list_attention(q, k, v, blocks)[0], want)


def test_masks_of_tiles_are_kept_once():
    for sinks, window in ((4, 128), (4, 250), (130, 130), (7, 65), (63, 191), (64, 256)):
        few = block_list(sp.sinks_and_window(sinks, window), 1024, 1024).tiles
        assert len(few) <= 6, "sinks, the diagonal, two at the window's edge, and these two with sinks"
    blocks = block_list(sp.sinks_and_window(4, 128), 4096, 4096)
    whole = blocks.tile[0, 0, 40][: blocks.count[0, 0, 40]] == 0
    assert whole.sum() >= 1
    assert blocks.density() == pytest.approx(blocks.count.sum().item() / 64**2)


def test_a_window_as_long_as_the_text_is_full_attention():
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 65, 32, generator=g, dtype=torch.float64) for _ in range(3))
    want = attention(q, k, v, causal=True)
    for mask in (sp.sinks_and_window(0, 65), sp.strided(65), sp.fixed(65, 1), sp.dilated(65, 1)):
        torch.testing.assert_close(sp.pattern_attention(q, k, v, mask), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(sp.dilated_attention(q, k, v, [65], [1]), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("heads", [1, 4])
def test_longnet_is_one_softmax_over_a_multiset(n, heads):
    segments, rates = [8, 16, 64], [1, 2, 4]
    g = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, n, 16, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 2, n, 16, generator=g, dtype=torch.float64) for _ in range(2))
    times = sum(
        sp.dense_mask(sp.dilated(w, r, heads), n, n, heads=4).double() for w, r in zip(segments, rates)
    )
    assert n < 31 or times.max() == 3
    scores = 0.25 * q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)
    weights = times * torch.exp(scores)  # a key seen twice counts twice
    want = weights @ v.repeat_interleave(2, dim=1) / weights.sum(-1, keepdim=True)
    got = sp.dilated_attention(q, k, v, segments, rates, heads=heads)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_longnet_rows_that_nobody_owns_are_zero():
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    out = sp.dilated_attention(q, k, v, [4], [2])
    assert torch.equal(out[:, :, 1::2], torch.zeros(1, 1, 4, 4))
    assert out[:, :, ::2].abs().sum() > 0
    assert torch.equal(sp.pattern_attention(q, k, v, sp.dilated(4, 2))[:, :, 1::2], out[:, :, 1::2])


@pytest.mark.parametrize("name", CAUSAL)
def test_no_future_token_leaks(name):
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 4, 70, 16, generator=g) for _ in range(3))
    blocks = block_list(RULES[name][0], 70, 70, block_m=16, block_n=16, heads=4)
    t = 37
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    for x in (q2, k2, v2):
        x[:, :, t] += 3.0
    a, b = (block_list_attention(*x, blocks)[0] for x in ((q, k, v), (q2, k2, v2)))
    assert torch.equal(a[:, :, :t], b[:, :, :t])
    if name != "dilated":
        assert not torch.equal(a[:, :, t], b[:, :, t])


def test_gradients():
    g = torch.Generator().manual_seed(6)
    q, k, v = (
        torch.randn(1, 2, 11, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    blocks = block_list(sp.fixed(4, 1), 11, 11, block_m=4, block_n=4)
    assert torch.autograd.gradcheck(lambda *x: block_list_attention(*x, blocks)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: sp.dilated_attention(*x, [4, 8], [1, 2]), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_the_ratio_rule(dtype):
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, 100, 32, generator=g).to(dtype) for _ in range(3))
    mask = sp.strided(9)
    want = sp.pattern_attention(q.double(), k.double(), v.double(), mask)
    keep = sp.dense_mask(mask, 100, 100)
    scores = (q @ k.transpose(-1, -2) * 32**-0.5).masked_fill(~keep, -math.inf)
    plain = (scores.softmax(-1) @ v - want).abs().max()
    got, lse = block_list_attention(q, k, v, block_list(mask, 100, 100))
    assert got.dtype == dtype
    assert lse.dtype == torch.float32
    assert (got - want).abs().max() <= 2 * plain


@pytest.mark.parametrize("n", LENGTHS)
def test_pairs_in_closed_form(n):
    def counted(mask):
        return int(sp.dense_mask(mask, n, n).sum())

    for window in (1, 7, 200):
        for sinks in (0, 1, 4, 90):
            assert cost.sinks_and_window_pairs(n, sinks, window) == counted(
                sp.sinks_and_window(sinks, window)
            )
    for stride in (1, 2, 8):
        assert cost.strided_pairs(n, stride) == counted(sp.strided(stride))
    for stride, summary in ((1, 1), (8, 1), (8, 3), (8, 8)):
        own = counted(sp.fixed(stride, summary))
        assert cost.fixed_pairs(n, stride, summary) == own
    for segment, rate in ((1, 1), (16, 1), (16, 4), (16, 5)):
        assert cost.dilated_pairs(n, segment, rate) == counted(sp.dilated(segment, rate))
    for window in (2, 6, 40):
        for g in (0, 1, 5, 300):
            want = counted(sp.longformer(window, tuple(range(min(g, n)))))
            assert cost.longformer_pairs(n, window, g) == want


def test_known_costs():
    assert cost.pair_flops(10, 64) == 2560
    assert cost.best_stride(12_288) == pytest.approx(110.9, abs=0.1)
    # Child et al.: enwik8, 12,288 tokens, blocks of 128 with 32 summary cells.
    share = cost.fixed_pairs(12_288, 128, 32) / (12_288 * 12_289 / 2)
    assert share == pytest.approx(0.2579, abs=0.0001)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sp.strided(0), "stride: expected an integer of at least 1, got 0"),
        (lambda: sp.strided(4, "rows"), "part: expected one of local, column, union, got 'rows'"),
        (lambda: sp.fixed(8, 5, heads=2), "summary: expected heads . summary of at most stride 8, got 2 . 5"),
        (lambda: sp.longformer(3), "window: expected an even number"),
        (lambda: sp.longformer(4, (-1,)), "global_tokens: expected positions of at least 0, got -1"),
        (lambda: sp.bigbird(64, window=2), "window: expected an odd number of blocks, got 2"),
        (lambda: sp.bigbird(64, random=-1), "random: expected an integer of at least 0, got -1"),
        (lambda: sp.dilated(4, 5), "rate: expected at most the segment 4, got 5"),
        (lambda: sp.sinks_and_window(-1, 4), "sinks: expected an integer of at least 0, got -1"),
        (lambda: sp.union(), "masks: expected at least one, got none"),
        (lambda: sp.dense_mask(sp.causal(), 5, 4), "seqlen_q: expected at most seqlen_k 4, got 5"),
        (lambda: block_list(sp.causal(), 5, 4), "seqlen_q: expected at most seqlen_k 4, got 5"),
        (lambda: block_list(sp.causal(), 4, 4, block_n=0), "block_n: expected an integer of at least 1, got 0"),
        (lambda: _attend(5, block_list(sp.causal(), 4, 4)), "blocks: expected a list for lengths 5 and 5"),
        (lambda: _attend(4, block_list(sp.causal(), 4, 4, heads=3)), "blocks: expected 1 or 2 query heads, got 3"),
        (lambda: sp.dilated_attention(*_qkv(4), [4], [1, 2]), "rates: expected one for each of 1 segments"),
        (lambda: sp.dilated_attention(_qkv(3)[0], *_qkv(4)[1:], [4], [1]), "q: expected as many queries as keys"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _qkv(n):
    return tuple(torch.randn(1, 2, n, 8) for _ in range(3))


def _attend(n, blocks: BlockList):
    return block_list_attention(*_qkv(n), blocks)
