"""A small table that reads well on a page, in a notebook and in a terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence


class Table:
    """Rows under a header; the first column names the row.

    Args:
        header: column names, units included.
        rows: cells as text or numbers, as long as the header; numbers are shown as ``str`` gives them.
        caption: what the table shows.
        text: columns of words, set from the left like the first; the others are numbers.

    Raises:
        ValueError: for a row whose length is not the header's.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str,
        text: Sequence[str] = (),
    ) -> None:
        for i, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"rows: expected {len(header)} cells in row {i}, got {len(row)}")
        self.header = list(header)
        self.rows = [[str(cell) for cell in row] for row in rows]
        self.caption = caption
        self.left = [i == 0 or name in text for i, name in enumerate(self.header)]

    def _repr_html_(self) -> str:
        # A wide table scrolls inside its own box, reachable by keyboard, instead of widening the page.
        label = html.escape(self.caption, quote=True)
        sides = ["left" if left else "right" for left in self.left]
        head = "".join(
            f'<th scope="col" style="text-align:{side}">{html.escape(h)}</th>'
            for h, side in zip(self.header, sides)
        )
        body = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(first)}</th>'
            + "".join(
                f'<td style="text-align:{side}">{html.escape(cell)}</td>'
                for cell, side in zip(rest, sides[1:])
            )
            + "</tr>"
            for first, *rest in self.rows
        )
        # "dataframe" is the class that the theme recolours in dark mode.
        return (
            f'<div style="overflow-x:auto" tabindex="0" role="region" aria-label="{label}">'
            '<table class="table dataframe">'
            f'<caption style="caption-side:top;text-align:left">{html.escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        text = [
            "  ".join(
                cell.ljust(w) if left else cell.rjust(w) for cell, w, left in zip(line, widths, self.left)
            )
            for line in lines
        ]
        return "\n".join([self.caption, *text])
