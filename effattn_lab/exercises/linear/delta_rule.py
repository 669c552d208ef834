"""The seven exercises of the delta-rule lab, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.linear._delta_rule_chunks import CHUNK, FORWARD
from effattn_lab.exercises.linear._delta_rule_solve import SOLVE, SYSTEM
from effattn_lab.exercises.linear._delta_rule_token import TOKEN, WRITE
from effattn_lab.exercises.linear._delta_rule_triton import TRITON_FORWARD

EXERCISES = (WRITE, TOKEN, SOLVE, SYSTEM, CHUNK, FORWARD, TRITON_FORWARD)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.linear._delta_rule_triton_solution import delta_kernel

    return delta_kernel
