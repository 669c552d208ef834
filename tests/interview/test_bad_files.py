"""A wrong bank file gives an error that names the file, the question and the field."""

from __future__ import annotations

import copy

import pytest
import yaml

from effattn_lab.interview import BankError, Evidence, load
from effattn_lab.interview import expressions as ex

GOOD = {
    "topic": "full/flash",
    "title": "Flash",
    "questions": [
        {
            "id": "full/flash/one",
            "level": "mid",
            "question": "What?",
            "red_flag": "That.",
            "strong_answer": "This.",
            "key_points": ["first", "second", "third"],
            "follow_ups": [{"ask": "And?", "answer": "So."}],
            "links": {"section": "full/flash#flash-io", "lab": "full/flash"},
            "sources": ["dao2022flashattention"],
            "numbers": [{"claim": "a number", "value": 8, "unit": "B", "expr": "2 * 4"}],
        }
    ],
}


def write(folder, data, name="full/flash"):
    file = folder / f"{name}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False), encoding="utf-8"
    )
    return file


def broken(change):
    data = copy.deepcopy(GOOD)
    change(data, data["questions"][0])
    return data


def test_the_unbroken_file_loads(tmp_path):
    write(tmp_path, GOOD)
    (question,) = load(tmp_path)
    assert question.numbers[0].evaluate() == 8
    assert (question.chapter, question.section, question.anchor) == (
        "full/flash",
        "flash-io",
        "q-full-flash-one",
    )


def test_evidence_and_cases_load(tmp_path):
    def change(data, q):
        q["kind"] = "case"
        q["answer_by"] = ["number:8 B", "proof", "test:tests/full/test_flash.py::test_merge_law"]
        q["key_points"] = [{"point": f"point {i}", "by": ["cite:dao2022flashattention"]} for i in range(8)]
        q["proof"] = "assert True"

    write(tmp_path, broken(change))
    (question,) = load(tmp_path)
    assert question.kind == "case"
    assert [e.kind for e in question.answer_by] == ["number", "proof", "test"]
    assert question.answer_by[0].target == "8 B"
    assert question.key_points[7] == "point 7"
    assert question.points_by[7] == (Evidence("cite", "dao2022flashattention"),)
    assert question.follow_ups[0].by == ()


def test_shared_quantity_is_filled_in(tmp_path):
    (tmp_path / "quantities.yml").write_text(
        "two: {meaning: A pair, unit: B, expr: 1 + 1}\n", encoding="utf-8"
    )
    numbers = [{"q": "two", "value": 2}, {"claim": "thrice", "value": 6, "expr": '3 * Q["two"]'}]
    write(tmp_path, broken(lambda d, q: q.update(numbers=numbers)))
    shared, own = load(tmp_path)[0].numbers
    assert (shared.claim, shared.unit, shared.evaluate(), shared.quantity) == ("A pair", "B", 2, "two")
    assert (own.expr, own.evaluate(), own.uses) == ("3 * (1 + 1)", 6, ("two",))


def _drop(field):
    return lambda data, q: q.pop(field)


