"""Timing that can be trusted: warm-up, many runs, medians with quantiles, the device synchronised.

CPU: ``torch.utils.benchmark``. GPU: ``triton.testing.do_bench``, which clears the L2 cache between runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the 20 % and 80 % quantiles. ``runs`` samples were taken."""

    median_s: float
    q20_s: float
    q80_s: float
    runs: int
    device: str

    def ratio(self, other: Timing) -> float:
        """How many times faster than ``other`` this is; both from one session on one machine, or it means nothing."""
        return other.median_s / self.median_s


def measure(
    fn: Callable[..., Any], *args: Any, min_run_time: float = 0.5, device: str | None = None, **kwargs: Any
) -> Timing:
    """Time ``fn(*args, **kwargs)``; build the inputs before, not inside.

    Args:
        fn: what to time. Called at least three times.
        min_run_time: seconds to spend measuring. Default 0.5.
        device: "cpu" or "cuda". Default: that of the first tensor among ``args``, else "cpu".

    Returns:
        :class:`Timing` with the threads that torch is set to use.
    """
    if not min_run_time > 0:
        raise ValueError(f"min_run_time: expected a positive number of seconds, got {min_run_time!r}")
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected 'cpu', or 'cuda' where there is a GPU, got {device!r}")
    if device is None:
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    if device == "cuda":
        from triton.testing import do_bench

        times = do_bench(lambda: fn(*args, **kwargs), rep=int(min_run_time * 1000), return_mode="all")
        samples = np.asarray(times) / 1000
    else:
        from torch.utils.benchmark import Timer

        timer = Timer(
            "fn(*args, **kwargs)",
            globals={"fn": fn, "args": args, "kwargs": kwargs},
            num_threads=torch.get_num_threads(),
        )
        timer.timeit(1)
        result = timer.blocked_autorange(min_run_time=min_run_time)
        samples = np.asarray(result.times)
        if len(samples) < 3:
            samples = np.asarray([*samples, *(timer.timeit(1).mean for _ in range(3 - len(samples)))])
    q20, median, q80 = np.quantile(samples, [0.2, 0.5, 0.8])
    return Timing(float(median), float(q20), float(q80), len(samples), device)


def measure_cold(
    fns: Mapping[str, Callable[[], Any]], rounds: int = 25, clear_bytes: int = 128 * 2**20
) -> dict[str, Timing]:
    """Time functions on the CPU with cold caches, in turns, so that a disturbance meets all of them.

    A loop over one call finds its data in the cache that the call before filled. A model doesn't: between two visits
    of a layer it reads all others. Before each timed call ``clear_bytes`` of other memory are read.

    Args:
        fns: what to time, by name; called without arguments.
        rounds: samples of each, at least 3. Default 25.
        clear_bytes: more than the largest cache holds. Default 128 MiB.

    Returns:
        :class:`Timing` of each name.
    """
    if not fns:
        raise ValueError("fns: expected at least one function, got none")
    if rounds < 3:
        raise ValueError(f"rounds: expected at least 3, got {rounds!r}")
    if clear_bytes < 8:
        raise ValueError(f"clear_bytes: expected at least 8, got {clear_bytes!r}")
    other = torch.ones(clear_bytes // 8, dtype=torch.float64)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():
        fn()  # what is done once, such as choosing a code path, is not timed
    for _ in range(rounds):
        for name, fn in fns.items():
            other.sum()
            begin = time.perf_counter()
            fn()
            samples[name].append(time.perf_counter() - begin)
    found = {}
    for name, taken in samples.items():
        q20, median, q80 = np.quantile(taken, [0.2, 0.5, 0.8])
        found[name] = Timing(float(median), float(q20), float(q80), rounds, "cpu")
    return found
