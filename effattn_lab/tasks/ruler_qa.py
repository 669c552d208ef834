"""RULER's two question-answering tasks, over documents that every Python carries.

How they differ from RULER's own. Its ``qa_1`` takes SQuAD: questions that people wrote about a paragraph of
Wikipedia, in words of their own. Ours is a gap: a sentence of one paragraph of Python's reference without one quoted
term. Whoever finds the sentence has the answer, so it tests search and copying more than reading.

Its ``qa_2`` takes HotpotQA: questions that need two paragraphs. Ours needs two as well: a class is described by the
first sentence of its documentation, and the base of its base is asked. One note names the base, the other what that
derives from. Questions are made by a pattern, and common answers repeat (``ValueError``), so guessing scores above 0.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from effattn_lab.tasks.ruler_sample import Sample
from effattn_lab.tasks.ruler_text import class_notes, paragraphs

GAP = "____"


class Question(NamedTuple):
    """A question, its answer and the documents that hold it."""

    text: str
    answer: str
    gold: tuple[str, ...]


@lru_cache
def gaps() -> tuple[Question, ...]:
    """Sentences with one quoted term, each in one paragraph only; the question doesn't hold the term."""
    pool, found = paragraphs(), {}
    for paragraph in pool:
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", paragraph):
            terms = re.findall(r'"([^"\s]{3,24})"', sentence)
            if len(terms) != 1 or not 10 <= len(sentence.split()) <= 40 or sentence.count(terms[0]) != 1:
                continue
            asked = f"Which term is missing in this sentence: {sentence.replace(terms[0], GAP)}"
            if terms[0].lower() not in asked.lower() and sum(sentence in p for p in pool) == 1:
                found[asked] = Question(asked, terms[0], (paragraph,))
    return tuple(found.values())


@lru_cache
def bases() -> tuple[Question, ...]:
    """Classes whose base has a note too, and whose base's base is not the end of nearly every chain."""
    notes = class_notes()
    said = [note.says for note in notes.values()]
    found = []
    for note in notes.values():
        base = notes.get(note.base)
        if base is not None and _worth_asking(base.base) and said.count(note.says) == 1:
            text = f"A class is documented by: {note.says} From which class does its base class derive?"
            if base.base.lower() not in text.lower():
                found.append(Question(text, base.base, (note.text(), base.text())))
    return tuple(found)


def _worth_asking(answer: str) -> bool:
    return answer not in ("object", "BaseException", "Exception") and "._" not in answer


@lru_cache
def documents(task: str) -> tuple[str, ...]:
    """All documents of a task; for ``qa_2`` the notes, then paragraphs, since there are only some hundred notes."""
    if task == "qa_1":
        return paragraphs()
    return (*(note.text() for note in class_notes().values()), *paragraphs())


def question_answering(task: str, filler: int, rng: np.random.Generator, reserve: int) -> Sample:
    """A question, its gold documents and ``filler`` others, shuffled and numbered.

    For ``qa_2`` other notes come before paragraphs. Documents don't repeat: a sample can't be longer than all of
    them, about 55,000 tokens.
    """
    asked = gaps() if task == "qa_1" else bases()
    chosen = asked[int(rng.integers(len(asked)))]
    pool = [d for d in documents(task) if d not in chosen.gold]
    notes = 0 if task == "qa_1" else len(class_notes()) - len(chosen.gold)
    order = [*rng.permutation(notes).tolist(), *(notes + rng.permutation(len(pool) - notes)).tolist()]
    shown = [*chosen.gold, *(pool[i] for i in order[:filler])]
    mixed = [shown[i] for i in rng.permutation(len(shown))]
    text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(mixed, 1))
    first = "Answer the question from the documents below, with the answer alone.\n\n"
    question = f"\n\nQuestion: {chosen.text}\nAnswer:"
    return Sample(task, first + text, question, (chosen.answer,), "part", reserve, filler)
