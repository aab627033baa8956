"""Compressed experts and coded models in an experiment, and what reads them afterwards."""

import shutil

import pytest

from coin.cli import main
from coin.modules import Coded
from coin.networks import load_network
from coin.reporting import read_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]

COPIES = ["replica-8bit-delta", "replica-3bit-delta", "replica-3bit-int8base"]
COMPRESSED = """
replicas: [{bits: 8}, {bits: 3}, {bits: 3, base_bits: 8}]
methods:
  - {class_path: Refit, init_args: {compress: [{bits: 8}, {bits: 2}]}}
  - {class_path: Average, init_args: {adapters: {rank: 2}, compress: {bits: 4}}}
decoders: [linear, expert_head]
"""


def check_copies(frame):
    copies = frame[frame["decoder"] == "replica"]
    assert copies["method"].to_list() == [label for label in COPIES for _ in range(2)]
    assert copies["task"].to_list() == ["digits", "letters"] * 3
    assert copies["erased"].to_list() == copies["task"].to_list()
    in_eight_bits = copies[copies["method"] == COPIES[0]]
    assert in_eight_bits["agreement"].min() > 0.95
    memory = copies.groupby("method")["memory_mib"].first()
    assert memory["replica-3bit-int8base"] < memory["replica-3bit-delta"]


def check_coded(frame, seed):
    """Check the rows of compressed coded models, and what serves them."""
    coded = frame[(frame["decoder"] == "expert_head") & (frame["method"] != "none")]
    means = coded.groupby("method")[["nda", "memory_mib"]].mean()
    nda = means["nda"]
    assert nda["refit-8bit"] == pytest.approx(nda["refit"], abs=0.1)
    memory = means["memory_mib"]
    assert memory["refit-2bit"] < memory["refit-8bit"] < memory["refit"]
    assert memory["average+rank2-4bit"] < memory["average+rank2"]
    for method, stored in memory.items():
        system = Coded.from_run(seed, method, "expert_head")
        (heads,) = {decoder.nbytes for decoder in system.decoders.values()}
        assert (system.nbytes + heads) / 2**20 == pytest.approx(stored)


def test_compressed_networks_are_rows_of_the_results_and_files_that_outlive_the_store(
    run_small, trained, tmp_path, capsys
):
    seed = run_small(trained + COMPRESSED)
    frame = read_results(seed)
    check_copies(frame)
    check_coded(frame, seed)
    # The configuration that was left repeats the run, and finds all of it done.
    capsys.readouterr()
    assert main(["run", "-c", str(seed / "config.yaml")]) == 0
    assert "compressing" not in capsys.readouterr().err
    # A copy whose links were followed is whole.
    shutil.copytree(seed.parent, tmp_path / "copied")
    (tmp_path / ".steps").rename(tmp_path / "gone")
    files = list(tmp_path.glob("copied/seed-*/replicas/*bit*.safetensors"))
    assert len(files) == 2 * len(COPIES)
    assert {load_network(path).num_classes for path in files} == {6, 10}
    assert len(Coded.from_run(tmp_path / "copied", "refit-2bit", "linear").files) == 3


def test_the_command_compresses_experts_and_coded_models(finished, tmp_path, capsys):
    seed = finished / "seed-0"
    digits = seed / "experts/digits/expert.safetensors"
    letters = tmp_path / "letters.safetensors"
    base = f"--base={finished}/base/initial-10.safetensors"
    expert = ["compress", str(seed / "experts/letters/expert.safetensors"), base, "--bits=3"]
    assert main([*expert, "--base_bits=8", f"--output={letters}"]) == 0
    assert capsys.readouterr().out.strip() == str(letters)
    assert len(list(tmp_path.glob("initial-10-*-int8.safetensors"))) == 1
    coded = ["compress", str(seed / "coded/average.safetensors"), "--bits=8"]
    output = f"--output={tmp_path}/average.safetensors"
    assert main([*coded, "--base_bits=0", output]) == 0
    assert load_network(tmp_path / "average.safetensors").num_classes == 10
    assert main([*coded, base, output]) == 2
    assert "a coded model, which has no base" in capsys.readouterr().err
    # What is compressed is merged like what is not.
    experts = f"--experts={{digits: {digits}, letters: {letters}}}"
    average = ["--method=Average", "--method.batchnorm=average"]
    assert main(["merge", experts, *average, f"--output={tmp_path}/merged"]) == 0
    assert load_network(tmp_path / "merged/average-average.safetensors").num_classes == 10
