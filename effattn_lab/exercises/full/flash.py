"""The six exercises of the flash lab, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.full._flash_backward import BACKWARD_TILE
from effattn_lab.exercises.full._flash_forward import FORWARD
from effattn_lab.exercises.full._flash_rows import MERGE, SAFE_SOFTMAX
from effattn_lab.exercises.full._flash_tiles import TILE_STEP
from effattn_lab.exercises.full._flash_triton import TRITON_FORWARD

EXERCISES = (SAFE_SOFTMAX, MERGE, TILE_STEP, FORWARD, BACKWARD_TILE, TRITON_FORWARD)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.full._flash_triton_solution import flash_kernel

    return flash_kernel
