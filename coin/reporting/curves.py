"""Figures of NDA against what was varied: the calibration samples, or any option of a sweep."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coin.reporting.canvas import colour, dashes, legend_below, marker, style
from coin.reporting.comparison import REFERENCES, decoders_of, heading, variant_names
from coin.reporting.series import FEW, label_bottom, log_scale, names_of, panels_for

_DECADE = 8.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""
_TICKS = 8
"""Up to so many values are all named on the axis."""


def nda_against_samples(means: pd.DataFrame) -> Figure:
    """Mean NDA ± spread against the calibration samples per task, P, a panel per decoder and a line per variant.

    Where several experiments hold one variant and P, the line runs through the mean of their means. The references
    are left out: next to the survivors alone, the methods' lines would fall together.
    """
    return _curves(means, means["samples_per_task"], "calibration samples per task, P", joined=True)


def nda_against_option(means: pd.DataFrame, option: str, values: "pd.Series[Any]", *, joined: bool) -> Figure:
    """The same against an option of a sweep: along its values where they are numbers, else in order of appearance.

    Args:
        means: Rows of a summary.
        option: The option's name.
        values: Its value in each row.
        joined: Whether to join the points of a variant by a line; not where other options differ from point to point.
    """
    return _curves(means, values, option, joined=joined)


def _curves(means: pd.DataFrame, values: "pd.Series[Any]", label: str, *, joined: bool) -> Figure:
    with style():
        means = means[~means["method"].isin(REFERENCES)]
        names, decoders = names_of(means), decoders_of(means)
        points = means.assign(name=variant_names(means), value=values[means.index])
        numeric = pd.api.types.is_numeric_dtype(points["value"]) and points["value"].dtype != bool
        known = list(dict.fromkeys(points["value"]))
        known = sorted(known) if numeric else known
        place = {value: value if numeric else float(i) for i, value in enumerate(known)}
        figure, panels = panels_for([f"decoder {decoder}" for decoder in decoders], 2.3)
        for decoder, axes in zip(decoders, panels.values(), strict=True):
            for i, name in enumerate(names):
                rows = points[(points["decoder"] == decoder) & (points["name"] == name)]
                rows = rows.groupby("value")[["nda_mean", "nda_std"]].mean().reindex(known).dropna(subset="nda_mean")
                axes.errorbar(
                    [place[value] for value in rows.index], 100 * rows["nda_mean"],
                    100 * rows["nda_std"].fillna(0.0), color=colour(i), marker=marker(i), markersize=5, capsize=2,
                    linewidth=1.2, linestyle=dashes(i) if joined and numeric else "none", label=name,
                )  # fmt: skip
            axes.set_ylabel("NDA (%)")
            _scale(axes, known, numeric)
        first = next(iter(panels.values()))
        label_bottom(panels, f"{label} (log scale)" if first.get_xscale() == "log" else label)
        legend_below(figure, first, columns=3 if len(decoders) <= FEW else 6)
        return figure


def _scale(axes: Axes, values: list[Any], numeric: bool) -> None:
    if not numeric:
        axes.set_xticks(range(len(values)), [heading(str(value)) for value in values])
        axes.margins(x=0.15)
        return
    if values[0] > 0 and values[-1] >= _DECADE * values[0]:
        log_scale(axes)
    if len(values) <= _TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
