"""What is said of experts that were trained elsewhere, and which tokenizer their texts get."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from coin.cli import main
from coin.commands.run import read_experiment
from coin.errors import CoinWarning

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
RUN = ["run", "-c", "imported.yaml"]


def write(document):
    average = {"name": "imported", "methods": [{"class_path": "Average"}]}
    Path("imported.yaml").write_text(yaml.safe_dump(average | document))


def test_guessing_and_distances_are_told_of_folders(tmp_path, capsys):
    names = {place: f"digit {9 - place}" for place in range(10)}  # in another order
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, id2label=names)
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained("base")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.001 * torch.randn_like(parameter)
    network.save_pretrained("near")
    transformers.ViTForImageClassification(config).save_pretrained("other")
    tasks = {}
    for seed, name in enumerate(("one", "two")):
        options = {"max_train": 60, "max_test": 20, "split_seed": seed}
        tasks[name] = {"class_path": "Digits", "init_args": options}
    checkpoints = {"one": f"hf/{tmp_path}/near", "two": f"hf/{tmp_path}/other"}
    write(
        {
            "network": {"name": f"hf/{tmp_path}/base", "image_size": 16, "weights": "pretrained"},
            "tasks": tasks,
            "expert": {"checkpoints": checkpoints},
            "calibration": {"samples_per_task": 8},
        }
    )
    with pytest.warns(CoinWarning) as warned:
        assert main([*RUN, "--only=coded-average"]) == 0
    of_one, *_, of_two = [str(each.message) for each in warned]
    guesses = r"the expert 'one' .* training samples \(chance is 10.0%\).* classes are 0, 1, 2"
    assert re.search(guesses, of_one)
    unrelated = r"'two' \d+% of its weights from the initialisation, as unrelated"
    assert re.search(unrelated, of_two)
    lines = capsys.readouterr().err.splitlines()
    accuracy, distance = [line for line in lines if line.startswith("expert one: ")]
    normalised = r"right on \d+\.\d% of \d+ training samples, images normalised with mean \[0\.4"
    assert re.search(normalised, accuracy)
    found = re.search(r"its weights are (.*)% from the initialisation", distance)
    assert found is not None
    assert 0 < float(found[1]) < 5


@pytest.fixture
def texts(tmp_path):
    """An experiment on a table of texts, for a network of Hugging Face's that reads them."""
    config = transformers.BertConfig(**SMALL, vocab_size=12, max_position_embeddings=8)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    rows = [f"w{number % 9} w2,{'ab'[number % 2]}" for number in range(40)]
    Path("texts.csv").write_text("\n".join(["text,label", *rows]))
    task = {"class_path": "TextFile", "init_args": {"train": "texts.csv", "test": "texts.csv"}}
    network = {"name": f"hf/{tmp_path}/bert", "image_size": 6, "weights": "pretrained"}
    return {"network": network, "tasks": {"one": task, "two": task}}


WORDS = [f"w{number}" for number in range(28)]


def test_texts_are_cut_by_the_tokenizer_of_their_network(texts, write_tokenizer, tmp_path):
    write(texts)
    write_tokenizer("bert/tokenizer.json", WORDS[:9])
    task = read_experiment(["-c", "imported.yaml"])[0].tasks["one"]
    assert task.tokenizer == str(tmp_path / "bert/tokenizer.json")
    assert task.splits.train[:][0].max() == 10


OTHER = "found a task whose tokenizer has 30 tokens for the network 'hf/"
SMALL_RESNET = "--network={name: small_resnet, weights: null}"
DISTILLATION = "--methods=[{class_path: Distillation}]"
FIT = """fit --model.network=hf/bert --model.image_size=6 --trainer.max_epochs=1 --data=TextFile
    --data.image_size=6 --data.train=texts.csv --data.test=texts.csv --data.tokenizer=30.json"""
MISTAKES = {
    "no tokenizer": (None, RUN, "found no tokenizer.json of 'hf/"),
    "another tokenizer": ("30.json", [*RUN, "--dry-run"], OTHER),
    "another tokenizer to fit": ("30.json", FIT.split(), OTHER),
    "a network of images": (
        "11.json",
        [*RUN, SMALL_RESNET],
        "found a task of texts for the network 'small_resnet', expected images",
    ),
    "a task of images": (
        "11.json",
        [*RUN, "--tasks.two={class_path: Digits}"],
        "found a task of images for the network 'hf/",
    ),
    "an augmentation": (
        "11.json",
        [*RUN, DISTILLATION],
        "found augmentation 'shift' for TextFile, whose samples are texts",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_texts_that_the_network_does_not_read_are_one_line(case, texts, write_tokenizer, capsys):
    tokenizer, command, expected = MISTAKES[case]
    for count in (11, 30):
        write_tokenizer(f"{count}.json", WORDS[: count - 2])
    texts["tasks"]["one"]["init_args"]["tokenizer"] = tokenizer
    write(texts)
    assert main(command) == 2
    assert f"coin: error: {expected}" in capsys.readouterr().err


def test_columns_are_checked_before_anything_is_fetched(texts, capsys):
    texts["tasks"]["one"]["init_args"]["label_column"] = "class"
    texts["network"]["name"] = "hf/some/id"
    texts["expert"] = {"checkpoints": {"two": "hf/other/id"}}
    write(texts)
    assert main(RUN) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with the columns text and class" in line
