"""``{practice}``: the trainer, one card of the interview bank or one numeric drill at a time.

Every text is parsed as MyST when the book is built and stands in the page, hidden: formulas, citations and code are
those of the rest of the book. What ``_sims/practice.js`` needs besides (the scheduler's parameters, the drills with
their computed answers) is inlined as JSON. Nothing is fetched, so the page also works from a file.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import fsrs.scheduler
from docutils import nodes
from sphinx.application import Sphinx

from effattn_lab.interview import numeric, schedule
from effattn_lab.interview.bank import Question
from interview import Questions, bullets

CSS = "practice.css"
TAG = "practice-trainer"
# In this order: the element comes last, for it uses the others.
SCRIPTS = ("practice-core", "practice-store", "practice-parts", "practice")
BANK_PAGE = "chapters/practice/interview"


class element(nodes.General, nodes.Element):
    """An HTML element with attributes: ``tag``, and ``html``, a dictionary."""


def box(tag: str, *children: nodes.Node, classes: str = "", **html: str) -> element:
    """``<tag class="classes" …>``; underscores in names of attributes become hyphens."""
    attributes = {name.replace("_", "-"): value for name, value in html.items()}
    return element("", *children, tag=tag, html=attributes, classes=classes.split())


class Practice(Questions):
    """``{practice}``."""

    def run(self) -> list[nodes.Node]:
        metadata = self.env.metadata[self.env.docname]
        metadata.setdefault("sims", []).extend(SCRIPTS)
        metadata["interview"] = metadata["practice"] = True
        for name in SCRIPTS:
            self.env.note_dependency(str(Path(self.env.srcdir) / "_sims" / f"{name}.js"))
        self.env.note_dependency(str(numeric.DRILLS))
        questions, drills = self.bank(), numeric.load()
        topics = {question.topic: question.topic_title for question in questions}
        cards: list[nodes.Node] = []
        # New cards are met in this order: a topic's questions, then its numbers.
        for topic in dict.fromkeys([*topics, *(drill.topic for drill in drills)]):
            title = topics.get(topic, topic)
            cards += [self.spoken(question, title) for question in questions if question.topic == topic]
            cards += [self.drill(drill, title) for drill in drills if drill.topic == topic]
        trainer = box(TAG, inlined(page_data()), self.noscript(), *cards, classes="sim", data_sim="practice")
        trainer["ids"] = ["practice-trainer"]
        return [trainer]

    def spoken(self, question: Question, title: str) -> nodes.Node:
        """A card to answer aloud."""
        for file in (question.file, question.file.parent.parent / "quantities.yml"):
            self.env.note_dependency(str(file))
        rubric = box(
            "fieldset",
            box("legend", nodes.Text("What did a listener hear? Tick it, strictly")),
            *self.parse(bullets(question.key_points)),
            classes="practice-rubric",
        )
        answer = [
            self.block("Red flag", "red", self.parse(question.red_flag)),
            self.block("Strong answer", "strong", self.parse(question.strong_answer)),
        ]
        if question.follow_ups:
            follow = [self.follow_up(follow_up) for follow_up in question.follow_ups]
            answer.append(self.block("Follow-ups: answer each before you open it", "follow", follow))
        links = [*self.parse(self.links(question)), *self.in_the_bank(question)]
        answer += [rubric, box("div", *links, classes="practice-links")]
        kind = "case" if question.kind == "case" else "spoken"
        html = {"data_kind": kind, "data_id": question.id, "data_minutes": f"{question.minutes:g}"}
        return self.card(question, title, self.parse(question.question), answer, **html)

    def drill(self, drill: numeric.Drill, title: str) -> nodes.Node:
        """A card to compute; the script puts the numbers in."""
        ask = [box("p", nodes.strong("", drill.title)), box("p", classes="practice-ask")]
        answer = [
            self.block("Formula", "formula", self.parse(drill.formula)),
            self.block("With the numbers", "worked", [box("p", classes="practice-worked")]),
            box("div", *self.parse(f"Read again: {{ref}}`{drill.section}`"), classes="practice-links"),
        ]
        return self.card(drill, title, ask, answer, data_kind="number", data_id=f"numeric/{drill.id}")

    def card(
        self,
        item: Question | numeric.Drill,
        title: str,
        ask: list[nodes.Node],
        answer: list[nodes.Node],
        **html: str,
    ) -> nodes.Node:
        minutes = f" · {item.minutes:g} min" if isinstance(item, Question) else ""
        level = box("span", nodes.Text(item.level), classes=f"interview-level interview-{item.level}")
        head = box("p", level, nodes.Text(f" {title}{minutes}"), classes="practice-head")
        return box(
            "article",
            head,
            box("div", *ask, classes="practice-question"),
            box(
                "div",
                *answer,
                classes="practice-answer",
                hidden="",
                tabindex="-1",
                role="group",
                aria_label="Answer",
            ),
            classes="practice-card",
            hidden="",
            tabindex="0",
            data_topic=item.topic,
            data_title=title,
            data_level=item.level,
            **html,
        )

    def in_the_bank(self, question: Question) -> list[nodes.Node]:
        """A link to the question in the bank, with the expressions behind its numbers and its proof."""
        builder = self.env.app.builder
        if BANK_PAGE not in self.env.found_docs or builder.format != "html":
            return []
        address = f"{builder.get_relative_uri(self.env.docname, BANK_PAGE)}#{question.anchor}"
        return [nodes.paragraph("", "", nodes.reference("", "Where its numbers come from", refuri=address))]

    def noscript(self) -> nodes.Node:
        text = "The trainer needs JavaScript. All questions with their answers folded stand in {ref}`interview-bank`."
        return box("noscript", *self.parse(text))


def page_data() -> dict[str, Any]:
    """What the script gets: the terminal's scheduler, the units, the drills."""
    settings = schedule.scheduler().to_dict()
    return {
        "fsrs": {
            "parameters": settings["parameters"],
            "retention": settings["desired_retention"],
            "maximum_interval": settings["maximum_interval"],
            "stability_min": fsrs.scheduler.STABILITY_MIN,
            "difficulty_min": fsrs.scheduler.MIN_DIFFICULTY,
            "difficulty_max": fsrs.scheduler.MAX_DIFFICULTY,
        },
        "ratings": {str(rating): name for rating, name in schedule.RATINGS.items()},
        "units": numeric.UNITS,
        "drills": drills_data(),
    }


@functools.cache
def drills_data() -> list[dict[str, Any]]:
    return numeric.page_data()


def inlined(data: Any) -> nodes.Node:
    # "</" inside a script element would end it early.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return nodes.raw("", f'<script type="application/json">{text}</script>\n', format="html")


def visit_element(self: Any, node: element) -> None:
    self.body.append(self.starttag(node, node["tag"], **node["html"]))


def depart_element(self: Any, node: element) -> None:
    self.body.append(f"</{node['tag']}>\n")


def _nothing(self: Any, node: nodes.Node) -> None:
    """Other builders show the children one after another."""


def copy_css(app: Sphinx) -> None:
    if app.builder.format == "html":
        target = Path(app.outdir) / "_static"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name(CSS), target / CSS)


def add_css(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if app.env.metadata.get(pagename, {}).get("practice"):
        app.add_css_file(CSS)


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("interview")
    other = {name: (_nothing, _nothing) for name in ("latex", "text", "man", "texinfo")}
    app.add_node(element, html=(visit_element, depart_element), **other)
    app.add_directive("practice", Practice)
    app.connect("builder-inited", copy_css)
    app.connect("html-page-context", add_css)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
