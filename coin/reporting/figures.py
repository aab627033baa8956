"""All figures: one colour a method, one marker a decoder, names beside what they name.

Colours belong to methods, by name, in every figure: cold for closed forms, warm for what is trained, grey for the
references. Variants of a method share its colour. `means` are rows of a summary, means over tasks.
"""

import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from coin.coding.decoder_config import REPLICA
from coin.reporting.results import Counts
from coin.reporting.summary import REFERENCES, decoders_of, largest_samples, variant_names

PAPER_NDA = 0.975
"""What the paper reports that COIN's NDA exceeds "in some cases" (arXiv 2409.01420, abstract): no least."""
INK, _SOFT = "#1b1f24", "#6b7480"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
WIDTH = 5.4
"""Inches. Narrow, so that the text is still legible on a phone."""
_METHODS = {
    "average": "#56B4E9", "coin": "#0072B2", "regmean": "#6A3D9A", "head_fit": "#44AA99", "refit": "#009E73",
    "full_fisher": "#332288", "gauss_newton": "#117733", "task_arithmetic": "#88A0C8", "ties": "#7BAFDE",
    "wudi": "#B8A800", "base": "#A65628", "spare": "#CC79A7",
    "distillation": "#E69F00", "readout_distillation": "#D55E00", "none": _SOFT, "oracle": INK,
}  # fmt: skip
_OTHERS = ("#CC79A7", "#B8A800", "#A65628", "#F781BF", "#999933")
_MANY = 4
"""So many forwards and more have one marker."""
_NEAR = 0.5
"""Points of NDA below 100 up to which an axis is about linear."""
_TICKS = tuple(step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5))
_NAMED = 16
"""So many layers or classes are named on an axis."""
# Any: a list of matplotlib's own literal names would tie us to one version of its stubs.
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
    "grid.alpha": 0.15, "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names come from the user: a dollar sign is no mathematics
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Draw in the house's style within this block, whatever the user's matplotlib settings say."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def colour(index: int) -> str:
    """Return the colour of a series that is no method, by its index; they repeat after eight."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Return the marker of the series with this index."""
    return MARKERS[index % len(MARKERS)]


