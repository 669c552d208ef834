import time

import pytest
import torch

from effattn_lab.measure.timing import measure, measure_cold


def test_orders_fast_and_slow():
    fast = measure(time.sleep, 0.002, min_run_time=0.05)
    slow = measure(time.sleep, 0.02, min_run_time=0.05)
    assert fast.median_s >= 0.002
    assert fast.q20_s <= fast.median_s <= fast.q80_s
    assert slow.runs >= 3
    assert fast.ratio(slow) > 3


def test_takes_the_device_of_the_tensor():
    assert measure(torch.relu, torch.ones(4), min_run_time=0.01).device == "cpu"


def test_cold_calls_come_in_turns_each_after_the_clearing(monkeypatch):
    order = []
    plain = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda x: order.append(x.numel()) or plain(x))
    fns = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measure_cold(fns, rounds=3, clear_bytes=800)
    assert order == ["a", "b"] + [100, "a", 100, "b"] * 3  # once each to warm up, then in turns
    assert [t.runs for t in found.values()] == [3, 3]


def test_a_cold_call_waits_for_memory():
    """256 KiB fit into the cache of a core: in a loop they are read faster than after something else."""
    x = torch.ones(2**15, dtype=torch.float64)
    cold = measure_cold({"x": x.sum}, rounds=15)["x"]
    warm = measure_cold({"x": x.sum}, rounds=15, clear_bytes=8)["x"]
    assert warm.q20_s < cold.q20_s


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: measure_cold({}), "fns: expected at least one"),
        (lambda: measure_cold({"x": int}, rounds=2), "rounds: expected at least 3, got 2"),
        (lambda: measure_cold({"x": int}, clear_bytes=0), "clear_bytes: expected at least 8, got 0"),
    ],
)
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