CASES = {
    "no level": (_drop("level"), "'level': missing"),
    "no red flag": (_drop("red_flag"), "'red_flag': missing"),
    "no links": (_drop("links"), "'links': missing"),
    "level": (
        lambda d, q: q.update(level="expert"),
        "'level': expected one of junior, mid, senior, staff, got 'expert'",
    ),
    "unknown field": (lambda d, q: q.update(answer="x"), "'answer': unknown"),
    "too few points": (lambda d, q: q.update(key_points=["one"]), "'key_points'"),
    "point is no text": (lambda d, q: q["key_points"].append({"a": "b"}), r"'key_points\[3\]'"),
    "follow-up without answer": (
        lambda d, q: q["follow_ups"][0].pop("answer"),
        r"'follow_ups\[0\].answer': missing",
    ),
    "section": (lambda d, q: q["links"].update(section="flash-io"), "'links.section'"),
    "value is text": (lambda d, q: q["numbers"][0].update(value="8"), r"'numbers\[0\].value'"),
    "no evidence": (
        lambda d, q: q["numbers"][0].pop("expr"),
        r"'numbers\[0\]': expected 'q' .*'expr'.*or 'source'",
    ),
    "expression": (
        lambda d, q: q["numbers"][0].update(expr="2 *"),
        r"'numbers\[0\].expr': not a Python expression",
    ),
    "forbidden expression": (
        lambda d, q: q["numbers"][0].update(expr="().__class__"),
        r"'numbers\[0\].expr'.*not allowed",
    ),
    "unknown quantity": (
        lambda d, q: q.update(numbers=[{"q": "no-such", "value": 8}]),
        r"'numbers\[0\].q': 'no-such' is not in quantities.yml",
    ),
    "unknown quantity in an expression": (
        lambda d, q: q["numbers"][0].update(expr='Q["no-such"] + 1'),
        r"'numbers\[0\].expr': 'no-such' is not in quantities.yml",
    ),
    "quantity and claim": (lambda d, q: q["numbers"][0].update(q="two"), r"'numbers\[0\]"),
    "evidence of no kind": (lambda d, q: q.update(answer_by=["trust me"]), r"'answer_by\[0\]'"),
    "no evidence in the list": (lambda d, q: q.update(answer_by=[]), "'answer_by'"),
    "evidence by a number that is not there": (
        lambda d, q: q.update(answer_by=["number:9 B"]),
        "'answer_by': no number of the question is '9 B'; there are 8 B",
    ),
    "evidence by a number without its unit": (
        lambda d, q: q.update(answer_by=["number:8"]),
        "'answer_by': no number of the question is '8'",
    ),
    "evidence by a proof that is not there": (
        lambda d, q: q["follow_ups"][0].update(by=["proof"]),
        r"'follow_ups\[0\].by': the question has no proof",
    ),
    "evidence by an unlisted paper": (
        lambda d, q: q.update(key_points=["first", {"point": "second", "by": ["cite:nobody2020"]}, "third"]),
        r"'key_points\[1\].by': 'nobody2020' is not in 'sources'",
    ),
    "evidence by something that is no test": (
        lambda d, q: q.update(answer_by=["test:effattn_lab/cli.py::main"]),
        r"'answer_by\[0\]'",
    ),
    "many points outside a case": (
        lambda d, q: q.update(key_points=[f"point {i}" for i in range(6)]),
        "'key_points': expected at most 5 outside a case, got 6",
    ),
    "kind": (lambda d, q: q.update(kind="riddle"), "'kind': expected one of question, case"),
    "unlisted source": (
        lambda d, q: q["numbers"][0].update(source="nobody2020"),
        r"'numbers\[0\].source'.*nobody2020",
    ),
    "loose tolerance": (lambda d, q: q["numbers"][0].update(rel_tol=0.5), r"'numbers\[0\].rel_tol'"),
    "proof proves nothing": (lambda d, q: q.update(proof="print(1)"), "'proof'"),
    "id of another topic": (
        lambda d, q: q.update(id="full/heads/one"),
        "'id': expected it to begin with 'full/flash/'",
    ),
    "id": (lambda d, q: q.update(id="One"), "'id'"),
    "same id twice": (lambda d, q: d["questions"].append(copy.deepcopy(q)), "'id': already used"),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_error_names_file_question_and_field(tmp_path, change, message):
    data = broken(change)
    write(tmp_path, data)
    with pytest.raises(BankError, match=message) as caught:
        load(tmp_path)
    assert "full/flash.yml" in str(caught.value).replace("\\", "/")
    assert str(data["questions"][0]["id"]) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topic: [", "not valid YAML"),
        ("topic: full/flash\ntopic: full/flash\n", "'topic' is given twice"),
        ("", "object"),
        (
            "topic: full/flash\ntitle: Flash\nquestions: [{level: mid}]\n",
            "question 1: field 'id', 'question'",
        ),
        ("topic: full/heads\ntitle: Heads\nquestions: []\n", "questions"),
    ],
)
def test_malformed_file(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(BankError, match=message) as caught:
        load(tmp_path)
    assert "flash.yml" in str(caught.value)


def test_topic_must_match_the_path(tmp_path):
    write(tmp_path, GOOD, "full/heads")
    with pytest.raises(BankError, match=r"heads.yml: field 'topic': expected 'full/heads'"):
        load(tmp_path)


def test_empty_bank(tmp_path):
    with pytest.raises(BankError, match="found none"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        ("__import__('os')", "unknown name"),
        ("math.__dict__", "not allowed"),
        ("GPUS['A100'].__class__", "not allowed"),
        ("linear_attention.__dict__", "not allowed"),
        ("linear_attention.state_bytes.__globals__", "not allowed"),
        ("linear_attention.torch", "no attribute"),
        ("[x for x in (1,)]", "not allowed"),
        ("(lambda: 1)()", "not allowed"),
        ("1 if 1 else 2", "not allowed"),
        ("max(*GPUS)", "not allowed"),
        ("kv_cache_bytes(**{})", "not allowed"),
        ("True.real", "not allowed"),
        ("'{0.__class__}'.format(math)", "not allowed"),
        ("2 ** 100000", "too large"),
        ("10 ** 9 ** 9", "too large"),
        ("'a' * 9", "text"),
        ("1 / 0", "division"),
        ("GPUS['none'].ridge", "KeyError"),
        ("attention_flops(1)", "TypeError"),
        ("GPUS", "expected a finite number"),
        ("math.inf", "expected a finite number"),
        ("1 +", "not a Python expression"),
        ("1" * 900, "at most"),
        ("max('{0.__class__}', '').format(math)", "not allowed"),
        ("derate(GPUS['A100']).__class__", "not allowed"),
        ("derate.ridge", "not allowed"),
        ("derate(GPUS['A100'], 2)", "compute: expected a share"),
    ],
)
def test_expression_refused(expr, message):
    with pytest.raises(ValueError, match=message):
        ex.evaluate(expr)


def test_expression_arithmetic():
    assert ex.evaluate("kv_cache_bytes(32, 8, 128, 1) / 2**10") == 128
    assert ex.evaluate('-GPUS["H100"].bandwidth_gbs + 3350') == 0
    assert ex.evaluate("flash_tiled_bytes(1, 1, 1, 64, 64, 16, block_m=64, block_n=64)") == 8448
    assert ex.evaluate("linear_attention.state_bytes(8, 64, 64) / 2**10") == 130  # S and z, fp32
    assert ex.evaluate("derate(GPUS['A100'], 1, 0.5).ridge / GPUS['A100'].ridge") == 2
    assert ex.evaluate("with_kv_heads(MODELS['Llama-2-7B'], 8).num_kv_heads") == 8
    assert ex.evaluate("max(7 // 2, 7 % 4, abs(-2))") == 3
