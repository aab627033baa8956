"""``coin run`` of networks that people bring: of timm, of Hugging Face, a class and methods of their own."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from coin.files.safetensors import load_provenance
from coin.reporting import read_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]


@pytest.fixture(autouse=True)
def workplace(monkeypatch):
    """Find the examples, and forget this test's folder after it: another's has a module of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def measured(seed, methods):
    """Check that every method was measured with every decoder and made a network of its own; return their rows."""
    frame = read_results(seed)
    assert (frame[frame["method"] == "oracle"]["nda"] == 1).all()
    rows = frame[~frame["method"].isin(["oracle", "none"])]
    by_method = rows.groupby("method")
    assert by_method["decoder"].nunique().to_list() == [3] * methods
    assert rows["residual"].gt(0).all()
    assert by_method["residual"].mean().round(9).nunique() == methods
    return rows


TASKS = """
tasks:
  digits: {class_path: Digits, init_args: {max_train: 80, max_test: 40}}
  letters: {class_path: Glyphs, init_args: {classes: A-D, train_per_class: 20, test_per_class: 9}}
"""
IMAGES = """
base: null
expert: {epochs: 1, lr: 0.01, batch_size: 16}
methods: [{class_path: Average}, {class_path: Coin}, {class_path: Refit}]
"""
NETWORKS = {
    "timm's ResNet50": """
network:
  name: timm/resnet50
  image_size: 32
  options: {layers: [1, 1, 1, 1], channels: [4, 8, 12, 16]}
""",
    "Hugging Face's ResNet": "network: {name: hf/model, image_size: 32}",
}


@pytest.mark.parametrize("case", NETWORKS)
def test_image_classifiers_of_others(case, run_small):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetConfig(**sizes).save_pretrained("model")
    measured(run_small(NETWORKS[case] + TASKS + IMAGES), 3)


MINE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 5, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.layers(x).mean((2, 3)))

def merge(experts, calibration, share=0.5):
    first, second = experts
    state = second.state_dict()
    for name, tensor in first.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(share).add_((1 - share) * state[name])
    return first
"""
OWN = """
network: {name: mine.Small, image_size: 20, options: {width: 6}}
tasks:
  one: {class_path: ImageFolder, init_args: {root: one}}
  two: {class_path: ImageFolder, init_args: {root: two}}
"""


def test_a_class_and_folders_of_images_of_the_user_s_own(run_small):
    Path("mine.py").write_text(MINE)  # in the working folder
    draw = np.random.default_rng(0)
    for task, split, label in product(("one", "two"), ("train", "test"), range(3)):
        folder = Path(task, split, f"class{label}")
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            pixels[:, :, label] //= 4  # each class is dark in a colour
            Image.fromarray(pixels).save(folder / f"{number}.png")
    measured(run_small(OWN + IMAGES), 3)


TRANSFORMERS = """
network:
  name: small_vit
  image_size: 16
  options: {patch_size: 8, depth: 2, heads: 2, width: 16, mlp_width: 24}
base:
  task: {class_path: Glyphs, init_args: {classes: K-N, train_samples: 80}}
  epochs: 1
  lr: 0.001
  optimizer: AdamW
expert: {epochs: 1, lr: 0.001, optimizer: AdamW}
methods:
  - {class_path: RegMean}
  - {class_path: HeadFit}
  - {class_path: Base}
  - {class_path: Refit}
  - {class_path: Distillation, init_args: {steps: 3, batch_size: 16, lr: 1.0e-3, augmentation: none}}
"""


def test_vision_transformers_with_every_method(run_small):
    rows = measured(run_small(TASKS + TRANSFORMERS), 5)
    assert set(rows["batchnorm"]) == {""}  # no BatchNorm, so no policy for it


JUDGED = {"good": "yes", "great": "yes", "bad": "no", "poor": "no"}
TEXTS = """
network: {name: hf/bert}
base: null
tasks:
  film:
    class_path: TextFile
    init_args: {train: film.csv, test: film.csv, max_tokens: 6, tokenizer: words.json}
  meal:
    class_path: TextFile
    init_args: {train: meal.csv, test: meal.csv, max_tokens: 6, tokenizer: words.json}
expert: {epochs: 12, lr: 0.01, optimizer: AdamW, batch_size: 16}
methods:
  - {class_path: Average}
  - {class_path: RegMean}
  - {class_path: HeadFit}
  - {class_path: Distillation, init_args: {steps: 3, batch_size: 16, lr: 1.0e-3, augmentation: none}}
"""


def test_texts_end_to_end(run_small, write_tokenizer):
    words = [*JUDGED, "film", "meal", "was"]
    write_tokenizer("words.json", words)
    for subject in ("film", "meal"):
        rows = [f"{subject} was {word},{label}" for word, label in JUDGED.items()]
        Path(f"{subject}.csv").write_text("\n".join(["text,label", *rows * 10]))
    bert = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(words) + 2,
        max_position_embeddings=6,
    )
    bert.save_pretrained("bert")
    rows = measured(run_small(TEXTS), 4)
    residuals = rows.groupby("method")["residual"].mean()
    assert residuals["head_fit"] < residuals["average"]  # the test texts are the training texts
    assert (rows["expert_accuracy"] > 0.9).all()


OWN_METHODS = """
code: [[0.5, 0.5]]
methods:
  - {class_path: Average, init_args: {batchnorm: average, label: average}}
  - {class_path: UserMethod, init_args: {function: mine.merge}}
  - {class_path: UserMethod, init_args: {function: mine.merge, options: {share: 0.9}, label: tilted}}
  - {class_path: UserMethod, init_args: {function: notebooks.foreign_methods.dare}}
  - {class_path: UserMethod, init_args: {function: notebooks.foreign_methods.distil, options: {steps: 5}}}
  - {class_path: notebooks.foreign_methods.TsvM}
"""


def test_a_method_of_the_user_s_own_is_a_line(run_small, trained):
    Path("mine.py").write_text(MINE)
    seed = run_small(trained + OWN_METHODS)
    rows = read_results(seed).query("decoder == 'linear'").set_index(["method", "task"])
    methods = set(rows.index.get_level_values("method"))
    assert methods == {"oracle", "average", "merge", "tilted", "dare", "distil", "tsv_m"}
    merged = rows.loc["merge"]
    assert (merged["nda"] == rows.loc["average"]["nda"]).all()
    assert (merged["batchnorm"] == "").all()
    assert (merged["residual"] != rows.loc["tilted"]["residual"]).all()
    made = load_provenance(seed / "coded/tilted.safetensors")["method"]
    assert made["options"]["options"] == {"share": 0.9}
