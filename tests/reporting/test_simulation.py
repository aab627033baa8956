"""A simulation's file, table and figures."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from coin.errors import ConfigurationError, FileError
from coin.reporting.simulation import SimulationRow, print_simulation, read_simulation, write_simulation
from coin.reporting.simulation_plots import accuracy_against_latency, latency_against_load


def row(policy: str, load: float, quantile: float = math.nan, **changes: float) -> SimulationRow:
    latencies = {
        f"{name}{part}": value * factor
        for name, value in (("p50", 0.01), ("p99", 0.1), ("p995", 0.2), ("p999", 0.4))
        for part, factor in (("", 1.0), ("_low", 0.9), ("_high", 1.2))
    }
    plain = SimulationRow(
        experiment="three", method="coin", batchnorm="average", decoder="ridge", want="one", policy=policy,
        quantile=quantile, load=load, servers=4, queries=1000, seeds=2, **latencies, share_decoded=0.05,
        share_failed=0.0, forwards=1.2, utilisation=0.3, expert_accuracy=0.95, decoded_accuracy=0.9,
        effective_accuracy=0.9475, service_seconds=0.005, decoding_seconds=0.0001,
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.fixture
def rows() -> list[SimulationRow]:
    lost = {"p999": math.inf, "p999_high": math.inf, "p995_high": math.inf, "share_failed": 0.002}
    return [
        row("uncoded", 0.2),
        row("uncoded", 0.8, **lost),
        row("coded_hedged", 0.2, 0.9),
        row("coded_hedged", 0.8, 0.9, p999=0.3, p999_low=0.25, p999_high=0.5),
    ]


def test_file_reads_back_exactly(rows: list[SimulationRow], tmp_path: Path) -> None:
    write_simulation(tmp_path, rows)
    found = read_simulation(tmp_path)
    assert [repr(each) for each in found] == [repr(each) for each in rows]  # NaN is not NaN
    with pytest.raises(ConfigurationError, match="no rows"):
        write_simulation(tmp_path, [])
    with pytest.raises(FileError, match=r"simulation\.csv"):
        read_simulation(tmp_path / "elsewhere")


def test_table_fits_100_columns_and_shows_failures(rows: list[SimulationRow]) -> None:
    console = Console(width=100, record=True)
    print_simulation([*rows, *(replace(each, want="all") for each in rows)], console)
    text = console.export_text()
    assert "three: 4 servers, one expert's answer a query; coin (average), ridge" in text
    assert "all experts' answers a query" in text
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("0.8")]
    assert lines[0] == ["0.8", "uncoded", "10.0", "100", "200", "∞", "5.00", "0.20", "1.20", "94.75"]
    assert lines[1][:5] == ["0.8", "coded_hedged,", "q", "=", "0.9"]


@pytest.mark.parametrize("draw", [latency_against_load, accuracy_against_latency])
def test_figures_have_a_line_a_policy_and_no_infinite_point(draw: Callable, rows: list[SimulationRow]) -> None:
    figure = draw(rows)
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel()
    last = figure.axes[-1]
    lines = {each.get_label(): each.lines[0].get_xdata() for each in last.containers}
    assert set(lines) == {"uncoded", "coded_hedged, q = 0.9"}
    assert len(lines["uncoded"]) == 1  # the other one's quantile is infinite
    assert len(lines["coded_hedged, q = 0.9"]) == 2
