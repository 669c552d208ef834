"""The interview bank in the book, from ``interview/<part>/<slug>.yml``.

- ``{interview} full/flash``: the questions of one file, answers folded.
- ``{interview-bank}``: all questions, a section a topic, with a filter that needs no server. Without JavaScript
  everything is shown.

Folds are native ``<details>``. The same question stands in its chapter and on the bank's page, so its id is an HTML
id only and never a Sphinx label, of which there could be one alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from effattn_lab.interview.bank import BankError, FollowUp, Number, Question, load, load_file

CSS = "interview.css"
FILTER = "interview-filter"


class fold(nodes.General, nodes.Element):
    """``<details>``; its first child is a `fold_summary`."""


class fold_summary(nodes.General, nodes.TextElement):
    """``<summary>``: what stands there while the fold is closed."""


class Questions(SphinxDirective):
    """What the directives of the bank and of the practice page share: parsing the texts of questions as MyST."""

    def parse(self, markdown: str) -> list[nodes.Node]:
        box = nodes.Element()
        self.state.nested_parse(
            StringList(markdown.splitlines(), source="interview"), self.content_offset, box
        )
        return box.children

    def summary(self, markdown: str, *before: nodes.Node) -> fold_summary:
        parsed = self.parse(markdown)
        if len(parsed) != 1 or not isinstance(parsed[0], nodes.paragraph):
            raise self.error(f"interview: a question must be a single paragraph: {markdown[:60]!r}")
        node = fold_summary(markdown, "", *before, *parsed[0].children)
        node.source, node.line = self.get_source_info()
        return node

    def block(self, label: str, kind: str, content: Iterable[nodes.Node]) -> nodes.Node:
        heading = nodes.paragraph("", label, classes=["interview-label"])
        return nodes.container("", heading, *content, classes=["interview-block", f"interview-{kind}"])

    def question(self, question: Question) -> nodes.Node:
        for file in (question.file, question.file.parent.parent / "quantities.yml"):
            self.env.note_dependency(str(file))
        self.env.metadata[self.env.docname]["interview"] = True
        level = nodes.inline("", question.level, classes=["interview-level", f"interview-{question.level}"])
        item = fold("", self.summary(question.question, level, nodes.Text(" ")), ids=[question.anchor])
        item["classes"] = ["interview"]
        item["data"] = {"topic": question.topic, "level": question.level}
        item += self.block("Red flag", "red", self.parse(question.red_flag))
        item += self.block("Strong answer", "strong", self.parse(question.strong_answer))
        item += self.block("What the listener ticks off", "points", self.parse(bullets(question.key_points)))
        item += self.block("Follow-ups", "follow", [self.follow_up(f) for f in question.follow_ups])
        if question.numbers:
            text = bullets(_evidence(number) for number in question.numbers)
            item += self.block("Where the numbers come from", "evidence", self.parse(text))
        if question.proof:
            proof = question.proof.rstrip()
            code = nodes.literal_block(proof, proof, language="python")  # coloured only if source equals text
            item += self.block("Proof to run", "proof", [code])
        item += nodes.container("", *self.parse(self.links(question)), classes=["interview-links"])
        return item

    def follow_up(self, follow_up: FollowUp) -> nodes.Node:
        item = fold("", self.summary(follow_up.ask), *self.parse(follow_up.answer))
        item["classes"] = ["interview-follow-up"]
        return item

    def bank(self) -> list[Question]:
        """All questions."""
        try:
            return load(Path(self.env.srcdir) / "interview")
        except BankError as error:
            raise self.error(f"{self.name}: {error}") from error

    def links(self, question: Question) -> str:
        parts = [f"Read again: {{ref}}`{question.section}`"]
        lab = f"labs/solved/{question.lab}"
        if question.lab and lab in self.env.found_docs:
            parts.append(f"Lab: {{doc}}`/{lab}`")
        if question.sources:
            parts.append(f"Sources: {{cite}}`{','.join(question.sources)}`")
        return " · ".join(parts)


class Interview(Questions):
    """``{interview} part/slug``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        topic = self.arguments[0].strip()
        file = Path(self.env.srcdir) / "interview" / f"{topic}.yml"
        if not file.is_file():
            raise self.error(f"interview: there is no interview/{topic}.yml")
        try:
            questions = load_file(file)
        except BankError as error:
            raise self.error(f"interview: {error}") from error
        return [self.question(question) for question in questions]


class InterviewBank(Questions):
    """``{interview-bank}``: every topic's questions as a section of their own."""

    def run(self) -> list[nodes.Node]:
        questions = self.bank()
        # The filter is a simulator to the rest of the book: `_ext/sim.py` loads its script on this page only.
        self.env.metadata[self.env.docname].setdefault("sims", []).append(FILTER)
        found: list[nodes.Node] = [nodes.raw("", f"<{FILTER}></{FILTER}>", format="html")]
        for topic in dict.fromkeys(question.topic for question in questions):
            mine = [question for question in questions if question.topic == topic]
            section = nodes.section("", ids=[f"bank-{topic.replace('/', '-').replace('_', '-')}"])
            section["classes"] = ["interview-topic"]
            section += nodes.title(mine[0].topic_title, mine[0].topic_title)
            section += [self.question(question) for question in mine]
            found.append(section)
        return found


def bullets(lines: Iterable[str]) -> str:
    return "\n".join("- " + " ".join(line.split()) for line in lines)


def _evidence(number: Number) -> str:
    unit = f" {number.unit}" if number.unit else ""
    text = f"**{_digits(number.value)}{unit}**: {number.claim}"
    if number.expr:
        text += f", from `{number.expr}`"
    if number.source:
        text += f", {'figures of' if number.expr else 'reported by'} {{cite:t}}`{number.source}`"
    return text


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    mantissa, _, exponent = f"{value:g}".partition("e")
    return rf"${mantissa}\cdot10^{{{int(exponent)}}}$" if exponent else mantissa


def visit_fold(self: Any, node: fold) -> None:
    data = {f"data-{key}": value for key, value in node.get("data", {}).items()}
    self.body.append(self.starttag(node, "details", **data))


def depart_fold(self: Any, node: fold) -> None:
    self.body.append("</details>\n")


def visit_summary(self: Any, node: fold_summary) -> None:
    self.body.append(self.starttag(node, "summary", ""))


def depart_summary(self: Any, node: fold_summary) -> None:
    self.body.append("</summary>\n")


def _nothing(self: Any, node: nodes.Node) -> None:
    """Other builders show the children one after another."""


def copy_css(app: Sphinx) -> None:
    if app.builder.format == "html":
        target = Path(app.outdir) / "_static"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name(CSS), target / CSS)


def add_css(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if app.env.metadata.get(pagename, {}).get("interview"):
        app.add_css_file(CSS)


def setup(app: Sphinx) -> dict[str, Any]:
    other = {name: (_nothing, _nothing) for name in ("latex", "text", "man", "texinfo")}
    app.add_node(fold, html=(visit_fold, depart_fold), **other)
    app.add_node(fold_summary, html=(visit_summary, depart_summary), **other)
    app.add_directive("interview", Interview)
    app.add_directive("interview-bank", InterviewBank)
    app.connect("builder-inited", copy_css)
    app.connect("html-page-context", add_css)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
