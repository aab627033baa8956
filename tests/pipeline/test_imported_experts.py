"""What is said of experts that were trained elsewhere, and which tokenizer their texts get."""

import re
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
from coin.errors import CoinWarning
from coin.networks.hub import _configuration

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
AVERAGE = [{"class_path": "Average"}]


def write(document: dict[str, Any]) -> None:
    _configuration.cache_clear()  # of another test's folder of the same name
    Path("imported.yaml").write_text(
        yaml.safe_dump({"name": "imported", "methods": AVERAGE, **document})
    )


@pytest.fixture
def guessing_experts() -> None:
    """Write an experiment with two experts that guess, near the base, whose classes are in another order."""
    names = {place: f"digit {9 - place}" for place in range(10)}
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, id2label=names)
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config)
    for place in ("base", "one", "two"):
        network.save_pretrained(place)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.001 * torch.randn_like(parameter)
    tasks = {}
    for seed, name in enumerate(("one", "two")):
        options = {"max_train": 60, "max_test": 20, "split_seed": seed}
        tasks[name] = {"class_path": "Digits", "init_args": options}
    write(
        {
            "network": {"name": "hf/base", "image_size": 16, "weights": "pretrained"},
            "tasks": tasks,
            "expert": {"checkpoints": {"one": "hf/one", "two": "hf/two"}},
            "calibration": {"samples_per_task": 8},
        }
    )


@pytest.mark.usefixtures("guessing_experts")
def test_distances_and_guessing_are_told_of_folders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(CoinWarning, match="found the expert 'one'") as warned:
        assert main(["run", "-c", "imported.yaml", "--only=coded-average"]) == 0
    first = str(warned[0].message)
    assert "training samples (chance is 10.0%)" in first
    assert "the task's classes are 0, 1, 2" in first
    lines = capsys.readouterr().err.splitlines()
    of_one = [line for line in lines if line.startswith("expert one: ")]
    accuracy = r"right on \d+\.\d% of \d+ training samples, images normalised with mean \[0\.4"
    assert re.search(accuracy, of_one[0])
    distance = re.search(r"its weights are (.*)% from the initialisation", of_one[1])
    assert distance is not None
    assert 0 < float(distance[1]) < 5


@pytest.mark.usefixtures("guessing_experts")
def test_an_expert_of_another_start_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    config = transformers.ViTConfig.from_pretrained("one")
    transformers.ViTForImageClassification(config).save_pretrained("two")
    with pytest.warns(
        CoinWarning, match=r"'two' \d+% of its weights from the initialisation, as unrelated"
    ):
        assert main(["run", "-c", "imported.yaml", "--only=two"]) == 0


def write_tokenizer(path: str, count: int) -> None:
    """Write a tokenizer of so many tokens: w0, w1, … and two special ones."""
    words = {"[PAD]": 0, "[UNK]": 1}
    for number in range(count - 2):
        words[f"w{number}"] = number + 2
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(path)


@pytest.fixture
def texts() -> dict[str, Any]:
    """An experiment on a table of texts, for a network of Hugging Face's that reads them."""
    config = transformers.BertConfig(**SMALL, vocab_size=12, max_position_embeddings=8)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    rows = [f"w{number % 9} w2,{'ab'[number % 2]}" for number in range(40)]
    Path("texts.csv").write_text("\n".join(["text,label", *rows]))
    task = {"class_path": "TextFile", "init_args": {"train": "texts.csv", "test": "texts.csv"}}
    document = {
        "network": {"name": "hf/bert", "image_size": 6, "weights": "pretrained"},
        "tasks": {"one": task, "two": task},
    }
    write(document)
    return document


@pytest.mark.usefixtures("texts")
def test_texts_are_cut_by_the_tokenizer_of_their_network(tmp_path: Path) -> None:
    write_tokenizer("bert/tokenizer.json", 11)
    task: Any = read_experiment(["-c", "imported.yaml"])[0].tasks["one"]
    assert task.tokenizer == str(tmp_path / "bert/tokenizer.json")
    assert task.splits.train[:][0].max() == 10


WITHOUT = "found no tokenizer.json of 'hf/bert', expected it for TextFile"
OTHER = "found a task whose tokenizer has 30 tokens for the network 'hf/bert', expected 11; set"
RUN = ["run", "-c", "imported.yaml"]
FIT = [
    "fit",
    "--model.network=hf/bert",
    "--model.image_size=6",
    "--data=TextFile",
    "--data.image_size=6",
]
FIT += ["--data.train=texts.csv", "--data.test=texts.csv", "--data.tokenizer=other.json"]
FIT += ["--trainer.max_epochs=1"]
MISTAKES = {
    "no tokenizer": ({}, RUN, WITHOUT),
    "another tokenizer": ({"tokenizer": "other.json"}, [*RUN, "--dry-run"], OTHER),
    "another tokenizer to fit": ({"tokenizer": "other.json"}, FIT, OTHER),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_texts_without_the_network_s_tokenizer_are_one_line(
    case: str, texts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options, command, expected = MISTAKES[case]
    texts["tasks"]["one"]["init_args"] |= options
    write(texts)
    write_tokenizer("other.json", 30)
    if options:
        write_tokenizer("bert/tokenizer.json", 11)
    assert main(command) == 2
    assert f"coin: error: {expected}" in capsys.readouterr().err


def test_columns_are_checked_before_anything_is_fetched(
    texts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    texts["tasks"]["one"]["init_args"]["label_column"] = "class"
    texts["network"]["name"] = "hf/some/id"
    texts["expert"] = {"checkpoints": {"two": "hf/other/id"}}
    write(texts)
    assert main(RUN) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with the columns text and class" in line
