"""``coin run`` of transformers, on images and on texts."""

import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from coin.cli import main
from coin.reporting import read_results

pytestmark = pytest.mark.slow

CONFIG = """
name: vit
network:
  name: small_vit
  image_size: 16
  options: {patch_size: 8, depth: 2, heads: 2, width: 16, mlp_width: 24}
base:
  task: {class_path: Glyphs, init_args: {classes: K-N, train_samples: 80}}
  epochs: 1
  optimizer: AdamW
  lr: 0.001
tasks:
  digits: {class_path: Digits, init_args: {max_train: 80, max_test: 40}}
  letters: {class_path: Glyphs, init_args: {classes: A-D, train_per_class: 20, test_per_class: 9}}
expert: {epochs: 1, lr: 0.001, optimizer: AdamW, batch_size: 32}
code: [[0.5, 0.5]]
calibration: {samples_per_task: 24, batch_size: 16}
methods:
  - {class_path: RegMean}
  - {class_path: HeadFit}
  - {class_path: TaskArithmetic}
  - {class_path: Base}
  - {class_path: Refit, init_args: {start: wudi, label: from-wudi}}
  - {class_path: Refit, init_args: {target: own, start: coin, label: from-coin}}
  - {class_path: Ties}
  - {class_path: Distillation, init_args: {steps: 3, batch_size: 16, lr: 1.0e-3, augmentation: none}}
decoders: [linear, ridge, feature_ridge, {kind: feature_ridge, fitted_on: own}]
seeds: [0]
"""


def test_vision_transformers_with_every_method_and_decoder(tmp_path: Path) -> None:
    path = tmp_path / "vit.yaml"
    path.write_text(CONFIG)
    assert main(["run", "-c", str(path), f"--output={tmp_path}"]) == 0
    frame = read_results(tmp_path / "vit/seed-0")
    oracle = frame[frame.method == "oracle"]
    assert (oracle.nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none"])]
    assert measured.method.nunique() == 8
    assert (measured.groupby("method").decoder.nunique() == 4).all()
    # No BatchNorm, so no policy for it.
    assert set(measured.batchnorm) == {""}
    assert all(math.isfinite(value) and value > 0 for value in measured.residual)
    residuals = measured.groupby("method").residual.mean()
    assert len(set(residuals.round(9))) == measured.method.nunique()  # no two methods made the same network


MEALS = "class_path: TextFile, init_args: {train: meals.csv, test: meals.csv, tokenizer: words.json}"
WORDS = ["[PAD]", "[UNK]", *["good", "great", "bad", "poor", "film", "meal", "actor", "soup", "the", "a", "was"]]
TEXT = """
name: text
network:
  name: minilm
  image_size: 6
  options: {vocabulary: 13, depth: 2, heads: 2, width: 16, mlp_width: 24}
tasks:
  films: {class_path: TextFile, init_args: {train: films.csv, test: films.csv, tokenizer: words.json}}
  meals: {class_path: TextFile, init_args: {train: meals.csv, test: meals.csv, tokenizer: words.json}}
expert: {epochs: 3, lr: 0.01, optimizer: AdamW, batch_size: 16}
calibration: {samples_per_task: 24, batch_size: 16}
methods:
  - {class_path: Average}
  - {class_path: RegMean}
  - {class_path: HeadFit}
  - {class_path: Distillation, init_args: {steps: 3, batch_size: 16, lr: 1.0e-3, augmentation: none}}
decoders: [linear, ridge, feature_ridge]
"""


@pytest.fixture
def text_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment on two tables of sentences, in the working folder."""
    monkeypatch.chdir(tmp_path)
    model = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.save("words.json")
    for name, subjects in {"films": ("film", "actor"), "meals": ("meal", "soup")}.items():
        rows = [
            f"{article} {subject} was {word},{label}"
            for article in ("the", "a", "")
            for subject in subjects
            for word, label in (("good", "yes"), ("great", "yes"), ("bad", "no"), ("poor", "no"))
        ]
        Path(f"{name}.csv").write_text("text,label\n" + "\n".join(rows * 2) + "\n")
    path = tmp_path / "text.yaml"
    path.write_text(TEXT)
    return path


def test_texts_end_to_end(text_config: Path, tmp_path: Path) -> None:
    assert main(["run", "-c", str(text_config), f"--output={tmp_path}"]) == 0
    frame = read_results(tmp_path / "text/seed-0")
    assert (frame[frame.method == "oracle"].nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none"])]
    assert measured.method.nunique() == 4
    assert (measured.groupby("method").decoder.nunique() == 3).all()
    residuals = measured.groupby("method").residual.mean()
    assert len(set(residuals.round(9))) == 4
    assert residuals.head_fit < residuals.average  # in sample: the test texts are the training texts
    assert (frame.expert_accuracy > 0.9).all()  # one word decides


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("name: minilm", "name: small_resnet", "found a task of texts for the network 'small_resnet', expected images"),
        (MEALS, "class_path: Digits", "found a task of images for the network 'minilm', expected texts"),
        (", augmentation: none", "", "found augmentation 'shift' for TextFile, whose samples are texts, expected none"),
    ],
)
def test_data_that_the_network_does_not_read_are_one_line(
    text_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str
) -> None:
    text_config.write_text(TEXT.replace(old, new))
    assert main(["run", "-c", str(text_config), f"--output={tmp_path}"]) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "text").exists()
