"""Real text without a download: what every Python installation carries."""

from __future__ import annotations

import importlib
import inspect


def topics(max_chars: int | None = None) -> str:
    """Python's language reference as plain English text, some 465 kB in Python 3.11 (``pydoc_data.topics``).

    Args:
        max_chars: stop after that many characters, at least 1. Default: all.

    The topics come in alphabetical order of their names; the wording differs a little between Python versions.
    """
    from pydoc_data.topics import topics as table

    return _clip("\n\n".join(table[name].strip() for name in sorted(table)), max_chars)


def passages_once(text: str) -> str:
    """``text`` without the paragraphs that stood in it before, whatever their line breaks.

    The language reference prints whole passages under several headings: of 64-byte pieces held out at random, two in
    five stand word for word in the rest. Where one part is to be new to a model trained on another, begin with this.
    """
    seen: set[str] = set()
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if words not in seen:
            seen.add(words)
            kept.append(paragraph)
    return "\n\n".join(kept)


def stdlib_source(module: str = "argparse", max_chars: int | None = None) -> str:
    """The Python source of a standard-library module, for text that is code.

    Raises:
        ValueError: if there is no such module, or it has no Python source.
    """
    try:
        source = inspect.getsource(importlib.import_module(module))
    except (ImportError, OSError, TypeError) as error:
        raise ValueError(
            f"module: expected a standard-library module with Python source, got {module!r}"
        ) from error
    return _clip(source, max_chars)


def _clip(text: str, max_chars: int | None) -> str:
    if max_chars is None:
        return text
    if isinstance(max_chars, bool) or not isinstance(max_chars, int) or max_chars < 1:
        raise ValueError(f"max_chars: expected an integer of at least 1 or None, got {max_chars!r}")
    return text[:max_chars]
