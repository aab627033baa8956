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
        small = {"max_tokens": 5, "batch_size": 4, "eval_batch_size": 4, "tokenizer": tokenizer}
        return TextFile(str(train), str(test), **{**small, **options})

    return make


def test_texts_become_rows_of_tokens_cut_and_filled_up(table, monkeypatch) -> None:
    task = table(max_tokens=4)
    texts = ["the good film", "good good good good good good", "tasty", ""]
    task.test.write_text("".join(json.dumps({"label": "positive", "text": text}) + "\n" for text in texts))
    rows, _ = task.splits.test[:]
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[6, 2, 4, 0], [2, 2, 2, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match=r"no package tokenizers, .* pip install '\.\[text\]'"):
        table().setup()


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
    assert read == ["train.csv", "test.jsonl"]
    before = given.content_key()
    assert table().content_key() == before
    given.test.write_text('{"text": "good", "label": "positive"}\n')
    assert given.content_key() != before


def test_calibration_yields_tokens_pools_and_tokenises_anew(table, synthetic) -> None:
    tasks = Tasks({"a": table(), "b": table(seed=1)}, samples_per_task=6, batch_size=5)
    calibration = tasks.calibration()
    assert [tuple(batch.shape) for batch in calibration] == [(5, 5), (5, 5), (2, 5)]
    assert torch.cat(list(calibration)).equal(calibration.inputs())
    tasks.resize(64)  # of images
    assert tasks.calibration().inputs().shape == (12, 5)
    mixed = Tasks({"a": table(image_size=16), "b": synthetic()}, samples_per_task=4)
    with pytest.raises(DataError, match=r"found calibration samples of shapes .* expected one shape"):
        mixed.calibration().inputs()


def test_texts_are_not_augmented(table, tmp_path) -> None:
    with pytest.raises(
        ConfigurationError, match="found augmentation 'shift' for TextFile, whose samples are texts, expected none"
    ):
        table(augmentation="shift")
    training = Training(Tasks({"a": table()}, samples_per_task=6), tmp_path, seed=0)
    with pytest.raises(ConfigurationError, match="found augmentation 'crop' for TextFile"):
        training.calibration(Distillation(augmentation="crop"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: task.train.unlink(), r"cannot read '.*train\.csv' \(.*No such file.*; expected CSV"),
        (lambda task: task.train.write_text("words,label\na,x\nb,y\n"), "'text'.*with the columns text and label"),
        (lambda task: task.test.write_text("{"), "expected CSV, or JSON Lines in .jsonl"),
        (lambda task: task.test.write_text('{"text": "a", "label": "other"}\n'), "the label 'other', which '.*lacks"),
        (lambda task: Path(task.tokenizer).write_text("{"), "give a tokenizer.json"),
    ],
)
def test_bad_tables_are_one_line(table, change, message) -> None:
    task = table()
    change(task)
    with pytest.raises(DataError, match=message) as caught:
        task.setup()
    assert "\n" not in str(caught.value)


def test_clinc_is_written_as_tables(tmp_path: Path, tokenizer: str) -> None:
    domains = {"meals": ["praise", "blame"], "films": ["play", "stop"]}
    rows = [("the good, good meal", "praise"), ("play the film", "play"), ("the bad meal", "blame"), ("hm", "oos")]
    texts = {split: rows * times for split, times in {"train": 4, "val": 1, "test": 2}.items()}
    (tmp_path / "domains.json").write_text(json.dumps(domains))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).parents[2] / "notebooks/clinc.py"
    command = [sys.executable, script, *(tmp_path / name for name in ("texts.json", "domains.json", "out"))]
    subprocess.run(command, check=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["films", "meals"]
    train, test = (str(tmp_path / f"out/meals/{name}.csv") for name in ("train", "test"))
    task = TextFile(train, test, max_tokens=4, tokenizer=tokenizer, validation_share=0.2)
    assert task.classes == ("blame", "praise")
    assert [len(part) for part in (task.splits.train, task.splits.validation, task.splits.test)] == [8, 2, 4]
    tokens, labels = task.splits.test[:]
    assert tokens.tolist() == [[6, 2, 1, 2], [6, 3, 5, 0]] * 2
    assert labels.tolist() == [1, 0] * 2
