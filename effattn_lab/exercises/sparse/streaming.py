"""The six exercises of the lab on sinks and windows, in the order of its steps."""

from effattn_lab.exercises.sparse._streaming_cache import PLACE, STEP
from effattn_lab.exercises.sparse._streaming_masks import BOUNDS, MASK, SOFTMAX_ONE
from effattn_lab.exercises.sparse._streaming_triton import TRITON_FORWARD

EXERCISES = (MASK, SOFTMAX_ONE, PLACE, STEP, BOUNDS, TRITON_FORWARD)
