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

    Raises:
        ValueError: for a row whose length is not the header's.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> None:
        for i, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"rows: expected {len(header)} cells in row {i}, got {len(row)}")
        self.header = list(header)
        self.rows = [[str(cell) for cell in row] for row in rows]
        self.caption = caption

    def _repr_html_(self) -> str:
        # A wide table scrolls inside its own box, reachable by keyboard, instead of widening the page.
        label = html.escape(self.caption, quote=True)
        head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in self.header)
        body = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(first)}</th>'
            + "".join(f'<td style="text-align:right">{html.escape(cell)}</td>' for cell in rest)
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
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
            )
            for line in lines
        ]
        return "\n".join([self.caption, *text])
