import json
import subprocess
import sys
from pathlib import Path

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
    lines = [json.dumps({"label": label, "text": text}) for text, label in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def table(tmp_path: Path, tokenizer: str):
    """Return a function that makes the task of a CSV file to train and a JSON Lines file to test on."""
    train = tmp_path / "train.csv"
    test = tmp_path / "test.jsonl"
    lines = [f'"{text}",{label}' for text, label in ROWS]
    train.write_text("\n".join(["text,label", *lines]))
    test.write_text(as_lines(ROWS[:6]))

    def make(**options):
        small = {"max_tokens": 5, "batch_size": 4, "tokenizer": tokenizer}
        return TextFile(str(train), str(test), **small | options)

    return make


def test_texts_become_rows_of_tokens_cut_and_filled_up(table) -> None:
    task = table(max_tokens=4)
    texts = ["the good film", "good good good good good good", "tasty", ""]
    task.test.write_text(as_lines((text, "positive") for text in texts))
    rows, labels = task.splits.test[:]
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[6, 2, 4, 0], [2, 2, 2, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert labels.tolist() == [1, 1, 1, 1]
    assert task.vocabulary == len(WORDS)


def test_a_table_is_a_task_like_others(table) -> None:
    task = table()
    assert task.classes == ("negative", "positive")
    splits = task.splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [18, 2, 6]
    tokens, labels = task.on_after_batch_transfer(next(iter(task.train_dataloader())), 0)
    assert tokens.shape == (4, 5)
    is_positive = (tokens == WORDS.index("good")).any(1)
    assert labels.tolist() == is_positive.long().tolist()


def test_copies_read_the_files_once(table) -> None:
    given = table()
    splits = given.splits
    given.train.unlink()
    given.test.unlink()
    for seed in range(3):
        assert task_with(given, seed=seed).splits is splits
        assert task_with(given, seed=seed).classes == ("negative", "positive")


def test_columns_have_other_names_by_options(table) -> None:
    task = table(text_column="said", label_column="mood")
    task.train.write_text("mood,said\na,the film\nb,the meal\na,good\n")
    task.test.write_text('{"mood": "b", "said": "bad"}\n')
    assert task.classes == ("a", "b")
    assert task.splits.test[:][0].tolist() == [[3, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["train", "test", "tokenizer"])
def test_another_content_of_a_file_is_another_key(table, name) -> None:
    before = table().content_key()
    assert table().content_key() == before
    file = Path(getattr(table(), name))
    file.write_text(file.read_text() + " ")
    after = table().content_key()
    assert [each for each in before if after[each] != before[each]] == [name]


def test_calibration_samples_are_tokens_whatever_the_image_size(table) -> None:
    tasks = Tasks({"a": table(), "b": table(seed=1)}, samples_per_task=6, batch_size=5)
    tasks.resize(64)
    batches = list(tasks.calibration())
    assert [tuple(batch.shape) for batch in batches] == [(5, 5), (5, 5), (2, 5)]
    assert torch.equal(torch.cat(batches), tasks.calibration().inputs())


def test_texts_and_images_are_not_pooled(table, synthetic) -> None:
    mixed = Tasks({"a": table(image_size=16), "b": synthetic()}, samples_per_task=4)
    with pytest.raises(
        DataError, match=r"found calibration samples of shapes .* expected one shape"
    ):
        mixed.calibration().inputs()


def test_texts_are_not_augmented(table, tmp_path) -> None:
    expected = "for TextFile, whose samples are texts, expected none"
    with pytest.raises(ConfigurationError, match=f"found augmentation 'shift' {expected}"):
        table(augmentation="shift")
    training = Training(Tasks({"a": table()}, samples_per_task=6), tmp_path, seed=0)
    with pytest.raises(ConfigurationError, match=f"found augmentation 'crop' {expected}"):
        training.calibration(Distillation(augmentation="crop"))


BAD = {
    "no file": ("train", None, r"cannot read '.*train\.csv' \(.*No such file.*; expected CSV"),
    "no column": ("train", "words,label\na,x\nb,y\n", "'text'.*with the columns text and label"),
    "no JSON": ("test", "{", "expected CSV, or JSON Lines in .jsonl"),
    "a new label": ("test", as_lines([("a", "other")]), "the label 'other', which '.*lacks"),
    "no tokenizer": ("tokenizer", "{", "give a tokenizer.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_cannot_be_used_are_one_line(table, case) -> None:
    name, content, message = BAD[case]
    task = table()
    file = Path(getattr(task, name))
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        task.setup()
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(table, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ConfigurationError, match=r"no package tokenizers, .* pip install '\.\[text\]'"
    ):
        table().setup()


def test_clinc_is_written_as_tables(tmp_path: Path, tokenizer: str) -> None:
    rows = [
        ("the good, good meal", "praise"),
        ("play the film", "play"),
        ("the bad meal", "blame"),
        ("hm", "oos"),
    ]
    domains = tmp_path / "domains.json"
    domains.write_text(json.dumps({"meals": ["praise", "blame"], "films": ["play", "stop"]}))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"train": rows * 4, "val": rows, "test": rows * 2}))
    out = tmp_path / "out"
    subprocess.run([sys.executable, ROOT / "notebooks/clinc.py", texts, domains, out], check=True)
    assert sorted(path.name for path in out.iterdir()) == ["films", "meals"]
    files = [str(out / f"meals/{name}.csv") for name in ("train", "test")]
    task = TextFile(*files, max_tokens=4, tokenizer=tokenizer, validation_share=0.2)
    assert task.classes == ("blame", "praise")
    splits = task.splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 2, 4]
    tokens, labels = splits.test[:]
    assert tokens.tolist() == [[6, 2, 1, 2], [6, 3, 5, 0]] * 2
    assert labels.tolist() == [1, 0] * 2
