"""One small experiment, run once through the command line and read by many tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from coin.cli import main

CONFIG = """
name: tiny
network: {name: small_resnet, image_size: 16, options: {width: 4}}
base:
  task: {class_path: Glyphs, init_args: {classes: K-T, train_samples: 200}}
  epochs: 1
  lr: 0.02
tasks:
  digits: {class_path: Digits, init_args: {max_train: 120, max_test: 77}}
  letters: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9}}
expert: {epochs: 2, lr: 0.02, batch_size: 32}
code: [[0.4, 0.6]]
calibration: {samples_per_task: 24, batch_size: 16}
methods:
  - {class_path: Average}
  - {class_path: Coin}
  - {class_path: Coin, init_args: {batchnorm: recalibrate}}
  - {class_path: Coin, init_args: {batchnorm: keep}}
  - {class_path: Distillation, init_args: {steps: 10, batch_size: 16, learning_rates: [1.0e-3, 3.0e-4]}}
decoders: [linear, ridge, feature_ridge]
seeds: [0]
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory, fresh_wandb: Callable[[], None]) -> Path:
    """The folder of the finished experiment; tests read it and leave it as it is."""
    fresh_wandb()
    output = tmp_path_factory.mktemp("runs")
    environment = {name: os.environ.pop(name, None) for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR")}
    try:
        assert main(["run", "-c", str(config), f"--output={output}"]) == 0
    finally:
        os.environ.update({name: value for name, value in environment.items() if value is not None})
    return output / "tiny"
