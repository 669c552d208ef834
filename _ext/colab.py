"""Lab pages launch the *student* notebook.

The book shows ``labs/solved/<part>/<slug>.ipynb``; its Colab button, the line under its title and its
download open ``labs/<part>/<slug>.ipynb``, the notebook with the blanks. Other pages get no Colab button:
there is nothing to do in them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
SOLVED = "labs/solved/"


def student_notebook(docname: str) -> str | None:
    """``labs/solved/full/flash`` → ``labs/full/flash.ipynb``; ``None`` for a page that is not a lab."""
    return f"labs/{docname.removeprefix(SOLVED)}.ipynb" if docname.startswith(SOLVED) else None


def colab_address(app: Sphinx, notebook: str) -> str:
    """Address that opens a notebook of the repository in Colab, from the one address in ``_config.yml``."""
    theme = app.config.html_theme_options
    org, repository = theme["repository_url"].rstrip("/").split("/")[-2:]
    service = theme["launch_buttons"]["colab_url"].rstrip("/")
    return f"{service}/github/{org}/{repository}/blob/{theme['repository_branch']}/{notebook}"


def to_root(docname: str) -> str:
    return "../" * docname.count("/")


def add_launch_line(app: Sphinx, doctree: nodes.document) -> None:
    """Put "Open in Colab" and the download under the title of a lab."""
    docname = app.env.docname
    notebook = student_notebook(docname)
    title = next(iter(doctree.findall(nodes.title)), None)
    if notebook is None or title is None or app.builder.format != "html":
        return
    if not (Path(app.srcdir) / notebook).is_file():
        LOGGER.warning("%s has no student notebook %s; run `make labs`", docname, notebook, location=docname)
        return
    markup = (
        '<p class="lab-launch">'
        f'<a class="lab-button" href="{colab_address(app, notebook)}">Open in Colab</a> '
        f'<a class="lab-button" href="{to_root(docname)}{notebook}" download>Download the notebook</a> '
        "<span>This page is the solved lab; the buttons give the notebook with the blanks.</span></p>"
    )
    title.parent.insert(title.parent.index(title) + 1, nodes.raw("", markup, format="html"))


def fix_buttons(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Point the header's Colab button at the student notebook, or take it away."""
    notebook = student_notebook(pagename)
    buttons = [b for b in context.get("header_buttons", []) if b.get("label") != "launch-buttons"]
    if notebook is not None:
        buttons.insert(
            0,
            {
                "type": "group",
                "tooltip": "Launch the lab",
                "icon": "fas fa-rocket",
                "label": "launch-buttons",
                "buttons": [
                    {
                        "type": "link",
                        "text": "Colab",
                        "tooltip": "Open the student notebook in Colab",
                        "icon": "_static/images/logo_colab.png",
                        "url": colab_address(app, notebook),
                    }
                ],
            },
        )
        for group in buttons:
            if group.get("label") == "download-buttons":
                group["buttons"].insert(
                    0,
                    {
                        "type": "link",
                        "text": "student .ipynb",
                        "tooltip": "Download the notebook with the blanks",
                        "icon": "fas fa-code",
                        "url": context["pathto"](notebook, 1),
                    },
                )
    context["header_buttons"] = buttons


def copy_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Put the student notebooks into the site, at the same path as in the repository."""
    if exception is not None or app.builder.format != "html":
        return
    for docname in app.env.found_docs:
        notebook = student_notebook(docname)
        if notebook and (Path(app.srcdir) / notebook).is_file():
            target = Path(app.outdir) / notebook
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(app.srcdir) / notebook, target)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", add_launch_line)
    # After the theme has filled its list of buttons.
    app.connect("html-page-context", fix_buttons, priority=900)
    app.connect("build-finished", copy_notebooks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
