"""Small repairs of the theme's pages, each for a fault that a browser or axe-core reports."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

BODY = (
    # A list must hold list items, and a bibliography entry is none to a screen reader.
    ('<div role="list" class="citation-list">', '<div class="citation-list">'),
    (' role="doc-biblioentry"', ""),
    # Footnotes are marked in the same way.
    ('<aside class="footnote-list brackets" role="list">', '<aside class="footnote-list brackets">'),
)


def configure(app: Sphinx, config: Config) -> None:
    # The title stands beside the logo; an empty default mode logs a warning on every page.
    config.html_theme_options["logo"] = {"text": config.html_title, "alt_text": f"{config.html_title}, home"}
    config.html_context.setdefault("default_mode", "auto")


def mend(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if "body" in context:
        for old, new in BODY:
            context["body"] = context["body"].replace(old, new)
    contents = context.get("generate_toctree_html")
    if contents is not None:

        def named(*args: Any, **kwargs: Any) -> str:
            # The arrow that unfolds a chapter's pages is a button without a name.
            return str(contents(*args, **kwargs)).replace(
                "<summary>", '<summary aria-label="Pages of this chapter">'
            )

        context["generate_toctree_html"] = named


def setup(app: Sphinx) -> dict[str, Any]:
    # Before the theme reads its options.
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", mend, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
