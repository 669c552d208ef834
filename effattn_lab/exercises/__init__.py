"""Exercises: what a learner writes, how it is checked, and what a wrong answer usually means.

``check("full/flash/merge", merge)`` prints one line per property. The same `Exercise` objects serve the
notebooks and the grader.
"""

from effattn_lab.exercises.check import Result, check, hint, reference, solution, take
from effattn_lab.exercises.core import Case, Exercise, Failure, Mutant, Output, Probe, Tolerance
from effattn_lab.exercises.registry import all_exercises, get

__all__ = [
    "Case",
    "Exercise",
    "Failure",
    "Mutant",
    "Output",
    "Probe",
    "Result",
    "Tolerance",
    "all_exercises",
    "check",
    "get",
    "hint",
    "reference",
    "solution",
    "take",
]
