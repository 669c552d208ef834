"""The built book, once for all tests that look at it."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock  # comes with torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def script() -> Any:
    """The module ``_ext/build.py``."""
    spec = importlib.util.spec_from_file_location("effattn_book_build", ROOT / "_ext" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of the book's pages, built anew with warnings as errors (outputs of cells come from the cache).

    Test processes that run side by side share one build: the first makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "book"
    with FileLock(f"{out}.lock"):
        failure = out / "failure.txt"
        if not out.exists():
            command = [sys.executable, str(ROOT / "_ext" / "build.py"), "--out", str(out)]
            environment = {**os.environ, "CI": "true"}
            done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
            if done.returncode != 0:
                out.mkdir(exist_ok=True)
                failure.write_text(f"{done.stdout[-1000:]}\n{done.stderr}", encoding="utf-8")
    if failure.exists():
        pytest.fail(f"the book does not build:\n{failure.read_text(encoding='utf-8')}", pytrace=False)
    return out / "html"


@pytest.fixture(scope="session")
def address(site: Path, script: Any) -> Iterator[str]:
    """The book served on this machine, as ``make read`` serves it."""
    server = script.listen(site, first=8100)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@functools.cache
def toc_pages() -> tuple[str, ...]:
    """Names of the pages in ``_toc.yml``, in order."""
    import yaml

    found: list[str] = []

    def walk(entry: object) -> None:
        if isinstance(entry, dict):
            found.extend(entry[key] for key in ("root", "file") if key in entry)
            for value in entry.values():
                walk(value)
        elif isinstance(entry, list):
            for value in entry:
                walk(value)

    walk(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    return tuple(found)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "toc_page" in metafunc.fixturenames:
        metafunc.parametrize("toc_page", toc_pages())
