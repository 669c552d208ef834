"""Build the book with warnings as errors, and serve it.

    python _ext/build.py                    build _build/html (nothing to do when no input changed)
    python _ext/build.py --serve            the same, then serve it on 127.0.0.1
    python _ext/build.py --out DIR          build into DIR/html, with the outputs of cells shared
    python _ext/build.py --fresh            also run every cell again

Two traps of Jupyter Book are taken care of here. A second build after a failing one reports success, because
warnings come when a page is read: so pages and doctrees are deleted before each build. And the cache of cell
outputs sees the code of cells but not the packages they import: so it is cleared when a package changed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import http.server
import importlib.util
import os
import re
import shutil
import socketserver
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the cells of chapters import or read: a change makes every stored output doubtful.
CODE = ("effattn_lab", "kernels", "interview", "map.yml", "constraints.txt")
# What else a page depends on.
PAGES = (
    "index.md",
    "chapters",
    "labs",
    "_config.yml",
    "_toc.yml",
    "_ext",
    "_sims",
    "_static",
    "_templates",
    "references.bib",
    "pyproject.toml",
)
SKIP = {"__pycache__", ".ipynb_checkpoints", ".mypy_cache", ".ruff_cache"}
COLOUR = re.compile(r"\x1b\[[0-9;]*[mK]")
FIRST_PORT = 8000


def files(paths: Iterable[str]) -> Iterator[Path]:
    for name in paths:
        path = ROOT / name
        if path.is_file():
            yield path
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(set(folders) - SKIP)
            yield from (Path(folder) / n for n in sorted(names))


def digest(paths: Iterable[str]) -> str:
    """Hash of the names and contents of all files below ``paths`` of the repository."""
    total = hashlib.sha256(sys.version.encode())
    for path in files(paths):
        total.update(f"{path.relative_to(ROOT)}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def clear_stale_outputs(cache: Path, key: str, fresh: bool) -> None:
    """Drop stored cell outputs that were made with other code than today's."""
    stored = read(cache / "code-key")
    if cache.is_dir() and (fresh or stored != key):
        shutil.rmtree(cache)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "code-key").write_text(key + "\n", encoding="utf-8")


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Two builds at once would share the stored outputs: the second waits (where the system has file locks)."""
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another build of the book is running; waiting for it ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_builder(out: Path, cache: Path) -> tuple[int, str]:
    """Run Jupyter Book in a process of its own, showing where it is; returns its status and its output."""
    script = (
        "import sys; from pathlib import Path; from jupyter_book.sphinx import build_sphinx\n"
        "root, out, cache = map(Path, sys.argv[1:])\n"
        "status = build_sphinx(root, out / 'html', path_config=root / '_config.yml', noconfig=True,\n"
        "    confoverrides={'external_toc_path': str(root / '_toc.yml'), 'nb_execution_cache_path': str(cache),\n"
        "        'latex_individualpages': False},\n"
        "    warningiserror=True, keep_going=True)\n"
        "sys.exit(status if isinstance(status, int) else 1)\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "FORCE_COLOR": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT), str(out), str(cache)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    lines, begun, live = [], time.monotonic(), sys.stdout.isatty()
    try:
        for raw in process.stdout:
            line = COLOUR.sub("", raw).rstrip()
            lines.append(line)
            step = re.match(r"(reading sources|writing output)\.\.\. \[ *(\d+)%\] (.+)", line)
            execution = re.match(r"(.+)\.(?:md|ipynb): Executing notebook", line)
            if step or execution:
                what = (
                    f"{step[1].split()[0]} {step[2]:>3}%  {step[3]}"
                    if step
                    else f"running the cells of {shown(Path(execution[1]))}"
                )  # type: ignore[index]
                text = f"[{time.monotonic() - begun:4.0f} s] {what}"
                print(f"\r\x1b[K{text[:78]}" if live else text, end="" if live else "\n", flush=True)
        process.wait()
    except BaseException:
        process.terminate()
        raise
    finally:
        if live:
            print("\r\x1b[K", end="", flush=True)
    return process.returncode, "\n".join(lines)


def explain(output: str, html: Path, log: Path) -> str:
    """Say in plain words why the build failed."""
    seen = dict.fromkeys(
        line.replace(f"{ROOT}{os.sep}", "")
        for line in output.splitlines()
        if re.search(r"\b(WARNING|ERROR|CRITICAL)\b|[Ee]xception|Error:", line)
        and "build finished with problems" not in line
    )
    what = list(seen)
    lines = [f"The book was not built: {len(what)} warning(s) or error(s), and each counts as an error."]
    lines += [f"  {line}" for line in what[:20]]
    if len(what) > 20:
        lines.append(f"  … and {len(what) - 20} more")
    for report in sorted(html.glob("reports/**/*.log")):
        tail = [COLOUR.sub("", line) for line in read(report).splitlines()[-12:]]
        lines += [f"A cell failed; the end of {shown(report)}:", *(f"  | {line}" for line in tail)]
    return "\n".join([*lines, f"Everything it said: {shown(log)}"])


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(ROOT) else str(path)


def build(out: Path, fresh: bool = False) -> bool:
    """Build the book into ``out/html``; True when it is there and complete."""
    if importlib.util.find_spec("jupyter_book") is None:
        print(
            "The book needs jupyter-book, which this Python does not have: run `make env`, then "
            "`.venv/bin/python _ext/build.py`.",
            file=sys.stderr,
        )
        return False
    with one_at_a_time(ROOT / "_build"):
        return build_alone(out, fresh)


def build_alone(out: Path, fresh: bool) -> bool:
    html, stamp, begun = out / "html", out / "html" / ".inputs", time.monotonic()
    code = digest(CODE)
    inputs = f"{code} {digest(PAGES)}"
    if not fresh and read(stamp) == inputs and (html / "index.html").is_file():
        print(f"The book is up to date: {shown(html / 'index.html')}")
        return True

    for stale in (html, out / ".doctrees", out / "jupyter_execute"):
        shutil.rmtree(stale, ignore_errors=True)
    cache = ROOT / "_build" / ".jupyter_cache"
    clear_stale_outputs(cache, code, fresh)
    out.mkdir(parents=True, exist_ok=True)
    status, output = run_builder(out, cache)
    log = out / "build.log"
    log.write_text(output, encoding="utf-8")
    if status != 0 or not (html / "index.html").is_file():
        print(explain(output, html, log), file=sys.stderr)
        return False
    # Only a good build leaves the stamp.
    stamp.write_text(inputs + "\n", encoding="utf-8")
    weights = [f.stat().st_size for f in html.rglob("*") if f.is_file()]
    pages = [f for f in html.rglob("*.html") if "_static" not in f.parts]
    print(
        f"The book is built: {len(pages)} pages, {sum(weights) / 1e6:.1f} MB, "
        f"{time.monotonic() - begun:.0f} s. Open {shown(html / 'index.html')}"
    )
    return True


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each; a reader sees no stale page after a rebuild."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    allow_reuse_address = False


def listen(html: Path, first: int = FIRST_PORT, tries: int = 100) -> Server:
    """A server of ``html`` on the first free port of 127.0.0.1 from ``first`` on."""
    handler = functools.partial(Handler, directory=str(html))
    for port in range(first, first + tries):
        try:
            return Server(("127.0.0.1", port), handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(f"no free port from {first} to {first + tries - 1} on 127.0.0.1")


def has_browser() -> bool:
    """Whether a window can open here: not in CI, not over a line without a display."""
    if os.environ.get("CI") or os.environ.get("EFFATTN_NO_BROWSER"):
        return False
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def serve(html: Path) -> None:
    server = listen(html)
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    print(f"Read it at {address}   (Ctrl-C ends)", flush=True)
    if has_browser():
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(address)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    print("\nStopped.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the book, warnings as errors, and serve it.")
    parser.add_argument("--serve", action="store_true", help="serve the book on 127.0.0.1 when it is built")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "_build", help="folder to build into (default _build)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="build even when nothing changed; run every cell"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        if not build(out, arguments.fresh):
            return 1
    except KeyboardInterrupt:
        print("\nStopped before the book was finished.", file=sys.stderr)
        return 130
    if arguments.serve:
        serve(out / "html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
