"""The seven exercises of the ZeroS lab, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.linear._zeros_chunk import CHUNK
from effattn_lab.exercises.linear._zeros_states import ANGLE, STEP
from effattn_lab.exercises.linear._zeros_triton import TRITON_STATES
from effattn_lab.exercises.linear._zeros_weights import EXPAND, LOGITS, WEIGHTS

EXERCISES = (EXPAND, WEIGHTS, LOGITS, ANGLE, STEP, CHUNK, TRITON_STATES)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.linear._zeros_triton_solution import zeros_kernel

    return zeros_kernel
