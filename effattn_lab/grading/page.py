"""The frame of the pages that grading writes: no script, nothing loaded, readable in the dark and on a phone."""

from __future__ import annotations

from effattn_lab.grading.text import escaped

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #595959; --back: #fff; --panel: #f4f5f7;
  --line: #d0d4da; --good: #00664a; --bad: #a33c00; --mark: #ffe9a8; --link: #00568a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #b0b0b0; --back: #16181c; --panel: #22252b;
  --line: #454b55; --good: #5fd3aa; --bad: #ff9d66; --mark: #5c4a00; --link: #8cc8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 52rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
body.wide { max-width: 76rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .5rem 0; }
a { color: var(--link); }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.word { overflow-wrap: normal; }
td.long { min-width: 16rem; }
th { overflow-wrap: normal; }
code, pre { font: .875rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem;
  margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
section.exercise { border: 1px solid var(--line); border-radius: 6px; padding: .2rem 1rem .8rem; margin: 1rem 0; }
section.exercise h2 { margin-top: .7rem; }
ul { padding-left: 1.2rem; margin: .4rem 0; }
ul.properties { list-style: none; padding: 0; }
ul.properties li { padding: .15rem 0 .15rem 1.6rem; text-indent: -1.6rem; }
ul.properties li > * { text-indent: 0; }
ul.properties div { margin-left: 0; color: var(--soft); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.soft { color: var(--soft); }
.total { font-size: 1.3rem; margin: .2rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1rem; }
.pair > div { min-width: 0; }
mark { background: var(--mark); color: inherit; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
.scroll table { min-width: 34rem; overflow-wrap: break-word; }
@media (max-width: 30rem) { .pair { grid-template-columns: 1fr; } body { padding: 1rem .8rem 3rem; } }
"""


def document(title: str, body: str, *, images: bool = False, wide: bool = False) -> str:
    """A whole page. ``body`` is HTML whose texts are escaped already; ``images`` allows pictures in the page."""
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; img-src data:" if images else "")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body{' class="wide"' if wide else ""}>
<main>
{body}
</main>
</body>
</html>
"""
