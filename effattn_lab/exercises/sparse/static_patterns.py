"""The seven exercises of the lab on static patterns, in the order of its steps."""

from effattn_lab.exercises.sparse._static_patterns_masks import LONGFORMER, STRIDED
from effattn_lab.exercises.sparse._static_patterns_mix import MIX
from effattn_lab.exercises.sparse._static_patterns_reach import CAPTURED, REACH
from effattn_lab.exercises.sparse._static_patterns_tiles import KINDS, TILED

EXERCISES = (STRIDED, LONGFORMER, REACH, CAPTURED, KINDS, TILED, MIX)
