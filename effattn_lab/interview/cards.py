"""Texts of the bank as HTML for a flash card: Markdown by markdown-it, formulas in MathJax's ``\\(…\\)``."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

from effattn_lab.interview.bank import Question
from effattn_lab.interview.links import Book, heading, place


@functools.cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    md = MarkdownIt("commonmark", {"html": False}).enable("table")
    # The rules by which "$5 and $6" are two prices and no formula.
    dollarmath_plugin(md, allow_space=False, allow_digits=False, allow_labels=False, double_inline=True)
    md.add_render_rule("math_inline", _inline)
    md.add_render_rule("math_inline_double", _display)
    md.add_render_rule("math_block", _display)
    return md


def _inline(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    return rf"\({html.escape(tokens[index].content, quote=False)}\)"


def _display(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    return rf"\[{html.escape(tokens[index].content.strip(), quote=False)}\]"


def to_html(markdown: str) -> str:
    """HTML of a text of one or more paragraphs."""
    return str(_markdown().render(markdown)).strip()


def inline_html(markdown: str) -> str:
    """HTML of a text without a paragraph around it, for an item of a list."""
    return str(_markdown().renderInline(" ".join(markdown.split())))


def fields(question: Question, book: Book) -> dict[str, str]:
    """The card's fields by name, HTML each. ``Link`` is empty where no address is known."""
    points = "".join(f"<li>{inline_html(point)}</li>" for point in question.key_points)
    follow_ups = "".join(
        f"<details><summary>{inline_html(f.ask)}</summary>{to_html(f.answer)}</details>"
        for f in question.follow_ups
    )
    url = book.url(question)
    title = heading(question.chapter, question.section) or place(question)
    link = (
        f'<a href="{html.escape(url)}">{html.escape(question.topic_title)}: {inline_html(title)}</a>'
        if url
        else ""
    )
    return {
        "Question": to_html(question.question),
        "Topic": html.escape(question.topic_title),
        "Level": html.escape(f"{question.level} · {question.minutes:g} min"),
        "Red flag": to_html(question.red_flag),
        "Strong answer": to_html(question.strong_answer),
        "Points": f"<ul>{points}</ul>",
        "Follow-ups": follow_ups,
        "Link": link,
        "Id": html.escape(question.id),
    }
