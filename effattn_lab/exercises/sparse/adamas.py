"""The six exercises of the lab on Adamas, in the order of its steps."""

from effattn_lab.exercises.sparse._adamas_codes import BUCKETS, HADAMARD, PACK
from effattn_lab.exercises.sparse._adamas_distance import DISTANCE
from effattn_lab.exercises.sparse._adamas_step import NEAREST, STEP

EXERCISES = (HADAMARD, BUCKETS, PACK, DISTANCE, NEAREST, STEP)
