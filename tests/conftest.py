"""What every test shares: which machines can run which tests, and the browser."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

# First of all that may load triton: it decides between interpreter and compiler, once for the process.
import effattn_kernels  # noqa: F401
import pytest

# Two test processes share few cores: torch's own threads would only get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@functools.cache
def chromium() -> str | None:
    """Path of the browser: ``EFFATTN_CHROMIUM``, else the distribution's own."""
    names = (os.environ.get("EFFATTN_CHROMIUM", ""), *CHROMIUM_NAMES)
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def missing(marker: str) -> str | None:
    """What a test with this marker needs and this machine lacks."""
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "not run: this machine has no GPU"
    if importlib.util.find_spec("playwright") is None:
        return "not run: the package playwright is missing (make env)"
    if chromium() is None:
        return "not run: Chromium is missing (install the system package chromium, or set EFFATTN_CHROMIUM)"
    return None


def pytest_configure() -> None:
    """Independent implementations may be missing on a laptop, where their tests say so; in CI nothing may be."""
    absent = [name for name in ("fla", "einops", "transformers") if importlib.util.find_spec(name) is None]
    if absent and os.environ.get("CI"):
        raise pytest.UsageError(
            f"CI must hold our forms against others: {', '.join(absent)} missing (make env)"
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that this machine cannot run are listed with the reason; CI must be able to run the browser's."""
    for marker in ("gpu", "browser"):
        if item.get_closest_marker(marker) and (reason := missing(marker)):
            if marker == "browser" and os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests of a process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
        yield running
        running.close()
