"""``coin run`` of networks that people bring: of timm, of Hugging Face, a class and methods of their own."""

import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from coin.files.safetensors import load_provenance
from coin.reporting import read_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]

Run = Callable[..., Path]
METHODS: list[Any] = [{"class_path": name} for name in ("Average", "Coin", "Refit")]
LETTERS = {
    "class_path": "Glyphs",
    "init_args": {"classes": "A-D", "train_per_class": 20, "test_per_class": 9},
}
TASKS = {
    "digits": {"class_path": "Digits", "init_args": {"max_train": 80, "max_test": 40}},
    "letters": LETTERS,
}
DISTILLATION = {"steps": 3, "batch_size": 16, "lr": 1e-3, "augmentation": "none"}


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the examples, and forget this test's folder after it: another's has a module of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def checked(seed: Path, methods: int, decoders: int) -> pd.DataFrame:
    """Check that every method was measured with every decoder and made a network of its own; return their rows."""
    frame = read_results(seed)
    assert (frame[frame.method == "oracle"].nda == 1).all()
    measured = frame[~frame.method.isin(["oracle", "none"])]
    assert measured.method.nunique() == methods
    assert (measured.groupby("method").decoder.nunique() == decoders).all()
    assert all(math.isfinite(value) and value > 0 for value in measured.residual)
    assert len(set(measured.groupby("method").residual.mean().round(9))) == methods
    return measured


RESNET50 = {
    "name": "timm/resnet50",
    "image_size": 32,
    "options": {"layers": [1, 1, 1, 1], "channels": [4, 8, 12, 16]},
}
VIT = {
    "name": "timm/vit_tiny_patch16_224",
    "image_size": 32,
    "options": {"patch_size": 8, "embed_dim": 24, "depth": 2},
}
HEAD_ALONE = {"overrides": {"letters": {"trainable": ["head"], "freeze_batchnorm": True}}}


@pytest.mark.parametrize(
    ("network", "options"),
    [(RESNET50, HEAD_ALONE), (VIT, {}), ({"name": "hf/model", "image_size": 32}, {})],
    ids=["timm's ResNet50", "timm's ViT", "Hugging Face's ResNet"],
)
def test_image_classifiers_of_other_libraries(network: Any, options: Any, run_small: Run) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    config.save_pretrained("model")
    expert = {"epochs": 1, "lr": 0.01, "batch_size": 32, **options}
    checked(
        run_small(network=network, tasks=TASKS, base=None, expert=expert, methods=METHODS), 3, 3
    )


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


def test_a_class_of_the_users_own_on_folders_of_images(run_small: Run, tmp_path: Path) -> None:
    Path("ownclass.py").write_text(OWN_CLASS)
    draw = np.random.default_rng(0)
    for task, split, label in product(("one", "two"), ("train", "test"), range(3)):
        folder = tmp_path / task / split / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(12):
            pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            pixels[:, :, label] //= 4
            Image.fromarray(pixels).save(folder / f"{index}.png")
    tasks = {
        task: {"class_path": "ImageFolder", "init_args": {"root": task}} for task in ("one", "two")
    }
    network = {"name": "ownclass.Small", "image_size": 20, "options": {"width": 6}}
    expert = {"epochs": 2, "lr": 0.01, "batch_size": 16}
    checked(
        run_small(network=network, tasks=tasks, base=None, expert=expert, methods=METHODS), 3, 3
    )


def test_vision_transformers_with_every_method_and_decoder(run_small: Run) -> None:
    options = {"patch_size": 8, "depth": 2, "heads": 2, "width": 16, "mlp_width": 24}
    adam = {"epochs": 1, "lr": 0.001, "optimizer": "AdamW"}
    base = {
        "task": {"class_path": "Glyphs", "init_args": {"classes": "K-N", "train_samples": 80}},
        **adam,
    }
    names = ("RegMean", "HeadFit", "Base", "Refit")
    methods = [{"class_path": name} for name in names]
    methods.append({"class_path": "Distillation", "init_args": DISTILLATION})
    network = {"name": "small_vit", "image_size": 16, "options": options}
    decoders = ["linear", "ridge", "feature_ridge"]
    run = run_small(
        network=network, base=base, tasks=TASKS, expert=adam, methods=methods, decoders=decoders
    )
    assert set(checked(run, 5, 3).batchnorm) == {""}  # no BatchNorm, so no policy for it


WORDS = [
    "[PAD]",
    "[UNK]",
    *["good", "great", "bad", "poor", "film", "meal", "actor", "soup", "the", "a", "was"],
]


