"""The seven exercises of the lab on Adamas, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.sparse._adamas_codes import BUCKETS, HADAMARD, PACK
from effattn_lab.exercises.sparse._adamas_distance import DISTANCE
from effattn_lab.exercises.sparse._adamas_step import NEAREST, STEP
from effattn_lab.exercises.sparse._adamas_triton import TRITON_DISTANCES

EXERCISES = (HADAMARD, BUCKETS, PACK, DISTANCE, NEAREST, STEP, TRITON_DISTANCES)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.sparse._adamas_triton_solution import distances_kernel

    return distances_kernel
