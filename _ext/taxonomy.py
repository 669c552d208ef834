"""The clickable map of the book and its tables, from ``map.yml``.

- ``{taxonomy-map}``: the picture. A direction leads to its section of the map chapter, a system to its chapter
  when that is in the table of contents, otherwise to its line in the map chapter.
- ``{taxonomy-systems} sparse``: the table of the systems placed on one direction.
- ``{taxonomy-leaves} sparse``: the leaves of a direction with the members that the survey's tree names.
- ``{taxonomy-cuts}``: for each cost, the systems that cut it.

``python _ext/taxonomy.py`` writes the wide layout as a picture that stands alone, ``_static/map.svg`` (the README
shows it). Pages with the map are read again when a chapter is added, so that its links are never stale.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import taxonomy_svg
import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

MAP_DOC = "chapters/map"
CSS = "taxonomy.css"
# Rules of the page that a picture on its own has no use for.
LAYOUT = (".etm-svg {", ".etm-svg a", ".etm-narrow", ".etm-wide")


def load_map(path: Path) -> dict[str, Any]:
    """Read and check ``map.yml``; a ``ValueError`` names the entry and what is wrong with it."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    leaves = {d["id"]: {leaf["id"] for leaf in d.get("leaves", [])} for d in data["directions"]}
    seen: set[str] = set()
    for system in data["systems"]:
        where = f"map.yml, system {system.get('id', system)}"
        missing = {"id", "name", "direction", "room", "line", "cuts", "placed"} - set(system)
        if missing:
            raise ValueError(f"{where}: expected the keys {sorted(missing)}")
        if system["id"] in seen:
            raise ValueError(f"{where}: the id is used twice")
        seen.add(system["id"])
        if system["direction"] not in leaves:
            raise ValueError(f"{where}: direction {system['direction']!r} is none of {sorted(leaves)}")
        if leaves[system["direction"]] and system.get("leaf") not in leaves[system["direction"]]:
            raise ValueError(
                f"{where}: leaf {system.get('leaf')!r} is not in direction {system['direction']!r}"
            )
        if unknown := set(system["cuts"]) - set(data["cuts"]):
            raise ValueError(f"{where}: cuts {sorted(unknown)} are none of {sorted(data['cuts'])}")
        if system["placed"] not in ("survey", "book"):
            raise ValueError(f"{where}: placed is 'survey' or 'book', not {system['placed']!r}")
        if not ("arxiv" in system or "venue" in system):
            raise ValueError(f"{where}: expected a source: arxiv or venue")
    return data


def chapter_of(system: dict[str, Any]) -> str:
    """Name of the document that treats the system: ``chapters/<part>/<slug>``."""
    return f"chapters/{system['room']}"


class Links:
    """Addresses seen from one page: of sections, chapters and lines of the map chapter's tables."""

    def __init__(self, env: BuildEnvironment, data: dict[str, Any]) -> None:
        self.env, self.here = env, env.docname
        self.systems = {s["id"]: s for s in data["systems"]}

    def address(self, document: str, anchor: str = "") -> str | None:
        """Relative address of ``document``, or None when it is not part of this book (yet)."""
        if document not in self.env.found_docs:
            return None
        if document == self.here:
            return f"#{anchor}"
        base = self.env.app.builder.get_relative_uri(self.here, document)
        return f"{base}#{anchor}" if anchor else base

    def written(self, system: dict[str, Any]) -> bool:
        return chapter_of(system) in self.env.found_docs

    def __call__(self, kind: str, name: str) -> tuple[str | None, bool]:
        """The resolver that ``taxonomy_svg`` asks."""
        if kind == "direction":
            return self.address(MAP_DOC, f"direction-{name}"), True
        system = self.systems[name]
        if self.written(system):
            return self.address(chapter_of(system)), True
        return self.address(MAP_DOC, f"sys-{name}"), False


class Taxonomy(SphinxDirective):
    """What the four directives share: the data, the page's dependence on it, links."""

    def load(self) -> tuple[dict[str, Any], Links]:
        path = Path(self.env.srcdir) / "map.yml"
        self.env.note_dependency(str(path))
        self.env.metadata[self.env.docname]["taxonomy"] = True
        data = load_map(path)
        return data, Links(self.env, data)

    def direction(self, data: dict[str, Any]) -> dict[str, Any]:
        name = self.arguments[0].strip()
        for direction in data["directions"]:
            if direction["id"] == name:
                return direction
        raise self.error(f"{self.name}: {name!r} is none of {[d['id'] for d in data['directions']]}")


class TaxonomyMap(Taxonomy):
    """The picture, in a wide and a narrow layout of which CSS shows one."""

    def run(self) -> list[nodes.Node]:
        data, links = self.load()
        number = self.env.new_serialno("taxonomy-map")
        wide = taxonomy_svg.draw(data, taxonomy_svg.WIDE, links, f"etm-wide-{number}")
        narrow = taxonomy_svg.draw(data, taxonomy_svg.NARROW, links, f"etm-narrow-{number}")
        markup = (
            f'<nav class="etm" aria-label="Map of the book"><div class="etm-wide">{wide}</div>'
            f'<div class="etm-narrow">{narrow}</div></nav>'
        )
        return [nodes.raw("", markup, format="html")]


def link(address: str | None, text: str) -> nodes.Node:
    """A link, or the plain text where there is nothing to link to."""
    if address is None:
        return nodes.Text(text)
    return nodes.reference("", text, refuri=address, internal=not address.startswith("http"))


