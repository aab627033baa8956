"""``coin run`` of networks that people bring: of timm, of Hugging Face, a class and methods of their own."""

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
CLOSED_FORMS: list[Any] = [{"class_path": name} for name in ("Average", "Coin", "Refit")]
SHORT = {"steps": 3, "batch_size": 16, "lr": 1e-3, "augmentation": "none"}
DISTILLATION = {"class_path": "Distillation", "init_args": SHORT}
DIGITS = {"class_path": "Digits", "init_args": {"max_train": 80, "max_test": 40}}
LETTERS = {
    "class_path": "Glyphs",
    "init_args": {"classes": "A-D", "train_per_class": 20, "test_per_class": 9},
}
TASKS = {"digits": DIGITS, "letters": LETTERS}


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the examples, and forget this test's folder after it: another's has a module of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def measured(seed: Path, methods: int) -> pd.DataFrame:
    """Check that every method was measured with every decoder and made a network of its own; return their rows."""
    frame = read_results(seed)
    assert (frame[frame["method"] == "oracle"]["nda"] == 1).all()
    rows = frame[~frame["method"].isin(["oracle", "none"])]
    by_method = rows.groupby("method")
    assert by_method["decoder"].nunique().to_list() == [3] * methods
    assert rows["residual"].gt(0).all()
    assert by_method["residual"].mean().round(9).nunique() == methods
    return rows


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
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 8, 12, 16]}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2}
SMALL_VIT = {"patch_size": 8, "depth": 2, "heads": 2, "width": 16, "mlp_width": 24}
NETWORKS: dict[str, dict[str, Any]] = {
    "timm's ResNet50": {"name": "timm/resnet50", "image_size": 32, "options": RESNET},
    "timm's ViT": {"name": "timm/vit_tiny_patch16_224", "image_size": 32, "options": VIT},
    "Hugging Face's ResNet": {"name": "hf/model", "image_size": 32},
    "a class of one's own": {"name": "ownclass.Small", "image_size": 20, "options": {"width": 6}},
}


def write_images() -> dict[str, Any]:
    """Write two folders of images of three classes, each dark in a colour, and return the tasks."""
    draw = np.random.default_rng(0)
    for task, split, label, number in product(
        ("one", "two"), ("train", "test"), range(3), range(12)
    ):
        pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        pixels[:, :, label] //= 4
        folder = Path(task, split, f"class{label}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return {
        task: {"class_path": "ImageFolder", "init_args": {"root": task}} for task in ("one", "two")
    }


@pytest.mark.parametrize("case", NETWORKS)
def test_image_classifiers_of_others(case: str, run_small: Run) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetConfig(**sizes).save_pretrained("model")
    Path("ownclass.py").write_text(OWN_CLASS)
    tasks = write_images() if case == "a class of one's own" else TASKS
    expert = {"epochs": 1, "lr": 0.01, "batch_size": 16}
    seed = run_small(
        network=NETWORKS[case], tasks=tasks, base=None, expert=expert, methods=CLOSED_FORMS
    )
    measured(seed, 3)


def test_vision_transformers_with_every_method(run_small: Run) -> None:
    adam = {"epochs": 1, "lr": 0.001, "optimizer": "AdamW"}
    base_task = {"class_path": "Glyphs", "init_args": {"classes": "K-N", "train_samples": 80}}
    names = ("RegMean", "HeadFit", "Base", "Refit")
    methods = [*({"class_path": name} for name in names), DISTILLATION]
    network = {"name": "small_vit", "image_size": 16, "options": SMALL_VIT}
    seed = run_small(
        network=network, base={"task": base_task, **adam}, tasks=TASKS, expert=adam, methods=methods
    )
    assert set(measured(seed, 5)["batchnorm"]) == {""}  # no BatchNorm, so no policy for it


WORDS = ["[PAD]", "[UNK]", "good", "great", "bad", "poor", "film", "meal", "was"]
JUDGED = {"good": "yes", "great": "yes", "bad": "no", "poor": "no"}


@pytest.fixture
def texts() -> dict[str, Any]:
    """Sections of an experiment on two tables of sentences, in the working folder; one word decides."""
    words = {word: place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save("words.json")
    tasks = {}
    for subject in ("film", "meal"):
        rows = [f"{subject} was {word},{label}" for word, label in JUDGED.items()]
        Path(f"{subject}.csv").write_text("\n".join(["text,label", *rows * 10]))
        file = f"{subject}.csv"
        options = {"train": file, "test": file, "max_tokens": 6, "tokenizer": "words.json"}
        tasks[subject] = {"class_path": "TextFile", "init_args": options}
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    bert = transformers.BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=6)
    bert.save_pretrained("bert")
    names = ("Average", "RegMean", "HeadFit")
    return {
        "network": {"name": "hf/bert"},
        "base": None,
        "tasks": tasks,
        "expert": {"epochs": 12, "lr": 0.01, "optimizer": "AdamW", "batch_size": 16},
        "methods": [*({"class_path": name} for name in names), DISTILLATION],
    }


def test_texts_end_to_end(texts: dict[str, Any], run_small: Run) -> None:
    rows = measured(run_small(**texts), 4)
    residuals = rows.groupby("method")["residual"].mean()
    assert residuals["head_fit"] < residuals["average"]  # the test texts are the training texts
    assert (rows["expert_accuracy"] > 0.9).all()


MISTAKES = {
    "--network={name: small_resnet}": "found a task of texts for the network 'small_resnet', expected images",
    "--tasks.meal={class_path: Digits}": "found a task of images for the network 'hf/bert', expected texts",
    "--methods=[{class_path: Distillation}]": "found augmentation 'shift' for TextFile, whose samples are texts",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_data_that_the_network_does_not_read_are_one_line(
    option: str, texts: dict[str, Any], run_small: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        run_small(option, **texts)
    assert MISTAKES[option] in capsys.readouterr().err.splitlines()[-1]
    assert not Path("tiny").exists()


MINE = """
def merge(experts, calibration, share=0.5):
    first, second = experts
    state = second.state_dict()
    for name, tensor in first.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(share).add_((1 - share) * state[name])
    return first

def fail(experts, calibration):
    return 1 / 0
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
    rows = read_results(seed).query("decoder == 'linear'").set_index(["method", "task"])
    methods = set(rows.index.get_level_values("method"))
    assert methods == {"oracle", "average", "merge", "tilted", "dare", "distil", "tsv_m"}
    assert (rows.loc["merge"]["nda"] == rows.loc["average"]["nda"]).all()
    assert (rows.loc["merge"]["batchnorm"] == "").all()
    assert (rows.loc["tilted"]["residual"] != rows.loc["merge"]["residual"]).all()
    made = load_provenance(seed / "coded/tilted.safetensors")["method"]
    assert made["options"]["options"] == {"share": 0.9}
    Path("mine.py").write_text(f"{MINE}\nCHANGED = True\n")
    sys.modules.pop("mine", None)
    capsys.readouterr()
    run_small(**trained, methods=OWN_METHODS, code=[[0.5, 0.5]])
    lines = capsys.readouterr().err
    assert "seed 0: merge: merging" in lines
    assert "dare: up to date" in lines


def test_what_it_raises_keeps_its_traceback_and_one_that_is_not_there_is_one_line(
    run_small: Run, trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(MINE)
    with pytest.raises(AssertionError):
        run_small(**trained, methods=[user("mine.merged")])
    expected = "found function 'mine.merged', expected the import path of a Python function"
    assert f"coin: error: {expected}" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ZeroDivisionError):
        run_small(**trained, methods=[user("mine.fail")])
