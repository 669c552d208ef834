"""The common look of the book's pictures: one palette, one set of roles, one Matplotlib style.

The colours are Okabe and Ito's (2008), which readers with the common colour deficiencies can tell apart.
A colour never carries a meaning alone: lines also differ by dash or marker, areas also by hatch or label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe–Ito colours by name, plus greys. All are read on white.
PALETTE: dict[str, str] = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#6E6E6E",
    "light": "#E6E6E6",
    "white": "#FFFFFF",
}

#: What a colour means, the same in every chapter.
COLORS: dict[str, str] = {
    "query": PALETTE["blue"],
    "key": PALETTE["orange"],
    "value": PALETTE["green"],
    "output": PALETTE["purple"],
    "score": PALETTE["sky"],
    "state": PALETTE["yellow"],
    "hbm": PALETTE["vermillion"],
    "sram": PALETTE["sky"],
    "compute": PALETTE["blue"],
    "memory": PALETTE["vermillion"],
    "good": PALETTE["green"],
    "bad": PALETTE["vermillion"],
    "masked": PALETTE["light"],
    "naive": PALETTE["vermillion"],
    "flash": PALETTE["blue"],
    "text": "#1A1A1A",
    "muted": PALETTE["grey"],
    "grid": "#D4D4D4",
}

#: Order in which unlabelled lines take colours (yellow is left out: too pale for a line on white).
CYCLE: tuple[str, ...] = (
    PALETTE["blue"],
    PALETTE["vermillion"],
    PALETTE["green"],
    PALETTE["purple"],
    PALETTE["orange"],
    PALETTE["sky"],
    PALETTE["black"],
)

#: Figure widths in inches: text column, half column, small inset.
WIDTH = 7.0
HALF = 3.6


def rc() -> dict[str, Any]:
    """Matplotlib settings of the book as a dictionary.

    Sizes are chosen for figures at most ``WIDTH`` = 7 in wide. A phone of 390 px shows such a figure at 51 px
    an inch, text of 10.5 pt about 7.5 px high: a figure full of small text should be narrower. The background
    is white, not transparent, so that black axes stay readable when the page is dark. SVG ids come from a
    fixed salt: the same figure gives the same bytes.
    """
    from cycler import cycler

    return {
        "font.family": "DejaVu Sans",
        "mathtext.fontset": "dejavusans",
        "font.size": 11.5,
        "axes.titlesize": 12.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 11.5,
        "xtick.labelsize": 10.5,
        "ytick.labelsize": 10.5,
        "legend.fontsize": 10.5,
        "legend.frameon": False,
        "figure.figsize": (WIDTH, 3.9),
        "figure.dpi": 110,
        "savefig.dpi": 160,
        "savefig.bbox": "tight",
        "savefig.pad_inches": 0.08,
        "figure.facecolor": PALETTE["white"],
        "savefig.facecolor": PALETTE["white"],
        "savefig.transparent": False,
        "axes.facecolor": PALETTE["white"],
        "axes.edgecolor": COLORS["text"],
        "axes.labelcolor": COLORS["text"],
        "text.color": COLORS["text"],
        "xtick.color": COLORS["text"],
        "ytick.color": COLORS["text"],
        "axes.linewidth": 0.9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLORS["grid"],
        "grid.linewidth": 0.7,
        "lines.linewidth": 2.2,
        "lines.markersize": 6,
        "axes.prop_cycle": cycler(color=list(CYCLE)),
        "image.cmap": "cividis",
        "svg.fonttype": "path",
        "svg.hashsalt": "effattn-lab",
    }


def use() -> None:
    """Apply the book's style to Matplotlib, for this process."""
    import matplotlib

    matplotlib.rcParams.update(rc())


def save(fig: Figure, path: str) -> None:
    """Write ``fig`` to ``path`` (.svg or .png) undated: the same figure gives the same file."""
    metadata: dict[str, Any] = {"Software": None}
    if path.endswith(".svg"):
        metadata = {"Date": None}
    fig.savefig(path, metadata=metadata)
