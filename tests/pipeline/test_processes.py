"""``coin run`` by several processes: the same steps on each, one that writes, and the numbers of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from coin.cli import main
from coin.reporting import read_results

SCRIPT = str(Path(__file__).with_name("run_in_processes.py"))

# Neither training samples nor calibration samples nor test samples can be halved.
CONFIG = """
name: shared
network: {name: small_resnet, image_size: 16, options: {width: 4}}
base:
  task: {class_path: Glyphs, init_args: {classes: K-T, train_samples: 101}}
  epochs: 1
tasks:
  digits: {class_path: Digits, init_args: {max_train: 81, max_test: 37}}
  letters: {class_path: Glyphs, init_args: {classes: A-E, train_per_class: 17, test_per_class: 5}}
expert: {epochs: 1, lr: 0.02, batch_size: 16}
calibration: {samples_per_task: 21, batch_size: 8}
methods:
  - {class_path: Average}
  - {class_path: Coin, init_args: {batchnorm: recalibrate}}
  - {class_path: RegMean}
  - {class_path: Distillation, init_args: {steps: 3, batch_size: 8, learning_rates: [3.0e-4, 1.0e-3]}}
"""
CLOSED_FORMS = "[{class_path: Average}, {class_path: Coin, init_args: {batchnorm: recalibrate}}, {class_path: RegMean}]"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def results(folder):
    """Return the rows of the closed forms, but for their times."""
    frame = read_results(folder / "shared/seed-0")
    rows = frame[frame["method"] != "distillation"]
    return rows.drop(columns=["merge_seconds", "decoder_seconds"]).reset_index(drop=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_reports")
def test_two_processes_run_an_experiment_together(tmp_path):
    Path("shared.yaml").write_text(CONFIG)
    two = tmp_path / "two"
    trainer = "--trainer={accelerator: cpu, devices: 2, strategy: ddp}"
    command = ["run", "-c", "shared.yaml", f"--output={two}", trainer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*LAUNCH, SCRIPT, str(two), *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("left its process group") == 2
    first = json.loads((two / "first.json").read_text())
    assert first["processes"] == 2
    assert done.stderr.count("seed 0: expert digits: training") == 1
    assert done.stderr.count("seed 0: expert digits: up to date") == 1
    assert {path: Path(path).stat().st_mtime_ns for path in first["times"]} == first["times"]
    assert "distillation" in set(read_results(two / "shared/seed-0")["method"])

    # From the same experts, one process comes to the same statistics, coded models and results.
    one = tmp_path / "one"
    place = f"{two}/shared/seed-0/experts/{{}}/expert.safetensors"
    experts = {task: place.format(task) for task in ("digits", "letters")}
    options = [
        f"--output={one}",
        f"--expert.checkpoints={json.dumps(experts)}",
        f"--base={{task: null, checkpoint: {two}/shared/base/base.safetensors}}",
        f"--methods={CLOSED_FORMS}",
        "--trainer.accelerator=cpu",
    ]
    assert main(["run", "-c", "shared.yaml", *options]) == 0
    exact = ["expert_accuracy", "decoded_accuracy", "nda", "agreement"]
    pd.testing.assert_frame_equal(results(two)[exact], results(one)[exact])
    pd.testing.assert_frame_equal(results(two), results(one), rtol=1e-4)


def test_processes_without_a_trainer_for_them_are_refused(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run() == 2
    assert "found WORLD_SIZE=2 and a trainer section for one process" in capsys.readouterr().err
