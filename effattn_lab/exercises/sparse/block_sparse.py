"""The seven exercises of the lab on chosen blocks, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.sparse._block_sparse_scores import ANTIDIAGONAL, WEIGHT
from effattn_lab.exercises.sparse._block_sparse_select import GATE, SELECT
from effattn_lab.exercises.sparse._block_sparse_serve import FINE, SERVE
from effattn_lab.exercises.sparse._block_sparse_triton import TRITON_FORWARD

EXERCISES = (ANTIDIAGONAL, WEIGHT, SELECT, GATE, SERVE, FINE, TRITON_FORWARD)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.sparse._block_sparse_triton_solution import block_list_kernel

    return block_list_kernel
