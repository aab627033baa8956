"""``coin run`` of networks that people bring: timm's, Hugging Face's, a class of their own on their own images."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from coin.cli import main
from coin.reporting import read_results

pytestmark = pytest.mark.slow

REST = """
code: [[0.5, 0.5]]
calibration: {samples_per_task: 24, batch_size: 16}
methods:
  - {class_path: Average}
  - {class_path: Coin}
  - {class_path: Refit, init_args: {target: own}}
decoders: [linear, feature_ridge, {kind: feature_ridge, survivors: false}]
"""
IMAGES = """
name: own
tasks:
  digits: {class_path: Digits, init_args: {max_train: 80, max_test: 40}}
  letters: {class_path: Glyphs, init_args: {classes: A-D, train_per_class: 20, test_per_class: 9}}
expert: {epochs: 1, lr: 0.01, batch_size: 32}
"""
OWN_CLASS = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 5, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.layers(x).mean((2, 3)))
"""


def run(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text + REST)
    assert main(["run", "-c", "own.yaml", f"--output={tmp_path}"]) == 0
    frame = read_results(tmp_path / "own/seed-0")
    assert (frame[frame.method == "oracle"].nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none"])]
    assert set(measured.method) == {"average", "coin", "refit"}
    assert (measured.groupby("method").decoder.nunique() == 3).all()
    assert len(set(measured.groupby("method").residual.mean().round(9))) == 3


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


RESNET50 = "{name: timm/resnet50, image_size: 32, options: {layers: [1, 1, 1, 1], channels: [4, 8, 12, 16]}}"
VIT = "{name: timm/vit_tiny_patch16_224, image_size: 32, options: {patch_size: 8, embed_dim: 24, depth: 2}}"


@pytest.mark.parametrize(
    ("network", "expert"),
    [(RESNET50, "overrides: {letters: {trainable: [head], freeze_batchnorm: true}}"), (VIT, "l2_sp: 0.1")],
)
def test_networks_of_timm(network: str, expert: str, tmp_path: Path) -> None:
    run(f"network: {network}{IMAGES.rstrip().removesuffix('}')}, {expert}}}", tmp_path)


def test_an_image_classifier_of_hugging_face(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.save_pretrained("model")
    run("network: {name: hf/model, image_size: 32}" + IMAGES, tmp_path)


def test_a_class_of_the_users_own_on_folders_of_images(tmp_path: Path) -> None:
    Path("ownclass.py").write_text(OWN_CLASS)
    draw = np.random.default_rng(0)
    for task, split, label in product(("one", "two"), ("train", "test"), range(3)):
        folder = tmp_path / task / split / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(12):
            pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            pixels[:, :, label] //= 4
            Image.fromarray(pixels).save(folder / f"{index}.png")
    tasks = "\n".join(f"  {task}: {{class_path: ImageFolder, init_args: {{root: {task}}}}}" for task in ("one", "two"))
    run(
        "name: own\nnetwork: {name: ownclass.Small, image_size: 20, options: {width: 6}}\n"
        f"tasks:\n{tasks}\nexpert: {{epochs: 2, lr: 0.01, batch_size: 16}}",
        tmp_path,
    )
