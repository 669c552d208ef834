"""What the tables beside flash-linear-attention share: their command, and the record that the book shows."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effattn_lab._command import bad_values, file_to_write, positive
from effattn_lab.measure.xray import show


def record_of(module_file: str) -> dict[str, Any]:
    """The record that lies beside a module, with its ``versions``."""
    found: dict[str, Any] = json.loads(Path(module_file).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def command(
    rows: Callable[[str, int, str], list[dict[str, Any]]],
    purpose: str | None,
    arguments: Sequence[str] | None,
    *,
    size: str = "head_dim",
    default: int = 64,
) -> None:
    """Parse, compile, print; ``--json`` writes the record. ``rows(gpu, head_dim, dtype)`` makes the table.

    ``size`` names what stands in the place of ``head_dim`` where a kernel has none.
    """
    parser = argparse.ArgumentParser(description=(purpose or "").splitlines()[0])
    parser.add_argument("--gpu", default="A100,H100")
    parser.add_argument(f"--{size.replace('_', '-')}", type=positive, default=default)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="write the rows to a file, for `recorded`"
    )
    chosen = parser.parse_args(arguments)
    number = getattr(chosen, size)
    with bad_values(parser):
        table = rows(chosen.gpu, number, chosen.dtype)
    if chosen.json:
        versions = {name: importlib.metadata.version(name) for name in ("triton", "fla-core")}
        record = {size: number, "dtype": chosen.dtype, "versions": versions, "rows": table}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(table)
