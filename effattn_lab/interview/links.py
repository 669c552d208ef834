"""Where a question's section can be read: a page of the built book, or its source in the repository."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from effattn_lab.interview.bank import Question


@dataclass(frozen=True)
class Book:
    """Addresses of the book.

    Attributes:
        pages: address of the built book, without a slash at its end; None if unknown.
        source: address of the repository's files (``…/blob/main``); None if unknown.
    """

    pages: str | None = None
    source: str | None = None

    def url(self, question: Question) -> str | None:
        """Address of the section that answers `question`; None if no address is known."""
        if self.pages:
            return f"{self.pages}/chapters/{question.chapter}.html#{question.section}"
        # A label of the book is no anchor on the repository's pages, so this leads to the chapter's beginning.
        return f"{self.source}/chapters/{question.chapter}.md" if self.source else None


def find_book(pages: str | None = None) -> Book:
    """The book at `pages`, else at the address in the checkout's ``_config.yml``; in a wheel, none is known.

    Raises:
        ValueError: `pages` is no web address.
    """
    if pages is not None:
        parts = urlsplit(pages)
        if parts.scheme not in ("http", "https", "file") or not (parts.netloc or parts.scheme == "file"):
            raise ValueError(f"book-url: expected an address that begins with https://, got {pages!r}")
        return Book(pages=re.sub(r"/(?:index\.html)?$", "", pages.split("#")[0]))
    root = checkout()
    if root is None:
        return Book()
    import yaml

    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    built = (config.get("html") or {}).get("baseurl")
    repository = config.get("repository") or {}
    source = (
        f"{repository['url'].rstrip('/')}/blob/{repository.get('branch', 'main')}" if repository else None
    )
    return Book(pages=built.rstrip("/") if built else None, source=source)


def checkout() -> Path | None:
    """Folder of the checkout that this package runs from; None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "_config.yml").is_file() and (root / "chapters").is_dir() else None


@functools.cache
def heading(chapter: str, section: str) -> str | None:
    """Heading of a section, from the chapter's source; None without a checkout or such a label."""
    root = checkout()
    source = root / "chapters" / f"{chapter}.md" if root else None
    if source is None or not source.is_file():
        return None
    text = source.read_text(encoding="utf-8")
    found = re.search(rf"^\({re.escape(section)}\)=\s*\n+#+\s+(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def place(question: Question) -> str:
    """The section as a learner finds it on disk: ``chapters/full/flash.md#flash-io``."""
    return f"chapters/{question.chapter}.md#{question.section}"
