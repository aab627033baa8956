"""The stored results in notebooks/results, read for the tables of README.md and docs."""

from functools import cache
from pathlib import Path

import pandas as pd

from coin.reporting import read_results, standins
from coin.reporting.results import requested_policy

RESULTS = Path(__file__).parent / "results"
DECODERS = ("linear", "feature_ridge")
DEFAULTS = ("", "keep", "auto")
"""BatchNorm's policies that nobody asked for."""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table for a Markdown page."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def spread(values: "pd.Series[float]") -> str:
    """Return ``mean ± standard deviation`` with one digit, of one value itself, ``–`` where there are none."""
    return (
        "–"
        if not len(values)
        else f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
    )


def percent(share: float) -> str:
    """Return a share in % with one digit, without the sign."""
    return f"{100 * share:.1f}"


@cache
def measured(suite: str, lost: int | None = 1) -> pd.DataFrame:
    """The rows of a suite where so many experts are lost, all if None; `run` tells its seeds and experiments apart.

    A suite is an experiment, or the pattern of several: ``fleet-*``.
    """
    frames = []
    for path in sorted(RESULTS.glob(f"{suite}/seed-*/results.csv")):
        rows = read_results(path.parent)
        frames.append(rows.assign(run=rows.experiment + "/" + path.parent.name))
    frame = pd.concat(frames, ignore_index=True)
    return frame if lost is None else frame[frame.erased.str.count(r"\+") + 1 == lost]


def runs(suite: str, lost: int | None = 1) -> pd.DataFrame:
    """A suite's rows with so many experts lost, or all; each run, a seed and a draw of the base, counts as a seed."""
    rows = measured(suite, lost)
    return rows.assign(seed=rows.groupby("run", sort=False).ngroup(), experiment=suite)


def made(suite: str) -> str:
    """Return the command that makes a suite's numbers, and the revision at which it did."""
    revisions = pd.read_csv(RESULTS / "made.csv", index_col="suite").revision
    return f"make study, at {revisions[suite]}"


def of_method(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """A method's rows, of BatchNorm's policies those of the default."""
    return rows[(rows.method == method) & rows.batchnorm.map(requested_policy).isin(DEFAULTS)]


def rows_of(rows: pd.DataFrame, method: str, decoder: str) -> pd.DataFrame:
    """A method's rows with a decoder."""
    return of_method(rows[rows.decoder == decoder], method)


def ndas(rows: pd.DataFrame, method: str, decoder: str) -> "pd.Series[float]":
    """The mean NDA over tasks in %, one number for each run of a suite."""
    own = rows_of(rows, method, decoder)
    return 100 * own.groupby("run").nda.mean()


def cost(rows: pd.DataFrame, method: str) -> float:
    """Return the mean passes that making a method's coded model took."""
    return float(of_method(rows, method).merge_passes.mean())


def network_mib(rows: pd.DataFrame) -> float:
    """The size of one network in MiB: that of the experts' average, read by nothing beside it."""
    is_average = (rows.method == "average") & (rows.decoder == "linear")
    return float(rows[is_average].memory_mib.mean())


@cache
def stood_in(suite: str) -> pd.DataFrame:
    """The rows of a suite of stand-ins, with their memory in networks."""
    rows = measured(suite)
    return rows.assign(networks=rows.memory_mib / network_mib(rows))


def of_stand_ins(suite: str) -> tuple[pd.DataFrame, float]:
    """What may stand in for a lost expert, and the size of a network in MiB."""
    return standins(runs(suite, None)), network_mib(measured(suite))


def rivals() -> pd.DataFrame:
    """What `rivals.py` measured on the photos' experts."""
    rows = pd.read_csv(RESULTS / "photos/rivals.csv", keep_default_na=False, dtype={"rank": str})
    return rows.assign(rank=rows["rank"].str.removesuffix(".0"))