def method_colour(name: str) -> str:
    """Return the colour of a method, whatever its label, BatchNorm policy or code add to its name."""
    known = [method for method in _METHODS if name.startswith(method)]
    return _METHODS[max(known, key=len)] if known else _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def as_png(figure: Figure, dpi: int = 200) -> bytes:
    """Return a figure as PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Figure, axes: Axes, title: str | None = None, columns: int = 3) -> None:
    """Put the legend of `axes` under the figure, where it hides no point."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(
        1, min(columns, len(labels), int(12 * figure.get_figwidth() / (8 + max(map(len, labels), default=0))))
    )
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, math.ceil(len(labels) / columns) - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def nda_against_cost(means: pd.DataFrame, decoder: str | None = None, unit: str = "seconds") -> Figure:
    """Mean NDA ± spread of every method against what it cost, decoder included, for one decoder.

    What is free stands at the left end of the logarithmic axis. Names stand at the right, the best one first. The
    decoder is the one with the largest mean NDA by default; the unit ``seconds`` or ``passes``.
    """
    with style():
        means, decoder = _of_decoder(means, decoder, last=True)
        cost = means[f"merge_{unit}_mean"] + means[f"decoder_{unit}_mean"]
        own = cost[~means["method"].isin(REFERENCES)]
        least, most = (float(own[own > 0].min()), float(own.max())) if (own > 0).any() else (1.0, 1.0)
        free = 10 ** (math.floor(math.log10(least)) - 0.5)
        figure, axes = _scatter(means, cost.where(cost > 0, free), decoder)
        _log_scale(axes)
        some_free = bool((own <= 0).any())
        axes.set_xlim((free if some_free else least) / 1.6, most * 1.6)
        if some_free:
            ticks = [10.0**k for k in range(math.ceil(math.log10(least)) - 1, 9) if 2 * free < 10.0**k <= most * 1.6]
            axes.set_xticks([free, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
            axes.minorticks_off()
        axes.set_xlabel(f"{unit} for coded model and decoder (log scale)")
        return figure


def nda_against_memory(stand_ins: pd.DataFrame, network_mib: float = math.nan) -> Figure:
    """Mean NDA ± spread of every stand-in against what it keeps, on a logarithmic axis; a marker by its forwards.

    Named are those that no other beats in both (joined by a line), and every method with its best decoder. What keeps
    nothing stands at the left end. Points below all that are named are left out.

    Args:
        stand_ins: As `coin.reporting.summary.stand_ins` returns them.
        network_mib: The size of one network, which is then the unit of the axis; MiB otherwise.
    """
    with style():
        rows = stand_ins.sort_values(["memory_mib", "nda_mean"], ascending=[True, False], ignore_index=True)
        unit, size = ("MiB", 1.0) if math.isnan(network_mib) else ("networks", network_mib)
        sizes = rows["memory_mib"] / size
        free = 10 ** (math.floor(math.log10(sizes[sizes > 0].min())) - 0.3) if (sizes > 0).any() else 1.0
        at = sizes.where(sizes > 0, free)
        front = rows["nda_mean"] > rows["nda_mean"].cummax().shift(fill_value=-1.0)  # better than all that keep less
        named = {*rows.groupby("name")["nda_mean"].idxmax(), *rows.index[front]}
        figure = Figure(figsize=(1.5 * WIDTH, max(3.6, 1.1 + 0.2 * len(named))))
        axes = figure.subplots()
        counts = rows["forwards"].clip(upper=_MANY).astype(int)
        kinds = sorted(set(counts))
        labels: list[tuple[float, float | None, str, str]] = []
        for i, row in enumerate(rows.to_dict("records")):
            nda, spread = 100 * row["nda_mean"], 100 * (0.0 if math.isnan(row["nda_std"]) else row["nda_std"])
            look: Any = {"color": method_colour(row["name"]), "alpha": 1.0 if i in named else 0.3, "markersize": 6.5}
            axes.errorbar(at[i], nda, spread or None, capsize=2, marker=marker(kinds.index(counts[i])), **look)
            if i in named:
                read = "" if row["decoder"] == REPLICA else f", {row['decoder']}"
                labels.append((nda, float(at[i]), f"{row['name']}{read}  {nda:.1f}", look["color"]))
        axes.step(at[front], 100 * rows["nda_mean"][front], where="post", color=INK, linewidth=0.8, zorder=0)
        lowest, highest = min(nda for nda, *_ in labels), max(100.0, *(nda for nda, *_ in labels))
        axes.set_yscale("function", functions=(_nearness, _nda_of))
        axes.set_ylim(lowest - 0.1 * (100.2 - lowest), _nda_of(_nearness(highest) + 0.1))
        shown = [tick for tick in (20, 40, 60, 80, 90, 95, 98, 99, 99.5, 100) if tick >= lowest - 1]
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        _log_scale(axes)
        ticks = {tick: f"{tick:g}" for tick in _TICKS if at.min() / 1.3 <= tick <= at.max() * 1.3}
        if (sizes <= 0).any():
            ticks = {free: "0"} | {tick: text for tick, text in ticks.items() if tick > 1.5 * free}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        _column_of_names(axes, labels, 0.18 / (figure.get_figheight() - 0.9))
        axes.set(ylabel="NDA (%)", xlabel=f"kept beyond the experts' servers, in {unit} (log scale)")
        for i, count in enumerate(kinds):
            text = f"{count}{' or more' if count == _MANY else ''} network{'s' if count > 1 else ''} a lost answer"
            axes.plot([], [], color=_SOFT, marker=marker(i), linestyle="none", label=text)
        legend_below(figure, axes)
        return figure


def nda_against_residual(means: pd.DataFrame, decoder: str | None = None) -> Figure:
    """Mean NDA ± spread against the residual ‖f_c − Σβf‖ / ‖Σβf‖, for one decoder, ``linear`` by default."""
    with style():
        means, decoder = _of_decoder(means[means["method"] != "none"], decoder, last=False)
        means = means[np.isfinite(means["residual_mean"])]
        figure, axes = _scatter(means, means["residual_mean"], decoder)
        axes.set_xlabel("residual, ‖f_c − Σβf‖ / ‖Σβf‖")
        return figure


def nda_by_method(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread, a line per method's variant and a marker per decoder."""
    return _dots(means, decoders_of(means), "decoder", ["decoder"])


def nda_by_experiment(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread of several experiments, a marker each, for the first two of `decoders_of`."""
    decoders = decoders_of(means)[:2]
    return _dots(
        means[means["decoder"].isin(decoders)], list(dict.fromkeys(means["experiment"])), "experiment", decoders
    )


def nda_against_samples(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread against P, a panel for each of the first two of `decoders_of`, a line per variant."""
    return nda_against_option(means, "calibration samples per task, P", means["samples_per_task"])


def nda_against_option(means: pd.DataFrame, option: str, values: "pd.Series[Any]", *, joined: bool = True) -> Figure:
    """The same against an option of a sweep: along its values where they are numbers, else in order of appearance.

    Where several experiments hold one variant and value, the point is the mean of their means. The points of a variant
    are `joined` by a line, unless other options differ from point to point.
    """
    with style():
        points = means.assign(name=variant_names(means), value=values)[~means["method"].isin(REFERENCES)]
        numeric = pd.api.types.is_numeric_dtype(points["value"]) and points["value"].dtype != bool
        known = list(dict.fromkeys(points["value"].sort_values() if numeric else points["value"]))
        logarithmic = numeric and known[0] > 0 and known[-1] >= 8 * known[0]
        decoders = decoders_of(points)[:2]
        figure = Figure(figsize=(WIDTH, 0.8 + 2.5 * len(decoders)))
        panels = figure.subplots(len(decoders), 1, sharex=True, squeeze=False)[:, 0]
        for axes, decoder in zip(panels, decoders, strict=True):
            for i, (name, rows) in enumerate(points[points["decoder"] == decoder].groupby("name", sort=False)):
                at = 100 * rows.groupby("value", sort=False)[["nda_mean", "nda_std"]].mean()
                at = at.set_axis([value if numeric else known.index(value) for value in at.index]).sort_index()
                axes.errorbar(
                    at.index, at["nda_mean"], at["nda_std"].fillna(0.0), color=method_colour(str(name)),
                    marker=marker(i), markersize=5, capsize=2, linewidth=1.2, label=str(name),
                    linestyle="-" if joined and numeric else "none",
                )  # fmt: skip
            axes.set(ylabel="NDA (%)", title=f"decoder {decoder}")
            if logarithmic:
                _log_scale(axes)
            if not numeric or len(known) <= 8:
                axes.set_xticks(known if numeric else range(len(known)), [_short(value) for value in known])
                axes.minorticks_off()
        panels[-1].set_xlabel(f"{option} (log scale)" if logarithmic else option)
        legend_below(figure, panels[0])
        return figure


def confusion_matrices(counts: Mapping[str, Counts], classes: Sequence[str]) -> Figure:
    """Expert's answer against decoded answer, a panel per entry, each row in shares of the expert's answers.

    `counts` are ``[C, C]`` by the panel's title, the expert's answer × the decoded answer; `classes` are C names.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 1.0 + (WIDTH - 1.4) / max(2, len(counts))))
        panels = figure.subplots(1, max(2, len(counts)), squeeze=False)[0]
        ticks = np.arange(0, len(classes), max(1, math.ceil(len(classes) / 26)))
        names = [_short(classes[int(i)]) for i in ticks]
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


def risk_curves(risk: pd.DataFrame) -> Figure:
    """Whether decoded answers disagree with the expert's as often as foretold, and how right those of least risk are.

    `risk` are `coin.reporting.tables.risk_totals`, a colour per ``name``.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 3.0))
        calibration, coverage = figure.subplots(1, 2)
        for i, (name, points) in enumerate(risk.groupby("name", sort=False)):
            look = {"color": method_colour(str(name)), "marker": marker(i), "markersize": 5, "linewidth": 1.2}
            at = points[points["curve"] == "calibration"].sort_values("at")
            calibration.plot(100 * at["risk"], 100 * (1 - at["agreement"]), label=str(name), **look)
            at = points[points["curve"] == "coverage"].sort_values("at")
            coverage.plot(100 * at["at"], 100 * at["decoded_accuracy"], **look)
            coverage.plot(100 * at["at"], 100 * at["expert_accuracy"], **look | {"marker": None, "linestyle": ":"})
        most = 100 * risk["risk"].max()
        calibration.plot([0, most], [0, most], color=_SOFT, linestyle="--", linewidth=0.9)
        calibration.set(xlabel="risk (%), mean of a bin", ylabel="disagree with the expert (%)")
        coverage.set(xlabel="kept, of least risk (%)", ylabel="accuracy (%)")
        coverage.invert_xaxis()
        legend_below(figure, calibration)
        return figure


def layer_profile(layers: pd.DataFrame) -> Figure:
    """Where the mass of the Fisher lies, and how far each merge is from the average, layer by layer.

    Methods with the same numbers, such as those that differ in their BatchNorm policy alone, are drawn once. `layers`
    is what `coin.reporting.read_layers` returns.
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
            bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, format=FuncFormatter(_plain))
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


def _of_decoder(means: pd.DataFrame, decoder: str | None, *, last: bool) -> tuple[pd.DataFrame, str]:
    means = largest_samples(means[means["method"] != "oracle"])
    decoder = decoder or decoders_of(means)[:2][-1 if last else 0]
    return means[means["decoder"] == decoder], decoder


def _scatter(means: pd.DataFrame, x: "pd.Series[float]", decoder: str) -> tuple[Figure, Axes]:
    """Draw NDA ± spread against a number, with the names and numbers of the points in a column at the right."""
    names, own = variant_names(means), ~means["method"].isin(REFERENCES)
    figure = Figure(figsize=(WIDTH, max(3.3, 0.6 + 0.2 * len(means))))
    axes = figure.subplots()
    labels = []
    for i in means.index:
        nda, spread = 100 * float(means.loc[i, "nda_mean"]), 100 * float(means.loc[i, "nda_std"])
        ink = method_colour(names[i])
        text = f"{names[i]}  {nda:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")
        labels.append((nda, float(x[i]) if own[i] else None, text, ink))
        if own[i]:
            axes.errorbar(
                x[i], nda, 0 if math.isnan(spread) else spread, color=ink, marker="o", markersize=7, capsize=3
            )
    low, high = axes.get_ylim()
    for nda in (nda for nda, at, _, _ in labels if at is None and nda > low - 1.5 * (high - low)):
        axes.axhline(nda, color=_SOFT, linestyle="--", linewidth=1.1)
    if low - 0.5 * (high - low) < 100 * PAPER_NDA < high + 0.5 * (high - low):
        axes.axhline(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")
    _column_of_names(axes, labels, 0.18 / (figure.get_figheight() - 0.8))
    axes.set_ylabel(f"NDA (%), {decoder} decoder")
    return figure, axes


def _column_of_names(axes: Axes, labels: list[tuple[float, float | None, str, str]], gap: float) -> None:
    """Write names beside the axes, from the best down and `gap` of its height apart, each with a line to its point."""
    low, high = axes.get_ylim()
    to_height = axes.transData + axes.transAxes.inverted()
    labels = sorted((label for label in labels if not math.isnan(label[0])), key=lambda label: -label[0])
    heights: list[float] = []
    for nda, *_ in labels:
        wanted = float(to_height.transform((axes.get_xlim()[1], min(max(nda, low), high)))[1])
        heights.append(min(wanted, heights[-1] - gap) if heights else wanted)
    floor = 0.02
    for i in reversed(range(len(heights))):
        heights[i] = max(heights[i], floor)
        floor = heights[i] + gap
    right = axes.get_yaxis_transform()
    for (nda, x, text, ink), height in zip(labels, heights, strict=True):
        beyond = x is None and nda < low
        axes.annotate(
            f"{text} ↓" if beyond else text, (1.0, nda) if x is None else (x, nda), (1.04, height),
            xycoords=right if x is None else "data", textcoords="axes fraction", fontsize=9, color=ink, va="center",
            annotation_clip=False,
            arrowprops=None if beyond else {"arrowstyle": "-", "color": ink, "alpha": 0.35, "linewidth": 0.8},
        )  # fmt: skip


def _dots(means: pd.DataFrame, series: list[str], column: str, decoders: list[str]) -> Figure:
    """Draw NDA ± spread, a line per variant and a marker per value of `column`, in a panel per decoder if need be."""
    with style():
        means = largest_samples(means[means["method"] != "oracle"])
        means = means.assign(name=variant_names(means), last=means["method"].isin(REFERENCES))
        names = list(dict.fromkeys(means.sort_values("last", kind="stable")["name"]))
        panels_of = {"": means} if column == "decoder" else {d: means[means["decoder"] == d] for d in decoders}
        lines = [[name for name in names if name in set(part["name"])] for part in panels_of.values()]
        crowd = 0.26 * max(1.0, len(series) / 4)
        figure = Figure(figsize=(WIDTH, 1.3 + sum(0.4 + crowd * len(own) for own in lines)))
        panels = figure.subplots(len(lines), 1, squeeze=False, sharex=True, height_ratios=[len(own) for own in lines])
        for axes, own, (decoder, part) in zip(panels[:, 0], lines, panels_of.items(), strict=True):
            for i, value in enumerate(series):
                for _, row in part[part[column] == value].iterrows():
                    place = own.index(row["name"]) + 0.6 * ((i + 0.5) / len(series) - 0.5)
                    spread = 0.0 if math.isnan(row["nda_std"]) else 100 * row["nda_std"]
                    look = {"color": method_colour(row["name"]), "marker": marker(i), "markersize": 5.5, "capsize": 2}
                    axes.errorbar(100 * row["nda_mean"], place, xerr=spread, **look)
            axes.set_yticks(range(len(own)), own)
            axes.set_ylim(len(own) - 0.5, -0.5)
            axes.axvline(100 * PAPER_NDA, color=INK, linewidth=0.9, linestyle=":")
            axes.set_title(f"decoder {decoder}" if decoder else "")
        panels[-1, 0].set_xlabel("NDA (%), mean over tasks ± spread over seeds")
        for i, value in enumerate(series):
            panels[0, 0].plot([], [], color=_SOFT, marker=marker(i), linestyle="none", label=value)
        legend_below(figure, panels[0, 0], column)
        return figure


def _log_scale(axes: Axes) -> None:
    """Make the x axis logarithmic with plain numbers: matplotlib's own labels need parsed mathematics."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _nearness(nda: Any) -> Any:
    """Return how near an NDA in % is to 100, on a scale on which its distance halves in equal steps."""
    return -np.arcsinh((100 - np.asarray(nda)) / _NEAR)


def _nda_of(nearness: Any) -> Any:
    return 100 + _NEAR * np.sinh(np.asarray(nearness))


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _short(value: object) -> str:
    """Return a tick's text: a number in full, a long name cut off."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _NAMED else f"{text[: _NAMED - 1]}…"
