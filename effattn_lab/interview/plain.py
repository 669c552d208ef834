"""Markdown with LaTeX formulas as text for a terminal.

Only the LaTeX that the bank uses; a test checks that nothing of it is left in any text.
"""

from __future__ import annotations

import re

_SYMBOLS = {
    r"\alpha": "α", r"\beta": "β", r"\cdot": "·", r"\delta": "δ", r"\Delta": "Δ", r"\dots": "…", r"\ell": "ℓ",
    r"\epsilon": "ε", r"\gamma": "γ", r"\infty": "∞", r"\lambda": "λ", r"\lfloor": "⌊", r"\mu": "μ", r"\phi": "φ",
    r"\Omega": "Ω", r"\rfloor": "⌋", r"\sigma": "σ", r"\sum": "Σ", r"\tau": "τ", r"\Theta": "Θ", r"\top": "ᵀ",
    r"\,": " ",
}  # fmt: skip
_RELATIONS = {r"\approx": "≈", r"\ge": "≥", r"\in": "∈", r"\le": "≤", r"\ne": "≠", r"\times": "×"}
_SUPERSCRIPTS = str.maketrans("0123456789-+nT", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿᵀ")
_FORMULA = re.compile(r"\$([^$]+)\$")


def plain(markdown: str) -> str:
    """`markdown` with each ``$formula$`` in Unicode and without emphasis marks; inline code keeps its backticks."""
    text = _FORMULA.sub(lambda match: _formula(match[1]), markdown)
    return re.sub(r"(\*\*|__)(.+?)\1", r"\2", text)


def _formula(tex: str) -> str:
    tex = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", tex)
    tex = re.sub(r"\\sqrt\s*(?:\{(\w)\}|(\w))", lambda m: f"√{m[1] or m[2]}", tex)
    tex = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", tex)
    tex = re.sub(r"\\(ln|log|max)(_\w)?(?![A-Za-z])\s?", r"\1\2 ", tex)
    for command, symbol in _RELATIONS.items():
        tex = re.sub(rf"\s?{re.escape(command)}(?![A-Za-z])\s?", f" {symbol} ", tex)
    for command, symbol in _SYMBOLS.items():
        # A letter right after the command belongs to another command, not to this one.
        tex = re.sub(re.escape(command) + (r"(?![A-Za-z])\s?" if command[-1].isalpha() else ""), symbol, tex)
    tex = re.sub(r"_\{(\w+)\}", r"_\1", tex)
    tex = re.sub(r"\^(?:\{([0-9nT+-]+)\}|([0-9nT]))", lambda m: (m[1] or m[2]).translate(_SUPERSCRIPTS), tex)
    tex = re.sub(r"\^(?:\{(ᵀ)\}|(ᵀ))", "ᵀ", tex)
    tex = re.sub(r"\^\{(\w)\}", r"^\1", tex)
    tex = re.sub(r"\^\{([^{}]*)\}", r"^(\1)", tex)
    return tex.replace("{", "").replace("}", "")
