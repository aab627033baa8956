import json
import sys
from hashlib import sha256
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from coin.data import Augmentation, Clinc, TextFile, clinc
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, DataError
from coin.files.atomic import sha256_of

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
    tasks.resize(64)  # of images
    assert tasks.calibration().inputs().shape == (12, 5)
    mixed = Tasks({"a": table(image_size=16), "b": synthetic()}, samples_per_task=4)
    with pytest.raises(DataError, match=r"found calibration samples of shapes .* expected one shape"):
        mixed.calibration().inputs()


def test_texts_are_not_augmented(table) -> None:
    with pytest.raises(
        ConfigurationError, match="found augmentation 'shift' for TextFile, whose samples are texts, expected none"
    ):
        table(augmentation="shift")
    tasks = Tasks({"a": table()}, samples_per_task=6)
    tasks.augmentation = Augmentation.crop
    with pytest.raises(ConfigurationError, match="found augmentation 'crop' for TextFile"):
        tasks.train_dataloader()


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
    for use in (task.setup,) if "tokenizer" in message else (task.check_files, task.setup):
        with pytest.raises(DataError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.fixture
def fleet(tmp_path: Path, tokenizer: str, monkeypatch):
    """Return a function that makes a task of two intents, from tiny files in place of upstream's."""
    monkeypatch.setattr(clinc, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    domains = {"meals": ["praise", "blame"], "films": ["play", "stop"]}
    rows = [("the good meal", "praise"), ("play the film", "play"), ("the bad meal", "blame")]
    data = {split: rows * times for split, times in {"train": 4, "val": 1, "test": 2}.items()}
    (tmp_path / "clinc150").mkdir()
    for name, content in {"domains.json": domains, "data_full.json": data}.items():
        path = tmp_path / "clinc150" / name
        path.write_text(json.dumps(content))
        monkeypatch.setitem(clinc.SHA256, name, sha256_of(path))

    def make(domain: str = "meals", **options):
        return Clinc(domain, root=str(tmp_path), max_tokens=4, tokenizer=tokenizer, **options)

    return make


@pytest.mark.parametrize("download", [True, False])
def test_a_domain_of_clinc_is_read_from_a_local_copy(fleet, download: bool) -> None:
    task = fleet(download=download)
    assert task.classes == ("praise", "blame")
    task.prepare_data()
    task.check_files()
    assert [len(part) for part in (task.splits.train, task.splits.validation, task.splits.test)] == [8, 2, 4]
    assert task.splits.test.images().tolist() == [[6, 2, 5, 0], [6, 3, 5, 0]] * 2
    assert task.splits.test.targets.tolist() == [0, 1] * 2
    with pytest.raises(ConfigurationError, match="found domain='cats', expected one of meals, films"):
        _ = fleet("cats").classes


def test_clinc_without_its_files_is_one_line(fleet, tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise URLError("no\nroute to host")

    monkeypatch.setattr(clinc, "download_url_to_file", fail)
    place = tmp_path / "clinc150"
    (place / "domains.json").write_text("{}")
    with pytest.raises(DataError, match=f"Clinc: .*no usable files in {place} .domains.json has another SHA-256"):
        _ = fleet().classes
    (place / "data_full.json").unlink()
    with pytest.raises(DataError, match=f"^Clinc: the download failed and .* {place} .*route to host.*download: false"):
        fleet().prepare_data()
    with pytest.raises(DataError, match=f"^Clinc: there are no usable files in {place} .*set download: true"):
        fleet(download=False).check_files()


def test_a_download_is_of_upstreams_commit_with_its_hash(fleet, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "clinc150/domains.json"
    content = path.read_bytes()
    path.unlink()

    def fetch(url, target, hash_prefix, progress):
        assert url.endswith("/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/domains.json")
        assert hash_prefix == sha256(content).hexdigest()
        Path(target).write_bytes(content)

    monkeypatch.setattr(clinc, "download_url_to_file", fetch)
    assert fleet("films").classes == ("play", "stop")
