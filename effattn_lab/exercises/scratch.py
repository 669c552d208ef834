"""Library functions that an exercise asks to write are not there to be called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode


class NotAllowed(RuntimeError):
    """A call to what the exercise asks to write."""


class _Refuse(TorchFunctionMode):
    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").removeprefix("linalg_")
        if name in self.names:
            raise NotAllowed(f"{name} does what this exercise asks you to write; write it yourself")
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing(from_scratch: Iterable[str]) -> Iterator[None]:
    """Within the block, torch's functions of these names raise `NotAllowed`.

    Args:
        from_scratch: as `Exercise.from_scratch`; entries ``torch.name`` count, under every spelling that torch has
            (``torch.softmax``, ``x.softmax``, ``F.softmax``; ``torch.linalg.inv``, ``torch.linalg_inv``).
            Others are left to whoever builds the environment.

    It is a word to the honest: code that wants to can reach the same operation by other ways.
    """
    names = frozenset(n.rsplit(".", 1)[1] for n in from_scratch if n.startswith("torch."))
    if not names:
        yield
        return
    with _Refuse(names):
        yield
