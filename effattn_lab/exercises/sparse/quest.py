"""The seven exercises of the lab on Quest, H2O and SnapKV, in the order of its steps."""

from typing import Any

from effattn_lab.exercises.sparse._quest_caches import DECODE, H2O
from effattn_lab.exercises.sparse._quest_pages import BOUNDS, PAGES, SCORES
from effattn_lab.exercises.sparse._quest_snapkv import SNAPKV
from effattn_lab.exercises.sparse._quest_triton import TRITON_BOUNDS

EXERCISES = (BOUNDS, SCORES, PAGES, DECODE, H2O, SNAPKV, TRITON_BOUNDS)


def reference_kernel() -> Any:
    """The ``@triton.jit`` kernel of the model solution, for steps that examine a kernel. Needs triton."""
    import effattn_kernels

    effattn_kernels.require()
    from effattn_lab.exercises.sparse._quest_triton_solution import bounds_kernel

    return bounds_kernel
