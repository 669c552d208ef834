"""`_ext/build.py`: what makes it build again, what it says when a build fails, and its server."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def project(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project in place of the repository, and a builder that writes one page."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "effattn_lab").mkdir()
    (tmp_path / "chapters" / "a.md").write_text("# A\n")
    (tmp_path / "effattn_lab" / "m.py").write_text("x = 1\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    runs: list[Path] = []

    def run_builder(out: Path, cache: Path) -> tuple[int, str]:
        runs.append(out)
        (out / "html").mkdir()
        (out / "html" / "index.html").write_text("<h1>A</h1>")
        (cache / "outputs").write_text("stored")
        return 0, "build succeeded."

    monkeypatch.setattr(script, "run_builder", run_builder)
    monkeypatch.setattr(script, "runs", runs, raising=False)
    return tmp_path


def test_nothing_changed_means_nothing_to_do(
    project: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = project / "_build"
    assert script.build(out)
    assert script.build(out)
    assert len(script.runs) == 1
    assert "up to date" in capsys.readouterr().out


def test_a_changed_page_is_built_and_keeps_stored_outputs(project: Path, script: Any) -> None:
    out = project / "_build"
    assert script.build(out)
    (out / "html" / "left-over.html").write_text("old")
    (project / "chapters" / "a.md").write_text("# B\n")
    (out / ".jupyter_cache" / "of-this-code").write_text("kept")
    assert script.build(out)
    assert len(script.runs) == 2
    assert (out / ".jupyter_cache" / "of-this-code").is_file()
    assert not (out / "html" / "left-over.html").exists(), "pages of the last build are deleted first"


@pytest.mark.parametrize("change", ["content", "rename", "fresh"])
def test_a_changed_package_clears_stored_outputs(project: Path, script: Any, change: str) -> None:
    out, module = project / "_build", project / "effattn_lab" / "m.py"
    assert script.build(out)
    (out / ".jupyter_cache" / "of-this-code").write_text("stale")
    if change == "content":
        module.write_text("x = 2\n")
    elif change == "rename":
        module.rename(module.with_name("n.py"))
    assert script.build(out, fresh=change == "fresh")
    assert not (out / ".jupyter_cache" / "of-this-code").exists()


def test_a_failed_build_says_what_failed_and_is_built_again(
    project: Path, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, good = project / "_build", script.run_builder

    def fail(out: Path, cache: Path) -> tuple[int, str]:
        good(out, cache)
        report = out / "html" / "reports" / "chapters" / "a.err.log"
        report.parent.mkdir(parents=True)
        report.write_text("Traceback\nZeroDivisionError: division by zero\n")
        return 1, f"{project}/chapters/a.md:3: WARNING: undefined label: 'nope'"

    monkeypatch.setattr(script, "run_builder", fail)
    assert not script.build(out)
    said = capsys.readouterr().err
    assert "chapters/a.md:3: WARNING: undefined label: 'nope'" in said
    assert str(project) not in said.splitlines()[1]
    assert "ZeroDivisionError: division by zero" in said
    monkeypatch.setattr(script, "run_builder", good)
    assert script.build(out), "a failed build is not taken for a finished one"
    assert len(script.runs) == 2


def test_server_takes_the_next_free_port_and_serves_its_folder_alone(tmp_path: Path, script: Any) -> None:
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("<h1>here</h1>")
    (tmp_path / "secret").write_text("no")
    first: Any = script.listen(tmp_path / "html", first=18731)
    second: Any = script.listen(tmp_path / "html", first=first.server_address[1])
    try:
        assert second.server_address[1] > first.server_address[1]
        assert second.server_address[0] == "127.0.0.1"
        threading.Thread(target=second.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{second.server_address[1]}"
        with urllib.request.urlopen(f"{base}/", timeout=10) as answer:
            assert b"here" in answer.read()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{base}/../secret", timeout=10)
        second.shutdown()
    finally:
        first.server_close()
        second.server_close()
