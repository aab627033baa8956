"""The figures and tables of the notebooks from 03 on, from the results in notebooks/results."""

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from stored import RESULTS, made, runs

from coin.reporting import experts
from coin.reporting.figures import COLOURS, MARKERS, style


def folded(suite: str, table: pd.DataFrame, called: str = "") -> HTML:
    """A table to unfold, under the command and the revision that made its numbers."""
    return HTML(
        f"<details><summary>{called or suite}: {made(suite)}</summary>{table.to_html()}</details>"
    )


def sources(suites: tuple[str, ...]) -> str:
    """The suites of a table, the commands that made them and the revisions at which they did, to stand below it."""
    made_by = [f"{suite}: {made(suite)}" for suite in suites]
    return f"\n\n*{'; '.join(made_by)}.*"


def accuracies(suites: tuple[str, ...]) -> pd.DataFrame:
    """How many runs there are, and how right the experts are in them."""
    return pd.concat({suite: experts(runs(suite)) for suite in suites})


def wrong_experts() -> tuple[Figure, pd.DataFrame, pd.DataFrame]:
    """How often batches expose and name an expert that answers wrongly, and how much less right it is."""
    faults = pd.read_csv(RESULTS / "silent-faults" / "faults.csv")
    found = ["alarm", "named", "false_alarm"]
    by_seed = faults.groupby(["fault", "experts", "method", "batch", "seed"], sort=False)[
        found
    ].mean()
    with style():
        figure, panels = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True)
        for column, (fault, part) in enumerate(by_seed.groupby("fault", sort=False)):
            for axes, what in zip(panels[:, column], found, strict=False):
                groups = part[what].groupby(["experts", "method"], sort=False)
                for place, ((count, method), own) in enumerate(groups):
                    at = 100 * own.groupby("batch").agg(["mean", "std"])
                    look = {
                        "color": COLOURS[place // 2],
                        "marker": MARKERS[place // 2],
                        "capsize": 2,
                    }
                    look |= {
                        "linestyle": ":" if method == "none" else "-",
                        "label": f"N = {count}, {method}" if axes is panels[0, 0] else None,
                    }
                    axes.errorbar(range(len(at)), at["mean"], at["std"], **look)
                axes.set_xticks(range(len(at)), at.index)
                axes.set_title(f"{fault}: {what}")
            panels[1, column].set_xlabel("inputs in a batch")
        for axes in panels[:, 0]:
            axes.set_ylabel("batches (%)")
        figure.legend(loc="outside lower center", ncols=4)
    right = faults.groupby(["fault", "experts"], sort=False)[
        ["expert_accuracy", "faulty_accuracy"]
    ].mean()
    mean = by_seed.groupby(["fault", "experts", "method", "batch"], sort=False).mean()
    return figure, mean.mul(100).round(1).unstack("batch"), right.mul(100).round(1)
