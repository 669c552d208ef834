"""Costs of linearized attention against counting and against figures known from elsewhere."""

import pytest
import sympy as sp
import torch

from effattn_lab.foundations import cost_model
from effattn_lab.linear import linearized_llm_cost as cost
from effattn_lab.linear.linearized_llm import linearized_attention_chunked
from effattn_lab.measure import linearized_llm_peers


@pytest.mark.parametrize("seen", [1, 15, 16, 17, 40])
def test_state_is_counted(seen):
    q, k, v = (torch.rand(1, 2, seen, d) for d in (8, 8, 6))
    _, state = linearized_attention_chunked(
        q, k, v, conv_weight=torch.rand(2, 5), group_size=16, return_state=True
    )
    held = sum(x.numel() for x in state[:4])
    assert held <= cost.state_elements(2, 8, 6, 16, 5)
    assert (held == cost.state_elements(2, 8, 6, 16, 5)) == (seen % 16 == 15)
    assert cost.state_elements(2, 8, 6, 16, 0) == cost.state_elements(2, 8, 6, 16, 1)


def test_flops_are_counted():
    """Products of the readable form, counted by PyTorch; its convolution is the one by bands."""
    from torch.utils.flop_counter import FlopCounterMode

    heads, kv_heads, n, d, dv, group, lags = 4, 2, 128, 16, 24, 32, 9
    q, k, v = torch.rand(1, heads, n, d), torch.rand(1, kv_heads, n, d), torch.rand(1, kv_heads, n, dv)
    with FlopCounterMode(display=False) as counter:
        linearized_attention_chunked(q, k, v, group_size=group)
    attention = cost.local_flops(heads, n, d, dv, group) + cost.global_flops(heads, kv_heads, n, d, dv)
    assert counter.get_total_flops() == attention
    with FlopCounterMode(display=False) as counter:
        linearized_attention_chunked(q, k, v, group_size=group, conv_weight=torch.rand(heads, lags))
    assert counter.get_total_flops() == attention + cost.conv_band_flops(heads, n, dv, lags, group)
    whole = cost.forward_flops(heads, kv_heads, n, d, dv, group, lags)
    assert whole == attention + cost.conv_flops(heads, n, dv, lags)


def test_known_figures():
    """LLaMA-2-7B's head: 128 dimensions, groups of 64, 32 taps."""
    assert cost.local_flops(1, 1, 128, 128, 64) == 32768
    assert cost.global_flops(1, 1, 1, 128, 128) == 65536
    assert cost.conv_flops(1, 1, 128, 32) == 8192
    assert cost.crossover_flops(128) == 2 * 64 + 2 * 128 + 32 - 1
    assert round(cost.crossover_cache(128)) == 142  # as many numbers as a KV cache of 142 tokens


def test_crossovers_are_where_the_costs_meet():
    n, d, g, c = sp.symbols("N D G L", positive=True)
    softmax = 4 * d * cost_model.visible_pairs(n, n, causal=True)
    (meet,) = sp.solve(sp.Eq(softmax / n, cost.forward_flops(1, 1, n, d, d, g, c) / n), n)
    assert sp.simplify(meet - cost.crossover_flops(d, g, c)) == 0
    assert sp.simplify(cost.crossover_flops(d, g, c) - (2 * g + 2 * d + c - 1)) == 0
    assert sp.simplify(cost.crossover_cache(d, g, c) - (d / 2 + g - 1 + (c - 1) / 2)) == 0


def test_xray_beside_fla():
    """The smallest table, a real compilation: the band takes a fraction of the loop over lags."""
    pytest.importorskip("fla.modules.causal_conv1d.ops", reason="fla-core is not installed (extra peers)")
    ours, theirs = linearized_llm_peers.rows("A100", warps=(4,), kernels=("conv",))
    assert (ours["by"], theirs["by"]) == ("ours", "fla")
    assert ours["spill_bytes"] == theirs["spill_bytes"] == 0
    assert ours["instructions_per_token"] < 0.2 * theirs["instructions_per_token"]
    assert ours["loads_per_token"] < 1.5 < 32 == theirs["loads_per_token"]
    with pytest.raises(ValueError, match="head_dim: expected 64, got 128"):
        linearized_llm_peers.rows("A100", head_dim=128)
    with pytest.raises(ValueError, match="kernels: expected some of states"):
        linearized_llm_peers.rows("A100", kernels=("fwd",))


def test_recorded_rows_are_of_the_shipped_tiles():
    """What the chapter prints: every step of ours and fla's, on two GPUs, nothing spilled."""
    rows = linearized_llm_peers.recorded()
    steps = {name: {*by, "fla"} for name, by in linearized_llm_peers.STEPS.items()}
    assert {(r["gpu"], r["kernel"], r["by"]) for r in rows} == {
        (gpu, name, by) for gpu in ("A100", "H100") for name in steps for by in steps[name]
    }
    from effattn_kernels._linearized_llm_tiles import choose_tiles

    tiles = choose_tiles(64, 64, 64, torch.bfloat16, "sm80")
    for row in rows:
        assert row["spill_bytes"] == 0
        if row["gpu"] == "A100" and row["by"] != "fla":
            assert row["num_warps"] == getattr(tiles, row["kernel"]).num_warps


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """Every kernel at head dim 64; ``effattn xray linearized_llm --gpu all`` has the other dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("linearized_llm", gpus="A100,MI300X", head_dims=(64,), dtypes=("bf16",)):
        what = (row["kernel"], row["gpu"])
        assert row["spill_bytes"] == 0, what
        assert row["fits"], what
        assert row["tensor_core_instructions"] > 0, what
