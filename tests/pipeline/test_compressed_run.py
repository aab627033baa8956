"""Compressed experts and coded models in an experiment, and what reads them afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coin.cli import main
from coin.modules import Coded
from coin.networks import load_network
from coin.reporting import read_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]

REPLICAS = [{"bits": 8}, {"bits": 3}, {"bits": 3, "base_bits": 8}]
METHODS = [
    {"class_path": "Average", "init_args": {"compress": {"bits": 8}}},
    {"class_path": "Refit", "init_args": {"compress": [{"bits": 8}, {"bits": 2}]}},
    {"class_path": "Average", "init_args": {"adapters": {"rank": 2}, "compress": {"bits": 4}}},
]


def test_replicas_and_compressed_coded_models_are_rows_of_the_results(
    run_small: Callable[..., Path],
    trained: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = run_small(
        **trained, methods=METHODS, replicas=REPLICAS, decoders=["linear", "expert_head"]
    )
    frame = read_results(seed)
    replicas = frame[frame.decoder == "replica"]
    labels = ["replica-8bit-delta", "replica-3bit-delta", "replica-3bit-int8base"]
    assert list(dict.fromkeys(replicas.method)) == labels
    assert replicas.task.tolist() == ["digits", "letters"] * 3
    assert (replicas.erased == replicas.task).all()
    assert set(zip(replicas.forwards, replicas.losses, strict=True)) == {(1, 2)}
    assert replicas.residual.isna().all()
    assert replicas.merge_seconds.gt(0).all()
    assert replicas[replicas.method == "replica-8bit-delta"].agreement.min() > 0.95
    # The bytes are those on disk, but for the files' headers, which are long beside so small a network.
    whole = (seed / "experts/digits/expert.safetensors").stat().st_size / 2**20
    memory = replicas.groupby("method").memory_mib.first()
    assert whole < memory["replica-3bit-delta"] < 1.5 * whole
    kept = (seed / "replicas/digits.3bit-int8base.safetensors").resolve().parent
    on_disk = [path.stat().st_size for path in kept.glob("*.safetensors")]
    assert len(on_disk) == 3  # the base and two experts
    assert memory["replica-3bit-int8base"] == pytest.approx(sum(on_disk) / 2**20, rel=0.4)
    # A process that answers for all experts holds the copies as stored and one of them whole.
    expert = load_network(seed / "experts/digits/expert.safetensors").nbytes / 2**20
    resident = replicas.groupby("method").resident_mib.first()
    assert (resident - memory).tolist() == pytest.approx([expert] * 3)
    coded = frame[
        frame.decoder.isin(["linear", "expert_head"]) & frame.method.str.startswith("refit")
    ]
    assert list(dict.fromkeys(coded.method)) == ["refit", "refit-8bit", "refit-2bit"]
    nda = coded[coded.decoder == "expert_head"].groupby("method").nda.mean()
    assert nda["refit-8bit"] == pytest.approx(nda["refit"], abs=0.1)
    kept_mib = coded[coded.decoder == "linear"].groupby("method").memory_mib.first()
    assert kept_mib["refit-2bit"] < kept_mib["refit-8bit"] < kept_mib["refit"]
    resident_mib = coded[coded.decoder == "linear"].groupby("method").resident_mib.first()
    assert resident_mib["refit"] == kept_mib["refit"]
    assert kept_mib["refit-2bit"] < resident_mib["refit-2bit"] < resident_mib["refit"]
    for method, mib in (
        frame[frame.decoder == "linear"].groupby("method").memory_mib.first().items()
    ):
        if method not in ("none", "oracle"):
            assert Coded.from_run(seed, method, "linear").nbytes / 2**20 == pytest.approx(mib)
    bodies = frame[frame.method.str.contains("rank2")].groupby("method").memory_mib.first()
    assert list(bodies.index) == ["average+rank2", "average+rank2-4bit"]
    for method, mib in bodies.items():
        system = Coded.from_run(seed, method, "expert_head")
        (heads,) = {decoder.nbytes for decoder in system.decoders.values()}
        assert (system.nbytes + heads) / 2**20 == pytest.approx(mib)
    references = frame[frame.method.isin(["none", "oracle"])]
    assert references.resident_mib.equals(references.memory_mib)
    kinds = {
        each["label"]: each["method"]
        for each in json.loads((seed / "results.json").read_text())["methods"]
    }
    assert (kinds["replica-3bit-delta"], kinds["refit-2bit"]) == ("replica", "refit")
    # The configuration that was left repeats the run, and finds all of it done.
    capsys.readouterr()
    assert main(["run", "-c", str(seed / "config.yaml")]) == 0
    told = capsys.readouterr().err
    assert "evaluation: up to date" in told
    assert "compressing" not in told
    # A copy whose links were followed is whole.
    copy = tmp_path / "copied"
    shutil.copytree(seed.parent, copy)
    (tmp_path / ".steps").rename(tmp_path / "gone")
    copies = list(copy.glob("seed-*/replicas/*bit*.safetensors"))
    assert len(copies) == 2 * len(REPLICAS)
    for path in copies:
        assert load_network(path).num_classes in (6, 10)
    assert len(Coded.from_run(copy, "refit-2bit", "linear").files) == 3
    assert (copy / "summary.csv").read_text().count("replica-3bit-delta") == 3


def test_the_command_compresses_experts_and_coded_models(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, base = finished / "seed-0", finished / "base/initial-10.safetensors"
    expert, output = seed / "experts/letters/expert.safetensors", tmp_path / "letters.safetensors"
    assert (
        main(
            [
                "compress",
                str(expert),
                f"--base={base}",
                "--bits=3",
                "--base_bits=8",
                f"--output={output}",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == str(output)
    assert load_network(output).num_classes == 6
    (kept,) = tmp_path.glob("initial-10-*-int8.safetensors")
    assert sorted(tmp_path.iterdir()) == [kept, output]
    coded = ["compress", str(seed / "coded/average.safetensors"), "--bits=8", "--base_bits=0"]
    assert main([*coded, f"--output={tmp_path}/average.safetensors"]) == 0
    # What is compressed is merged like what is not.
    files = f"--experts={{digits: {seed}/experts/digits/expert.safetensors, letters: {output}}}"
    assert (
        main(
            [
                "merge",
                files,
                "--method=Average",
                "--method.batchnorm=average",
                f"--output={tmp_path}/m",
            ]
        )
        == 0
    )
    assert load_network(tmp_path / "m/average-average.safetensors").num_classes == 10
    capsys.readouterr()
    assert (
        main([*coded[:2], f"--base={base}", "--bits=8", f"--output={tmp_path}/x.safetensors"]) == 2
    )
    assert "a coded model, which has no base" in capsys.readouterr().err
    for wrong, told in (
        (["--bits=3"], "no base"),
        ([f"--base={base}", "--bits=12"], "bits=12"),
        ([f"--base={base}"], "found bits=None"),
    ):
        capsys.readouterr()
        assert main(["compress", str(expert), *wrong, f"--output={tmp_path}/x.safetensors"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
