"""The directive ``{sim}``: a script that needs another is loaded after it, once; what is missing is named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

EXT = str(Path(__file__).parents[2] / "_ext")


def build(folder: Path, page: str) -> tuple[list[str], str]:
    """Build one page; the simulators' scripts in the order in which it loads them, and what Sphinx warned of."""
    from io import StringIO

    from sphinx.application import Sphinx

    source, out, said = folder / "book", folder / "out", StringIO()
    (source / "_sims").mkdir(parents=True)
    for name, needs in (("one-sim", "base"), ("two-sim", "base"), ("lost-sim", "nowhere")):
        script = f'// A simulator.\n// needs: {needs}\ncustomElements.define("{name}", X);\n'
        (source / "_sims" / f"{name}.js").write_text(script, encoding="utf-8")
    (source / "_sims" / "base.js").write_text("// What they share.\n", encoding="utf-8")
    (source / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {EXT!r}); extensions = ['myst_parser', 'sim']", encoding="utf-8"
    )
    (source / "index.md").write_text(page, encoding="utf-8")
    before = list(sys.path)
    try:
        app = Sphinx(source, source, out, out / "trees", "html", status=StringIO(), warning=said)
        app.build()
    finally:
        sys.path[:] = before
    html = (out / "index.html").read_text(encoding="utf-8")
    return re.findall(r'src="_static/sims/([a-z-]+)\.js', html), said.getvalue()


def sim(name: str) -> str:
    return f"```{{sim}} {name}\n:alt: A picture.\n```\n\n"


def test_a_shared_script_comes_first_and_once(tmp_path):
    loaded, warned = build(tmp_path, "# A page\n\n" + sim("two-sim") + sim("one-sim") + sim("two-sim"))
    assert loaded == ["base", "two-sim", "one-sim"]
    assert warned == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost-sim", "sim lost-sim: it needs _sims/nowhere.js"),
        ("no-sim", "there is no simulator _sims/no-sim.js"),
        ("base", "_sims/base.js defines no custom element"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, message):
    loaded, warned = build(tmp_path, "# A page\n\n" + sim(name))
    assert message in warned
    assert loaded == []
