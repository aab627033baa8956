"""Figures of what lies behind the accuracies: confusions, and where in the network a merge differs."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coin.reporting.canvas import WIDTH, colour, legend_below, marker, style
from coin.reporting.results import Counts

_LAYERS_WITH_NAMES = 40


def confusion_matrices(counts: Mapping[str, Counts]) -> Figure:
    """Expert's answer against decoded answer, a panel per entry, each row in shares of the expert's answers.

    Args:
        counts: Panel title → counts ``[C, C]``, the expert's answer × the decoded answer.
    """
    with style():
        columns = 2 if len(counts) in (1, 2, 4) else 3
        rows = math.ceil(len(counts) / columns)
        figure = Figure(figsize=(WIDTH, 0.95 + rows * (WIDTH - 0.4) / columns))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(counts) :]:
            axes.set_visible(False)
        image = None
        for axes, (title, matrix) in zip(panels.flat, counts.items(), strict=False):
            totals = matrix.sum(1, keepdims=True)
            shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
            image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(title, fontsize=8)
            last = len(matrix) - 1
            axes.set_xticks([0, last])
            axes.set_yticks([0, last])
            axes.tick_params(labelsize=7)
        figure.supylabel("class that the expert answers", fontsize=10)
        if image is not None:
            bar = figure.colorbar(image, ax=list(panels.flat), location="bottom", shrink=0.6, aspect=40)
            bar.set_label("across: class that was decoded; colour: share of the expert's answers", fontsize=9)
        return figure


def layer_profile(layers: pd.DataFrame) -> Figure:
    """Where the weight of the Fisher lies, and how far each merge is from its experts, layer by layer.

    Args:
        layers: Columns ``method, layer, fisher_share, distance``, layers in the network's order.
    """
    with style():
        names = list(dict.fromkeys(layers["layer"]))
        methods = list(dict.fromkeys(layers["method"]))
        position = {name: i for i, name in enumerate(names)}
        figure = Figure(figsize=(WIDTH, 6.2))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, column, label in zip(
            panels,
            ("fisher_share", "distance"),
            ("share of the Fisher's mass (%)", "distance to the experts"),
            strict=True,
        ):
            for i, method in enumerate(methods):
                rows = layers[(layers["method"] == method) & layers[column].notna()]
                if not rows.empty:
                    values = rows[column] * (100 if column == "fisher_share" else 1)
                    axes.plot(
                        [position[name] for name in rows["layer"]], values,
                        color=colour(i), marker=marker(i), markersize=3.5, linewidth=1.0, label=method,
                    )  # fmt: skip
            axes.set_ylabel(label)
        if len(names) <= _LAYERS_WITH_NAMES:
            panels[1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            panels[1].set_xlabel("layer")
        else:
            panels[1].set_xlabel(f"layer, from the input (0) to the head ({len(names) - 1})")
        legend_below(figure, panels[1])
        return figure
