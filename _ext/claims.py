"""``{claims}``: what the papers and their summaries claim, beside what this book measured, from ``claims.yml``.

Nothing measured is typed: each number is looked up in the record that an experiment of the package wrote, and the
verdict is a comparison of such numbers. A row without a measurement says so, and why.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from effattn_lab.interview.expressions import evaluate

VERDICTS = {True: "Same direction", False: "Not here", None: "Not measured here"}
_TEXTS = ("id", "mechanism", "claim", "cite", "reported", "why")
_STEP = re.compile(r"(?:^|\.)(\w[\w-]*)|\[([^\]]+)\]")


class ClaimError(ValueError):
    """A row of ``claims.yml`` is wrong; the message names it."""


@dataclass(frozen=True)
class Claim:
    """One headline claim.

    Args:
        id: name of the row; mechanism: ``part/slug``; claim: as it is usually told; cite: key of ``references.bib``.
        reported: what the source itself says, with its set-up. why: the reason for agreement or disagreement.
        setup: how it was measured here. result: what came out, numbers filled in. holds: None if not measured.
    """

    id: str
    mechanism: str
    claim: str
    cite: str
    reported: str
    why: str
    setup: str = ""
    result: str = ""
    holds: bool | None = None
    records: tuple[str, ...] = field(default=())


def load(root: Path) -> list[Claim]:
    """The rows of ``root/claims.yml``, in order.

    Raises:
        ClaimError: a text is missing or unknown, a number isn't in its record, a verdict isn't a comparison.
    """
    rows = yaml.safe_load((root / "claims.yml").read_text(encoding="utf-8"))
    found = [_claim(root, row) for row in rows]
    if len({claim.id for claim in found}) != len(found):
        raise ClaimError("id: two rows share one")
    return found


def _claim(root: Path, row: dict[str, Any]) -> Claim:
    name = row.get("id", "a row without id")
    missing = [key for key in _TEXTS if not isinstance(row.get(key), str)]
    if missing or row.keys() - {*_TEXTS, "ours"}:
        raise ClaimError(
            f"{name}: expected {', '.join(_TEXTS)} and perhaps ours; missing {missing}, got {[*row]}"
        )
    texts = {key: row[key].strip() for key in _TEXTS}
    ours = row.get("ours")
    if ours is None:
        return Claim(**texts)
    if ours.keys() != {"setup", "numbers", "result", "holds"}:
        raise ClaimError(f"{name}: ours: expected setup, numbers, result and holds, got {[*ours]}")
    try:
        numbers = {key: look_up(root, where) for key, where in ours["numbers"].items()}
        result = ours["result"].strip().format(**numbers)
        holds = compare(ours["holds"], numbers)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ClaimError(f"{name}: ours: {error}") from error
    records = tuple(sorted({where.split("#")[0] for where in ours["numbers"].values()}))
    return Claim(**texts, setup=ours["setup"].strip(), result=result, holds=holds, records=records)


def look_up(root: Path, where: str) -> float:
    """The number at ``file.json#path``; a step is ``key``, or ``[key=value,key=value]``: one row of a list.

    Raises:
        ValueError: there is no such file, step or row, several rows fit, or what is there isn't a number.
    """
    file, _, path = where.partition("#")
    here: Any = json.loads((root / file).read_text(encoding="utf-8"))
    if not path or _STEP.sub("", path):
        raise ValueError(f"{where!r}: expected file.json#key.key[key=value].key")
    for key, choice in _STEP.findall(path):
        if key:
            if not isinstance(here, dict) or key not in here:
                raise ValueError(f"{where!r}: no {key!r} there")
            here = here[key]
        else:
            wanted = dict(part.split("=", 1) for part in choice.split(","))
            fits = [row for row in here if all(str(row.get(k)) == v for k, v in wanted.items())]
            if len(fits) != 1:
                raise ValueError(f"{where!r}: {len(fits)} rows with {choice}, expected one")
            here = fits[0]
    if isinstance(here, bool) or not isinstance(here, int | float):
        raise ValueError(f"{where!r}: expected a number, got {here!r}")
    return here


def compare(text: str, numbers: dict[str, float]) -> bool:
    """Is ``left < right`` (or ``>``) true, where both sides are arithmetic over ``numbers``?

    Raises:
        ValueError: not one comparison, or a side that doesn't name a number or cannot be evaluated.
    """
    sides = re.split("([<>])", text)
    if len(sides) != 3:
        raise ValueError(f"holds: expected one comparison with < or >, got {text!r}")
    if not any(re.search(rf"\b{name}\b", text) for name in numbers):
        raise ValueError(f"holds: {text!r} compares nothing that was measured")
    left, right = (
        evaluate(re.sub(r"\b[a-z_]\w*\b", lambda m: repr(float(numbers[m[0]])), side)) for side in sides[::2]
    )
    return left < right if sides[1] == "<" else left > right


class Claims(SphinxDirective):
    """``{claims}``: all rows; ``{claims} part/slug``: those of one mechanism."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / "claims.yml"))
        try:
            rows = load(root)
        except ClaimError as error:
            raise self.error(f"claims.yml: {error}") from error
        if self.arguments:
            rows = [row for row in rows if row.mechanism == self.arguments[0]]
            if not rows:
                raise self.error(f"claims: no row of claims.yml is about {self.arguments[0]}")
        for record in {record for row in rows for record in row.records}:
            self.env.note_dependency(str(root / record))
        return [self.row(row) for row in rows]

    def row(self, claim: Claim) -> nodes.Node:
        verdict = VERDICTS[claim.holds]
        lines = [f"*Reported.* {claim.reported} {{cite}}`{claim.cite}`"]
        if claim.holds is not None:
            lines.append(f"*Measured here.* {claim.setup} {claim.result}")
        lines.append(f"**{verdict}.** {claim.why} Chapter: {{doc}}`/chapters/{claim.mechanism}`.")
        title = nodes.title("", claim.claim)
        box = nodes.admonition("", title, classes=["admonition-claim"], ids=[claim.id])
        text = "\n\n".join(lines)
        self.state.nested_parse(StringList(text.splitlines(), source="claims.yml"), self.content_offset, box)
        return box


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("claims", Claims)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
