import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from coin.data import TextFile
from coin.data.tasks import Tasks, task_with
from coin.distillation import Distillation
from coin.errors import ConfigurationError, DataError
from coin.pipeline.steps.merge import Training

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "meal", "the"]
ROWS = [("the good film", "positive"), ("bad, bad meal", "negative")] * 10
ROOT = Path(__file__).parents[2]


def as_lines(rows):
    """Return texts and labels as JSON Lines."""
    return pd.DataFrame(rows, columns=["text", "label"]).to_json(orient="records", lines=True)


@pytest.fixture
def table(tmp_path):
    """Return a function that makes the task of a CSV file to train and a JSON Lines file to test on."""
    model = WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pd.DataFrame(ROWS, columns=["text", "label"]).to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "test.jsonl").write_text(as_lines(ROWS[:6]))

    def make(**options):
        small = {"max_tokens": 5, "batch_size": 5, "tokenizer": f"{tmp_path}/tokenizer.json"}
        return TextFile(f"{tmp_path}/train.csv", f"{tmp_path}/test.jsonl", **small | options)

    return make


def test_texts_become_rows_of_tokens_cut_and_filled_up(table):
    task = table(max_tokens=4)
    texts = ["the good film", "good good good good good good", "tasty", ""]
    task.test.write_text(as_lines((text, "positive") for text in texts))
    rows, labels = task.splits.test[:]
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[6, 2, 4, 0], [2, 2, 2, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert labels.tolist() == [1, 1, 1, 1]
    assert task.vocabulary == len(WORDS)


def test_copies_read_the_files_once_and_train_on_batches_of_them(table):
    given = table()
    splits = given.splits
    assert [len(part) for part in splits] == [18, 6, 2]
    given.train.unlink()
    given.test.unlink()
    copy = task_with(given, seed=1)
    assert copy.splits is splits
    assert copy.classes == ("negative", "positive")
    tokens, labels = copy.on_after_batch_transfer(next(iter(copy.train_dataloader())), 0)
    assert tokens.shape == (5, 5)
    is_positive = (tokens == WORDS.index("good")).any(1)
    assert torch.equal(labels.bool(), is_positive)


def test_columns_have_other_names_by_options(table):
    task = table(text_column="said", label_column="mood")
    task.train.write_text("mood,said\na,the film\nb,the meal\na,good\n")
    task.test.write_text('{"mood": "b", "said": "bad"}\n')
    assert task.classes == ("a", "b")
    assert task.splits.test[:][0].tolist() == [[3, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["train", "test", "tokenizer"])
def test_another_content_of_a_file_is_another_key(table, name):
    task = table()
    before = task.content_key()
    file = Path(getattr(task, name))
    file.write_text(file.read_text() + " ")
    after = table().content_key()
    assert dict(after.items() - before.items()) == {name: after[name]}


def test_calibration_samples_are_tokens_whatever_the_image_size(table):
    tasks = Tasks({"a": table(), "b": table(seed=1)}, samples_per_task=6, batch_size=5)
    tasks.resize(64)
    batches = list(tasks.calibration())
    assert [tuple(batch.shape) for batch in batches] == [(5, 5), (5, 5), (2, 5)]
    assert torch.equal(torch.cat(batches), tasks.calibration().inputs())


def test_texts_and_images_are_not_pooled(table, synthetic):
    mixed = Tasks({"a": table(image_size=16), "b": synthetic()}, samples_per_task=4)
    message = "found calibration samples of shapes .* expected one shape"
    with pytest.raises(DataError, match=message):
        mixed.calibration().inputs()


def test_texts_are_not_augmented(table, tmp_path):
    expected = "for TextFile, whose samples are texts, expected none"
    with pytest.raises(ConfigurationError, match=f"found augmentation 'shift' {expected}"):
        table(augmentation="shift")
    training = Training(Tasks({"a": table()}, samples_per_task=6), tmp_path, seed=0)
    with pytest.raises(ConfigurationError, match=f"found augmentation 'crop' {expected}"):
        training.calibration(Distillation(augmentation="crop"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train", None, r"cannot read '.*train\.csv' \(.*No such file.*; expected CSV"),
        ("train", "words,label\na,x\nb,y\n", "'text'.*with the columns text and label"),
        ("test", "{", "expected CSV, or JSON Lines in .jsonl"),
        ("test", as_lines([("a", "other")]), "the label 'other', which '.*lacks"),
        ("tokenizer", "{", "give a tokenizer.json"),
    ],
    ids=["no file", "no column", "no JSON", "a new label", "no tokenizer"],
)
def test_files_that_cannot_be_used_are_one_line(file, content, message, table):
    task = table()
    path = Path(getattr(task, file))
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        task.setup()
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r"no package tokenizers, .* pip install '\.\[text\]'"
    with pytest.raises(ConfigurationError, match=message):
        table().setup()


def test_clinc_is_written_as_tables(tmp_path):
    praise, blame = ["the good, good meal", "praise"], ["the bad meal", "blame"]
    rows = [praise, ["play the film", "play"], blame, ["hm", "oos"]]
    (tmp_path / "domains").write_text('{"meals": ["praise", "blame"], "films": ["play", "stop"]}')
    (tmp_path / "texts").write_text(json.dumps({"train": rows * 4, "val": rows, "test": rows * 2}))
    command = [sys.executable, ROOT / "notebooks/clinc.py", "texts", "domains", "out"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["films", "meals"]
    for name, repeats in (("train", 5), ("test", 2)):
        table = pd.read_csv(tmp_path / f"out/meals/{name}.csv")
        assert table[["text", "label"]].to_numpy().tolist() == [praise, blame] * repeats
