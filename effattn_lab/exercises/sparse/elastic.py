"""The six exercises of the Elastic Attention lab, in the order of its steps."""

from effattn_lab.exercises.sparse._elastic_heads import MIX, PRICES
from effattn_lab.exercises.sparse._elastic_router import CHOOSE, DECIDE, POOL
from effattn_lab.exercises.sparse._elastic_tiles import TILES

EXERCISES = (POOL, DECIDE, CHOOSE, MIX, PRICES, TILES)
