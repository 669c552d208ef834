"""Text that others wrote, made safe to show: in a page, a table, a terminal, a file name."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata

#: Categories that show nothing, or change how the text around them is shown: control, format (bidi among them),
#: surrogates, private use, unassigned, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKS = {"Mn", "Me"}
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def visible(text: str, limit: int = 200, *, lines: bool = False) -> str:
    """``text`` with its invisible characters written out, at most ``limit`` characters of it.

    Args:
        text: anything.
        limit: the rest is replaced by "…".
        lines: keep line breaks and tabs; otherwise they are written out too.
    """
    out: list[str] = []
    marks = 0
    for character in text[:limit]:
        category = unicodedata.category(character)
        marks = marks + 1 if category in _MARKS else 0
        if lines and character in "\n\t":
            out.append(character)
        elif category in _HIDDEN or marks > 3:  # a heap of marks covers the lines around it
            out.append(f"⟨U+{ord(character):04X}⟩")
        else:
            out.append(character)
    return "".join(out) + ("…" if len(text) > limit else "")


def escaped(text: object, limit: int = 200, *, lines: bool = False) -> str:
    """`visible`, then escaped for HTML (text and attributes alike)."""
    return html.escape(visible(str(text), limit, lines=lines))


def key_of(name: str) -> str:
    """A file name for a student: ASCII letters, digits, ``. _ -``, at most 60 characters, never empty.

    What ASCII cannot say (a name in another script) is replaced by a short hash of the name.
    """
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(c for c in plain if unicodedata.category(c) not in _MARKS)
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:60].strip("._-")
    letters = sum(c.isalnum() for c in plain)
    kept = sum(c.isalnum() for c in base)
    if not base or _RESERVED.fullmatch(base) or kept < letters:
        return f"{base or 'student'}-{tag(name)}"
    return base


def tag(name: str) -> str:
    """Eight hexadecimal digits that stand for ``name``."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def number(value: float) -> str:
    """At most four decimals, a dot, no exponent, no trailing zeros: ``7.5``, ``3``."""
    return f"{value:.4f}".rstrip("0").rstrip(".") or "0"


def plural(count: int, thing: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
