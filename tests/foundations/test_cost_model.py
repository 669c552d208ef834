"""The cost formulas against counting, and against the figures that are known."""

import numpy as np
import pytest
import sympy as sp

from effattn_lab.foundations import cost_model as cm
from effattn_lab.foundations.attention import visible
from effattn_lab.measure.roofline import GPUS, predict


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (5, 5), (2, 7), (7, 2), (1, 9)])
def test_pairs_are_counted(nq, nk, causal):
    assert cm.visible_pairs(nq, nk, causal) == int(visible(nq, nk, causal=causal).sum())
    assert cm.attention_flops(2, 3, nq, nk, 8, causal) == 4 * 2 * 3 * 8 * cm.visible_pairs(nq, nk, causal)


def test_pairs_of_numbers_that_are_no_int():
    """More queries than keys: floats (and numpy's integers) once took the branch of the symbols, and came out low."""
    assert cm.visible_pairs(7.0, 2.0, causal=True) == cm.visible_pairs(7, 2, causal=True) == 3
    assert cm.visible_pairs(np.int64(7), np.int64(2), causal=True) == 3


def test_symbols_go_through():
    n, d = sp.symbols("N D", positive=True)
    flops = cm.attention_flops(1, 1, n, n, d)
    assert sp.simplify(flops - 4 * n**2 * d) == 0
    naive = cm.intensity(flops, cm.naive_bytes(1, 1, 1, n, n, d))
    assert sp.limit(naive, n, sp.oo) == d / 2
    flash = cm.intensity(flops, cm.flash_bytes(1, 1, 1, n, n, d))
    assert sp.limit(sp.limit(flash / n, d, sp.oo), n, sp.oo) == sp.Rational(1, 2)
    causal = cm.attention_flops(1, 1, n, n, d, causal=True)
    assert sp.limit(causal / flops, n, sp.oo) == sp.Rational(1, 2)


def test_decode_intensity_is_the_group_size():
    h, g, n, d = sp.symbols("H g N D", positive=True)
    ratio = cm.intensity(cm.decode_flops(1, h * g, n, d), cm.decode_bytes(1, h * g, h, n, d))
    assert sp.limit(ratio, n, sp.oo) == g


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "per_token"),
    [(32, 32, 128, 512 * 1024), (32, 8, 128, 128 * 1024), (80, 8, 128, 320 * 1024), (32, 1, 128, 16 * 1024)],
    ids=["llama2-7b", "llama3-8b", "llama3-70b", "mqa"],
)
def test_cache_of_known_models(layers, heads, dim, per_token):
    assert cm.kv_cache_bytes(layers, heads, dim, 1) == per_token


def test_mla_cache_of_deepseek():
    assert cm.mla_cache_bytes(60, 512, 64, 1) == 34_560 * 2
    assert cm.mla_cache_bytes(61, 512, 64, 131_072) / 2**30 == pytest.approx(8.58, abs=0.01)


def test_mla_decode_is_near_the_ridge():
    flops, nbytes = cm.mla_decode_flops(1, 128, 4096, 512, 64), cm.mla_cache_bytes(1, 512, 64, 4096)
    assert cm.intensity(flops, nbytes) == pytest.approx(128 * (576 + 512) / 576)
    assert 240 < cm.intensity(flops, nbytes) < GPUS["H100"].ridge


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("nq", "nk", "bm", "bn"), [(8, 8, 4, 2), (7, 13, 4, 4), (13, 7, 4, 4), (1, 1, 16, 16)]
)
def test_keys_read_counts_visible_tiles(nq, nk, bm, bn, causal):
    """A key tile is read by a query tile exactly when some pair in it is visible."""
    keep = visible(nq, nk, causal=causal)
    want = sum(
        min(bn, nk - j)
        for i in range(0, nq, bm)
        for j in range(0, nk, bn)
        if keep[i : i + bm, j : j + bn].any()
    )
    assert cm.keys_read(nq, nk, bm, bn, causal) == want


def test_tiled_bytes_approach_the_minimum_with_one_tile():
    one = cm.flash_tiled_bytes(2, 3, 3, 100, 100, 64, 2, block_m=128, block_n=128)
    assert one == cm.flash_bytes(2, 3, 3, 100, 100, 64, 2)


def test_backward_is_two_and_a_half_forwards():
    assert cm.attention_backward_flops(1, 1, 64, 64, 16) == 5 * cm.attention_flops(1, 1, 64, 64, 16) / 2


@pytest.mark.parametrize(
    ("name", "ridge"), [("T4", 203), ("L4", 403), ("A100", 153), ("H100", 295), ("H200", 206), ("B200", 281)]
)
def test_ridge_points(name, ridge):
    assert GPUS[name].ridge == pytest.approx(ridge, abs=0.6)


def test_prediction_takes_the_slower_side():
    low, high = predict(1e9, 1e9, "H100"), predict(1e12, 1e9, "h100")
    assert (low.bound, high.bound) == ("memory", "compute")
    assert low.time_s == pytest.approx(1e9 / 3.35e12)
    assert high.time_s == pytest.approx(1e12 / 989e12)
    assert low.intensity == 1
