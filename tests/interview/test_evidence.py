"""The walk over the bank notices claims without evidence, evidence that isn't there, and contradictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from effattn_lab.interview import BankError, Evidence, load
from effattn_lab.interview.bank import Number, Quantity, load_quantities
from effattn_lab.interview.evidence import canonical, contradictions, missing_tests, unbound_claims
from effattn_lab.interview.files import resolve

ROOT = Path(__file__).parents[2]
BANK = {question.id: question for question in load()}
QUANTITIES = load_quantities(ROOT / "interview")
RIDGE = BANK["foundations/cost_model/ridge"]
BATCH = BANK["foundations/cost_model/batch"]


def number(claim="Something nobody else counts", value=295.0, expr=None, source=None, **more):
    return Number(claim, value, "FLOP/B", expr, source, 0.005, **more)


def with_numbers(*numbers):
    return replace(BATCH, id="foundations/cost_model/seeded", numbers=numbers)


def complaints(*numbers):
    return contradictions([*BANK.values(), with_numbers(*numbers)], QUANTITIES)


def test_the_bank_itself_is_clean():
    assert contradictions(BANK.values(), QUANTITIES) == []


@pytest.mark.parametrize(
    ("seed", "complaint"),
    [
        # a shared quantity printed with another value: here the ridge of the sparse headline
        (
            number("Ridge of an H100, dense fp16 peak", 591, 'GPUS["H100"].ridge', quantity="h100-ridge"),
            "prints 591, h100-ridge is 295.224",
        ),
        # a reported figure, printed wrongly
        (number(value=750, source="shah2024flashattention3", quantity="fa3-tflops"), "prints 750, fa3-tflops is 740"),
        # what a question computes already, computed in another way under the same words
        (
            number("stored weights of Llama-3-8B, 16 bits", 15, 'linear_bytes(MODELS["Llama-3-8B"].read_params)'),
            "computed otherwise than in foundations/cost_model/batch",
        ),
        # the shared computation typed again, only spaced otherwise
        (number(expr="GPUS['H100'] . ridge"), "repeats h100-ridge"),
        # the same computation in two questions, and no quantity for it
        (number(value=203, expr='GPUS["T4"].ridge'), "foundations/cost_model/seeded: all compute GPUS['T4'].ridge"),
        # a figure of a paper outside the table, and one typed into an expression
        (number(source="shah2024flashattention3"), "belongs in quantities.yml"),
        (number(expr="740 / 2.5", source="shah2024flashattention3"), "typed in"),
    ],
)  # fmt: skip
def test_a_seeded_contradiction_is_caught(seed, complaint):
    assert any(complaint in found for found in complaints(seed)), complaints(seed)


def test_one_figure_of_a_paper_in_two_versions():
    """The first printing of the FlashAttention paper has 35.3 GB where the later has 40.3."""
    seed = number("Main-memory traffic, standard attention", 35.3, source="dao2022flashattention")
    other = replace(seed, value=40.3)
    found = contradictions(
        [with_numbers(seed), replace(with_numbers(other), id="full/flash/other")], QUANTITIES
    )
    assert any("computed otherwise than in foundations/cost_model/seeded" in text for text in found)


def test_honest_sharing_is_no_contradiction():
    same = next(n for n in RIDGE.numbers if n.quantity == "h100-ridge")
    assert same.value == 295
    assert complaints(same, number("A rounding of it", 300, 'GPUS["H100"].ridge + 5')) == []


def test_two_quantities_of_one_meaning():
    twin = Quantity("twin", "ridge of an H100; dense fp16 peak", "FLOP/B", "1 + 1", None, None)
    copy = Quantity("copy", "Another name", "FLOP/B", "GPUS['H100'].ridge", None, None)
    found = contradictions([], {**QUANTITIES, "twin": twin, "copy": copy})
    assert found == [
        "quantities h100-ridge and twin: the same meaning",
        "quantities h100-ridge and copy: the same computation",
    ]


def test_an_unbound_claim_is_named():
    assert unbound_claims(RIDGE) == []
    assert unbound_claims(replace(RIDGE, answer_by=())) == ["strong answer"]
    points = (RIDGE.points_by[0], (), *RIDGE.points_by[2:])
    assert unbound_claims(replace(RIDGE, points_by=points)) == [RIDGE.key_points[1]]
    follow_ups = (replace(RIDGE.follow_ups[0], by=()), *RIDGE.follow_ups[1:])
    assert unbound_claims(replace(RIDGE, follow_ups=follow_ups)) == [RIDGE.follow_ups[0].answer]


@pytest.mark.parametrize(
    "name",
    [
        "tests/full/test_flash.py::test_no_such_thing",
        "tests/full/test_nothing.py::test_merge_law",
        "tests/measure/test_traffic.py::traffic_rows",
    ],
)
def test_a_test_that_is_not_there_is_named(name):
    assert missing_tests(replace(RIDGE, answer_by=(Evidence("test", name),)), ROOT) == [name]


def test_resolve():
    assert resolve('Q["fa3-tflops"] / 2', QUANTITIES) == "740 / 2"
    assert canonical(resolve('1 / Q["h100-ridge"]', QUANTITIES)) == "1 / GPUS['H100'].ridge"
    assert canonical("f(a,b) *2") == canonical("(f(a, b)) * 2")
    with pytest.raises(ValueError, match=r"'no-such' is not in quantities.yml"):
        resolve('Q["no-such"]', QUANTITIES)
    circle = {"a": Quantity("a", "A", "", 'Q["a"] + 1', None, None)}
    with pytest.raises(ValueError, match="'a' refers to itself"):
        resolve('Q["a"]', circle)


def write_quantities(folder, text):
    (folder / "quantities.yml").write_text(text, encoding="utf-8")
    return load_quantities(folder)


def test_quantities_of_another_bank(tmp_path):
    assert load_quantities(tmp_path) == {}
    found = write_quantities(tmp_path, "two: {meaning: A pair, expr: 1 + 1}\n")
    assert found["two"].expr == "1 + 1"
    assert write_quantities(tmp_path, "three: {meaning: Three things, expr: 1 + 2}\n").keys() == {"three"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two: {meaning: A pair}", "'two': expected either 'expr', or 'value' with 'source'"),
        ("two: {meaning: A pair, value: 2}", "'two': expected either"),
        ("two: {meaning: A pair, expr: 1 + 1, value: 2, source: nobody2020}", "'two': expected either"),
        ("two: {meaning: A pair, expr: 1 +}", "'two.expr': not a Python expression"),
        ("two: {meaning: A pair, expr: 'Q[\"one\"]'}", "'two.expr': 'one' is not in quantities.yml"),
        ("Two: {meaning: A pair, expr: 1 + 1}", "'Two' does not match"),
        ("two: {meaning: A pair, expr: 1 + 1}\ntwo: {meaning: A pair, expr: 2}", "key 'two' is given twice"),
    ],
)
def test_wrong_quantities(tmp_path, text, message):
    with pytest.raises(BankError, match=message) as caught:
        write_quantities(tmp_path, text)
    assert "quantities.yml" in str(caught.value)
