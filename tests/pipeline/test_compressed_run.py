"""Compressed experts and coded models in an experiment, and what reads them afterwards."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coin.cli import main
from coin.modules import Coded
from coin.networks import load_network
from coin.reporting import read_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]

REPLICAS = [{"bits": 8}, {"bits": 3}, {"bits": 3, "base_bits": 8}]
COPIES = ["replica-8bit-delta", "replica-3bit-delta", "replica-3bit-int8base"]
METHODS = [
    {"class_path": "Refit", "init_args": {"compress": [{"bits": 8}, {"bits": 2}]}},
    {"class_path": "Average", "init_args": {"adapters": {"rank": 2}, "compress": {"bits": 4}}},
]


@pytest.fixture
def seed(run_small: Callable[..., Path], trained: dict[str, Any]) -> Path:
    """The folder of a seed with compressed copies, coded models and bodies."""
    decoders = ["linear", "expert_head"]
    return run_small(**trained, methods=METHODS, replicas=REPLICAS, decoders=decoders)


def mib(path: Path) -> float:
    return path.stat().st_size / 2**20


def check_copies(seed: Path, frame: pd.DataFrame) -> None:
    """Check the rows of copies; a file has a header, which is long beside so small a network."""
    copies = frame[frame["decoder"] == "replica"]
    assert copies["method"].to_list() == [label for label in COPIES for _ in range(2)]
    assert copies["task"].to_list() == copies["erased"].to_list() == ["digits", "letters"] * 3
    assert set(copies["losses"]) == {2}
    assert copies[copies["method"] == COPIES[0]]["agreement"].min() > 0.95
    memory = copies.groupby("method")["memory_mib"].first()
    whole = mib(seed / "experts/digits/expert.safetensors")
    assert whole < memory["replica-3bit-delta"] < 1.5 * whole  # two deltas, and the base as it is
    folder = (seed / "replicas/digits.3bit-int8base.safetensors").resolve().parent
    on_disk = [mib(path) for path in folder.glob("*.safetensors")]
    assert len(on_disk) == 3  # the base and two experts
    assert memory["replica-3bit-int8base"] == pytest.approx(sum(on_disk), rel=0.4)
    # A process that answers for all experts holds the copies as stored and one of them whole.
    expert = load_network(seed / "experts/digits/expert.safetensors").nbytes / 2**20
    resident = copies.groupby("method")["resident_mib"].first()
    assert (resident - memory).to_list() == pytest.approx([expert] * 3)


def check_coded(seed: Path, frame: pd.DataFrame) -> None:
    """Check the rows of compressed coded models, and what serves them."""
    rows = frame[frame["decoder"] == "expert_head"].groupby("method")
    nda = rows["nda"].mean()
    assert nda["refit-8bit"] == pytest.approx(nda["refit"], abs=0.1)
    memory = rows["memory_mib"].first()
    assert memory["refit-2bit"] < memory["refit-8bit"] < memory["refit"]
    assert memory["average+rank2-4bit"] < memory["average+rank2"]
    resident = rows["resident_mib"].first()
    assert memory["refit-2bit"] < resident["refit-2bit"] < resident["refit"]
    for method, stored in memory.drop("none", errors="ignore").items():
        system = Coded.from_run(seed, str(method), "expert_head")
        (heads,) = {decoder.nbytes for decoder in system.decoders.values()}
        assert (system.nbytes + heads) / 2**20 == pytest.approx(stored)


def test_compressed_networks_are_rows_of_the_results_and_files_that_outlive_the_store(
    seed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = read_results(seed)
    check_copies(seed, frame)
    check_coded(seed, frame)
    # The configuration that was left repeats the run, and finds all of it done.
    capsys.readouterr()
    assert main(["run", "-c", str(seed / "config.yaml")]) == 0
    assert "compressing" not in capsys.readouterr().err
    # A copy whose links were followed is whole.
    shutil.copytree(seed.parent, tmp_path / "copied")
    (tmp_path / ".steps").rename(tmp_path / "gone")
    files = list(tmp_path.glob("copied/seed-*/replicas/*bit*.safetensors"))
    assert len(files) == 2 * len(REPLICAS)
    assert {load_network(path).num_classes for path in files} == {6, 10}
    assert len(Coded.from_run(tmp_path / "copied", "refit-2bit", "linear").files) == 3


@pytest.fixture
def networks(finished: Path) -> dict[str, str]:
    """Options of the command by names: the base, an expert, a coded model."""
    return {
        "base": f"--base={finished}/base/initial-10.safetensors",
        "letters": f"{finished}/seed-0/experts/letters/expert.safetensors",
        "coded": f"{finished}/seed-0/coded/average.safetensors",
    }


def test_the_command_compresses_experts_and_coded_models(
    finished: Path, networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = tmp_path / "letters.safetensors"
    command = ["compress", networks["letters"], networks["base"], "--bits=3", "--base_bits=8"]
    assert main([*command, f"--output={letters}"]) == 0
    assert capsys.readouterr().out.strip() == str(letters)
    assert load_network(letters).num_classes == 6
    assert len(list(tmp_path.glob("initial-10-*-int8.safetensors"))) == 1
    coded = ["compress", networks["coded"], "--bits=8", "--base_bits=0"]
    assert main([*coded, f"--output={tmp_path}/average.safetensors"]) == 0
    # What is compressed is merged like what is not.
    digits = finished / "seed-0/experts/digits/expert.safetensors"
    experts = f"--experts={{digits: {digits}, letters: {letters}}}"
    average = ["--method=Average", "--method.batchnorm=average"]
    assert main(["merge", experts, *average, f"--output={tmp_path}/merged"]) == 0
    assert load_network(tmp_path / "merged/average-average.safetensors").num_classes == 10


MISTAKES = {
    "no base": (["letters"], ["--bits=3"]),
    "bits=12": (["letters", "base"], ["--bits=12"]),
    "found bits=None": (["letters", "base"], []),
    "a coded model, which has no base": (["coded", "base"], ["--bits=8"]),
}


@pytest.mark.parametrize("expected", MISTAKES)
def test_what_cannot_be_compressed_is_one_line(
    expected: str, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names, options = MISTAKES[expected]
    files = [networks[name] for name in names]
    assert main(["compress", *files, *options, "--output=x.safetensors"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
