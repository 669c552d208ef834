"""The book builds with warnings as errors, and its pages hold what they must and nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src",
         "audio": "src", "object": "data", "embed": "src", "image": "href", "use": "href"}  # fmt: skip


class Loaded(HTMLParser):
    """Addresses that a browser loads by itself when it opens the page, and the page's ids."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        wanted = LOADS.get(tag)
        # A link to a neighbour page or a canonical address loads nothing.
        if wanted and not (
            tag == "link" and not re.search(r"stylesheet|icon|preload", values.get("rel") or "")
        ):
            self.addresses += [values[wanted] or ""] if wanted in values else []


def parse(path: Path) -> Loaded:
    page = Loaded()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def pages(site: Path) -> list[Path]:
    return [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]


def test_every_page_of_the_contents_is_built(site: Path, toc_page: str) -> None:
    path = site / f"{toc_page}.html"
    assert path.is_file()
    assert "<h1>" in path.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    remote = [
        (page.name, address)
        for page in pages(site)
        for address in parse(page).addresses
        if re.match(r"(?:https?:)?//", address)
    ]
    assert remote == []
    styles = [
        (sheet.name, found)
        for sheet in site.rglob("*.css")
        for found in re.findall(
            r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"'\s]+", sheet.read_text(encoding="utf-8")
        )
    ]
    assert styles == []


def test_no_page_shows_the_markup_of_a_directive(site: Path) -> None:
    """A backtick in the title of a fence of backticks is no fence: the page then prints it, without a warning."""
    shown = [p.name for p in pages(site) if re.search(r"(?:`{3}|:{3})\{[a-z]", p.read_text(encoding="utf-8"))]
    assert shown == []


def test_ids_are_unique(site: Path, toc_page: str) -> None:
    ids = parse(site / f"{toc_page}.html").ids
    assert sorted({i for i in ids if ids.count(i) > 1}) == []


def test_no_path_of_this_machine_leaks(site: Path) -> None:
    for page in [*pages(site), site / "searchindex.js"]:
        text = page.read_text(encoding="utf-8")
        for folder in (str(ROOT), str(site.parent), str(Path.home()) + "/"):
            # The file system's root is no path of ours.
            assert len(folder) < 4 or folder not in text, f"{page.relative_to(site)} shows {folder}"


def test_labs_open_the_student_notebook(site: Path) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    repository = config["repository"]["url"].removeprefix("https://github.com/")
    start = f"https://colab.research.google.com/github/{repository}/blob/{config['repository']['branch']}/"
    seen = 0
    for page in pages(site):
        links = re.findall(
            r"https://colab\.research\.google\.com/[^\"'<\s]*", page.read_text(encoding="utf-8")
        )
        name = page.relative_to(site).with_suffix("").as_posix()
        if not name.startswith("labs/solved/"):
            assert not any("/blob/" in link and "/solved/" in link for link in links), name
            assert "dropdown-launch-buttons" not in page.read_text(encoding="utf-8"), name
            continue
        seen += 1
        student = f"labs/{name.removeprefix('labs/solved/')}.ipynb"
        assert set(links) == {start + student}, name
        assert len(links) >= 2, "a button in the header and one under the title"
        assert (ROOT / student).is_file()
        assert (site / student).read_bytes() == (ROOT / student).read_bytes(), "the download is the same file"
    assert seen > 0
