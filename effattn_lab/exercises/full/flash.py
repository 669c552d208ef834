"""The six exercises of the flash lab, in the order of its steps."""

from effattn_lab.exercises.full._flash_backward import BACKWARD_TILE
from effattn_lab.exercises.full._flash_forward import FORWARD
from effattn_lab.exercises.full._flash_rows import MERGE, SAFE_SOFTMAX
from effattn_lab.exercises.full._flash_tiles import TILE_STEP
from effattn_lab.exercises.full._flash_triton import TRITON_FORWARD

EXERCISES = (SAFE_SOFTMAX, MERGE, TILE_STEP, FORWARD, BACKWARD_TILE, TRITON_FORWARD)
