"""RULER's tasks: what stands in the text is counted again from the text, by a reader that knows only the wording."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from effattn_lab.tasks import ruler, ruler_lists, ruler_needles, ruler_qa, ruler_text
from effattn_lab.tasks.ruler_sample import Sample, largest, string_match_all, string_match_part

WORDS = re.compile(r"\w+|[^\w\s]")
NEEDLE = re.compile(r'The secret (number|uuid) of "([^"]+)" is (\S+)\.')


def count(text: str) -> int:
    """A tokenizer of its own: words and marks."""
    return len(WORDS.findall(text))


def make(task, length=900, **options):
    return ruler.make(task, length, count, **options)


def test_thirteen_tasks():
    assert len(ruler.TASKS) == 13
    assert Counter(task.group for task in ruler.TASKS.values()) == {
        "retrieval": 8,
        "tracing": 1,
        "aggregation": 2,
        "questions": 2,
    }
    assert [ruler.TASKS[name].reserve for name in ("niah_single_1", "vt", "cwe", "fwe", "qa_1")] == [
        128, 30, 120, 50, 32,
    ]  # fmt: skip


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_length_is_met_by_any_tokenizer(task):
    for tokens in (count, len, lambda text: len(text.encode()) // 4 + 1):
        for length in (3000, 5001) if tokens is not len else (12_000,):
            sample = ruler.make(task, length, tokens, seed=1)
            assert sample.tokens == tokens(sample.prompt)
            assert sample.tokens + sample.reserve <= length
            assert sample.prompt == sample.context + sample.question
            more = ruler.TASKS[task].build(
                sample.filler + 1, np.random.default_rng([1, *task.encode()]), sample.reserve, length
            )
            assert tokens(more.prompt) + more.reserve > length, "one more filler would not have fitted"


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_seed_is_a_sample(task):
    first, again, other = make(task, seed=4), make(task, seed=4), make(task, seed=5)
    assert first == again
    assert first.prompt != other.prompt
    assert all(first.references)
    assert first.score(" ".join(first.references)) == 1
    assert first.score("nothing of it") == 0


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_answer_stands_in_the_context_and_not_in_the_question(task):
    for seed in range(5):
        sample = make(task, seed=seed)
        assert all(r in sample.context for r in sample.references)
        assert not any(r in sample.question for r in sample.references), "else the question gives it away"


@pytest.mark.parametrize("task", ruler_needles.NEEDLES)
def test_needles(task):
    """Keys, values, queries and haystack as in RULER's table."""
    table = {  # haystack, keys but for a haystack of needles, values a key, queries, key is a uuid, value is a uuid
        "niah_single_1": ("noise", 1, 1, 1, False, False),
        "niah_single_2": ("essay", 1, 1, 1, False, False),
        "niah_single_3": ("essay", 1, 1, 1, False, True),
        "niah_multikey_1": ("essay", 4, 1, 1, False, False),
        "niah_multikey_2": ("needle", None, 1, 1, False, False),
        "niah_multikey_3": ("needle", None, 1, 1, True, True),
        "niah_multivalue": ("essay", 1, 4, 1, False, False),
        "niah_multiquery": ("essay", 4, 1, 4, False, False),
    }
    haystack, keys, values, queries, uuid_key, uuid_value = table[task]
    for seed in range(3):
        sample = make(task, seed=seed)
        found: dict[str, list[str]] = {}
        for kind, key, value in NEEDLE.findall(sample.context):
            assert kind == ("uuid" if uuid_value else "number")
            found.setdefault(key, []).append(value)
        assert len(found) == (sample.filler + 1 if keys is None else keys)
        assert all(len(v) == values for v in found.values())
        everything = [v for vs in found.values() for v in vs]
        assert len(set(everything)) == len(everything), "no value stands in two places"
        assert (
            all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", v) for v in everything)
            == uuid_value
        )
        assert all(re.fullmatch(r"[1-9]\d{6}", v) for v in everything) != uuid_value
        assert all(("-" in k and len(k) == 36) == uuid_key for k in found)
        asked = re.findall(r'"([^"]+)"', sample.question.split("Answer:")[0])
        assert len(asked) == queries
        assert sorted(sample.references) == sorted(v for key in asked for v in found[key])
        body = sample.context.split("\n\n", 1)[1]
        left = NEEDLE.sub("", body)
        if haystack == "needle":
            assert left.strip() == ""
        elif haystack == "noise":
            assert set(left.split("\n")) - {""} == set(ruler_text.NOISE)
            assert len([line for line in left.split("\n") if line]) == sample.filler
        else:
            essay = " ".join(ruler_text.sentences() * 2)
            assert re.sub(r"\s+", " ", left).strip() in essay, "the prose is whole and in its order"


