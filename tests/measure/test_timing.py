import time

import torch

from effattn_lab.measure.timing import measure


def test_orders_fast_and_slow():
    fast = measure(time.sleep, 0.002, min_run_time=0.05)
    slow = measure(time.sleep, 0.02, min_run_time=0.05)
    assert fast.median_s >= 0.002
    assert fast.q20_s <= fast.median_s <= fast.q80_s
    assert slow.runs >= 3
    assert fast.ratio(slow) > 3


def test_takes_the_device_of_the_tensor():
    assert measure(torch.relu, torch.ones(4), min_run_time=0.01).device == "cpu"
