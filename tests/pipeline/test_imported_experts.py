"""What is said of experts that were trained elsewhere, and which tokenizer their texts get."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from coin.cli import main
from coin.commands.run import read_experiment
from coin.data import TextFile
from coin.errors import CoinWarning
from coin.networks.hub import _configuration

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
DIGITS = {"class_path": "Digits", "init_args": {"max_train": 60, "max_test": 20}}
NAMES = [f"digit {digit}" for digit in range(9, -1, -1)]  # another order than the task's


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    """Two experts that guess, near the base but for their heads, and the base."""
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, id2label=dict(enumerate(NAMES)))
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config)
    for place in ("base", "one", "two"):
        network.save_pretrained(tmp_path / place)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.001 * torch.randn_like(parameter)
    _configuration.cache_clear()
    return {place: f"hf/{tmp_path / place}" for place in ("one", "two")}


def write(document: dict[str, Any]) -> str:
    Path("imported.yaml").write_text(yaml.safe_dump(document))
    return "imported.yaml"


def of_experts(experts: dict[str, str], base: Path) -> dict[str, Any]:
    """Return the sections of an experiment with these experts."""
    network = {"name": f"hf/{base}", "image_size": 16, "weights": "pretrained"}
    other = {**DIGITS, "init_args": {**DIGITS["init_args"], "split_seed": 1}}
    return {
        "name": "imported",
        "network": network,
        "tasks": {"one": DIGITS, "two": other},
        "expert": {"checkpoints": experts},
        "methods": [{"class_path": "Average"}],
        "calibration": {"samples_per_task": 8},
    }


def test_distances_and_guessing_are_told_of_folders(
    experts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(of_experts(experts, tmp_path / "base"))
    with pytest.warns(CoinWarning, match="found the expert") as told:
        assert main(["run", "-c", file, "--only=coded-average"]) == 0
    first = next(str(each.message) for each in told if "'one'" in str(each.message))
    assert "training samples (chance is 10.0%)" in first
    assert "the task's classes are 0, 1, 2" in first
    said = capsys.readouterr().err
    assert re.search(r"expert one: right on \d+\.\d% of \d+ training samples, images normalised with mean \[0\.4", said)
    lines = [line for line in said.splitlines() if "its weights are" in line]
    assert [line.partition(":")[0] for line in lines] == ["expert one", "expert two"]
    assert all(line.endswith("% from the initialisation") for line in lines)


@pytest.fixture
def write_tokenizer() -> Callable[[Path, int], None]:
    def write_words(path: Path, count: int) -> None:
        words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(count - 2))])}
        model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        model.pre_tokenizer = Whitespace()
        model.save(str(path))

    return write_words


def test_texts_of_a_folder_s_network_are_cut_by_its_own_tokenizer(
    tmp_path: Path, write_tokenizer: Callable[[Path, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.BertConfig(**SMALL, vocab_size=12, max_position_embeddings=8)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    _configuration.cache_clear()
    rows = "".join(f"w{i % 9} w2,{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "texts.csv").write_text(f"text,label\n{rows}")
    task = {"class_path": "TextFile", "init_args": {"train": "texts.csv", "test": "texts.csv"}}
    document: dict[str, Any] = {
        "name": "texts",
        "network": {"name": f"hf/{tmp_path / 'bert'}", "image_size": 6, "weights": "pretrained"},
        "tasks": {"one": task, "two": task},
        "methods": [{"class_path": "Average"}],
    }
    command = ["run", "-c", write(document), "--dry-run"]
    assert main(command) == 2
    assert "found no tokenizer.json of 'hf/" in capsys.readouterr().err
    write_tokenizer(tmp_path / "bert/tokenizer.json", 11)
    experiment = read_experiment(["-c", "imported.yaml"])[0]
    found = experiment.tasks["one"]
    assert isinstance(found, TextFile)
    assert found.tokenizer == str(tmp_path / "bert/tokenizer.json")
    assert found.splits.train[:][0].max() < 11
    write_tokenizer(tmp_path / "other.json", 30)
    task["init_args"]["tokenizer"] = "other.json"
    capsys.readouterr()
    write(document)
    assert main(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: found a task whose tokenizer has 30 tokens for the network 'hf/")
    assert "expected 11; set the task's tokenizer=" in line
    fit = ["fit", f"--model.network={document['network']['name']}", "--model.image_size=6", "--data=TextFile"]
    fit += [f"--data.{name}={value}" for name, value in task["init_args"].items()]
    assert main([*fit, "--data.image_size=6", "--trainer.max_epochs=1"]) == 2
    assert "found a task whose tokenizer has 30 tokens" in capsys.readouterr().err
