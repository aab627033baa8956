"""``coin run`` by several processes: the same steps on each, one that writes, and the numbers of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import coin.pipeline.steps.report
from coin.cli import main
from coin.reporting import read_results

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "run_in_processes.py"

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


def test_two_processes_run_an_experiment_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        coin.pipeline.steps.report, "write_report", lambda *_: None
    )  # as in the script
    (tmp_path / "shared.yaml").write_text(CONFIG)
    command = ["run", "-c", str(tmp_path / "shared.yaml"), f"--output={tmp_path / 'two'}"]
    trainer = "--trainer={accelerator: cpu, devices: 2, strategy: ddp}"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(tmp_path / "two"), *command, trainer],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("left its process group") == 2
    folder = tmp_path / "two/shared"
    first = json.loads((tmp_path / "two/first.json").read_text())
    assert first["processes"] == 2
    assert done.stderr.count("seed 0: expert digits: training") == 1
    assert done.stderr.count("seed 0: expert digits: up to date") == 1
    assert {path: Path(path).stat().st_mtime_ns for path in first["times"]} == first["times"]
    assert set(read_results(folder / "seed-0").method) >= {"distillation"}

    # From the same experts, one process comes to the same statistics, coded models and results.
    experts = {
        task: str(folder / f"seed-0/experts/{task}/expert.safetensors")
        for task in ("digits", "letters")
    }
    given = [f"--expert.checkpoints={json.dumps(experts)}", f"--output={tmp_path / 'one'}"]
    base = f"--base={{task: null, checkpoint: {folder}/base/base.safetensors}}"
    assert (
        main([*command, *given, base, f"--methods={CLOSED_FORMS}", "--trainer.accelerator=cpu"])
        == 0
    )
    wanted = read_results(tmp_path / "one/shared/seed-0").drop(
        columns=["merge_seconds", "decoder_seconds"]
    )
    found = read_results(folder / "seed-0").drop(columns=["merge_seconds", "decoder_seconds"])
    found = found[~found.method.str.contains("distillation")].reset_index(drop=True)
    exact = ["expert_accuracy", "decoded_accuracy", "nda", "agreement"]
    pd.testing.assert_frame_equal(found[exact], wanted[exact])
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-4)


def test_processes_without_a_trainer_for_them_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "-c", str(config)]) == 2
    assert "found WORLD_SIZE=2 and a trainer section for one process" in capsys.readouterr().err
