"""What all figures share: palette, style, and files whose bytes the numbers alone decide."""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from embrm.core.table import printable

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
BLACK = "#222222"
CURVES = (BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # names from data may hold $ and _
    "svg.hashsalt": "embrm",
}

_WIDTH = 7.2
"""Inches: the text width of a two-column paper."""

PANELS = 3
"""Panels side by side at most."""


def drawn(made: Mapping[str, Callable[[], Figure]]) -> dict[str, bytes]:
    """File name to content, PNG and SVG, of every figure that `made` draws by its name."""
    files = {}
    for name, draw in made.items():
        with _drawing():
            figure = draw()
            for suffix in ("png", "svg"):
                files[f"{name}.{suffix}"] = _render(figure, suffix)
    return files


@contextmanager
def _drawing() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes; that is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _render(figure: Figure, suffix: str) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    figure.savefig(stream, format=suffix, dpi=200, metadata=metadata, bbox_inches="tight")
    return stream.getvalue()


def panel_grid(panels: int) -> tuple[int, int]:
    """Columns and rows of so many panels: at most `PANELS` side by side, four two by two."""
    columns = 2 if panels == 4 else min(PANELS, panels)
    return columns, -(-panels // columns)


def new_figure(height: float, columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Axes row by row; height: of the whole."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def dot(color: str, filled: bool = True) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, marker="o", markerfacecolor=color if filled else "white")


def short_name(name: str, limit: int = 44) -> str:
    """A name on one line, cut where it is longer."""
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
