"""A step: the key that it has before it runs, its folder, and its lock."""

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def run(self) -> None:
        self.work()
        parts = [part.output.read_text() for part in self.parts]
        self.output.write_text("".join([*parts, self.config.get("option", "")]))


def write(folder: Path, name: str = "a", parts: tuple[Write, ...] = (), **config: Any) -> Write:
    return Write(name=name, store=folder / ".steps", parts=parts, config=config)


def working(folder: Path, work: Callable[[], None]) -> Write:
    return Write(name="a", store=folder / ".steps", work=work)


def test_a_key_is_known_before_anything_runs_and_follows_options_needs_files_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    weights.write_text("one")
    part = write(tmp_path, "part", option=1)
    made = write(tmp_path, option=1, parts=(part,), weights=weights)
    same = {"option": 1, "parts": (write(tmp_path / "elsewhere", "part", option=1),), "weights": weights}
    assert write(tmp_path / "other place", **same).key == made.key
    others: list[dict[str, Any]] = [
        {"option": 2},
        {"parts": (write(tmp_path, "part", option=2),)},
        {"parts": ()},
    ]
    keys = {write(tmp_path, **{**same, **other}).key for other in others} | {write(tmp_path, "b", **same).key}
    assert len(keys | {made.key}) == len(others) + 2
    weights.write_text("two")
    assert write(tmp_path, **same).key != made.key
    weights.write_text("one")
    copy = tmp_path / "moved"
    copy.write_text("one")
    assert write(tmp_path, **{**same, "weights": copy}).key == made.key
    monkeypatch.setattr(Write, "version", 2)
    assert write(tmp_path, **same).key != made.key


def test_a_step_is_finished_once_and_its_folder_is_not_touched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write(tmp_path, "first", option="x"), write(tmp_path, "second", option="y")
    both = write(tmp_path, "both", option="z", parts=(first, second))
    assert [step.name for step in both.closure.values()] == ["first", "second", "both"]
    assert not first.is_done
    for step in both.closure.values():
        execute(step, step.name)
    assert both.output.read_text() == "xyz"
    made = json.loads((both.folder / DONE).read_text())
    assert made["key"] == both.key
    assert made["options"]["config"] == {"option": "z"}
    before = both.output.stat().st_mtime_ns
    execute(write(tmp_path, "both", option="z", parts=(first, second)), "both")
    assert capsys.readouterr().err.splitlines()[-1] == "both: up to date"
    assert both.output.stat().st_mtime_ns == before
    other = write(tmp_path, "both", option="Z", parts=(first, second))
    assert other.folder != both.folder


def test_a_step_of_another_version_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write(tmp_path)
    execute(made, "made")
    execute(made, "made")
    current = versions()
    monkeypatch.setattr("coin.pipeline.step.versions", lambda: {**current, "torch": "9.0", "numpy": "9.0"})
    execute(made, "made")
    told = capsys.readouterr().err.splitlines()
    assert told[1:] == ["made: up to date", f"made: up to date (made by torch {current['torch']})"]


def test_what_fails_is_not_finished_and_goes_on_in_its_folder(tmp_path: Path) -> None:
    def fail() -> None:
        (made.folder / "half").touch()
        raise OSError("no space")

    made = working(tmp_path, fail)
    with pytest.raises(OSError, match="no space"):
        execute(made, "made")
    assert not made.is_done
    again = write(tmp_path)
    assert (again.folder / "half").is_file()
    execute(again, "again")
    assert again.is_done


@pytest.mark.filterwarnings("ignore:waiting for a:coin.errors.CoinWarning")
def test_two_commands_do_a_step_once(tmp_path: Path) -> None:
    runs: list[int] = []
    steps = [working(tmp_path, lambda: (runs.append(1), time.sleep(0.5))[0]) for _ in range(2)]
    threads = [threading.Thread(target=execute, args=(step, "it")) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert runs == [1]
    assert steps[0].is_done


def test_a_folder_that_takes_no_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot lock .*choose an output"), write(tmp_path / "file").locked():
        pass

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(FileError, match="No locks available; choose an output"), write(tmp_path).locked():
        pass


def test_a_changed_image_changes_the_keys_of_what_reads_it_wherever_the_folder_lies(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / split / name / "0.png")

    def keys(root: Path = folder) -> list[Any]:
        return [task_config({}, ImageFolder(str(root)), with_tests=with_tests) for with_tests in (False, True)]

    before = keys()
    shutil.copytree(folder, tmp_path / "copy")
    assert keys(tmp_path / "copy") == before
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(folder / "test/a/0.png")
    (training, testing), (old_training, old_testing) = keys(), before
    assert training == old_training
    assert testing != old_testing
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(folder / "train/a/1.png")
    assert all(key != old for key, old in zip(keys(), [training, testing], strict=True))


def test_where_a_downloaded_set_lies_changes_no_key() -> None:
    def found(**options: Any) -> dict[str, Any]:
        return task_config({"init_args": options}, MNIST(**options), with_tests=True)

    assert found() == found(root="elsewhere", download=False)
    assert found() != found(max_train=5)
