"""The eight exercises of the selective-scan lab, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.linear._selective_ssm_backward import BACKWARD
from effattn_lab.exercises.linear._selective_ssm_chunks import CHUNKED
from effattn_lab.exercises.linear._selective_ssm_conv import CONV
from effattn_lab.exercises.linear._selective_ssm_parts import DISCRETIZE, STEP
from effattn_lab.exercises.linear._selective_ssm_scans import COMBINE, DOUBLE
from effattn_lab.exercises.linear._selective_ssm_triton import TRITON_SCAN

EXERCISES = (DISCRETIZE, STEP, CONV, COMBINE, DOUBLE, CHUNKED, BACKWARD, TRITON_SCAN)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.linear._selective_ssm_triton_solution import ssm_kernel

    return ssm_kernel
