"""Serve MathJax from the built site, so that an open page asks no other machine for anything.

The wheel ``sphinx-mathjax-offline`` carries MathJax 3.2; used as an extension it would copy all 24 MB
of it, so this one copies the 2 MB that TeX input with CHTML output needs.
"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

PARTS = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions", "a11y/assistive-mml.js")


def mathjax_source() -> Path:
    """Folder of MathJax inside the installed wheel; raises ``ExtensionError`` where it is missing."""
    try:
        found = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    except PackageNotFoundError as error:
        raise ExtensionError(
            "The book's formulas need the package sphinx-mathjax-offline, which is not installed. "
            "Run `make env`, or `pip install -c constraints.txt -e '.[book]'`."
        ) from error
    return Path(str(found))


def copy_mathjax(app: Sphinx) -> None:
    """Copy the needed part of MathJax to ``_static/mathjax`` of an HTML build."""
    if app.builder.format != "html":
        return
    # Pages whose only formulas are written by scripts need MathJax as well.
    app.set_html_assets_policy("always")
    source, target = mathjax_source(), Path(app.outdir) / "_static" / "mathjax"
    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / part, target / part)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
