"""Draws the map of ``map.yml`` as SVG: a wide layout in three columns, a narrow one in a single column.

Pure functions: data and a link resolver in, markup out. Colours come from ``taxonomy.css``, which takes them from
the theme, so that the picture follows dark mode. Nothing here needs a script: every card and every system is an
ordinary link, reached with the keyboard.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Resolver: ("direction" | "system", id) -> (address or None, is there a written chapter?)
Resolver = Callable[[str, str], tuple[str | None, bool]]

NARROW_LETTERS = set("iljtfrI.,:;'!|()[]- ")
WIDE_LETTERS = set("mwMWQ@%")


@dataclass(frozen=True)
class Style:
    """Sizes of one layout, in SVG units (about one CSS pixel at the width it is drawn for)."""

    width: float
    columns: int
    name: float  # font size of a direction's name
    text: float  # font size of its answer
    chip: float  # font size of a system's name
    chip_height: float
    gap: float = 14
    pad: float = 12


WIDE = Style(width=690, columns=3, name=14, text=12.5, chip=12.5, chip_height=25, gap=12, pad=11)
NARROW = Style(width=360, columns=1, name=17, text=14.5, chip=14.5, chip_height=32)


def text_width(text: str, size: float) -> float:
    """Upper estimate of the width of ``text``: the reader's font is not known when the book is built."""
    em = sum(
        0.33 if c in NARROW_LETTERS else 0.88 if c in WIDE_LETTERS else 0.68 if c.isupper() else 0.57
        for c in text
    )
    return em * size