def test_needles_stand_at_depths_of_the_grid():
    depths = set()
    for seed in range(40):
        sample = ruler_needles.build("niah_multivalue", 200, np.random.default_rng(seed), 128)
        body = sample.context.split("\n\n", 1)[1]
        # What the needles split: the sentences before each, found by putting the prose back.
        pieces = NEEDLE.split(body)[::4]
        before = np.cumsum([len(p.split()) for p in pieces])[:-1]
        assert len(set(before)) == 4, "no two at one depth"
        depths.update(round(b / sum(len(p.split()) for p in pieces), 1) for b in before)
    assert len(depths) == 11, "from the beginning to the end"
    assert len(ruler_needles.DEPTHS) == 40
    assert (ruler_needles.DEPTHS[0], ruler_needles.DEPTHS[-1]) == (0, 100)


def test_noise_and_lines_are_filled_at_every_place():
    places = Counter()
    for seed in range(300):
        text = ruler_needles.build("niah_single_1", 4, np.random.default_rng(seed), 128).context
        lines = text.split("\n\n", 1)[1].split("\n")
        places[next(i for i, line in enumerate(lines) if NEEDLE.match(line))] += 1
    assert set(places) == {0, 1, 2, 3, 4}
    assert min(places.values()) > 35  # 60 expected, 7 the standard deviation


def resolve(text: str) -> dict[str, str]:
    """Variables read from the top: every pointer must point to what stands above."""
    values: dict[str, str] = {}
    for name, other, number in re.findall(r"^VAR (\w+) = (?:VAR (\w+)|(\d+))$", text, flags=re.M):
        assert name not in values
        values[name] = number or values[other]
    return values


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 6)])
def test_variables(chains, hops):
    for seed in range(5):
        sample = ruler_lists.variables(40, np.random.default_rng(seed), 30, chains=chains, hops=hops)
        example, text = re.split(r"Answer: .*\n\n", sample.context)
        shown, values = resolve(example), resolve(text)
        asked = re.search(r"have the value (\d+)", sample.question)[1]
        assert {name for name, value in values.items() if value == asked} == set(sample.references)
        assert len(sample.references) == hops + 1
        assert len(values) == chains * (hops + 1)
        assert len(set(values.values())) == chains
        assert not set(shown) & set(values)
        assert all(re.fullmatch(r"[A-Z]{5}", name) for name in values)
        assert all(re.fullmatch(r"\d{5}", value) for value in values.values())
        given = re.search(r"Answer: [^:]*: (.*)\n\n", sample.context)[1].split()
        wanted = re.search(r"have the value (\d+)", example)[1]
        assert given == [name for name, value in shown.items() if value == wanted], "the example is right"


def numbered(text: str) -> list[str]:
    found = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(n) for n, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(("length", "often", "seldom"), [(4095, 6, 1), (4096, 30, 3), (9000, 30, 3)])
def test_common_words(length, often, seldom):
    sample = make("cwe", length, seed=2)
    example, text = re.split(r"Answer: .*\n\n", sample.context)
    counts = Counter(numbered(text))
    assert len(counts) == sample.filler
    assert {w for w, c in counts.items() if c == often} == set(sample.references)
    assert len(sample.references) == 10
    assert Counter(counts.values()) == {often: 10, seldom: sample.filler - 10}
    shown = Counter(numbered(example))
    assert not set(shown) & set(counts)
    given = numbered(re.search(r"Answer: [^:]*: (.*)\n\n", sample.context)[1])
    assert set(given) == {w for w, _ in shown.most_common(10)}
    assert len(shown) == 20


def test_frequent_words():
    for seed in range(3):
        sample = make("fwe", 2000, seed=seed)
        text = sample.context.split("\n\n", 1)[1].split()
        counts = Counter(text)
        ranked = [word for word, _ in counts.most_common()]
        assert ranked[0] == "..."
        assert set(sample.references) == set(ranked[1:4])
        assert counts[ranked[3]] > counts[ranked[4]], "one answer"
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in ranked[1:])
        assert len(ranked) <= 2000 // 50
        m = sample.filler
        assert [counts[w] for w in ranked[:4]] == [
            math.floor(m / k**2 * 6 / math.pi**2) for k in (1, 2, 3, 4)
        ]


def test_zeta():
    assert ruler_lists.zeta(2) == pytest.approx(math.pi**2 / 6, abs=1e-12)
    assert ruler_lists.zeta(4) == pytest.approx(math.pi**4 / 90, abs=1e-12)
    assert ruler_lists.zeta(1.5) == pytest.approx(2.612375348685488, abs=1e-9)
    with pytest.raises(ValueError, match="alpha: expected a number above 1, got 1"):
        ruler_lists.zeta(1)


