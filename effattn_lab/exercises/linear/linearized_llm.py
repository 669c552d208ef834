"""The exercises of the lab on linearized language models and speculative decoding, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.linear._linearized_llm_groups import GROUPED_FORWARD
from effattn_lab.exercises.linear._linearized_llm_parts import GROUPED_DECODE, MASKED_CONV
from effattn_lab.exercises.linear._linearized_llm_speculative import SPECULATIVE
from effattn_lab.exercises.linear._linearized_llm_trees import UNFOLD
from effattn_lab.exercises.linear._linearized_llm_triton import TRITON_CONV

EXERCISES = (MASKED_CONV, GROUPED_FORWARD, GROUPED_DECODE, UNFOLD, TRITON_CONV, *SPECULATIVE)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.linear._linearized_llm_triton_solution import conv_kernel

    return conv_kernel
