"""Arguments of the package's own experiments (``python -m effattn_lab....``), checked before work that takes minutes.

Each function is a ``type`` of argparse, which prints the option's name before the message and ends with status 2.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def file_to_write(text: str) -> Path:
    """A file that can be written, new or not: its folder exists and may be written, and it is no folder itself."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the name of a file, got the folder {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


@contextmanager
def bad_values(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What a function says about an argument (a ``ValueError``) is the command's message, not a traceback."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value
