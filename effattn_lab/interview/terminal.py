"""The screen and keyboard of ``effattn quiz``: panels, prompts, answers of several lines."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

YES, NO, QUIT = "y", "n", {"q", "quit", "exit"}
_WIDEST = 100  # longer lines are hard to read, however wide the terminal is
_TWO_COLUMNS = 96  # below this, two columns side by side are too narrow for prose
_TALL, _TALL_RATIO = 900, 4  # characters of one block; and how many times the other one's
_OWN_LINE = re.compile(r"\s*(?:[-*+] |\d+[.)] |\||#{1,6} |```)")


class Leave(Exception):
    """The learner leaves: ``q``, the end of the input, or Ctrl-C (`interrupted`)."""

    def __init__(self, interrupted: bool = False) -> None:
        super().__init__()
        self.interrupted = interrupted


def _utc() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Clock:
    """Where the time comes from. Tests give their own.

    Attributes:
        now: the date and time, UTC.
        seconds: a clock that never goes back, in seconds; only differences count.
    """

    now: Callable[[], datetime] = _utc
    seconds: Callable[[], float] = time.monotonic


@dataclass
class Stopwatch:
    """Seconds spent inside its ``with`` blocks, added up."""

    clock: Clock
    total: float = 0.0
    _began: float = field(default=0.0, repr=False)

    def __enter__(self) -> Stopwatch:
        self._began = self.clock.seconds()
        return self

    def __exit__(self, *error: object) -> None:
        self.total += self.clock.seconds() - self._began


class Screen:
    """Output through rich and input line by line.

    Args:
        boxes: draw panels in colour; False prints plain lines. Default: only if standard output is a terminal.
        clock: where the time comes from.
    """

    def __init__(self, boxes: bool | None = None, clock: Clock | None = None) -> None:
        from rich.console import Console

        self.boxes = sys.stdout.isatty() if boxes is None else boxes
        self.clock = clock or Clock()
        self.console: Any = Console(no_color=not self.boxes, highlight=False, soft_wrap=False)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  -- arrows and Backspace work while an answer is typed

    def say(self, text: str = "", dim: bool = False, indent: int = 0) -> None:
        """Print a line as it is, all of it `indent` columns from the left if it needs wrapping."""
        from rich.padding import Padding
        from rich.text import Text

        line = Text(text, style="dim" if dim and self.boxes else "")
        self.console.print(Padding(line, (0, 0, 0, indent), expand=False) if indent else line)

    def show(self, title: str, text: str, colour: str) -> None:
        """Print a titled block."""
        if not self.boxes:
            self.say(f"\n{title}\n{text}")
            return
        self.console.print(self._panel(title, text, colour, min(self.console.width, _WIDEST)))

    def show_beside(self, left: tuple[str, str, str], right: tuple[str, str, str]) -> None:
        """Print two titled blocks, next to each other where there is room and neither would stand alone for long."""
        lopsided = len(right[1]) > max(_TALL, _TALL_RATIO * len(left[1]))
        if not self.boxes or self.console.width < _TWO_COLUMNS or lopsided:
            self.show(*left)
            self.show(*right)
            return
        from rich.table import Table

        half = min(self.console.width, 2 * _WIDEST) // 2
        grid = Table.grid(padding=0)
        grid.add_row(self._panel(*left, half), self._panel(*right, half))
        self.console.print(grid)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print rows in columns; without boxes, separated by tabs and without headings, for other programs."""
        if not self.boxes:
            for row in rows:
                print("\t".join(row))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for number, heading in enumerate(headings):
            table.add_column(heading, overflow="fold", no_wrap=0 < number < len(headings) - 1)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    def read(self, prompt: str) -> str:
        """One line, stripped. Raises Leave at the end of the input, at Ctrl-C and at ``q``."""
        word = self._line(prompt).strip()
        if word.lower() in QUIT:
            raise Leave()
        return word

    def answer(self, prompt: str) -> str:
        """An answer of any number of lines, ended by an empty one; empty if it was said aloud. Raises Leave."""
        first = self.read(prompt)
        if not first:
            return ""
        lines = first.splitlines()
        while more := self._line("  … ").rstrip():
            lines += more.splitlines()
        return "\n".join(lines)

    def ticks(
        self, points: Sequence[str], others: Mapping[str, Callable[[], None]] | None = None
    ) -> tuple[bool, ...]:
        """List `points` and read yes or no for each, one by one or several letters at once. Raises Leave.

        `others`: further words that may be typed, and what each does before the point is asked again.
        """
        for number, point in enumerate(points, start=1):
            self.say(f"{number}. {point}", indent=2)
        found: list[bool] = []
        while len(found) < len(points):
            first, last = len(found) + 1, len(points)
            where = f"{first}" if first == last else f"{first} to {last}"
            word = self.read(f"{where} [y/n] ").lower().replace(" ", "")
            word = {"yes": YES, "no": NO}.get(word, word)
            if others and word in others:
                others[word]()
            elif word and set(word) <= {YES, NO} and len(word) <= len(points) - len(found):
                found += [letter == YES for letter in word]
            else:
                self.say("y, n, or q to leave; yyn answers three points at once")
        return tuple(found)

    def _line(self, prompt: str) -> str:
        try:
            line = input(prompt)
        except EOFError:
            raise Leave() from None
        except KeyboardInterrupt:
            raise Leave(interrupted=True) from None
        if not sys.stdin.isatty():
            self.say(line)  # a terminal echoes what is typed; a pipe does not
        return line

    def _panel(self, title: str, text: str, colour: str, width: int) -> Any:
        from rich.panel import Panel
        from rich.text import Text

        return Panel(Text(text), title=Text(title), title_align="left", border_style=colour, width=width)


def reflow(text: str) -> str:
    """`text` with the line breaks inside its paragraphs taken out; lists, tables, code and blank lines stay."""
    out: list[str] = []
    code = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        if out and out[-1].strip() and line.strip() and not (code or fence or _OWN_LINE.match(line)):
            previous = out[-1].lstrip()
            if not previous.startswith(("|", "```", "#")):
                out[-1] = f"{out[-1].rstrip()} {line.strip()}"
                continue
        out.append(line)
        code ^= fence
    return "\n".join(out)


def minutes(seconds: float) -> str:
    """``m:ss``; a minus sign where time is overdrawn."""
    whole = round(abs(seconds))
    return f"{'−' if seconds < 0 and whole else ''}{whole // 60}:{whole % 60:02d}"


def counted(number: int, noun: str) -> str:
    """``1 question``, ``2 questions``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
