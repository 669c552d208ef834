"""``{sim}``: an in-page simulator that needs no server.

::

    ```{sim} tile-stepper
    :alt: What the simulator shows, for readers without JavaScript.
    {"seqlen": 8, "block": 2}
    ```

writes the custom element that ``_sims/tile-stepper.js`` defines, with the JSON of the body inlined as
``<script type="application/json">`` and the alternative text in ``<noscript>``. The script is copied to
``_static/sims`` and loaded on pages that use it, and on no other page. It is a classic script: modules and
``fetch`` do not work when a page is opened from a file.

``:data: package.module:function`` calls that Python function when the page is read and inlines what it returns,
so that a table lives in the package alone; a body, if any, must be an object and overrides single fields.

A script that says ``// needs: name`` in a line of its own builds on ``_sims/name.js``, which is loaded before it.
"""

from __future__ import annotations

import html
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DEFINE = re.compile(r"""customElements\s*\.\s*define\(\s*["'`]([a-z][a-z0-9]*(?:-[a-z0-9]+)+)["'`]""")
NEEDS = re.compile(r"^// needs: ([a-z][a-z0-9-]*)$", re.MULTILINE)


def provided(spec: str) -> Any:
    """Call ``package.module:function`` and return its JSON-ready answer."""
    module, _, function = spec.strip().partition(":")
    return getattr(importlib.import_module(module), function)()


class Sim(SphinxDirective):
    """The directive; ``:alt:`` is required, ``:name:`` makes the simulator a target of links."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {
        "alt": directives.unchanged_required,
        "name": directives.unchanged,
        "class": directives.class_option,
        "data": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0].strip()
        script = Path(self.env.srcdir) / "_sims" / f"{name}.js"
        if not script.is_file():
            raise self.error(f"sim: there is no simulator _sims/{name}.js")
        self.env.note_dependency(str(script))
        text = script.read_text(encoding="utf-8")
        defined = DEFINE.findall(text)
        if not defined:
            raise self.error(f"sim: _sims/{name}.js defines no custom element")
        tag = name if name in defined else defined[0]

        alt = self.options.get("alt", "").strip()
        if not alt:
            raise self.error(f"sim {name}: the option :alt: (what it shows, in words) is missing")
        body = "\n".join(self.content).strip()
        if body or "data" in self.options:
            try:
                data = json.loads(body) if body else {}
            except json.JSONDecodeError as error:
                raise self.error(f"sim {name}: the body is not JSON: {error}") from error
            if "data" in self.options:
                try:
                    data = {**provided(self.options["data"]), **data}
                except (ImportError, AttributeError, TypeError, ValueError) as error:
                    raise self.error(f"sim {name}: data {self.options['data']}: {error}") from error
            # "</" inside a script element would end it early.
            inline = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
            body = f'<script type="application/json">{inline}</script>'

        loaded = self.env.metadata[self.env.docname].setdefault("sims", [])
        for needed in NEEDS.findall(text):
            base = script.with_name(f"{needed}.js")
            if not base.is_file():
                raise self.error(f"sim {name}: it needs _sims/{needed}.js, and there is no such file")
            self.env.note_dependency(str(base))
            loaded += [needed] if needed not in loaded else []
        loaded += [name] if name not in loaded else []
        markup = (
            f'<{tag} class="sim" data-sim="{name}">{body}'
            f"<noscript><p>{html.escape(alt)}</p></noscript></{tag}>"
        )
        node = nodes.container(
            "", nodes.raw("", markup, format="html"), classes=["sim-frame", *self.options.get("class", [])]
        )
        self.add_name(node)
        return [node]


def copy_sims(app: Sphinx) -> None:
    """Copy the simulators to ``_static/sims``, before pages compute their checksums."""
    if app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "sims"
    for script in sorted(Path(app.srcdir).glob("_sims/*.js")):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(script, target / script.name)


def load_sims(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Load a page's own simulators, on that page only."""
    for name in app.env.metadata.get(pagename, {}).get("sims", []):
        app.add_js_file(f"sims/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("sim", Sim)
    app.connect("builder-inited", copy_sims)
    app.connect("html-page-context", load_sims)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
