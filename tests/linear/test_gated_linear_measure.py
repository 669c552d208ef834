"""The instruments of gated linear attention: the table beside fla, tiles that do not spill, figures."""

import math

import pytest
import torch

from effattn_lab.figures import gated_linear as figures
from effattn_lab.figures import gated_linear_lab
from effattn_lab.measure import gated_linear_peers


def test_xray_beside_fla():
    """The smallest part of the recorded table, compiled again."""
    pytest.importorskip("fla.ops.common.chunk_h", reason="fla-core is not installed (extra peers)")
    rows = gated_linear_peers.rows("A100", warps=(2,), kernels=("states",))
    assert [row["by"] for row in rows] == ["ours", "fla"]
    for row in rows:
        assert row["spill_bytes"] == 0
        assert row["tensor_core_per_token"] == 2  # 64 x 64 x 64 in products of 16 x 8 x 16: 128 for 64 tokens
    assert rows[0]["instructions_per_token"] <= rows[1]["instructions_per_token"]
    record = gated_linear_peers.recorded()
    kept = [r for r in record["rows"] if r["gpu"] == "A100" and r["kernel"] == "states" and r["by"] == "ours"]
    assert [{**r, "tile": tuple(r["tile"])} for r in kept] == rows[:1]
    assert all(row["spill_bytes"] == 0 for row in record["rows"] if row["by"] == "ours")
    counts = {(r["gpu"], r["kernel"], r["by"]): r["instructions_per_token"] for r in record["rows"]}
    for gpu, kernel, by in counts:  # the chapter says: in every step, on either GPU
        assert by == "fla" or counts[gpu, kernel, "ours"] < counts[gpu, kernel, "fla"], (gpu, kernel)
    with pytest.raises(ValueError, match="head_dim: expected 16, 32 or 64, got 128"):
        gated_linear_peers.rows("A100", head_dim=128)
    with pytest.raises(ValueError, match="kernels: expected some of states"):
        gated_linear_peers.rows("A100", kernels=("fwd",))


@pytest.mark.slow
def test_shipped_tiles_do_not_spill():
    """A decay a channel at head dim 64; ``effattn xray gated_linear --gpu all`` has the other GPUs and dimensions."""
    from effattn_lab.measure.xray import xray_rows

    for row in xray_rows("gated_linear", gpus="A100", head_dims=(64,), dtypes=("bf16",)):
        assert row["spill_bytes"] == 0, row["kernel"]
        assert row["fits"], row["kernel"]
        assert (row["tensor_core_instructions"] > 0) == ("sums" not in row["kernel"]), row["kernel"]


def test_figures():
    import matplotlib.pyplot as plt

    for picture in (figures.masks, figures.levels, figures.reach):
        assert picture().axes
    plt.close("all")


def test_profile_by_distance():
    """Equal weights have equal profiles; a decay's is its powers."""
    n = 64
    equal = torch.ones(1, 2, n, n).tril()
    equal = equal / equal.sum(-1, keepdim=True)
    profile = gated_linear_lab.by_distance(equal)
    assert profile == pytest.approx([profile[0]] * (n // 2))
    lag = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
    decayed = (0.9**lag).tril()[None, None]
    assert gated_linear_lab.by_distance(decayed) == pytest.approx([0.9**d for d in range(n // 2)], rel=1e-5)
    normalised = gated_linear_lab.by_distance(decayed / decayed.sum(-1, keepdim=True))
    assert gated_linear_lab.decay_by_distance(math.log(0.9), n // 2) == pytest.approx(normalised, rel=1e-5)
    assert gated_linear_lab.first_token(decayed) == pytest.approx(float((0.9 ** torch.arange(32, 64)).mean()))