def wrap(text: str, size: float, width: float) -> list[str]:
    """Break ``text`` between words into lines no wider than ``width``."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def esc(text: str) -> str:
    return html.escape(text, quote=True)


def text_lines(lines: list[str], x: float, y: float, size: float, css: str) -> str:
    """Lines of text, the first baseline at ``y + size``."""
    return "".join(
        f'<text class="{css}" x="{x:g}" y="{y + size + i * size * 1.28:g}" font-size="{size:g}">{esc(line)}</text>'
        for i, line in enumerate(lines)
    )


# ---- small pictures, 44 by 44, one for each direction ------------------------------------------------


def _cells(filled: Callable[[int, int], int], n: int = 6, size: float = 44) -> str:
    """A grid of n by n cells; ``filled`` gives 0 (left out), 1 (outline) or 2 (full)."""
    step = size / n
    css = {1: "etm-line", 2: "etm-fill"}
    return "".join(
        f'<rect class="{css[kind]}" x="{j * step + 0.6:g}" y="{i * step + 0.6:g}" '
        f'width="{step - 1.2:g}" height="{step - 1.2:g}" rx="1"/>'
        for i in range(n)
        for j in range(n)
        if (kind := filled(i, j))
    )


def _rects(boxes: list[tuple[float, float, float, float, int]]) -> str:
    css = {1: "etm-line", 2: "etm-fill"}
    return "".join(
        f'<rect class="{css[k]}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="1.5"/>'
        for x, y, w, h, k in boxes
    )


def _path(d: str) -> str:
    return f'<path class="etm-stroke" d="{d}"/>'


SPARSE_CELLS = {(2, 0), (4, 0), (5, 0), (5, 3), (4, 2)}

GLYPHS: dict[str, str] = {
    # tokens fold into one small square state
    "linear": _rects([(0.6, 3 + 8 * i, 13, 5.5, 1) for i in range(5)] + [(27, 14, 16, 16, 2)])
    + _path("M15 6 L25 17 M15 22 L24 22 M15 38 L25 27"),
    "sparse": _cells(lambda i, j: 0 if j > i else 2 if i - j < 1 or (i, j) in SPARSE_CELLS else 1),
    "full": _cells(lambda i, j: 2 if j <= i else 0),
    # a router, four experts, one of them at work
    "moe": _rects([(0.6 + 11.2 * i, 26, 9, 16, 2 if i == 2 else 1) for i in range(4)])
    + _path("M22 6 L5 25 M22 6 L16 25 M22 6 L27.5 25 M22 6 L38.5 25")
    + '<circle class="etm-fill" cx="22" cy="6" r="4.5"/>',
    "hybrid": _rects([(2, 1.5 + 7 * i, 40, 5, 2 if i == 2 else 1) for i in range(6)]),
    # three passes over a row of masks
    "diffusion": "".join(
        _rects([(0.6 + 7.4 * j, 3 + 14.5 * i, 6, 9, 2 if on else 1)])
        for i, row in enumerate(((0, 1, 0, 0, 0, 0), (0, 1, 0, 1, 1, 0), (1, 1, 1, 1, 1, 1)))
        for j, on in enumerate(row)
    ),
    # a scan over image patches
    "modalities": _cells(lambda i, j: 1, n=4) + _path("M5.5 5.5 H38.5 V16.5 H5.5 V27.5 H38.5 V38.5 H5.5"),
    "training": _path("M3 3 V41 H42") + _path("M6 9 C14 34 24 36 41 37"),
    "serving": _rects(
        [(0.6 + 8 * i, 42 - h, 6, h, 2 if i > 2 else 1) for i, h in enumerate((12, 20, 9, 30, 24))]
    )
    + _path("M1 6 H42"),
    "uncertainty": _path("M2 40 H43") + _path("M3 38 C15 38 15 8 22 8 C29 8 29 38 42 38"),
}


# ---- cards --------------------------------------------------------------------------------------------


def chip_rows(
    systems: list[dict[str, Any]], width: float, style: Style
) -> list[list[tuple[dict[str, Any], float]]]:
    """Lay the systems out in rows of chips, in order, none wider than ``width``."""
    rows: list[list[tuple[dict[str, Any], float]]] = []
    room = -1.0
    for system in systems:
        chip = min(width, text_width(system["name"], style.chip) + 16)
        if chip > room:
            rows.append([])
            room = width
        rows[-1].append((system, chip))
        room -= chip + 6
    return rows


def card_parts(
    direction: dict[str, Any], systems: list[dict[str, Any]], width: float, style: Style
) -> tuple[list[str], list[str], list[list[tuple[dict[str, Any], float]]], float]:
    """Lines of the name, lines of the answer, rows of chips and the height they need."""
    inner = width - 2 * style.pad
    beside = inner - 44 - 10  # next to the small picture
    number = f"§{direction['section']} " if "section" in direction else ""
    name = wrap(number + direction["name"], style.name, beside)
    answer = wrap(direction["answer"], style.text, beside)
    rows = chip_rows(systems, inner, style)
    head = max(44.0, (len(name) * style.name + len(answer) * style.text) * 1.28 + 4)
    return name, answer, rows, style.pad + head + 12 + len(rows) * (style.chip_height + 6) + style.pad - 6


def linked(address: str | None, css: str, label: str, inner: str) -> str:
    """``inner`` as a link, or as a plain group where there is nothing to link to."""
    title = f"<title>{esc(label)}</title>"
    if address is None:
        return f'<g class="{css}">{title}{inner}</g>'
    return f'<a class="{css}" href="{esc(address)}" aria-label="{esc(label)}">{title}{inner}</a>'


def draw_card(
    direction: dict[str, Any],
    systems: list[dict[str, Any]],
    x: float,
    y: float,
    width: float,
    height: float,
    style: Style,
    resolve: Resolver,
) -> str:
    name, answer, rows, needed = card_parts(direction, systems, width, style)
    head_bottom = needed - style.pad - len(rows) * (style.chip_height + 6)
    text_x = x + style.pad + 54
    name_height = len(name) * style.name * 1.28
    beside = "" if "section" in direction else " etm-beside"
    out = [
        f'<g class="etm-card etm-{direction["id"]}{beside}">',
        f'<rect class="etm-box" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"/>',
    ]
    head = (
        f'<rect class="etm-head" x="{x + 4:g}" y="{y + 4:g}" width="{width - 8:g}" '
        f'height="{head_bottom - 2:g}" rx="6"/>'
        f'<g transform="translate({x + style.pad:g} {y + style.pad:g})" aria-hidden="true">'
        f"{GLYPHS[direction['id']]}</g>"
        + text_lines(name, text_x, y + style.pad - 3, style.name, "etm-name")
        + text_lines(answer, text_x, y + style.pad + name_height, style.text, "etm-answer")
    )
    address, _ = resolve("direction", direction["id"])
    section = f"Section {direction['section']}, " if "section" in direction else ""
    out.append(linked(address, "etm-title", f"{section}{direction['name']}: {direction['answer']}", head))
    row_y = y + head_bottom + 6
    for row in rows:
        chip_x = x + style.pad
        for system, chip in row:
            address, written = resolve("system", system["id"])
            css = (
                "etm-chip"
                + (" etm-written" if written else "")
                + (" etm-ours" if system["placed"] == "book" and "section" in direction else "")
            )
            label = f"{system['name']}: {system['line']}" + ("" if written else " (chapter to come)")
            inner = (
                f'<rect x="{chip_x:g}" y="{row_y:g}" width="{chip:g}" height="{style.chip_height:g}" rx="6"/>'
                f'<text x="{chip_x + chip / 2:g}" y="{row_y + style.chip_height / 2 + style.chip * 0.35:g}" '
                f'font-size="{style.chip:g}" text-anchor="middle">{esc(system["name"])}</text>'
            )
            out.append(linked(address, css, label, inner))
            chip_x += chip + 6
        row_y += style.chip_height + 6
    out.append("</g>")
    return "".join(out)


def legend(x: float, y: float, style: Style) -> tuple[str, float]:
    """Explains the three looks of a chip; returns the markup and its height."""
    items = (
        ("etm-chip etm-written", "solid", "its chapter is written"),
        ("etm-chip", "dashed", "to come; leads to its line in the map chapter"),
        ("etm-chip etm-ours", "italic", "placed here by this book, not by the survey"),
    )
    out, px, py = [], x, y
    for css, word, meaning in items:
        chip = text_width(word, style.chip) + 16
        need = chip + 6 + text_width(meaning, style.text) + 12
        if px > x and px + need > x + style.width:
            px, py = x, py + style.chip_height + 6
        out.append(
            f'<g class="{css}"><rect x="{px:g}" y="{py:g}" width="{chip:g}" height="{style.chip_height:g}" rx="6"/>'
            f'<text x="{px + chip / 2:g}" y="{py + style.chip_height / 2 + style.chip * 0.35:g}" '
            f'font-size="{style.chip:g}" text-anchor="middle">{word}</text></g>'
            f'<text class="etm-answer" x="{px + chip + 7:g}" '
            f'y="{py + style.chip_height / 2 + style.text * 0.35:g}" font-size="{style.text:g}">'
            f"{esc(meaning)}</text>"
        )
        px += need
    return "".join(out), py - y + style.chip_height


def rows_of(directions: list[dict[str, Any]], columns: int) -> list[list[dict[str, Any]]]:
    """Group directions that share a ``where`` or stand alone into rows of at most ``columns`` cards.

    In the wide layout: the three ways to read the past, then what is around them, then the inputs, then the
    neighbours beside the map.
    """
    if columns == 1:
        return [[d] for d in directions]
    past = [d for d in directions if d["where"] == directions[0]["where"]]
    beside = [d for d in directions if "section" not in d]
    rest = [d for d in directions if d not in past and d not in beside]
    return [past, rest[:columns], rest[columns:], beside]


def draw(data: dict[str, Any], style: Style, resolve: Resolver, uid: str) -> str:
    """The whole map as one ``<svg>`` element; ``uid`` keeps ids apart when a page holds two layouts."""
    by_direction = {
        d["id"]: [s for s in data["systems"] if s["direction"] == d["id"]] for d in data["directions"]
    }
    body: list[str] = []
    label_size = style.text
    y, previous_bottoms = 0.0, []
    beside_started, shown = False, ""
    for row in rows_of(data["directions"], style.columns):
        if "section" not in row[0] and not beside_started:
            beside_started = True
            y += 6
            body.append(f'<path class="etm-border" d="M0 {y:g} H{style.width:g}"/>')
            lines = wrap("Beside the map: neighbours that the survey does not cover", label_size, style.width)
            body.append(text_lines(lines, 0, y + 8, label_size, "etm-where"))
            y += 8 + len(lines) * label_size * 1.28 + 8
        width = (style.width - style.gap * (len(row) - 1)) / len(row)
        # what part of the machine a card changes, once above each group of cards that share it
        if "section" in row[0]:
            labels = [d["where"] for d in row]
            starts = [i for i, w in enumerate(labels) if w != (labels[i - 1] if i else shown)]
            for i in starts:
                body.append(
                    text_lines(
                        [labels[i][0].upper() + labels[i][1:]],
                        i * (width + style.gap),
                        y,
                        label_size,
                        "etm-where",
                    )
                )
            if starts:
                y += label_size * 1.28 + 6
            shown = labels[-1]
        height = max(card_parts(d, by_direction[d["id"]], width, style)[3] for d in row)
        if any(d["id"] == "hybrid" for d in row) and len(row) == style.columns > 1:
            # a hybrid is built from the three cards above it
            column = next(i for i, d in enumerate(row) if d["id"] == "hybrid")
            middle = column * (width + style.gap) + width * 0.86  # to the right of the label
            top = previous_bottoms[0]
            ends = "".join(
                f"M{i * (width + style.gap) + width / 2:g} {top:g} V{top + 9:g} H{middle:g} "
                for i in range(len(previous_bottoms))
            )
            body.append(f'<path class="etm-join" d="{ends}M{middle:g} {top + 9:g} V{y:g}"/>')
        for i, direction in enumerate(row):
            body.append(
                draw_card(
                    direction,
                    by_direction[direction["id"]],
                    i * (width + style.gap),
                    y,
                    width,
                    height,
                    style,
                    resolve,
                )
            )
        y += height
        previous_bottoms = [y] * len(row)
        y += style.gap + (6 if style.columns > 1 else 0)
    marks, height = legend(0, y, style)
    body.append(marks)
    y += height + 4
    count = len(data["systems"])
    title = "Map of efficient transformers"
    desc = (
        f"Seven directions in the order of the survey Speed Always Wins and three neighbouring fields, "
        f"with {count} systems. Every direction and every system is a link."
    )
    return (
        f'<svg class="etm-svg" xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {style.width + 4:g} {y + 4:g}" '
        f'role="group" aria-labelledby="{uid}-t {uid}-d"><title id="{uid}-t">{title}</title>'
        f'<desc id="{uid}-d">{esc(desc)}</desc>{"".join(body)}</svg>'
    )
