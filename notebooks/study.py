"""The figures and tables of the notebooks from 03 on, from the results in notebooks/results."""

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from stored import RESULTS, made, runs

from coin.reporting import figures, summarise
from coin.reporting.style import COLOURS
from coin.reporting.summary import expert_accuracies, over_tasks, variant_names
from coin.reporting.tables import percent


def means(suite: str) -> pd.DataFrame:
    """NDA and cost over the runs of a suite, mean and deviation."""
    every = over_tasks(summarise(runs(suite)))
    return every[every.method != "oracle"]


def folded(suite: str, table: pd.DataFrame, called: str = "") -> HTML:
    """A table to unfold, under the command and the revision that made its numbers."""
    return HTML(
        f"<details><summary>{called or suite}: {made(suite)}</summary>{table.to_html()}</details>"
    )


def sources(suites: tuple[str, ...]) -> str:
    """The suites of a table, the commands that made them and the revisions at which they did, to stand below it."""
    made_by = [f"{suite}: {made(suite)}" for suite in suites]
    return f"\n\n*{'; '.join(made_by)}.*"


def cells(part: pd.DataFrame) -> "pd.Series[str]":
    """NDA in %, mean ± deviation."""
    return pd.Series(
        [percent(*pair, digits=1) for pair in zip(part.nda_mean, part.nda_std, strict=True)],
        part.index,
    )


def nda_table(part: pd.DataFrame) -> pd.DataFrame:
    """NDA by method and decoder, with passes and seconds of making the coded model."""
    part = part.assign(method=variant_names(part), cell=cells(part))
    shown = part.pivot_table(
        index="method", columns="decoder", values="cell", aggfunc="first", sort=False
    )
    costs = (
        part.groupby("method", sort=False)[["merge_passes_mean", "merge_seconds_mean"]]
        .first()
        .round()
        .astype(int)
    )
    shown = shown.fillna("–").rename_axis(columns=None)
    return shown.assign(passes=costs.merge_passes_mean, seconds=costs.merge_seconds_mean)


def accuracies(suites: tuple[str, ...]) -> pd.DataFrame:
    """How many runs there are, and how right the experts are in them."""
    found = {
        suite: expert_accuracies(summarise(runs(suite)))[["task", "seeds", "mean", "spread"]]
        for suite in suites
    }
    return pd.concat(found).droplevel(1)


def wrong_experts() -> tuple[Figure, pd.DataFrame, pd.DataFrame]:
    """How often batches expose and name an expert that answers wrongly, and how much less right it is."""
    faults = pd.read_csv(RESULTS / "silent-faults" / "faults.csv")
    found = ["alarm", "named", "false_alarm"]
    by_seed = faults.groupby(["fault", "experts", "method", "batch", "seed"], sort=False)[
        found
    ].mean()
    with figures.style():
        figure, panels = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True)
        for column, (fault, part) in enumerate(by_seed.groupby("fault", sort=False)):
            for axes, what in zip(panels[:, column], found, strict=False):
                groups = part[what].groupby(["experts", "method"], sort=False)
                for place, ((count, method), own) in enumerate(groups):
                    at = 100 * own.groupby("batch").agg(["mean", "std"])
                    look = {
                        "color": COLOURS[place // 2],
                        "marker": figures.marker(place // 2),
                        "capsize": 2,
                    }
                    look |= {
                        "linestyle": ":" if method == "none" else "-",
                        "label": f"N = {count}, {method}",
                    }
                    axes.errorbar(range(len(at)), at["mean"], at["std"], **look)
                axes.set_xticks(range(len(at)), at.index)
                axes.set_title(f"{fault}: {what}")
            panels[1, column].set_xlabel("inputs in a batch")
        for axes in panels[:, 0]:
            axes.set_ylabel("batches (%)")
        figures.legend_below(figure, columns=4)
    right = faults.groupby(["fault", "experts"], sort=False)[
        ["expert_accuracy", "faulty_accuracy"]
    ].mean()
    mean = by_seed.groupby(["fault", "experts", "method", "batch"], sort=False).mean()
    return figure, mean.mul(100).round(1).unstack("batch"), right.mul(100).round(1)
