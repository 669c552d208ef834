"""Read the bank's YAML files, check their shape, and write shared quantities out in expressions."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from effattn_lab.interview import expressions

QUANTITIES = "quantities.yml"
_PACKAGE = Path(__file__).resolve().parent
_REFERENCE = re.compile(r"""Q\[(["'])([^"'\]]*)\1\]""")


class BankError(ValueError):
    """A bank file is wrong; the message names the file, the question and the field."""


@dataclass(frozen=True)
class Quantity:
    """A quantity that answers share: computed by `expr`, or reported as `value` by `source`."""

    id: str
    meaning: str
    unit: str
    expr: str | None
    value: float | None
    source: str | None


def read_yaml(file: Path) -> Any:
    """Content of a YAML file; BankError if it cannot be read, isn't YAML, or gives a key twice."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise BankError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BankError(f"{file}: not valid YAML: {error}") from None


def load_quantities(root: Path | str) -> dict[str, Quantity]:
    """Id → quantity, from ``quantities.yml`` in the bank's folder; none if there is no such file.

    Raises:
        BankError: the file is wrong, or an expression in it does not parse.
    """
    file = Path(root) / QUANTITIES
    return dict(_quantities(file, file.stat().st_mtime_ns)) if file.is_file() else {}


@functools.lru_cache(maxsize=8)
def _quantities(file: Path, modified: int) -> Mapping[str, Quantity]:
    del modified  # a changed file is read again
    data = read_yaml(file)
    check_schema(data, file, "quantities")
    found = {
        id_: Quantity(
            id_, q["meaning"].strip(), q.get("unit", ""), q.get("expr"), q.get("value"), q.get("source")
        )
        for id_, q in data.items()
    }
    for id_, quantity in found.items():
        try:
            if quantity.expr is not None:
                expressions.parse(resolve(quantity.expr, found))
        except ValueError as error:
            raise BankError(f"{file}: field '{id_}.expr': {error}") from None
    return found


def referred(expr: str) -> tuple[str, ...]:
    """Ids of the quantities that `expr` names as ``Q["id"]``."""
    return tuple(match[2] for match in _REFERENCE.finditer(expr))


def resolve(expr: str, quantities: Mapping[str, Quantity], depth: int = 4) -> str:
    """`expr` with each ``Q["id"]`` replaced by what ``quantities.yml`` says: its expression, or the reported value.

    Raises:
        ValueError: an id that is not there, or quantities that refer to each other in a circle.
    """

    def written_out(match: re.Match[str]) -> str:
        quantity = quantities.get(match[2])
        if quantity is None:
            raise ValueError(f"{match[2]!r} is not in {QUANTITIES}")
        if quantity.expr is None:
            return f"{quantity.value!r}"
        if depth == 0:
            raise ValueError(f"{match[2]!r} refers to itself, or to others more than four deep")
        inner = resolve(quantity.expr, quantities, depth - 1)
        return inner if inner.isidentifier() else f"({inner})"

    return _REFERENCE.sub(written_out, expr)


@functools.cache
def _validator(part: str | None) -> jsonschema.Draft202012Validator:
    schema = json.loads((_PACKAGE / "schema.json").read_text(encoding="utf-8"))
    if part is not None:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
    return jsonschema.Draft202012Validator(schema)


def check_schema(data: Any, file: Path, part: str | None = None) -> None:
    """BankError unless `data` has the shape of a bank file, or of `part` (a name in the schema's ``$defs``)."""
    errors = sorted(
        _validator(part).iter_errors(data), key=lambda error: [str(part) for part in error.absolute_path]
    )
    if not errors:
        return
    error = errors[0]
    path = list(error.absolute_path)
    where = str(file)
    if len(path) >= 2 and path[0] == "questions":
        entry = data["questions"][path[1]]
        name = entry.get("id") if isinstance(entry, dict) else None
        where += f": {name or f'question {int(path[1]) + 1}'}"
        path = path[2:]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    raise BankError(f"{where}: {_explain(error, field)}")


def _explain(error: Any, field: str) -> str:
    def inside(names: Iterable[str]) -> str:
        return ", ".join(repr(f"{field}.{name}" if field else name) for name in names)

    match error.validator:
        case "required":
            return f"field {inside(n for n in error.validator_value if n not in error.instance)}: missing"
        case "additionalProperties":
            known = error.schema["properties"]
            extra = inside(str(n) for n in error.instance if n not in known)
            return f"field {extra}: unknown; expected one of {', '.join(known)}"
        case "anyOf" if "numbers[" in field:
            return (
                f"field {field!r}: expected 'q' (a shared quantity), or 'claim' with 'expr' (how to compute it) "
                "or 'source' (who reports it), got none of them"
            )
        case "anyOf":
            return f"field {field!r}: expected a text or {{point: ..., by: [...]}}, got {str(error.instance)[:100]}"
        case "oneOf":
            return f"field {field!r}: expected either 'expr', or 'value' with 'source'"
        case None:
            return f"field {field!r}: given by the quantity that 'q' names, so not here as well"
        case "enum":
            return (
                f"field {field!r}: expected one of {', '.join(error.validator_value)}, got {error.instance!r}"
            )
    return f"field {field!r}: {error.message[:300]}" if field else error.message[:300]


#: libyaml reads the bank nine times faster; a PyYAML built without it still reads it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_Loader):
    """Safe loader that refuses a key given twice, where PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found
