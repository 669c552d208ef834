"""Run a whole notebook with nbval and say which cells do not run. Information for people; no point depends on it.

The notebook comes on standard input, the answer leaves as one JSON line on standard output.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from effattn_lab.grading.inside.limited import harden

MOST = 60  # failing cells that are told


class _Seen:
    """Collects what pytest says of each cell."""

    def __init__(self) -> None:
        self.ran = 0
        self.failed: list[tuple[int, str]] = []
        self.problem = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call":
            return
        number = int((re.findall(r"Cell (\d+)$", report.nodeid) or ["-1"])[0]) + 1
        if report.outcome == "passed":
            self.ran += 1
        elif hasattr(report, "wasxfail"):
            self.failed.append((number, "not run: an earlier cell took too long"))
        else:
            self.failed.append((number, _reason(str(report.longrepr))))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.problem = _reason(str(report.longrepr))


def _reason(text: str) -> str:
    """The last line of a traceback that names an exception, without colours."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    if any("Timeout" in line for line in lines):
        return "it took too long"
    named = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception|Interrupt|Exit)\b", line)]
    return (named or [line for line in lines if line] or ["no reason given"])[-1][:200]


def main() -> None:
    harden()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    notebook = Path("/tmp/notebook.ipynb")
    notebook.write_bytes(sys.stdin.buffer.read())
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    import pytest

    seen = _Seen()
    options = [
        "--nbval-lax",
        "--nbval-current-env",
        f"--nbval-cell-timeout={sys.argv[1]}",
        "-p",
        "no:cacheprovider",
    ]
    pytest.main(["-q", "--rootdir=/tmp", "-c", "/dev/null", *options, str(notebook)], plugins=[seen])
    json.dump({"ran": seen.ran, "failed": seen.failed[:MOST], "problem": seen.problem}, answer)
    answer.close()
    os._exit(0)  # whatever threads the notebook left


if __name__ == "__main__":
    main()
