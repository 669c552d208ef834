"""The six exercises of the lab on sinks and windows, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.sparse._streaming_cache import PLACE, STEP
from effattn_lab.exercises.sparse._streaming_masks import BOUNDS, MASK, SOFTMAX_ONE
from effattn_lab.exercises.sparse._streaming_triton import TRITON_FORWARD

EXERCISES = (MASK, SOFTMAX_ONE, PLACE, STEP, BOUNDS, TRITON_FORWARD)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.sparse._streaming_triton_solution import streaming_kernel

    return streaming_kernel
