"""``coin run`` of vision transformers: every method and every decoder."""

import math
from pathlib import Path

import pytest

from coin.cli import main
from coin.reporting import read_results

CONFIG = """
name: vit
network:
  name: small_vit
  image_size: 16
  options: {patch_size: 8, depth: 2, heads: 2, width: 16, mlp_width: 24}
base:
  task: {class_path: Glyphs, init_args: {classes: K-N, train_samples: 80}}
  epochs: 1
  optimizer: adamw
  lr: 0.001
tasks:
  digits: {class_path: Digits, init_args: {max_train: 80, max_test: 40}}
  letters: {class_path: Glyphs, init_args: {classes: A-D, train_per_class: 20, test_per_class: 9}}
expert: {epochs: 1, lr: 0.001, optimizer: adamw, batch_size: 32}
code: [[0.5, 0.5]]
calibration: {samples_per_task: 24, batch_size: 16, fisher_cotangents: 1}
methods:
  - {class_path: Average}
  - {class_path: Coin}
  - {class_path: Coin, init_args: {fisher_kind: monte_carlo, label: coin-monte_carlo}}
  - {class_path: Coin, init_args: {fisher_kind: empirical, label: coin-empirical}}
  - {class_path: RegMean}
  - {class_path: RegMean, init_args: {layers: linear, label: regmean-linear}}
  - {class_path: FullFisher, init_args: {max_iterations: 2, tolerance: 0.9}}
  - {class_path: HeadFit}
  - {class_path: GaussNewton, init_args: {max_steps: 1, max_iterations: 2}}
  - {class_path: TaskArithmetic}
  - {class_path: Ties}
  - {class_path: Distillation, init_args: {steps: 3, batch_size: 16, lr: 1.0e-3}}
  - {class_path: ReadoutDistillation, init_args: {steps: 3, batch_size: 16}}
decoders:
  - linear
  - ridge
  - feature_ridge
  - {kind: feature_ridge, features: stages, fitted_on: own}
  - {kind: feature_ridge, components: 4}
seeds: [0]
"""


@pytest.mark.filterwarnings("ignore:full_fisher stopped")
def test_vision_transformers_with_every_method_and_decoder(tmp_path: Path) -> None:
    path = tmp_path / "vit.yaml"
    path.write_text(CONFIG)
    assert main(["run", "-c", str(path), f"--output={tmp_path}"]) == 0
    frame = read_results(tmp_path / "vit/seed-0")
    oracle = frame[frame.method == "oracle"]
    assert (oracle.nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none"])]
    assert measured.method.nunique() == 13
    assert (measured.groupby("method").decoder.nunique() == 5).all()
    # No BatchNorm, so no policy for it.
    assert set(measured.batchnorm) == {""}
    assert all(math.isfinite(value) and value > 0 for value in measured.residual)
    residuals = measured.groupby("method").residual.mean()
    assert len(set(residuals.round(9))) == 13  # no two methods made the same network