def table(head: list[str], widths: list[int], rows: list[list[list[nodes.Node]]]) -> nodes.table:
    """A table of ``rows`` of cells, each cell a list of block nodes."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=w) for w in widths), cols=len(head))
    group += nodes.thead("", nodes.row("", *(nodes.entry("", nodes.paragraph(text=h)) for h in head)))
    group += nodes.tbody("", *(nodes.row("", *(nodes.entry("", *cell) for cell in row)) for row in rows))
    return nodes.table("", group, classes=["taxonomy-table", "colwidths-given"])


class TaxonomySystems(Taxonomy):
    """The table of the systems on one direction; each line is the target ``sys-<id>``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        data, links = self.load()
        direction = self.direction(data)
        rows = []
        for system in data["systems"]:
            if system["direction"] != direction["id"]:
                continue
            address = links.address(chapter_of(system))
            name = nodes.paragraph(
                "",
                "",
                nodes.strong("", "", link(address, system["name"])),
                ids=[f"sys-{system['id']}"],
                classes=["taxonomy-name"],
            )
            notes = [system["leaf"]] if "leaf" in system else []
            if system["placed"] == "book" and "section" in direction:
                notes.append("placed by this book")
            first: list[nodes.Node] = [name]
            if notes:
                first.append(nodes.paragraph("", "", nodes.emphasis(text=", ".join(notes))))
            cuts = ", ".join(data["cuts"][c] for c in system["cuts"])
            facts = nodes.paragraph(classes=["taxonomy-facts"])
            facts += nodes.Text(f"Cuts {cuts}. " if cuts else "Cuts nothing by itself. ")
            if address is None:
                facts += nodes.Text("Chapter to come: ")
                facts += nodes.literal(text=system["room"])
            else:
                facts += link(address, "Chapter")
            facts += nodes.Text(". ")
            if "arxiv" in system:
                facts += link(f"https://arxiv.org/abs/{system['arxiv']}", f"arXiv:{system['arxiv']}")
            else:
                facts += nodes.Text(system["venue"])
            rows.append([first, [nodes.paragraph(text=system["line"]), facts]])
        return [table(["System", "What it does"], [28, 72], rows)]


class TaxonomyLeaves(Taxonomy):
    """The leaves of a direction and the members that the survey's tree names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        data, _ = self.load()
        items = [
            nodes.list_item(
                "",
                nodes.paragraph(
                    "",
                    "",
                    nodes.strong(text=f"{leaf['id']} {leaf['name']}: "),
                    nodes.Text(", ".join(leaf["members"]) + "."),
                ),
            )
            for leaf in self.direction(data)["leaves"]
        ]
        return [nodes.bullet_list("", *items)]


class TaxonomyCuts(Taxonomy):
    """For each cost, the systems that cut it, with links."""

    def run(self) -> list[nodes.Node]:
        data, links = self.load()
        rows = []
        for key, meaning in data["cuts"].items():
            paragraph = nodes.paragraph()
            for i, system in enumerate(s for s in data["systems"] if key in s["cuts"]):
                if i:
                    paragraph += nodes.Text(", ")
                paragraph += link(links("system", system["id"])[0], system["name"])
            rows.append([[nodes.paragraph("", "", nodes.strong(text=meaning))], [paragraph]])
        return [table(["Cost", "Cut by"], [25, 75], rows)]


def outdated(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """Pages with the map are read again when a document comes or goes."""
    if not added and not removed:
        return []
    return [name for name, meta in env.metadata.items() if meta.get("taxonomy") and name in env.found_docs]


def copy_css(app: Sphinx) -> None:
    if app.builder.format == "html":
        target = Path(app.outdir) / "_static"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name(CSS), target / CSS)


def add_css(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if app.env.metadata.get(pagename, {}).get("taxonomy"):
        app.add_css_file(CSS)


def standalone(root: Path) -> str:
    """The wide map as an SVG file of its own: no links, its colours inside, light or dark as the reader's system."""

    def resolve(kind: str, name: str) -> tuple[None, bool]:
        return None, kind == "system" and (root / f"{chapter_of(systems[name])}.md").is_file()

    data = load_map(root / "map.yml")
    systems = {s["id"]: s for s in data["systems"]}
    css = Path(__file__).with_name(CSS).read_text(encoding="utf-8")
    rules = [line for line in css.splitlines() if line.startswith(".etm-") and not line.startswith(LAYOUT)]
    light = "--pst-color-background:#fff;--pst-color-text-base:#222832;--pst-color-border:#9ea7b3"
    dark = "--pst-color-background:#14181e;--pst-color-text-base:#ced6dd;--pst-color-border:#48566b"
    style = (
        f"<style>svg{{{light};font-family:Arial,Helvetica,sans-serif;background:var(--pst-color-background)}}\n"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}\n" + "\n".join(rules) + "</style>"
    )
    head, body = taxonomy_svg.draw(data, taxonomy_svg.WIDE, resolve, "map").split("<title", 1)
    return f"{head}{style}<title{body}\n"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("taxonomy-map", TaxonomyMap)
    app.add_directive("taxonomy-systems", TaxonomySystems)
    app.add_directive("taxonomy-leaves", TaxonomyLeaves)
    app.add_directive("taxonomy-cuts", TaxonomyCuts)
    app.connect("env-get-outdated", outdated)
    app.connect("builder-inited", copy_css)
    app.connect("html-page-context", add_css)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    (repository / "_static" / "map.svg").write_text(standalone(repository), encoding="utf-8")
