"""The bank: every file valid, every number with evidence, every link and source there, every proof true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

from effattn_lab.interview import LEVELS, load, select, topics
from effattn_lab.interview import bank as bank_module
from effattn_lab.interview.evidence import (
    cited,
    contradictions,
    missing_tests,
    named_tests,
    printed_numbers,
    unbound_claims,
    unsupported_numbers,
    unused_assumptions,
)
from effattn_lab.interview.files import referred
from effattn_lab.interview.plain import plain

ROOT = Path(__file__).parents[2]
BANK = load()
QUANTITIES = bank_module.load_quantities(ROOT / "interview")
KEYS = set(
    re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "references.bib").read_text(encoding="utf-8"), re.MULTILINE)
)
NUMBERS = [
    pytest.param(number, id=f"{question.id}-{i}")
    for question in BANK
    for i, number in enumerate(question.numbers)
    if number.expr
]
by_id = pytest.mark.parametrize("question", BANK, ids=[question.id for question in BANK])


def test_schema_is_a_schema():
    schema = json.loads((ROOT / "effattn_lab" / "interview" / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)


def test_load_finds_every_file():
    files = set((ROOT / "interview").rglob("*.yml")) - {ROOT / "interview" / "quantities.yml"}
    assert {question.file for question in BANK} == files
    assert bank_module.bank_root() == ROOT / "interview"


def test_ids_are_unique_and_levels_are_spread():
    assert len({question.id for question in BANK}) == len(BANK)
    assert len({question.anchor for question in BANK}) == len(BANK)
    assert {question.level for question in BANK} == set(LEVELS)
    for topic in topics(BANK):
        assert len({question.level for question in select(BANK, topic)}) >= 3, f"{topic}: too few levels"


@by_id
def test_section_exists(question):
    chapter = ROOT / "chapters" / f"{question.chapter}.md"
    assert chapter.is_file(), f"{question.id}: links.section names {chapter.name}, which is not there"
    assert re.search(
        rf"^\({re.escape(question.section)}\)=$", chapter.read_text(encoding="utf-8"), re.MULTILINE
    ), f"{question.id}: no label ({question.section})= in {chapter.relative_to(ROOT)}"


@by_id
def test_lab_exists(question):
    if question.lab is not None:
        assert (ROOT / "labs" / "src" / f"{question.lab}.py").is_file()


@by_id
def test_sources_are_in_the_bibliography(question):
    assert set(question.sources) <= KEYS
    assert cited(question) <= KEYS


def test_sources_of_quantities_are_in_the_bibliography():
    assert {q.source for q in QUANTITIES.values() if q.source is not None} <= KEYS


@by_id
def test_every_claim_is_bound(question):
    assert unbound_claims(question) == []
    assert missing_tests(question, ROOT) == []


def test_bound_tests_are_collected():
    """A function called test_x may still be no test: inside another, deselected, in a file that fails to import."""
    wanted = set().union(*(named_tests(question) for question in BANK))
    files = sorted({name.split("::")[0] for name in wanted})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    collected = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert wanted - collected == set(), done.stdout[-1000:]


def test_no_two_answers_contradict():
    assert contradictions(BANK, QUANTITIES) == []


def test_every_quantity_is_used():
    numbers = [number for question in BANK for number in question.numbers]
    used = {number.quantity for number in numbers} | {id_ for number in numbers for id_ in number.uses}
    inner = {id_ for q in QUANTITIES.values() for id_ in referred(q.expr or "")}
    assert set(QUANTITIES) <= used | inner


@by_id
def test_every_printed_number_has_evidence(question):
    assert unsupported_numbers(question) == []
    assert unused_assumptions(question) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_expression_gives_the_value(number):
    assert number.evaluate() == pytest.approx(number.value, rel=number.rel_tol, abs=0)


@pytest.mark.parametrize("question", [q for q in BANK if q.proof], ids=[q.id for q in BANK if q.proof])
def test_proof_runs(question):
    assert max(map(len, question.proof.splitlines())) <= 80, "wider than a page of the book"
    torch.set_num_threads(1)
    exec(compile(question.proof, question.id, "exec"), {})


def test_the_worked_cases_print_no_number_of_their_own():
    """What a sentence of the chapter prints is the bank's, which is computed; the rest is glued in from cells."""
    questions = select(BANK, "practice/system_design")
    known = {float(n.value) for q in questions for n in q.numbers} | {
        float(g) for q in questions for g in q.given
    }
    text = (
        (ROOT / "chapters" / "practice" / "system_design.md").read_text(encoding="utf-8").split("---", 2)[2]
    )
    text = re.sub(r"^```.*?^```$|^#.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\{\w+(:\w+)?\}`[^`]*`", " ", text)
    printed = list(printed_numbers(text))
    assert len(printed) > 60
    assert [value for value, unit in printed if value not in known and (unit or value > 8)] == []


@by_id
def test_strong_answer_can_be_said_aloud(question):
    text = plain(question.strong_answer)
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z0-9\"'])", text)
    if question.kind == "case":  # two to three minutes, after the working out
        assert 8 <= len(sentences) <= 30
        assert 220 <= len(text.split()) <= 450
        assert question.minutes >= 15
        return
    assert 3 <= len(sentences) <= 8
    # 150 words a minute is how people speak; a minute's answer is not a lecture of three.
    assert 40 <= len(text.split()) <= 75 * question.minutes


@by_id
def test_plain_leaves_no_latex(question):
    for text in question.texts():
        assert not re.search(r"[\\${}]", plain(re.sub(r"`[^`]*`", "", text))), text


def test_plain():
    assert plain(r"**Memory** is $4N^2D/M$, not `x**2`") == "Memory is 4N²D/M, not `x**2`"
    assert plain(r"$o = e^{L_a-L}o_a$, $N_q \ne N_k$, $\sqrt D$") == "o = e^(L_a-L)o_a, N_q ≠ N_k, √D"
    assert plain(r"$L_i = \log\sum_j e^{s_{ij}}$, $10^{-14}$") == "L_i = log Σ_j e^(s_ij), 10⁻¹⁴"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("53,248 tokens, 13 % and 5.7×", [53248, 13, 5.7]),
        (r"$4.5\cdot10^{15}$ FLOPs, $10^{-14}$", [4.5e15, 1e-14]),
        ("Llama-3-8B on an H100 in fp16, FA2, H2O, `2**10`", []),
        ("$4N^2D$ FLOPs, about 4.", [4]),
    ],
)
def test_printed_numbers(text, numbers):
    assert [value for value, _ in printed_numbers(text)] == numbers


def test_wheel_carries_the_bank(monkeypatch, tmp_path):
    # In a wheel the bank lies inside the package and no pyproject.toml beside it.
    package = tmp_path / "site-packages" / "effattn_lab" / "interview"
    (package / "bank" / "full").mkdir(parents=True)
    monkeypatch.setattr(bank_module, "_PACKAGE", package)
    assert bank_module.bank_root() == package / "bank"
    (package / "bank" / "full").rmdir()
    (package / "bank").rmdir()
    with pytest.raises(bank_module.BankError, match="no interview bank"):
        bank_module.bank_root()
