"""Which figures a report has, each with the name of its files and its caption."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coin.reporting import details, plots
from coin.reporting.comparison import REFERENCES, decoders_of, largest_samples, over_tasks
from coin.reporting.series import FEW
from coin.reporting.sources import Source
from coin.reporting.sweeps import SEEDS, Sweep, as_numbers

_DOTTED = "dotted: 97.5 %, which the paper exceeds in some cases"


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its files and what stands below it."""

    name: str
    figure: Figure
    caption: str


def comparing(summary: pd.DataFrame, experiments: int) -> Iterator[Plot]:
    """Draw what several experiments, or several P, have to say together."""
    means = over_tasks(summary)
    if means["method"].isin(REFERENCES).all():
        return
    if experiments > 1:
        yield Plot(
            "nda_by_experiment",
            plots.nda_by_experiment(largest_samples(means)),
            f"NDA by method and experiment, each task lost in turn; {_DOTTED}.",
        )
    if means["samples_per_task"].nunique() > 1:
        yield Plot(
            "nda_against_samples",
            plots.nda_against_samples(means),
            "NDA against the number of calibration samples per task, mean ± spread over seeds.",
        )


def against_options(summary: pd.DataFrame, sweep: Sweep, options: Mapping[str, Mapping[str, Any]]) -> Iterator[Plot]:
    """Draw NDA against each option of a sweep over more than P and seeds.

    Args:
        summary: The summary of all points.
        sweep: The sweep.
        options: Every point's options, by its name.
    """
    means = over_tasks(summary[summary["experiment"].isin(list(options))])
    if means["method"].isin(REFERENCES).all():
        return
    names = [name for name in next(iter(options.values())) if len(sweep.swept[name]) > 1]
    for name in names:
        values = as_numbers(means["experiment"].map({part: own[name] for part, own in options.items()}))
        others = [other for other in (*names, *sweep.swept) if other not in (name, SEEDS)]
        others = [other for other in dict.fromkeys(others) if len(sweep.swept[other]) > 1]
        over = f"; mean over {', '.join(others)}" if others else ""
        yield Plot(
            f"{sweep.name}-nda_against_{name}",
            plots.nda_against_option(largest_samples(means), name, values, joined=sweep.full),
            f"NDA against {name}, mean ± spread over seeds{over}.",
        )


def accuracies(summary: pd.DataFrame, prefix: str) -> Iterator[Plot]:
    """Draw one experiment's NDA by method, cost, residual and task.

    Args:
        summary: Its summary.
        prefix: Of the files' names, where several experiments are reported.
    """
    means = over_tasks(summary)
    if means.empty or means["method"].isin(REFERENCES).all():
        return
    means = largest_samples(means)
    samples = _samples(means)
    yield Plot(
        f"{prefix}nda_by_method",
        plots.nda_by_method(means),
        f"NDA by method and decoder, P = {samples}; {_DOTTED}.{_scales(means)}",
    )
    yield Plot(
        f"{prefix}nda_against_cost",
        plots.nda_against_cost(means),
        f"NDA against the time it takes to make the coded model and fit the decoder, both together, P = {samples}. Up "
        "and to the left is better.",
    )
    if np.isfinite(means.loc[~means["method"].isin(REFERENCES), "residual_mean"]).any():
        yield Plot(
            f"{prefix}nda_against_residual",
            plots.nda_against_residual(means),
            "NDA against the residual. Where a decoder is fitted, a large residual need not cost accuracy.",
        )
    tasks = summary[(summary["task"] != "mean") & (summary["erased"] == summary["task"])]
    yield Plot(
        f"{prefix}nda_per_task",
        plots.nda_per_task(largest_samples(tasks)),
        f"NDA of each task when it is lost, P = {samples}; {_DOTTED}.{_scales(means)}",
    )


def _scales(means: pd.DataFrame) -> str:
    """Say how the panels of many decoders are to be read."""
    if len(decoders_of(means)) <= FEW:
        return ""
    return (
        " Every decoder has a scale of its own; a diamond is its best method, hollow are the survivors alone, an arrow "
        "where they are beyond the scale."
    )


def layers(source: Source, prefix: str) -> Iterator[Plot]:
    """Draw where the Fisher's mass lies and how far merges are from the average, layer by layer, where it is known."""
    if source.layers is not None:
        yield Plot(
            f"{prefix}layers",
            details.layer_profile(source.layers),
            "Where the Fisher's mass lies, and how far each merge is from the average of the experts, from input to "
            "head. Methods with the same numbers, such as those that differ in their BatchNorm policy alone, are drawn "
            "once. Blank: the experts agree.",
        )


def _samples(rows: pd.DataFrame) -> str:
    return " and ".join(str(samples) for samples in sorted(set(rows["samples_per_task"])))
