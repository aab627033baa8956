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
