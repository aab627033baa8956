"""``coin simulate`` on a finished experiment: its files, what they say, and what it says to mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coin.cli import main
from coin.reporting import read_results
from coin.serving.machines import BATCHES, ServiceTimes
from coin.serving.policies import PolicyKind
from coin.serving.servers import System

pytestmark = pytest.mark.slow


def simulated(folder: Path, output: Path, *options: str) -> pd.DataFrame:
    given = ["--queries=400", "--seeds=2", f"--output={output}"]
    assert main(["simulate", str(folder), *given, *options]) == 0
    return pd.read_csv(output / "simulation.csv", keep_default_na=False)


EXPERT, STAND_IN = 0.01, 0.03


@pytest.fixture
def given_times(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Experts take 10 ms and what is coded 30 ms, in place of what is measured; return the measured servers' names."""
    names: list[str] = []

    def take(name: str, expert: int) -> ServiceTimes:
        names.append(name)
        seconds = EXPERT if name.startswith("expert") else STAND_IN
        return ServiceTimes(np.array([[seconds * (1 + inputs) / 2] for inputs in BATCHES]))

    monkeypatch.setattr(System, "network", lambda system, name: name)
    monkeypatch.setattr("coin.commands.simulate.measure", take)
    return names


def test_a_row_for_every_policy_and_kind_of_query(
    alone: Path, tmp_path: Path, capsys: Any, given_times: list[str]
) -> None:
    rows = simulated(alone, tmp_path, "-c", "stragglers")
    assert len(rows) == 2 * len(PolicyKind)
    assert set(rows["redundancy"]) == set(PolicyKind)
    assert (rows["p50"] <= rows["p99"]).all()
    assert (rows["p999_low"] <= rows["p999"]).all()
    assert (rows["p999"] <= rows["p999_high"]).all()
    assert set(rows["seeds"]) == {2}
    assert rows["service_seconds"].tolist() == pytest.approx([0.011] * len(rows))
    standins = pd.to_numeric(rows["standin_seconds"])
    assert standins[rows["redundancy"] == "uncoded"].isna().all()
    is_replica = rows["redundancy"].str.startswith("replica")
    assert standins[is_replica].tolist() == pytest.approx([0.011] * is_replica.sum())  # the experts' own networks
    is_coded = rows["redundancy"].str.startswith(("standin", "coded"))
    assert standins[is_coded].tolist() == pytest.approx([0.033] * is_coded.sum())
    assert given_times[:2] == ["expert-digits", "expert-letters"]
    assert all(name.startswith("coded-0") for name in given_times[2:])
    first = rows.groupby("redundancy")[["memory", "standing_in_accuracy", "variant", "share_stood_in"]].first()
    experts = first.loc["uncoded"].memory
    assert first.loc["replica"].memory == 2 * experts
    assert rows["extra_memory"].tolist() == pytest.approx((rows["memory"] - experts).tolist())
    assert experts < first.loc["standin"].memory < first.loc["replica"].memory
    method, _, decoder = first.loc["coded_hedged"].variant.rpartition(" ")
    assert decoder == "linear"
    results = read_results(alone / "seed-0").query(f"decoder == 'linear' and method == '{method}'")
    assert first.loc["coded_hedged"].standing_in_accuracy == pytest.approx(results.decoded_accuracy.mean())
    assert first.loc["replica"].standing_in_accuracy == pytest.approx(results.expert_accuracy.mean())
    assert first.loc["uncoded"].share_stood_in == 0
    shares, failed = rows["share_stood_in"], rows["share_failed"]
    expected = (1 - shares - failed) * results.expert_accuracy.mean() + shares * rows["standing_in_accuracy"]
    np.testing.assert_allclose(rows["effective_accuracy"], expected)
    printed = capsys.readouterr().out
    line = next(line.split() for line in printed.splitlines() if "uncoded" in line)
    assert line[line.index("uncoded") :].count("0") == 1  # MiB: none beyond the experts'
    assert f"table: {tmp_path / 'simulation.csv'}" in printed
    assert max(len(line) for line in printed.splitlines()[:-1]) <= 80
    assert {line.split()[1] for line in printed.splitlines() if line.startswith((" one", " all"))} == set(PolicyKind)
    assert (tmp_path / "plots" / "simulation.png").is_file()


def test_times_are_measured_and_what_is_named_is_meant(finished: Path, tmp_path: Path) -> None:
    rows = simulated(finished, tmp_path, "--policies=[coded_hedged]", "--method=coin", "--decoder=ridge")
    assert rows["variant"].tolist() == ["coin ridge"] * 2
    assert (rows["service_seconds"] > 0).all()
    assert (rows["standin_seconds"] > 0).all()
    rows = simulated(finished, tmp_path)  # no decoder of its reads no survivor
    assert set(rows["redundancy"]) == set(PolicyKind) - {"standin", "standin_lost"}


MISTAKES = {
    "no folder": (["nowhere"], "nowhere"),
    "no decoder": (["FOLDER", "--policies=[standin]"], "expected a decoder that reads none"),
    "load": (["FOLDER", "--load=1"], "load=1"),
    "seeds": (["FOLDER", "--seeds=0"], "seeds=0"),
    "slow": (["FOLDER", "--slow.share=1.5"], "share=1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(case: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, wanted = MISTAKES[case]
    assert main(["simulate", *(argument.replace("FOLDER", str(finished)) for argument in arguments)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert wanted in line
