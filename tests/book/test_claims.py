"""Claims beside measurements: numbers come from records, verdicts compare them, a wrong row is named."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ext() -> Any:
    spec = importlib.util.spec_from_file_location("effattn_claims", ROOT / "_ext" / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RECORD = {
    "rows": [{"mixer": "a", "n": 8, "loss": 1.5}, {"mixer": "b", "n": 8, "loss": 2.0}],
    "all": {"count": 2},
}
ROW = {
    "id": "x",
    "mechanism": "linear/zeros",
    "claim": "A is better.",
    "cite": "key",
    "reported": "A 1, B 2.",
    "why": "Because.",
    "ours": {
        "setup": "Two models.",
        "numbers": {"a": "r.json#rows[mixer=a,n=8].loss", "b": "r.json#rows[mixer=b].loss"},
        "result": "A {a:.1f}, B {b:.2f}.",
        "holds": "a < b - 0.1",
    },
}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "r.json").write_text(json.dumps(RECORD), encoding="utf-8")
    (folder / "claims.yml").write_text(yaml.safe_dump(list(rows)), encoding="utf-8")
    return folder


def test_a_row_gets_its_numbers_and_its_verdict_from_the_record(ext, tmp_path):
    (claim,) = ext.load(written(tmp_path, ROW))
    assert (claim.result, claim.holds, claim.records) == ("A 1.5, B 2.00.", True, ("r.json",))
    other = {**ROW, "ours": {**ROW["ours"], "holds": "a > b"}}
    assert ext.load(written(tmp_path, other))[0].holds is False
    unmeasured = {k: v for k, v in ROW.items() if k != "ours"}
    assert ext.load(written(tmp_path, unmeasured))[0].holds is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"why": None}, r"x: expected .* missing \['why'\]"),
        ({"typed": "0.9"}, "x: expected"),
        ({"ours": {"setup": "s"}}, "ours: expected setup"),
        ({"numbers": {"a": "r.json#rows[mixer=c].loss"}}, "0 rows with mixer=c"),
        ({"numbers": {"a": "r.json#rows[n=8].loss"}}, "2 rows with n=8"),
        ({"numbers": {"a": "r.json#all.missing"}}, "no 'missing' there"),
        ({"numbers": {"a": "r.json#all"}}, "expected a number"),
        ({"numbers": {"a": "r.json"}}, "expected file.json#"),
        ({"numbers": {"a": "none.json#all"}}, "none.json"),
        ({"result": "{c}"}, "ours: 'c'"),
        ({"holds": "1 < 2"}, "compares nothing that was measured"),
        ({"holds": "a"}, "expected one comparison"),
        ({"holds": "a < c"}, "ours: 'c'"),
    ],
)
def test_a_wrong_row_is_named_with_its_fault(ext, tmp_path, change, message):
    row = {**ROW, "ours": dict(ROW["ours"])}
    for key, value in change.items():
        (row["ours"] if key in row["ours"] else row)[key] = value
    with pytest.raises(ext.ClaimError, match=message):
        ext.load(written(tmp_path, row))


def test_the_rows_of_the_book(ext):
    rows = ext.load(ROOT)
    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(encoding="utf-8"), re.M))
    for row in rows:
        assert row.cite in keys, row.id
        assert (ROOT / "chapters" / f"{row.mechanism}.md").exists(), row.id
        assert all(row.records) or row.holds is None, row.id
