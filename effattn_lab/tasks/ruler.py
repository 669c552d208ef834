"""RULER's thirteen tasks at any length, for any tokenizer, from text that every Python installation carries.

Eight needle tasks, one of tracing, two of counting, two of questions about documents. Definitions follow the released
code: what lies around, how many keys and values, how often words come, where things are put, how answers are scored.
Not taken over: its texts (see :mod:`effattn_lab.tasks.ruler_text` and :mod:`effattn_lab.tasks.ruler_qa`), its
wording, and its habit to shuffle each sample of a size by the same permutation: here every sample has its own. So
scores are comparable between methods here, not with RULER's published tables.

Source: Hsieh et al. 2024, and the scripts of its repository.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from effattn_lab._validate import check_positive_int
from effattn_lab.tasks import ruler_lists, ruler_needles, ruler_qa
from effattn_lab.tasks.ruler_sample import Sample, largest, string_match_all, string_match_part

__all__ = ["RESERVE", "TASKS", "Sample", "Task", "make", "string_match_all", "string_match_part"]

#: Tokens kept free for the answer.
RESERVE = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


@dataclass(frozen=True)
class Task:
    """How a task is made.

    Attributes:
        group: "retrieval", "tracing", "aggregation" or "questions".
        reserve: tokens for the answer.
        build: ``(filler, rng, reserve, length)`` to a sample.
        least: smallest amount of filler.
        most: largest, if there is one.
    """

    group: str
    reserve: int
    build: Callable[[int, np.random.Generator, int, int], Sample]
    least: int
    most: Callable[[], int | None] = lambda: None


def _tasks() -> dict[str, Task]:
    made = {}
    for name, needle in ruler_needles.NEEDLES.items():
        build = partial(
            lambda task, n, rng, reserve, length: ruler_needles.build(task, n, rng, reserve), name
        )
        made[name] = Task("retrieval", RESERVE["niah"], build, 1, partial(ruler_needles.most, needle))
    made["vt"] = Task(
        "tracing", RESERVE["vt"], lambda n, rng, reserve, length: ruler_lists.variables(n, rng, reserve), 4
    )
    made["cwe"] = Task(
        "aggregation",
        RESERVE["cwe"],
        ruler_lists.common_words,
        ruler_lists.COMMON + 1,
        ruler_lists.most_words,
    )
    made["fwe"] = Task(
        "aggregation", RESERVE["fwe"], ruler_lists.frequent_words, ruler_lists.frequent_least()
    )
    for name in ("qa_1", "qa_2"):
        build = partial(
            lambda task, n, rng, reserve, length: ruler_qa.question_answering(task, n, rng, reserve), name
        )
        others = partial(
            lambda task, gold: len(ruler_qa.documents(task)) - gold, name, 1 if name == "qa_1" else 2
        )
        made[name] = Task("questions", RESERVE["qa"], build, 1, others)
    return made


TASKS: dict[str, Task] = _tasks()


def make(
    task: str, length: int, count_tokens: Callable[[str], int], *, seed: int = 0, reserve: int | None = None
) -> Sample:
    """A sample as long as fits: prompt and reserved answer take at most ``length`` tokens.

    Args:
        task: one of :data:`TASKS`.
        length: target in tokens, prompt and answer together.
        count_tokens: tokens of a text, for instance ``lambda s: len(tokenizer(s).input_ids)``.
        seed: of everything that is drawn, at least 0.
        reserve: tokens for the answer, at least 1. Default: the task's own (128 for needles, 30 for tracing, 120
            and 50 for counting, 32 for questions).

    Returns:
        the sample of the largest amount of filler found (see :func:`effattn_lab.tasks.ruler_sample.largest`).

    Raises:
        ValueError: for an unknown task, or a length that not even the least filler fits in.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    check_positive_int("length", length)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0, got {seed!r}")
    made = TASKS[task]
    if reserve is None:
        reserve = made.reserve
    check_positive_int("reserve", reserve)

    def build(filler: int) -> Sample:
        # A new generator each time: the sample depends on the seed and the amount, not on the search's path.
        sample = made.build(filler, np.random.default_rng([seed, *task.encode()]), reserve, length)
        return replace(sample, tokens=count_tokens(sample.prompt))

    filler = largest(lambda n: build(n).tokens + reserve <= length, made.least, made.most())
    if filler is None:
        raise ValueError(
            f"length: expected at least {build(made.least).tokens + reserve} tokens for {task} with this seed "
            f"({reserve} of them for the answer), got {length}"
        )
    return build(filler)
