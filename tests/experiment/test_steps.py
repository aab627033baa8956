"""The records that make an experiment resumable."""

import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coin.coding import Code
from coin.data import Digits, ImageFolder, TextFile
from coin.distillation import Distillation
from coin.errors import ConfigurationError
from coin.experiment.config import CalibrationConfig, ExpertConfig
from coin.experiment.store import Steps, step_key
from coin.merging import Average, Coin
from coin.steps.merge import coded_name, coded_paths
from coin.steps.options import config_dict


def test_a_step_is_finished_only_with_its_key_and_its_outputs(tmp_path: Path) -> None:
    steps, output = Steps(tmp_path), tmp_path / "out"
    assert not steps.finished("a", "k", [output])
    output.write_text("one")
    assert not steps.finished("a", "k", [output])
    steps.finish("a", "k", [output])
    assert steps.finished("a", "k", [output])
    assert not steps.finished("a", "other", [output])
    assert not steps.finished("b", "k", [output])
    output.write_text("two")
    assert not steps.finished("a", "k", [output])
    output.unlink()
    assert not steps.finished("a", "k", [output])


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    steps, output = Steps(tmp_path), tmp_path / "out"
    output.write_text("one")
    steps.finish("a", "k", [output])
    (tmp_path / ".steps/a.json").write_text("{")
    assert not steps.finished("a", "k", [output])


@pytest.fixture
def points(tmp_path: Path) -> tuple[Steps, Steps]:
    """The steps of one seed in two points of a sweep; the first has finished one, with two outputs."""
    (tmp_path / "sweep.yaml").touch()
    first, second = (Steps(tmp_path / name / "seed-0") for name in ("first", "second"))
    (first.folder / "experts").mkdir(parents=True)
    for name in OUTPUTS:
        (first.folder / name).write_text(f"weights of {name}")
    first.finish("expert-a[1]", "k", [first.folder / name for name in OUTPUTS])
    return first, second


OUTPUTS = ("experts/a.bin", "b.bin")


def finished(steps: Steps, name: str = "expert-a[1]", key: str = "k", shared: bool = True) -> bool:
    return steps.finished(name, key, [steps.folder / output for output in OUTPUTS], shared=shared)


def test_a_shared_step_is_taken_over_from_a_point_with_the_same_key(points: tuple[Steps, Steps]) -> None:
    first, second = points
    assert not finished(second, shared=False)
    assert not finished(second, key="other")
    assert not finished(second, name="expert-a1")
    assert not finished(Steps(second.folder.with_name("seed-1")))
    assert not second.folder.exists()
    (second.folder / "experts").mkdir(parents=True)
    (second.folder / "experts/a.bin").write_text("half a training")
    assert finished(second)
    assert all((first.folder / name).samefile(second.folder / name) for name in OUTPUTS)
    assert finished(second, shared=False)
    (second.folder / "b.bin").unlink()
    assert finished(second)
    assert not list(second.folder.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["no sweep", "changed", "gone", "record"])
def test_nothing_is_taken_over_from_a_damaged_point_or_outside_a_sweep(
    damage: str, points: tuple[Steps, Steps], tmp_path: Path
) -> None:
    first, second = points
    match damage:
        case "no sweep":
            (tmp_path / "sweep.yaml").unlink()
        case "changed":
            (first.folder / "b.bin").write_text("other weights")
        case "gone":
            (first.folder / "b.bin").unlink()
        case "record":
            (first.folder / ".steps/expert-a[1].json").write_text("[1]")
    assert not finished(second)
    assert not second.folder.exists()