def listed(sample: Sample) -> list[str]:
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", sample.context)
    assert [int(n) for n in parts[1::2]] == list(range(1, len(parts[1::2]) + 1))
    return parts[2::2]


def test_questions_of_one_document():
    for seed in range(10):
        sample = make("qa_1", seed=seed)
        documents = listed(sample)
        assert len(documents) == len(set(documents)) == sample.filler + 1
        asked = re.search(r"in this sentence: (.*)\nAnswer:", sample.question)[1]
        whole = asked.replace(ruler_qa.GAP, sample.references[0])
        assert sum(whole in d for d in documents) == 1
        assert asked.count(ruler_qa.GAP) == 1


def test_questions_of_two_documents():
    """The notes in the text, and they alone, lead from the description to the answer."""
    where = set()
    for seed in range(20):
        sample = make("qa_2", seed=seed)
        note = re.compile(r"(\S+) is a class\. Its documentation says: (.*) It derives from (\S+)\.")
        notes = {m[1]: m for m in map(note.fullmatch, listed(sample)) if m}
        says = re.search(r"documented by: (.*) From which", sample.question)[1]
        (start,) = [m for m in notes.values() if m[2] == says]
        assert notes[start[3]][3] == sample.references[0], "two steps"
        assert sample.references[0] not in ("object", "Exception", "BaseException")
        where.add([m[2] for m in notes.values()].index(says))
    assert len(where) > 5, "the gold is not always at one place"
    answers = Counter(q.answer for q in ruler_qa.bases())
    assert max(answers.values()) < 0.35 * len(ruler_qa.bases()), "one guess is not most of the score"


def test_documents_end_before_the_length():
    sample = ruler.make("qa_1", 10**6, count)
    assert sample.filler == len(ruler_text.paragraphs()) - 1
    assert sample.tokens < 10**5


def test_material():
    assert len(ruler_text.paragraphs()) > 500
    assert len(set(ruler_text.paragraphs())) == len(ruler_text.paragraphs())
    assert len(ruler_text.sentences()) > len(ruler_text.paragraphs())
    assert len(ruler_qa.gaps()) > 100
    assert len(ruler_qa.bases()) > 40
    few, many = ruler_text.words(10), ruler_text.words(10_000)
    assert len(set(many)) == len(many) > 5000
    assert many[: len(few)] == few
    assert not any("-" in word for word in few)


def test_scores():
    assert string_match_all(["It is 12 and 34.", "none"], [["12", "34", "56", "78"], ["9"]]) == 25
    assert string_match_all(["ABCDE"], [["abcde"]]) == 100, "case is ignored"
    assert string_match_part(["the Rose", "a fern"], [["rose", "oak"], ["oak"]]) == 50
    assert string_match_part(["oak, rose"], [["rose", "oak"]]) == 100, "one is enough, more is no more"
    sample = Sample("t", "c", "q", ("a1", "b2"), "all", 1)
    assert sample.score("only a1") == 0.5
    assert Sample("t", "c", "q", ("a1", "b2"), "part", 1).score("only a1") == 1


@pytest.mark.parametrize("limit", range(1, 40))
def test_largest(limit):
    asked = []

    def fits(n):
        asked.append(n)
        return n <= limit

    assert largest(fits, 1) == limit
    assert len(asked) <= 2 * math.log2(limit) + 4
    assert largest(fits, 1, 10) == min(limit, 10)
    assert largest(fits, limit) == limit
    assert largest(fits, limit + 1) is None
    assert max(asked) <= max(2 * limit, limit + 1), "nothing far beyond is ever built"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make("niah"), "task: expected one of niah_single_1, .*, got 'niah'"),
        (lambda: make("vt", 0), "length: expected an integer of at least 1, got 0"),
        (lambda: make("vt", 100, seed=-1), "seed: expected an integer of at least 0, got -1"),
        (lambda: make("vt", 100, reserve=0), "reserve: expected an integer of at least 1, got 0"),
        (lambda: make("cwe", 200), r"length: expected at least \d+ tokens for cwe .*120 of them.*, got 200"),
        (lambda: string_match_all([], []), "outputs: expected a non-empty sequence of strings"),
        (lambda: string_match_all("abc", ["a"]), "outputs: expected a non-empty sequence of strings, got 'abc'"),
        (lambda: string_match_part(["a"], []), "references: expected one entry for each of 1 outputs, got 0"),
        (lambda: string_match_part(["a"], ["abc"]), "references: expected non-empty sequences .* got 'abc'"),
        (lambda: string_match_part(["a"], [[]]), "references: expected non-empty sequences"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_length_named_as_the_least_is_enough():
    with pytest.raises(ValueError, match="length: expected at least") as said:
        make("niah_single_3", 50)
    least = int(re.search(r"at least (\d+)", str(said.value))[1])
    assert make("niah_single_3", least).filler >= 1
