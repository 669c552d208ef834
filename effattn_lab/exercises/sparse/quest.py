"""The six exercises of the lab on Quest, H2O and SnapKV, in the order of its steps."""

from effattn_lab.exercises.sparse._quest_caches import DECODE, H2O
from effattn_lab.exercises.sparse._quest_pages import BOUNDS, PAGES, SCORES
from effattn_lab.exercises.sparse._quest_snapkv import SNAPKV

EXERCISES = (BOUNDS, SCORES, PAGES, DECODE, H2O, SNAPKV)