def test_outputs_are_copied_where_there_are_no_links(
    points: tuple[Steps, Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    assert finished(points[1])
    assert (points[1].folder / "b.bin").read_text() == "weights of b.bin"


def test_a_point_waits_for_another_that_does_the_same_step(points: tuple[Steps, Steps], tmp_path: Path) -> None:
    first, second = points
    done: list[str] = []

    def wait() -> None:
        with second.alone("expert-b", "k"):
            done.append("second")

    waiting = threading.Thread(target=wait)
    with first.alone("expert-b", "k"):
        waiting.start()
        with second.alone("expert-b", "other key"), second.alone("expert-a", "k"):
            done.append("other steps")
        waiting.join(1)
        done.append("first")
    waiting.join(60)
    assert done == ["other steps", "first", "second"]
    (tmp_path / "sweep.yaml").unlink()
    with first.alone("expert-b", "k"), second.alone("expert-b", "k"):  # outside a sweep nobody waits
        pass


def test_key_follows_options_and_input_contents(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text("one")
    key = step_key({"calibration": CalibrationConfig(), "task": Digits()}, [source])
    assert key == step_key({"task": Digits(), "calibration": CalibrationConfig()}, [source])
    assert key != step_key({"calibration": CalibrationConfig(samples_per_task=10), "task": Digits()}, [source])
    assert key != step_key({"calibration": CalibrationConfig(), "task": Digits(max_train=9)}, [source])
    source.write_text("two")
    assert key != step_key({"calibration": CalibrationConfig(), "task": Digits()}, [source])


def test_methods_are_described_by_class_and_options() -> None:
    assert config_dict(Coin(damping=0.5))["damping"] == 0.5
    assert config_dict(Coin()) != config_dict(Average())
    assert config_dict(Distillation(steps=3))["steps"] == 3


def test_a_section_is_described_by_its_options_alone() -> None:
    assert config_dict(CalibrationConfig()).keys() == {field.name for field in fields(CalibrationConfig)}
    assert config_dict(ExpertConfig()).keys() == {field.name for field in fields(ExpertConfig)}


def test_reading_the_data_changes_no_key() -> None:
    task = Digits(max_train=50)
    before = step_key(task)
    task.setup()
    task.calibration(5)
    assert step_key(task) == before


def test_a_changed_image_folder_changes_the_key(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / split / name / "0.png")
    before = step_key(ImageFolder(str(tmp_path)))
    assert step_key(ImageFolder(str(tmp_path))) == before
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(tmp_path / "train/a/1.png")
    assert step_key(ImageFolder(str(tmp_path))) != before


@dataclass
class Section:
    depth: int = 1


class Odd(Average):
    """A user's method with an option of a user's kind."""

    def __init__(self, part: object) -> None:
        super().__init__()
        self.part = part


def test_options_of_every_kind_change_the_key() -> None:
    for one, other in ((Section(1), Section(2)), ({1}, {2}), (torch.ones(1), torch.zeros(1)), (Odd(1), Odd(2))):
        assert step_key(Odd(one)) != step_key(Odd(other))
        assert step_key(Odd(one)) == step_key(Odd(one))
    assert step_key(np.int64(3)) == step_key(3)
    assert config_dict(Odd(1))["class"].endswith("test_steps.Odd")


@pytest.mark.parametrize("part", [object(), lambda: None, torch.nn.Linear(1, 1)])
def test_an_option_of_another_kind_is_refused(part: object) -> None:
    with pytest.raises(ConfigurationError, match=r"found an option of type .*, expected plain values"):
        step_key(Odd(part))


def test_a_changed_tokenizer_changes_the_key(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\na,b\nc,d\n")
    task = TextFile(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), tokenizer=str(tmp_path / "t.json"))
    (tmp_path / "t.json").write_text("{}")
    before = step_key(task)
    (tmp_path / "t.json").write_text("[]")
    assert step_key(task) != before


class Fixed(Average):
    """A user's method with an option that has no default."""

    def __init__(self, share: float, **options: Any) -> None:
        super().__init__(**options)
        self.share = share


def test_methods_have_a_file_and_a_record_each() -> None:
    one = Code([[0.5, 0.5]])
    assert coded_paths(Fixed(0.5), one, Path("coded"))[0].parent == Path("coded")
    assert {coded_name(Average(label=label)) for label in ("a-0.2", "a-0.5")} == {"a-0.2", "a-0.5"}
    assert coded_name(Average(batchnorm="keep")) == "average-keep"
