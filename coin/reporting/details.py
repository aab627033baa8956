"""Figures of what lies behind the accuracies: confusions, and where in the network a merge differs."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from coin.reporting.canvas import WIDE, WIDTH, style
from coin.reporting.comparison import heading, layer_names
from coin.reporting.results import Counts

_LAYERS_WITH_NAMES = 48
_FAR = 3.0
"""Distances beyond this all have one colour."""
_DISTANCE = "distance from the average; 1: as far as the experts are"
_PANEL_COLUMNS = ((2, 2), (3, 3), (4, 2), (9, 3))
"""Up to so many confusion matrices stand in so many columns."""
_MOST_COLUMNS = 4


def confusion_matrices(counts: Mapping[str, Counts]) -> Figure:
    """Expert's answer against decoded answer, a panel per entry, each row in shares of the expert's answers.

    Args:
        counts: Panel title → counts ``[C, C]``, the expert's answer × the decoded answer.
    """
    with style():
        columns = next((most for limit, most in _PANEL_COLUMNS if len(counts) <= limit), _MOST_COLUMNS)
        rows = math.ceil(len(counts) / columns)
        figure = Figure(figsize=(WIDTH, 0.95 + rows * (WIDTH - 0.4) / columns))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(counts) :]:
            axes.set_visible(False)
        image = None
        for place, (axes, (title, matrix)) in enumerate(zip(panels.flat, counts.items(), strict=False)):
            totals = matrix.sum(1, keepdims=True)
            shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
            image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(heading(title, 66 // columns, "-_+"), fontsize=8 if columns < _MOST_COLUMNS else 7)
            last = len(matrix) - 1
            # Only at the edges: there are many panels, and all have the same classes.
            if place + columns >= len(counts):
                axes.set_xticks([0, last])
                axes.set_xlabel("decoded", fontsize=8)
            else:
                axes.set_xticks([])
            axes.set_yticks([0, last] if place % columns == 0 else [])
            axes.tick_params(labelsize=7)
        figure.supylabel("class that the expert answers", fontsize=10)
        if image is not None:
            bar = figure.colorbar(image, ax=list(panels.flat), location="bottom", shrink=0.6, aspect=40)
            bar.set_label("share of the expert's answers", fontsize=9)
        return figure


def layer_profile(layers: pd.DataFrame) -> Figure:
    """Where the mass of the Fisher lies, and how far each merge is from the average, layer by layer.

    BatchNorm policies change no parameters: variants with the same numbers are drawn once, under the first one's name.

    Args:
        layers: What `coin.reporting.read_layers` returns.
    """
    with style():
        names = list(dict.fromkeys(layers["layer"]))
        named = layers.assign(name=layer_names(layers))
        shares = _distinct(named, "fisher_share", names)
        distances = _distinct(named, "distance", names)
        drawn = [part for part in (shares, distances) if len(part)]
        if not drawn:
            drawn = [distances]
        letters = max((len(name) for part in drawn for name in part.index), default=0)
        wide = min(WIDE, max(WIDTH, 1.6 + 0.075 * letters + 0.2 * len(names)))
        heights = [0.6 + 0.2 * len(part) for part in drawn]
        foot = 0.07 * max(map(len, names)) if len(names) <= _LAYERS_WITH_NAMES else 0.4
        figure = Figure(figsize=(wide, sum(heights) + foot + 0.3))
        panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, part in zip(panels, drawn, strict=True):
            _heat(figure, axes, part, is_share=part is shares)
        if len(names) <= _LAYERS_WITH_NAMES:
            panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            panels[-1].set_xlabel("layer, from the input to the head")
        else:
            panels[-1].set_xlabel(f"layer, from the input (0) to the head ({len(names) - 1})")
        return figure


def _distinct(named: pd.DataFrame, column: str, layers: list[str]) -> pd.DataFrame:
    """Return one row per variant and one column per layer, without gaps and repetitions."""
    table = named.pivot(index="name", columns="layer", values=column).reindex(columns=layers)
    table = table.loc[list(dict.fromkeys(named["name"]))].dropna(how="all")
    return table[~table.round(6).duplicated()]


def _heat(figure: Figure, axes: Axes, part: pd.DataFrame, *, is_share: bool) -> None:
    values = np.ma.masked_invalid(part.to_numpy(dtype=float) * (100 if is_share else 1))
    # Most layers hold little of the mass, and most merges stay near the average: the square root lets them be seen.
    top = float(values.max()) if values.count() else 1.0
    norm = PowerNorm(0.5, vmin=0, vmax=max(top if is_share else min(top, _FAR), 1e-3))
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_yticks(range(len(part)), list(part.index), fontsize=8)
    bar = figure.colorbar(
        image, ax=axes, pad=0.01, aspect=12, extend="max" if not is_share and top > _FAR else "neither"
    )
    bar.ax.tick_params(labelsize=7)
    axes.set_title("share of the Fisher's mass (%)" if is_share else _DISTANCE, fontsize=9)
