"""The seven exercises of the gated-linear lab, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.linear._gated_linear_chunks import ACROSS, CHUNK
from effattn_lab.exercises.linear._gated_linear_forward import FORWARD
from effattn_lab.exercises.linear._gated_linear_parts import GATE, MASK, STEP
from effattn_lab.exercises.linear._gated_linear_triton import TRITON_FORWARD

EXERCISES = (STEP, GATE, MASK, ACROSS, CHUNK, FORWARD, TRITON_FORWARD)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.linear._gated_linear_triton_solution import gated_kernel

    return gated_kernel
