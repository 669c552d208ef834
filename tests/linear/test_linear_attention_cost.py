"""Costs of linear attention against counting, the figures that are known, and the tables made from them."""

import pytest
import sympy as sp
import torch

from effattn_lab import bench
from effattn_lab.foundations import cost_model
from effattn_lab.linear import linear_attention_bench
from effattn_lab.linear import linear_attention_cost as cost
from effattn_lab.linear.linear_attention import linear_attention_chunked
from effattn_lab.measure import linear_attention_peers


def test_state_is_counted():
    q, k, v = torch.rand(1, 6, 9, 5), torch.rand(1, 2, 9, 5), torch.rand(1, 2, 9, 3)
    _, state = linear_attention_chunked(q, k, v, feature_map="taylor", return_state=True)
    assert sum(x.numel() for x in state) == cost.state_elements(2, 1 + 5 + 25, 3)
    assert sum(x.numel() * x.element_size() for x in state) == cost.state_bytes(2, 31, 3)


def test_flops_are_counted():
    """Products of the readable forms, counted by PyTorch; a denominator is a column of ones more."""
    from torch.utils.flop_counter import FlopCounterMode

    n, d, dv, chunk, heads = 128, 16, 24, 32, 3
    q, k, v = (torch.rand(1, heads, n, x) for x in (d, d, dv))
    with FlopCounterMode(display=False) as counter:
        linear_attention_chunked(q, k, v, causal=True, chunk_size=chunk)
    # The readable form takes sums of rows as sums, where the model counts a column of V: 2 C a token inside the
    # chunk, and 2 d for writing z. (Its read of z is a product.)
    sums = heads * n * (2 * chunk + 2 * d)
    # And two products with nothing: the keys before the first query, the queries before the first key.
    assert counter.get_total_flops() == cost.chunked_flops(heads, n, d, dv, chunk) - sums


def test_known_lengths():
    assert cost.crossover_cache(128, itemsize=2, state_itemsize=2) == pytest.approx(
        64.5
    )  # d/2, and half for z
    assert cost.crossover_cache(64) == 65  # a float32 state against a bf16 cache
    assert cost.crossover_step(64) == 130
    based = cost.crossover_cache(16, 273, 16, itemsize=2, state_itemsize=2)
    assert based == pytest.approx(273 * 17 / 32)
    assert round(cost.crossover_flops(64)) == 258


def test_crossover_is_where_the_costs_meet():
    n, d, f, dv, c = sp.symbols("N D F V C", positive=True)
    softmax = 2 * (d + dv) * cost_model.visible_pairs(n, n, causal=True)
    (meet,) = sp.solve(sp.Eq(softmax / n, cost.chunked_flops(1, n, f, dv, c) / n), n)
    assert sp.simplify(meet - cost.crossover_flops(d, f, dv, c)) == 0
    per_token = sp.limit(cost.chunked_flops(1, n, d, d, c) / n / (4 * c * d + 4 * d**2), d, sp.oo)
    assert per_token == 1  # 4 C d + 4 d^2, the normaliser's column aside
    assert (
        sp.limit(cost.quadratic_flops(1, n, n, d, d) / cost_model.attention_flops(1, 1, n, n, d), d, sp.oo)
        == 1
    )
    assert sp.simplify(cost.step_bytes(1, 1, d, dv) - 2 * cost.state_bytes(1, d, dv) - 4 * (d + dv)) == 0
    states = cost.chunked_bytes(1, n, d, d, c) / n
    assert sp.limit(states, c, sp.oo) == 12 * d


def test_bench_rows():
    table = bench.rows("linear_attention", seqlens=(64, 130))
    assert {(r["implementation"], r["pass"]) for r in table} >= {
        ("sdpa", "forward"), ("chunked", "forward"), ("sdpa", "decode"), ("step", "decode"),
    }  # fmt: skip
    assert all(r["correct"] and r["median_ms"] > 0 for r in table), table
    for crossing in linear_attention_bench.crossovers(table):
        assert crossing["predicted_length"] in (65, 130, 258)
    with pytest.raises(ValueError, match="seqlen: expected an integer"):
        bench.rows("linear_attention", seqlens=(0,))
    with pytest.raises(ValueError, match="passes: expected some of forward, decode"):
        linear_attention_bench.rows((64,), passes=("backward",))


def test_a_wrong_form_carries_no_time(monkeypatch):
    monkeypatch.setattr(linear_attention_bench, "_chunked", lambda q, k, v: linear_attention_chunked(q, k, v))
    (row,) = [
        r for r in linear_attention_bench.rows((64,), 0.01, ("forward",)) if r["implementation"] == "chunked"
    ]
    assert not row["correct"]
    assert row["median_ms"] is row["vs_sdpa"] is None


def test_crossover_between_rows():
    def row(n, ratio):
        return {"seqlen": n, "vs_sdpa": ratio, "pass": "forward", "implementation": "chunked"}

    table = [row(100, 0.5), row(200, 2.0), row(400, 4.0)]
    assert linear_attention_bench.crossover(table, "forward", "chunked") == pytest.approx(100 * 2**0.5)
    assert linear_attention_bench.crossover(table[1:], "forward", "chunked") is None
    assert linear_attention_bench.crossover(table[:1], "forward", "chunked") is None


def test_xray_beside_fla():
    """The smallest table: one kernel, one GPU. Both are real compilations."""
    pytest.importorskip("fla.ops.common.chunk_h", reason="fla-core is not installed (extra peers)")
    rows = linear_attention_peers.rows("A100", warps=(2,), kernels=("outputs",))
    assert [row["by"] for row in rows] == ["ours", "ours, with the denominator", "fla"]
    for row in rows:
        assert row["spill_bytes"] == 0
        # 64 x 64 x 64 thrice: 24 mma of 16 x 8 x 16 a token and 64 tokens, less those a causal mask could spare
        assert 5 <= row["tensor_core_per_token"] <= 6
        assert 20 < row["instructions_per_token"] < 100
    assert rows[0]["instructions_per_token"] <= rows[2]["instructions_per_token"]
    with pytest.raises(ValueError, match="head_dim: expected 16, 32 or 64, got 128"):
        linear_attention_peers.rows("A100", head_dim=128)
    with pytest.raises(ValueError, match="kernels: expected some of states"):
        linear_attention_peers.rows("A100", kernels=("fwd",))


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """Every kernel at head dim 64; ``effattn xray linear_attention --gpu all`` has the other dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("linear_attention", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        what = (row["kernel"], row["gpu"])
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        assert (row["tensor_core_instructions"] > 0) == ("delta" not in row["kernel"]), what
