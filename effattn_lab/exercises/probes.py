"""Observe the tensors a function makes: the largest one, and the FLOPs of its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Seen:
    """What `watch` saw. ``largest`` is in elements, ``shape`` belongs to it, ``matmul_flops`` counts 2mnk."""

    largest: int = 0
    shape: tuple[int, ...] = field(default=())
    matmul_flops: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() > self.seen.largest:
                self.seen.largest, self.seen.shape = x.numel(), tuple(x.shape)
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            # args end in [..., m, k] and [..., k, n]; addmm and baddbmm carry the added matrix in front.
            a, b = args[-2:] if name in ("addmm", "baddbmm") else args[:2]
            self.seen.matmul_flops += 2 * a.numel() * b.shape[-1]
        return out


def watch(fn: Callable[..., Any], *args: Any) -> Seen:
    """Run ``fn(*args)`` and report the tensors it made on the way."""
    mode = _Watch()
    with mode:
        fn(*args)
    return mode.seen
