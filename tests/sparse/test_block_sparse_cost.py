"""Costs of choosing blocks, against pairs that are counted one by one."""

from __future__ import annotations

import math

import pytest
import torch

from effattn_lab.sparse import block_sparse_cost as cost
from effattn_lab.sparse import nsa
from effattn_lab.sparse.block_sparse import antidiagonal_scores, moba_selection

LENGTHS = pytest.mark.parametrize("n", [1, 7, 8, 9, 40, 65])


@LENGTHS
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_antidiagonal_products(n, stride):
    """Every tile that is not in the future takes ``S`` products of ``D`` numbers."""
    tiles = antidiagonal_scores(*torch.zeros(2, 1, 1, n, 2), stride=stride).shape[-1]
    shown = sum(m <= i for i in range(tiles) for m in range(tiles))
    assert cost.antidiagonal_flops(n, 5, stride) == shown * stride * 2 * 5


@LENGTHS
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_moba_pairs(n, top_k):
    q, k = torch.randn(2, 1, 1, n, 4, generator=torch.Generator().manual_seed(n))
    keep = moba_selection(q, k, block_size=8, top_k=top_k)[0, 0].repeat_interleave(8, dim=-1)[:, :n].tril()
    assert cost.moba_pairs(n, 8, top_k) == int(keep.sum())
    gates = sum(i // 8 for i in range(n))
    assert cost.moba_gate_flops(n, 4, 8) == 2 * 4 * gates + 4 * n
    assert cost.moba_flops(n, 4, 8, top_k) == cost.moba_gate_flops(n, 4, 8) + 4 * 4 * int(keep.sum())


@LENGTHS
def test_nsa_pairs(n):
    small = nsa.Blocks(length=8, stride=4, select=16, count=3, first=1, local=1, window=10)
    q, k = torch.randn(2, 1, 1, n, 4, generator=torch.Generator().manual_seed(n))
    p = nsa.compressed_weights(q, nsa.compress(k, small), small)
    chosen = nsa.nsa_selection(p, small, 1)[0, 0].repeat_interleave(16, dim=-1)[:, :n].tril()
    near = sum(min(t + 1, 10) for t in range(n))
    assert cost.nsa_pairs(n, small) == (int((p > 0).sum()), int(chosen.sum()), near)


def test_known_costs():
    # XAttention: the choice is 1 / (2 S) of causal attention, whatever the length.
    for n in (8192, 131_072):
        assert cost.antidiagonal_flops(n, 128, 8) / cost.full_flops(n, 128) == pytest.approx(1 / 16, rel=0.01)
        assert cost.pooled_flops(n, 128, 64) < 0.01 * cost.antidiagonal_flops(n, 128, 8)
    # NSA's paper counts t / d compressed tokens and has 4.0, 6.4, 9.1 and 11.6 times fewer tokens.
    for k, ratio in ((8, 4.0), (16, 6.4), (32, 9.1), (64, 11.6)):
        assert k * 1024 / cost.nsa_tokens(k * 1024) == pytest.approx(ratio, rel=0.01)
    # From about 49 K tokens on its coarse branch is the larger part of the work.
    for n, coarse_leads in ((32_768, False), (65_536, True)):
        coarse, fine, near = cost.nsa_pairs(n)
        assert (coarse > fine + near) == coarse_leads


def test_short_texts():
    assert cost.nsa_tokens(20) == 40  # no whole compressed block; all selected; all in the window
    assert cost.moba_pairs(5, 8, 3) == 15
    assert cost.moba_decode_bytes(5, 1, 8, 3, 1) == 1 + 10
    assert cost.full_decode_bytes(5, 1, 1) == 10
    assert cost.nsa_decode_bytes(8192, 1, itemsize=1) == 2 * cost.nsa_tokens(8192)
    assert cost.vertical_slash_flops(6, 1, 1, 2, last=4) == 2 * 4 * 6 + 4 * (1 + 2 + 3 * 4)
    assert cost.xattention_flops(64, 4, 1.0) == cost.antidiagonal_flops(64, 4) + cost.full_flops(64, 4)
    assert cost.full_flops(3, 1) == 4 * 6
    assert math.isclose(
        cost.xattention_flops(64, 4, 0.25, 4) - cost.antidiagonal_flops(64, 4, 4), cost.full_flops(64, 4) / 4
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cost.full_flops(0, 8), "seqlen: expected an integer of at least 1, got 0"),
        (lambda: cost.antidiagonal_flops(8, 8, 0), "stride: expected"),
        (lambda: cost.xattention_flops(8, 8, 0.0), "density: expected a share above 0 and up to 1, got 0.0"),
        (lambda: cost.expected_hit_rate(8, 64, 1.0), "share: expected a number between 0 and 1, got 1.0"),
        (lambda: cost.moba_pairs(8, 8, 0), "top_k: expected"),
        (lambda: cost.vertical_slash_flops(8, 8, 0, 1), "columns: expected"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
