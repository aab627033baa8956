"""``coin run`` from start to finish: its files, its skipping, its resuming."""

import signal
import subprocess
import sys
import time
from itertools import product

import pandas as pd
import pytest
import yaml

from coin.cli import main
from coin.files.atomic import sha256_of
from coin.files.safetensors import load_provenance, load_state
from coin.files.tensors import fingerprint
from coin.modules import Coded
from coin.reporting import read_results
from coin.reporting.results import requested_policy
from coin.reporting.summary import read_run

pytestmark = pytest.mark.slow

METHODS = {
    "average": "auto",
    "distillation": "keep",
    "coin": "auto",
    "coin-recalibrate": "recalibrate",
    "coin-keep": "keep",
}
MERGES = {f"coded-{method}" for method in METHODS}
FISHERS = {"fisher-digits", "fisher-letters"}
EXPERTS = {"expert-digits", "expert-letters"}
EVERY = {"base", "initial-10", "initial-6", *EXPERTS, *FISHERS, *MERGES, "evaluate", "report"}


def test_results_hold_every_method_decoder_and_task(finished):
    frame = read_results(finished / "seed-0")
    expected = {("oracle", "linear"), ("none", "ridge"), ("none", "feature_ridge")}
    expected |= set(product(METHODS, ("linear", "ridge", "feature_ridge")))
    for task, count in (("digits", 77), ("letters", 54)):
        rows = frame[frame["task"] == task]
        assert set(zip(rows["method"], rows["decoder"], strict=True)) == expected
        assert len(rows) == len(expected)
        right = rows["decoded_accuracy"] * count  # every test sample counts once
        assert right.to_list() == pytest.approx(right.round().to_list())
    for method, policy in METHODS.items():
        rows = frame[frame["method"] == method]
        assert set(rows["batchnorm"].map(requested_policy)) == {policy}


def test_coded_models_and_experts_say_what_made_them(finished):
    coin = load_provenance(finished / "seed-0/coded/coin.safetensors")
    assert (coin["code"], coin["row"], coin["samples_per_task"]) == ([[0.4, 0.6]], 0, 24)
    assert (coin["tasks"], coin["class_counts"]) == (["digits", "letters"], [10, 6])
    assert coin["method"]["options"]["damping"] == 1e-6
    assert len(coin["sha256"]) == 4  # two experts, two Fisher files
    kept = load_provenance(finished / "seed-0/coded/coin-keep.safetensors")["sha256"]
    (initial,) = kept.keys() - coin["sha256"].keys()  # whose BatchNorm statistics are kept
    assert kept[initial] == sha256_of(finished / "base/initial-10.safetensors")
    expert = load_provenance(finished / "seed-0/experts/letters/expert.safetensors")
    assert expert["task"] == "letters"
    assert [*expert["sha256"].values()] == [sha256_of(finished / "base/initial-6.safetensors")]


def name_of(folder):
    """Return the name of the step with this folder."""
    return folder.rpartition("-")[0]


def finished_steps(store):
    """Return the names of the finished steps."""
    return sorted(name_of(path.parent.name) for path in store.glob("*/done.json"))


def written(folder):
    """Return when every file below a folder was written, but for locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files}


def same_tensors(one, other):
    return fingerprint(load_state(one)[0]) == fingerprint(load_state(other)[0])


@pytest.mark.usefixtures("no_reports")
def test_a_changed_option_makes_anew_what_depends_on_it_and_back_again_nothing(copied, run, capsys):
    store = copied.parent / ".steps"
    option = "--calibration.samples_per_task=20"
    again = [*FISHERS, *MERGES, "evaluate", "report"]
    before = written(store)
    assert run("--dry-run", option) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(f"of {len(lines)} steps to do")
    folders = [line.rpartition("(")[2] for line in lines if line.startswith("to do  seed 0: ")]
    assert sorted(map(name_of, folders)) == sorted(again)
    assert run("--dry-run", "--trainer.max_epochs=3") == 2  # what a run refuses
    assert written(store) == before
    assert run(option) == 0
    after = written(store)
    assert before.items() <= after.items()
    assert finished_steps(store) == sorted([*EVERY, *again])
    assert set(read_results(copied / "seed-0")["samples_per_task"]) == {20}
    capsys.readouterr()
    assert run() == 0
    assert set(read_results(copied / "seed-0")["samples_per_task"]) == {24}
    assert written(store) == after
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Experts, own accuracy in %: digits ")
    assert f"report: {copied / 'report.html'}" in lines


@pytest.mark.usefixtures("no_reports")
def test_what_was_just_run_is_shown_and_nothing_else(copied, run):
    seed = copied / "seed-0"

    def shown(room):
        return {path.stem for path in (seed / room).iterdir()}

    average = "--methods=[{class_path: Average}]"
    assert run(average, "--replicas=[{bits: 3}]") == 0
    assert shown("replicas") >= {"digits.3bit-delta", "letters.3bit-delta"}
    assert run(average, "--seeds=[1]") == 0
    assert read_run(copied)[0] == [copied / "seed-1"]
    assert run(average) == 0
    assert shown("replicas") == set()
    assert shown("coded") == shown("systems") == {"average"}
    assert run() == 0
    assert shown("coded") == METHODS.keys()
    assert read_run(copied)[0] == [seed]


@pytest.mark.usefixtures("no_reports")
def test_an_interrupted_change_leaves_what_is_shown_as_it_was(copied, run, capsys, monkeypatch):
    def shown():
        links = {path: path.readlink() for path in copied.rglob("*") if path.is_symlink()}
        return {path: target for path, target in links.items() if ".steps" in target.parts}

    def interrupt(_):
        raise KeyboardInterrupt

    before = shown()
    with monkeypatch.context() as patch:
        patch.setattr("coin.pipeline.steps.merge.EstimateStatistic.run", interrupt)
        assert run("--expert.lr=0.3") == 130
    assert finished_steps(copied.parent / ".steps").count("expert-digits") == 2
    assert shown() == before
    Coded.from_run(copied)  # what coin serve reads
    # A part of the changed experiment is shown, and no more what was measured with the others.
    assert run("--expert.lr=0.3", "--only=digits") == 0
    expert = copied / "seed-0/experts/digits"
    assert expert.readlink() != before[expert]
    assert main(["choose", str(copied)]) == 2
    assert "expected the folder of an experiment or of one seed" in capsys.readouterr().err
    assert run() == 0
    assert shown().items() >= before.items()


def test_a_killed_run_of_a_folder_s_configuration_goes_on_to_the_same_files(finished, tmp_path):
    config = finished / "seed-0/config.yaml"
    command = ["run", "-c", str(config), f"--output={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coin", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".steps/expert-letters-*/checkpoints/last.ckpt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tiny/summary.csv").exists()
    assert main(command) == 0
    again = tmp_path / "tiny/seed-0"
    times = ["merge_seconds", "decoder_seconds"]
    expected = read_results(finished / "seed-0").drop(columns=times)
    found = read_results(again).drop(columns=times)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    made = [path.relative_to(finished) for path in finished.glob("seed-0/[ces]*/**/*.safetensors")]
    assert len(made) >= 2 + 2 + 5
    for path in made:
        assert same_tensors(tmp_path / "tiny" / path, finished / path), path
    text = config.read_text().replace(str(finished.parent), str(tmp_path))
    assert yaml.safe_load((again / "config.yaml").read_text()) == yaml.safe_load(text)
