"""Figures of details: what is decoded class by class, the Fisher layer by layer, an expert's training by epoch."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter

from coin.reporting.results import Counts
from coin.reporting.style import INK, WIDTH, style, tick_text
from coin.reporting.summary import variant_names


def confusion_matrices(counts: Mapping[str, Counts], classes: Sequence[str]) -> Figure:
    """Expert's answer against decoded answer, a panel per entry, each row in shares of the expert's answers.

    `counts` are ``[C, C]`` by the panel's title, the expert's answer × the decoded answer; `classes` are C names.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 1.0 + (WIDTH - 1.4) / max(2, len(counts))))
        panels = figure.subplots(1, max(2, len(counts)), squeeze=False)[0]
        ticks = np.arange(0, len(classes), max(1, math.ceil(len(classes) / 26)))
        names = [tick_text(classes[int(i)]) for i in ticks]
        image = None
        for axes, (title, matrix) in zip(panels, counts.items(), strict=False):
            totals = matrix.sum(1, keepdims=True)
            shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
            # The square root lets the few confusions be seen beside a full diagonal.
            image = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(title, fontsize=9)
            axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(ticks, names if axes is panels[0] else [])
            axes.set_xlabel("decoded answer", fontsize=9)
            axes.tick_params(labelsize=7)
        panels[0].set_ylabel("expert's answer", fontsize=9)
        for axes in panels[len(counts) :]:
            axes.set_visible(False)
        if image is not None:
            figure.colorbar(image, ax=list(panels), shrink=0.8, aspect=25).set_label("share", fontsize=9)
        return figure


def layer_profile(layers: pd.DataFrame) -> Figure:
    """Where the Fisher's mass lies, and how far each merge is from the average, of the rows that `read_layers` returns.

    Methods with the same numbers, such as those that differ in their BatchNorm policy alone, are drawn once.
    """
    with style():
        names = list(dict.fromkeys(layers["layer"]))
        named = layers.assign(name=variant_names(layers))
        titles = {"fisher_share": "share of the Fisher's mass (%)", "distance": "distance from the average"}
        drawn = {}
        for column in titles:
            table = named.pivot(index="name", columns="layer", values=column).reindex(columns=names)
            table = table.loc[list(dict.fromkeys(named["name"]))].dropna(how="all")
            if len(table := table[~table.round(6).duplicated()]):
                drawn[column] = table * (100 if column == "fisher_share" else 1)
        heights = [0.5 + 0.22 * len(table) for table in drawn.values()] or [1.0]
        figure = Figure(figsize=(2 * WIDTH, 1.3 + sum(heights)))
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (column, table) in zip(panels, drawn.items(), strict=False):
            values = np.ma.masked_invalid(table.to_numpy(float))
            # Most layers hold little of the mass, and most merges stay near the average.
            norm = SymLogNorm(1.0 if column == "fisher_share" else 0.1, vmin=0, vmax=max(float(values.max()), 1e-3))
            image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
            axes.grid(visible=False)
            axes.set_yticks(range(len(table)), list(table.index), fontsize=8)
            axes.set_title(titles[column], fontsize=9)
            bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, format=FormatStrFormatter("%g"))
            bar.ax.tick_params(labelsize=7)
        ticks = np.arange(0, len(names), max(1, math.ceil(len(names) / 40)))
        panels[-1].set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=7)
        panels[-1].set_xlabel("layer, from the input to the head")
        return figure


def training_curves(curves: pd.DataFrame) -> Figure:
    """Accuracy of every expert by epoch, a panel per task, a thin line per seed: in training and in validation.

    `curves` has ``task``, ``seed``, ``epoch``, ``train/accuracy`` and ``val/accuracy``, with gaps.
    """
    with style():
        tasks = list(dict.fromkeys(curves["task"]))
        columns = min(3, len(tasks))
        rows = math.ceil(len(tasks) / columns)
        figure = Figure(figsize=(WIDTH, 0.8 + 1.9 * rows))
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, task in zip(panels, tasks, strict=False):
            for kind, dash in (("train", "--"), ("val", "-")):
                for _, line in curves[curves["task"] == task].groupby("seed"):
                    line = line.dropna(subset=f"{kind}/accuracy")
                    axes.plot(line["epoch"] + 1, 100 * line[f"{kind}/accuracy"], dash, color=INK, marker=".", lw=0.9)
            axes.set(title=f"task {task}", xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        panels[0].set_ylabel("accuracy (%)")
        keys = [Line2D([], [], color=INK, linestyle=dash) for dash in ("--", "-")]
        figure.legend(keys, ["training, mean of the epoch", "validation"], loc="outside lower center", ncols=2)
        return figure
