"""The seven exercises of the linear-attention lab, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.linear._linear_attention_backward import BACKWARD
from effattn_lab.exercises.linear._linear_attention_chunks import CHUNK, FORWARD
from effattn_lab.exercises.linear._linear_attention_map import FEATURE_MAP
from effattn_lab.exercises.linear._linear_attention_parts import REGROUP, STEP
from effattn_lab.exercises.linear._linear_attention_triton import TRITON_FORWARD

EXERCISES = (FEATURE_MAP, REGROUP, STEP, CHUNK, FORWARD, BACKWARD, TRITON_FORWARD)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.linear._linear_attention_triton_solution import linear_kernel

    return linear_kernel
