"""What exercises are made of: random inputs and mutants from a table. A lab's own modules use it, checks do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Mutant


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> torch.Tensor:
    """Normal numbers of standard deviation ``size``, float32."""
    return torch.from_numpy(rng.standard_normal(shape) * size).float()


def mutants(make: Callable[..., Any], table: dict[str, str], unguarded: bool = False) -> tuple[Mutant, ...]:
    """One `Mutant` for each (fault, hint), calling ``make(fault, *arguments)``.

    ``unguarded``: add the variant ``make(..., guard=False)``, as two mistakes often come together.
    """
    return tuple(
        Mutant(fault, partial(make, fault), text, (partial(make, fault, guard=False),) if unguarded else ())
        for fault, text in table.items()
    )
