"""A step: the key that it has before it runs, its folder, and its lock."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from PIL import Image

from coin.core.versions import versions
from coin.data import MNIST, ImageFolder
from coin.errors import FileError
from coin.pipeline.options import task_config
from coin.pipeline.run import execute
from coin.pipeline.step import DONE, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class Write(Step):
    """Writes its option, behind what its needs have written."""

    parts: tuple["Write", ...] = ()
    work: Callable[[], None] = lambda: None

    def run(self):
        self.work()
        parts = [part.output.read_text() for part in self.parts]
        self.output.write_text("".join([*parts, self.config.get("option", "")]))


@dataclass(frozen=True, eq=False, kw_only=True)
class NewerWrite(Write):
    """It makes other numbers."""

    version = 2


NewerWrite.__name__ = "Write"


def write(folder, name="a", *parts, **config):
    return Write(name=name, store=folder / ".steps", parts=parts, config=config)


def test_a_key_follows_options_needs_files_and_version(tmp_path):
    for name, text in (("one", "1"), ("copy", "1"), ("two", "2")):
        (tmp_path / name).write_text(text)
    part = write(tmp_path, "part", option="x")
    other_part = write(tmp_path, "part", option="X")
    config = {"option": "y", "weights": tmp_path / "one"}
    copied = {"option": "y", "weights": tmp_path / "copy"}
    key = write(tmp_path, "a", part, **config).key
    assert write(tmp_path / "elsewhere", "a", part, **copied).key == key
    others = [
        NewerWrite(name="a", store=tmp_path, parts=(part,), config=config),
        write(tmp_path, "b", part, **config),
        write(tmp_path, "a", part, **config | {"option": "z"}),
        write(tmp_path, "a", part, **config | {"weights": tmp_path / "two"}),
        write(tmp_path, "a", other_part, **config),
        write(tmp_path, "a", **config),
    ]
    assert len({key, *(step.key for step in others)}) == 1 + len(others)


def test_a_step_is_finished_once_and_its_folder_is_not_touched_again(tmp_path, capsys):
    first = write(tmp_path, "first", option="x")
    second = write(tmp_path, "second", option="y")
    both = write(tmp_path, "both", first, second, option="z")
    assert [step.name for step in both.closure.values()] == ["first", "second", "both"]
    for step in both.closure.values():
        assert not step.is_done
        execute(step, step.name)
    assert both.output.read_text() == "xyz"
    made = json.loads((both.folder / DONE).read_text())
    assert (made["key"], made["options"]["config"]) == (both.key, {"option": "z"})
    both.output.write_text("untouched")
    execute(write(tmp_path, "both", first, second, option="z"), "both")
    assert both.output.read_text() == "untouched"
    assert capsys.readouterr().err.splitlines()[-1] == "both: up to date"


def test_a_step_of_another_version_is_told_of(tmp_path, monkeypatch, capsys):
    made = write(tmp_path)
    execute(made, "made")
    current = versions()
    newer = {**current, "torch": "9.0", "numpy": "9.0"}
    monkeypatch.setattr("coin.pipeline.step.versions", lambda: newer)
    execute(made, "made")
    expected = f"made: up to date (made by torch {current['torch']})"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_what_fails_is_not_finished_and_goes_on_in_its_folder(tmp_path):
    def fail():
        (made.folder / "half").touch()
        (made.folder / ".out.0.tmp").touch()
        raise OSError("no space")

    made = Write(name="a", store=tmp_path / ".steps", work=fail)
    with pytest.raises(OSError, match="no space"):
        execute(made, "made")
    assert not made.is_done
    again = write(tmp_path)
    execute(again, "again")
    assert again.is_done
    assert {path.name for path in made.folder.iterdir()} == {"half", "out", DONE}


@pytest.mark.filterwarnings("ignore:waiting for a:coin.errors.CoinWarning")
def test_two_commands_do_a_step_once(tmp_path):
    runs = []

    def work():
        runs.append(1)
        time.sleep(0.5)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            step = Write(name="a", store=tmp_path / ".steps", work=work)
            threads.submit(execute, step, "it")
    assert runs == [1]


def test_a_folder_that_takes_no_lock_is_one_line(tmp_path):
    (tmp_path / ".steps").touch()
    with pytest.raises(FileError, match=r"cannot lock .*: Not a directory; choose an output"):
        execute(write(tmp_path), "a")


def draw(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def test_test_images_are_in_no_key_of_a_training(tmp_path):
    for split, name in product(("train", "test"), ("a", "b")):
        draw(tmp_path / split / name / "0.png", 0)

    def configs():
        """Return what decides which samples are read without tests, and with them."""
        task = ImageFolder(str(tmp_path))
        return [task_config({}, task, with_tests=each) for each in (False, True)]

    training, testing = configs()
    draw(tmp_path / "test/a/0.png", 1)
    assert configs()[0] == training
    assert configs()[1] != testing
    draw(tmp_path / "train/a/0.png", 1)
    assert configs()[0] != training


def test_where_a_downloaded_set_lies_changes_no_key():
    def config(**options):
        return task_config({"init_args": options}, MNIST(**options), with_tests=True)

    assert config() == config(root="elsewhere", download=False)
    assert config() != config(max_train=5)
