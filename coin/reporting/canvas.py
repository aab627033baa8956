"""How figures look, and how they become PNG files and inline SVG.

Colours are Okabe and Ito's, told apart by colour-blind readers, and every series has its own marker besides: no two of
64 series share both. Text and axes are drawn in one ink that inline SVG replaces by ``currentColor``: the figure
follows the page into dark mode.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1b1f24"
_PAPER = "#ffffff"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#B8A800")
_DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 5.4
"""Inches. Narrow, so that the text is still legible on a phone."""
WIDE = 11.0
"""Inches, of figures with many panels: the report shows them over its whole width, to be scrolled on a phone."""
# Of the legend, in inches: a letter, a mark with the space around it, a line; and the lines that figures have room for.
_LETTER, _MARK, _LEGEND_ROW, _ROWS_WITH_ROOM = 0.08, 0.5, 0.19, 3

# Any: a list of matplotlib's own literal names would tie us to one version of its stubs.
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "coin",
    # Names come from the user: a dollar sign is no mathematics.
    "text.parse_math": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the house's style within this block, whatever the user's matplotlib settings say."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def colour(index: int) -> str:
    """Return the colour of the series with this index; they repeat after eight."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Return the marker of the series with this index: no two of 64 series share both colour and marker."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def dashes(index: int) -> str:
    """Return the line style of the series with this index: another one after every eight."""
    return _DASHES[index // len(COLOURS) % len(_DASHES)]


def legend_below(figure: Figure, axes: Axes, title: str | None = None, columns: int = 3) -> None:
    """Put the legend of `axes` under the figure, where it hides no point."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place_legend(figure, handles, labels, title, columns)


def place_legend(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str | None = None, columns: int = 3
) -> None:
    """Put a legend under the figure, in as many columns (at most so many) as the labels leave room for."""
    width, height = figure.get_size_inches()
    most = min(columns, len(labels))
    columns = next(count for count in range(most, 0, -1) if count == 1 or _fits(labels, count, width))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)
    rows = math.ceil(len(labels) / columns)
    figure.set_size_inches(width, height + _LEGEND_ROW * max(0, rows - _ROWS_WITH_ROOM))


def _fits(labels: Sequence[str], columns: int, width: float) -> bool:
    """Whether a legend is no wider than a figure; its columns are filled one after the other, as matplotlib does."""
    parts = np.array_split(np.array([len(label) for label in labels]), columns)
    return sum(_MARK + _LETTER * float(part.max()) for part in parts) <= width


def settle(figure: Figure) -> Figure:
    """Lay a figure out once and keep it so: the layout costs more than the drawing, and two files are drawn."""
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def as_png(figure: Figure, dpi: int = 160) -> bytes:
    """Return a figure as PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=_PAPER, metadata={"Software": None})
    return buffer.getvalue()


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG file on white."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    start = text.index(">", text.index("<svg")) + 1
    return f'{text[:start]}<rect width="100%" height="100%" fill="{_PAPER}"/>{text[start:]}'


def as_element(svg: str, name: str, description: str) -> str:
    """Return an SVG file as an element to put into HTML: transparent, in the page's colour, with no outside address.

    Args:
        svg: What `as_svg` returns.
        name: Letters, digits and hyphens; prefixes every identifier, so that several figures live on one page.
        description: What a screen reader says, already escaped for HTML.
    """
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    box = view[0] if view else ""
    rest = rest.replace(f'<rect width="100%" height="100%" fill="{_PAPER}"/>', "", 1)
    rest = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', rest)
    rest = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', rest)
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", rest)
    rest = rest.replace(INK, "currentColor")
    return f'<svg {box} role="img" aria-label="{description}">{rest}'