@pytest.fixture
def texts() -> dict[str, Any]:
    """Sections of an experiment on two tables of sentences, in the working folder."""
    model = Tokenizer(
        WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    model.pre_tokenizer = Whitespace()
    model.save("words.json")
    tasks = {}
    for name, subjects in {"films": ("film", "actor"), "meals": ("meal", "soup")}.items():
        judged = (("good", "yes"), ("great", "yes"), ("bad", "no"), ("poor", "no"))
        every = product(("the", "a", ""), subjects, judged)
        rows = [
            f"{article} {subject} was {word},{label}" for article, subject, (word, label) in every
        ]
        Path(f"{name}.csv").write_text("text,label\n" + "\n".join(rows * 2) + "\n")
        table = {
            "train": f"{name}.csv",
            "test": f"{name}.csv",
            "max_tokens": 6,
            "tokenizer": "words.json",
        }
        tasks[name] = {"class_path": "TextFile", "init_args": table}
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    transformers.BertConfig(**sizes, vocab_size=13, max_position_embeddings=6).save_pretrained(
        "bert"
    )
    methods = [{"class_path": name} for name in ("Average", "RegMean", "HeadFit")]
    methods.append({"class_path": "Distillation", "init_args": DISTILLATION})
    network = {"name": "hf/bert"}
    expert = {"epochs": 12, "lr": 0.01, "optimizer": "AdamW", "batch_size": 16}
    return {"network": network, "base": None, "tasks": tasks, "expert": expert, "methods": methods}


def test_texts_end_to_end(texts: dict[str, Any], run_small: Run) -> None:
    measured = checked(run_small(**texts), 4, 3)
    residuals = measured.groupby("method").residual.mean()
    assert (
        residuals.head_fit < residuals.average
    )  # in sample: the test texts are the training texts
    assert (measured.expert_accuracy > 0.9).all()  # one word decides


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            "--network={name: small_resnet}",
            "found a task of texts for the network 'small_resnet', expected images",
        ),
        (
            "--tasks.meals={class_path: Digits}",
            "found a task of images for the network 'hf/bert', expected texts",
        ),
        (
            "--methods=[{class_path: Distillation}]",
            "found augmentation 'shift' for TextFile, whose samples are texts",
        ),
    ],
)
def test_data_that_the_network_does_not_read_are_one_line(
    wrong: str, told: str, texts: dict[str, Any], run_small: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        run_small(wrong, **texts)
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("tiny").exists()


MINE = """
def merge(experts, calibration, share=0.5):
    first, second = experts
    state = second.state_dict()
    for name, tensor in first.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(share).add_((1 - share) * state[name])
    return first
"""


def user(function: str, **options: Any) -> dict[str, Any]:
    return {"class_path": "UserMethod", "init_args": {"function": function, **options}}


OWN_METHODS = [
    {"class_path": "Average", "init_args": {"batchnorm": "average", "label": "average"}},
    user("mine.merge"),
    user("mine.merge", options={"share": 0.9}, label="tilted"),
    user("notebooks.foreign_methods.dare"),
    user("notebooks.foreign_methods.distil", options={"steps": 5}),
    {"class_path": "notebooks.foreign_methods.TsvM"},
]


def test_a_method_of_the_users_own_is_a_line_and_is_made_anew_when_its_source_changes(
    run_small: Run, trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(MINE)  # in the working folder
    seed = run_small(**trained, methods=OWN_METHODS, code=[[0.5, 0.5]])
    frame = read_results(seed)
    assert set(frame.method) == {
        "none",
        "oracle",
        "average",
        "merge",
        "tilted",
        "dare",
        "distil",
        "tsv_m",
    }
    rows = frame[frame.decoder == "linear"].set_index(["method", "task"])
    assert (rows.loc["merge"].nda == rows.loc["average"].nda).all()
    assert (rows.loc["tilted"].residual != rows.loc["merge"].residual).all()
    assert (rows.loc["dare"].merge_seconds > 0).all()
    assert (rows.loc["merge"].batchnorm == "").all()
    assert load_provenance(seed / "coded/tilted.safetensors")["method"]["options"]["options"] == {
        "share": 0.9
    }
    Path("mine.py").write_text(MINE + "CHANGED = True\n")
    sys.modules.pop("mine", None)
    capsys.readouterr()
    run_small(**trained, methods=OWN_METHODS, code=[[0.5, 0.5]])
    said = capsys.readouterr().err
    assert "seed 0: merge: merging" in said
    assert "dare: up to date" in said


def test_what_it_raises_keeps_its_traceback_and_one_that_is_not_there_is_one_line(
    run_small: Run, trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text("def merge(experts, calibration, share=1):\n    return share / 0\n")
    with pytest.raises(AssertionError):
        run_small(**trained, methods=[user("mine.merged")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "coin: error: found function 'mine.merged', expected the import path of a Python function"
    )
    with pytest.raises(ZeroDivisionError):
        run_small(**trained, methods=[user("mine.merge")])
