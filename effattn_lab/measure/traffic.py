"""Count what a Triton kernel really moves: bytes loaded, bytes stored, FLOPs of its dot products.

Triton's interpreter executes every load, store and dot of a kernel through one *builder* object.
While `count` is open those methods are wrapped: each call is counted, then done as usual. Only lanes
whose mask is true are counted, so a padded tile costs what it really fetches.

What is counted is what the kernel *asks for*. On a GPU the L2 cache answers part of it, so the traffic
to main memory lies between the inputs-and-outputs-once minimum and this number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effattn_lab.measure._slugs import kernel_module

_open: list[Traffic] = []  # every open `count`, outermost first
_kernel: list[str] = []  # the kernel being run


@dataclass
class KernelTraffic:
    """What one kernel did, summed over its launches."""

    launches: int = 0
    programs: int = 0
    loads_bytes: int = 0
    stores_bytes: int = 0
    flops: int = 0  # 2 M N K for each tl.dot, masked elements included: the tensor core computes them too

    @property
    def bytes(self) -> int:
        return self.loads_bytes + self.stores_bytes


@dataclass
class Traffic:
    """What was counted between opening and closing `count`. Sizes are bytes, a multiply-add is two FLOPs."""

    by_kernel: dict[str, KernelTraffic] = field(default_factory=dict)

    @property
    def loads_bytes(self) -> int:
        return sum(k.loads_bytes for k in self.by_kernel.values())

    @property
    def stores_bytes(self) -> int:
        return sum(k.stores_bytes for k in self.by_kernel.values())

    @property
    def bytes(self) -> int:
        return self.loads_bytes + self.stores_bytes

    @property
    def flops(self) -> int:
        return sum(k.flops for k in self.by_kernel.values())

    def _add(self, **amounts: int) -> None:
        entry = self.by_kernel.setdefault(_kernel[-1] if _kernel else "(no kernel)", KernelTraffic())
        for name, amount in amounts.items():
            setattr(entry, name, getattr(entry, name) + amount)


@contextmanager
def count() -> Iterator[Traffic]:
    """Count the traffic of every kernel launched in the ``with`` block.

    Works on any ``@triton.jit`` kernel, also one just written in a notebook cell, and nests. Without a GPU import
    ``effattn_kernels`` before ``triton``: it switches triton to its interpreter.

    >>> with count() as t:              # doctest: +SKIP
    ...     my_kernel[grid](x, y, n, BLOCK=128)
    >>> t.loads_bytes, t.stores_bytes, t.flops, t.by_kernel["my_kernel"].launches  # doctest: +SKIP

    Raises:
        RuntimeError: kernels are compiled here, or there is no triton; the message says what to do.
    """
    builder, executor = _interpreter()
    traffic = Traffic()
    if not _open:
        _install(builder, executor)
    _open.append(traffic)
    try:
        yield traffic
    finally:
        _open.remove(traffic)
        if not _open:
            _remove(builder, executor)


def _interpreter() -> tuple[Any, Any]:
    """The builder that executes loads and stores, and the class that runs a grid."""
    import effattn_kernels

    if effattn_kernels.MODE == "compiled":
        effattn_kernels.require()  # without a GPU it says what went wrong, and that is another thing than below
    if effattn_kernels.MODE != "interpreter":
        reason = {
            "compiled": "kernels are compiled here, and a GPU does not tell what a kernel asked for. Start Python "
            "(or the notebook's kernel) with TRITON_INTERPRET=1 in the environment and run again.",
            "unavailable": "triton is not installed (it exists for Linux only). Use Linux, WSL2 or Colab.",
        }[effattn_kernels.MODE]
        raise RuntimeError(f"traffic can only be counted in Triton's interpreter: {reason}")
    from triton.runtime import interpreter

    return interpreter.interpreter_builder, interpreter.GridExecutor


def _element_bytes(ptrs: Any) -> int:
    return max(1, int(ptrs.get_element_ty().primitive_bitwidth) // 8)


def _lanes(ptrs: Any, mask: Any) -> int:
    """Lanes that touch memory."""
    if mask is None:
        return int(ptrs.data.size)
    return int(np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape)))


def _add(**amounts: int) -> None:
    for traffic in _open:
        traffic._add(**amounts)


_originals: dict[str, Any] = {}


def _install(builder: Any, executor: Any) -> None:
    def wrap(name: str, observe: Callable[..., None]) -> None:
        original = getattr(builder, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            observe(*args, **kwargs)
            return original(*args, **kwargs)

        # On the instance: the builder's other methods (unmasked loads, tensor descriptors) come here too.
        setattr(builder, name, method)

    def load(ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> None:
        _add(loads_bytes=_lanes(ptrs, mask) * _element_bytes(ptrs))

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> None:
        _add(stores_bytes=_lanes(ptrs, mask) * _element_bytes(ptrs))

    def atomic_rmw(op: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        moved = _lanes(ptrs, mask) * _element_bytes(ptrs)
        _add(loads_bytes=moved, stores_bytes=moved)

    def atomic_cas(ptrs: Any, *rest: Any) -> None:
        moved = _lanes(ptrs, None) * _element_bytes(ptrs)
        _add(loads_bytes=moved, stores_bytes=moved)

    def dot(a: Any, b: Any, *rest: Any) -> None:
        *batch, m, k = a.data.shape
        _add(flops=2 * int(np.prod(batch, dtype=np.int64)) * m * k * b.data.shape[-1])

    wrap("create_masked_load", load)
    wrap("create_masked_store", store)
    wrap("create_atomic_rmw", atomic_rmw)
    wrap("create_atomic_cas", atomic_cas)
    wrap("create_dot", dot)

    set_grid_idx = builder.set_grid_idx

    def next_program(*args: Any) -> Any:
        _add(programs=1)
        return set_grid_idx(*args)

    builder.set_grid_idx = next_program
    run_grid = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        _kernel.append(self.fn.__name__)
        try:
            _add(launches=1)
            return run_grid(self, *args, **kwargs)
        finally:
            _kernel.pop()

    _originals["__call__"] = run_grid
    executor.__call__ = launch


_HOOKED = (
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    "create_atomic_cas",
    "create_dot",
    "set_grid_idx",
)


def _remove(builder: Any, executor: Any) -> None:
    for name in _HOOKED:
        delattr(builder, name)  # the class's own method shows again
    executor.__call__ = _originals.pop("__call__")


def traffic_rows(slug: str = "flash", **shape: Any) -> list[dict[str, Any]]:
    """Measured against predicted bytes for each launch of a shipped kernel (``effattn traffic``).

    Args:
        slug: ``"flash"``. The formulas stand in ``effattn_lab.measure.<slug>_traffic``.
        shape: what to change of the kernel's standard case, e.g. ``seqlen_q=300, causal=False``.

    Returns:
        One dict a kernel: ``kernel, measured_bytes, formula_bytes, flops``, the ratio and the shape.

    Raises:
        ValueError: no such slug. RuntimeError: not in the interpreter.
    """
    kernel_module(slug)
    measured: list[dict[str, Any]] = importlib.import_module(f"effattn_lab.measure.{slug}_traffic").rows(
        **shape
    )
    return measured
