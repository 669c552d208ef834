"""Elastic Attention's costs, against counting."""

from __future__ import annotations

import pytest
import torch

from effattn_lab.foundations.presets import MODELS, ModelShape
from effattn_lab.sparse import elastic_cost as cost
from effattn_lab.sparse.elastic import AttentionRouter
from effattn_lab.sparse.static_patterns import dense_mask, sinks_and_window


@pytest.mark.parametrize("n", [1, 5, 12, 13, 60])
def test_read_share_by_counting(n):
    pairs = dense_mask(sinks_and_window(2, 10), n, n).sum().item()
    assert cost.read_share(n, 2, 10) == pytest.approx(pairs / (n * (n + 1) / 2))
    assert (cost.read_share(n, 2, 10) == 1) == (n <= 12)


def test_ideal_speedup_of_the_papers_mixture():
    """0.745 of the heads sparse: 2.2 at 8 k, 3.8 at 256 k, never 1 / 0.255."""
    for k, want in ((8, 2.22), (16, 2.81), (32, 3.26), (64, 3.56), (128, 3.73), (256, 3.82)):
        assert cost.ideal_speedup(0.745, 1024 * k) == pytest.approx(want, abs=0.02)
    assert cost.ideal_speedup(0.745, 10**9) < 1 / 0.255
    assert cost.ideal_speedup(1.0, 1152) == pytest.approx(1)
    assert cost.ideal_speedup(0.0, 10**6) == 1


def test_the_reported_speedups_are_those_of_a_whole_prefill():
    """Llama-3.1-8B has the shape of Llama-3-8B: with all its FLOPs counted, both reported curves within 5 %."""
    model = MODELS["Llama-3-8B"]
    curves = {0.745: (1.05, 1.17, 1.34, 1.65, 2.10, 2.54), 0.70: (1.12, 1.17, 1.31, 1.58, 1.96, 2.38)}
    for sparsity, reported in curves.items():
        for k, want in zip((8, 16, 32, 64, 128, 256), reported):
            got = cost.prefill_speedup(sparsity, 1024 * k, model)
            assert got == pytest.approx(want, rel=0.05), (sparsity, k)
            assert got < cost.ideal_speedup(sparsity, 1024 * k)
    n, d = 50, 8
    small = ModelShape("small", 1, 16, 2, 1, d, 32, 10, False, "here")
    weights = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
    dense = 4 * d * n * (n + 1) / 2
    few = 4 * d * dense_mask(sinks_and_window(2, 10), n, n).sum().item()
    want = (2 * n * weights + 2 * dense) / (2 * n * weights + dense + few)
    assert cost.prefill_speedup(0.5, n, small, 2, 10) == pytest.approx(want)


def test_prefill_flops():
    n, d = 50, 8
    dense = 4 * d * n * (n + 1) / 2
    few = 4 * d * dense_mask(sinks_and_window(2, 10), n, n).sum().item()
    assert cost.prefill_flops(n, 4, d, 0.75, 2, 10) == pytest.approx(dense + 3 * few)


def test_router():
    for d, e in ((128, 4), (8, 2)):
        router = AttentionRouter(d, expansion=e)
        assert cost.router_parameters(d, e) == sum(p.numel() for p in router.parameters())
    weights = sum(p.numel() for p in AttentionRouter(16).parameters() if p.dim() == 2)
    assert cost.router_flops(3, 16, boundary=10) == 3 * (2 * weights + 20 * 16)


def test_bad_input_is_named():
    for words, call in (
        ("sparsity: expected a share from 0 to 1, got 1.5", lambda: cost.ideal_speedup(1.5, 10)),
        ("seqlen: expected an integer", lambda: cost.read_share(0)),
        ("sinks: expected an integer of at least 0, got -1", lambda: cost.read_share(5, -1)),
        ("num_heads: expected an integer", lambda: cost.prefill_flops(5, 0, 8, 0.5)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_router_runs_on_pooled_keys():
    """What the count says is all there is: the same logits from the two means."""
    torch.manual_seed(0)
    router = AttentionRouter(8, boundary=2).eval()
    k = torch.randn(1, 2, 9, 8)
    want = router.router(router.task(torch.cat([k[:, :, :2], k[:, :, -2:]], 2).mean(2)))
    torch.testing.assert_close(router(k).logits, want)
