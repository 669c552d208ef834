"""Costs of the delta rule against counting, and the figures that are known."""

import pytest
import sympy as sp
import torch
from torch.utils.flop_counter import FlopCounterMode

from effattn_lab.foundations import cost_model
from effattn_lab.linear import delta_rule_cost as cost
from effattn_lab.linear import linear_attention_cost
from effattn_lab.linear.delta_rule import delta_rule_chunked


def test_state_is_counted():
    q, k, v, beta = (
        torch.rand(1, 6, 9, 5),
        torch.rand(1, 2, 9, 5),
        torch.rand(1, 2, 9, 3),
        torch.rand(1, 2, 9),
    )
    _, state = delta_rule_chunked(q, k, v, beta, return_state=True)
    assert state.numel() == cost.state_elements(2, 5, 3)
    assert state.numel() * state.element_size() == cost.state_bytes(2, 5, 3)


def test_flops_are_counted():
    """Products of the readable form, counted by PyTorch, which does not count triangular solves."""
    n, d, dv, chunk, heads = 128, 16, 24, 32, 3
    q, k, v = (torch.rand(1, heads, n, x) for x in (d, d, dv))
    with FlopCounterMode(display=False) as counter:
        delta_rule_chunked(q, k, v, torch.rand(1, heads, n), chunk_size=chunk)
    solve = heads * n * chunk * (d + dv)
    assert counter.get_total_flops() == cost.chunked_flops(heads, n, d, dv, chunk) - solve


def test_solve_is_counted():
    """Substitution row by row, 2 FLOPs for each number of the strict triangle and column: C (C - 1) n of them."""
    from effattn_lab.linear.delta_rule import forward_substitution

    c, columns = 32, 40
    with FlopCounterMode(display=False) as counter:
        forward_substitution(torch.rand(1, c, c), torch.rand(1, c, columns))
    assert counter.get_total_flops() == c * (c - 1) * columns


def test_against_linear_attention():
    n, d, c = sp.symbols("N D C", positive=True)
    extra = cost.chunked_flops(1, 1, d, d, c) - (4 * d**2 + 4 * c * d)  # linear attention without normaliser
    assert sp.simplify(extra - (2 * d**2 + 4 * c * d)) == 0
    assert cost.recurrent_flops(1, n, d, d) == 6 * n * d**2
    assert cost.recurrent_flops(1, n, d, d, gated=True) == 7 * n * d**2
    assert cost.chunked_flops(1, 1, 64, 64) / linear_attention_cost.chunked_flops(1, 1, 64, 64) > 1.6
    best = sp.solve(sp.diff(cost.sequential_steps(n, c), c), c)
    assert best == [sp.sqrt(n)]


def test_crossover_is_where_the_costs_meet():
    n, d, dv, c = sp.symbols("N D V C", positive=True)
    softmax = 2 * (d + dv) * cost_model.visible_pairs(n, n, causal=True)
    (meet,) = sp.solve(sp.Eq(softmax / n, cost.chunked_flops(1, n, d, dv, c) / n), n)
    assert sp.simplify(meet - cost.crossover_flops(d, dv, c)) == 0
    assert cost.crossover_flops(64) == 447
    assert cost.crossover_step(64) == 128
    cache = cost_model.kv_cache_bytes(1, 1, 64, 128)
    assert cache == 2 * cost.state_bytes(1, 64, 64)
    assert sp.simplify(cost.step_bytes(1, 1, d, dv) - 2 * cost.state_bytes(1, d, dv) - 4 * (d + dv)) == 0
    assert cost.step_flops(1, 1, d, d) == 6 * d**2
    assert cost.chunked_bytes(1, 1, 64, 64, 64) == pytest.approx(2 * (12 * 64 + 2 * 64))


def test_xray_beside_fla():
    """The smallest table: one kernel, one GPU. Both are real compilations."""
    pytest.importorskip("fla.ops.common.chunk_o", reason="fla-core is not installed (extra peers)")
    from effattn_lab.measure import delta_rule_peers

    ours, fla = delta_rule_peers.rows("A100", kernels=("outputs",))
    assert (ours["by"], fla["by"]) == ("ours", "fla")
    for row in (ours, fla):
        assert row["spill_bytes"] == 0
        assert (
            row["tensor_core_per_token"] == 6
        )  # three products of 64 x 64 x 64, 128 instructions of 16 x 8 x 16 each
    assert 20 < ours["instructions_per_token"] <= fla["instructions_per_token"] < 100
    with pytest.raises(ValueError, match="head_dim: expected 32 or 64, got 128"):
        delta_rule_peers.rows("A100", head_dim=128)
    with pytest.raises(ValueError, match="kernels: expected some of transform"):
        delta_rule_peers.rows("A100", kernels=("fwd",))
    with pytest.raises(ValueError, match="gpus: expected NVIDIA's with tensor cores"):
        delta_rule_peers.rows("T4", kernels=("outputs",), dtype="fp16")


def test_loops_are_weighed():
    """Two backward branches: a body of three with one matrix instruction, a body of two; one forward branch."""
    from effattn_lab.measure._loop_worker import loops

    code = ["MOV R1, R2", "HMMA.16816.F32 R4, R4, R5, R4", "IADD3 R1, R1, 0x1, RZ", "@P0 BRA 0x0010",
            "FADD R1, R1, R2", "@!P1 BRA 0x0040", "BRA 0x0070", "NOP", "EXIT"]  # fmt: skip
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(code))
    assert loops(sass) == [(3, 1), (2, 0)]


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """Every kernel at head dim 64; ``effattn xray delta_rule --gpu all`` has the other dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("delta_rule", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        what = (row["kernel"], row["gpu"])
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        assert row["tensor_core_instructions"] > 0, what
