"""Every measured number of the README and the manual is one of the stored results in ``notebooks/results``."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
RESULTS = NOTEBOOKS / "results"
README = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
MANUAL = (NOTEBOOKS / "MANUAL.md").read_text(encoding="utf-8")


def simulated(scenario: str, experts: int) -> pd.DataFrame:
    frame = pd.read_csv(RESULTS / "serving" / f"{scenario}-{experts}" / "simulation.csv")
    return frame.set_index(["redundancy", "want"])


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if math.isfinite(seconds) else "∞"


def tails(experts: int, redundancy: str) -> list[str]:
    """p99.9 in ms with its interval, for every scenario and want."""
    cells = []
    for scenario in ("rare-stragglers", "stragglers", "failures"):
        for want in ("one", "all"):
            row = simulated(scenario, experts).loc[(redundancy, want)]
            middle, *ends = map(milliseconds, (row.p999, row.p999_low, row.p999_high))
            cells.append("∞" if ends == ["∞", "∞"] else f"{middle} [{', '.join(ends)}]")
    return cells


def memory(experts: int, *redundancies: str) -> str:
    rows = [simulated("failures", experts).loc[(redundancy, "one")] for redundancy in redundancies]
    return "; ".join(f"{row.memory_server / 2**20:.0f}, {row.memory / 2**20:.0f}" for row in rows)


@pytest.mark.parametrize(
    ("experts", "redundancy", "name"),
    [
        (3, "uncoded", "uncoded"),
        (3, "spare", "**spare**"),
        (3, "coded_hedged", "coded_hedged"),
        (8, "spare", "**spare**"),
        (8, "coded_hedged", "coded_hedged"),
    ],
)
def test_the_manuals_serving_table_is_that_of_the_simulations(experts: int, redundancy: str, name: str) -> None:
    kinds = ("spare", "spare_half", "spare_int8") if redundancy == "spare" else (redundancy,)
    cells = [f"{experts}, {name}", memory(experts, *kinds), *tails(experts, redundancy)]
    assert f"| {' | '.join(cells)} |" in MANUAL
    assert set(simulated("stragglers", experts).seeds) == {20}


def test_the_manuals_serving_table_has_no_other_rows() -> None:
    assert len(re.findall(r"^\| \d, ", MANUAL, flags=re.MULTILINE)) == 5


def measured(suite: str) -> pd.DataFrame:
    """The rows of a suite's sweep, with the number of experts."""
    frame = pd.read_csv(RESULTS / suite / "sweep.csv", keep_default_na=False, na_values={"residual": [""], "nda": [""]})
    alone = frame[frame.erased == frame.task]
    return alone.assign(count=alone.groupby("experiment").task.transform("nunique"))


def over_points(rows: pd.DataFrame, column: str = "nda") -> "pd.Series[float]":
    """The mean over tasks for every point of a grid: one draw of base and seed."""
    return rows.groupby("experiment")[column].mean()


def ndas(rows: pd.DataFrame, method: str) -> str:
    """Mean NDA ± spread over seeds in %, of the linear decoder and of feature_ridge."""
    cells = []
    for decoder in ("linear", "feature_ridge"):
        own = rows[(rows.method == method) & (rows.decoder == decoder) & rows.batchnorm.isin(POLICIES)]
        means = 100 * over_points(own)
        cells.append(f"{means.mean():.1f} ± {means.std():.1f}" if len(means) else "–")
    return " / ".join(cells)


POLICIES = ("", "keep", "same", "auto:same", "auto:average", "auto:recalibrate")
PAIR, EXPERTS = measured("imagenet-pair"), measured("experts")
NAMES = {
    "none": "*none: no coded model*",
    "average": "`Average`",
    "coin": "`Coin`",
    "head_fit": "`HeadFit`",
    "refit": "**`Refit`**",
    "distillation": "`Distillation`, 150 steps",
    "readout_distillation": "`ReadoutDistillation`, 100 steps",
}


def passes(method: str) -> str:
    count = PAIR[PAIR.method == method].merge_passes.iloc[0]
    return f"{count / 1000:.0f}k" if count else "0"


def table() -> str:
    counts = [EXPERTS[EXPERTS["count"] == count] for count in (3, 5, 8)]
    return "\n".join(
        f"| {name} | {' | '.join(ndas(rows, method) for rows in (PAIR, *counts))} | {passes(method)} |"
        for method, name in NAMES.items()
    )


def test_the_readmes_table_is_that_of_the_sweeps() -> None:
    assert table() in README, f"expected\n{table()}"
