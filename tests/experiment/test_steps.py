"""The records that make an experiment resumable."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coin.coding import Code
from coin.data import Digits, ImageFolder, TextFile
from coin.errors import ConfigurationError
from coin.experiment.config import CalibrationConfig, ExpertConfig
from coin.experiment.merge import coded_paths
from coin.experiment.store import Steps, described, step_key
from coin.experiment.steps.merge import record_name
from coin.merging import Average, Coin
from coin.modules import Distillation


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
    assert described(Coin(damping=0.5))["damping"] == 0.5
    assert described(Coin()) != described(Average())
    assert described(Distillation(steps=3))["steps"] == 3


def test_a_section_is_described_by_its_options_alone() -> None:
    assert described(CalibrationConfig()).keys() == {field.name for field in fields(CalibrationConfig)}
    assert described(ExpertConfig()).keys() == {field.name for field in fields(ExpertConfig)}


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


class Odd:
    """A user's class with an attribute of a user's kind."""

    def __init__(self, part: object) -> None:
        self.part = part


def test_options_of_every_kind_change_the_key() -> None:
    for one, other in ((Section(1), Section(2)), ({1}, {2}), (torch.ones(1), torch.zeros(1)), (Odd(1), Odd(2))):
        assert step_key(Odd(one)) != step_key(Odd(other))
        assert step_key(Odd(one)) == step_key(Odd(one))
    assert step_key(np.int64(3)) == step_key(3)
    assert described(Odd(1))["class"].endswith("test_steps.Odd")


@pytest.mark.parametrize("part", [object(), lambda: None, torch.nn.Linear(1, 1)])
def test_an_option_whose_changes_nobody_would_notice_is_refused(part: object) -> None:
    with pytest.raises(ConfigurationError, match="begins with an underscore"):
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
    names = {record_name(coded_paths(Average(label=label), one, Path())[0]) for label in ("a-0.2", "a-0.5")}
    assert names == {"a-0.2", "a-0.5"}
    assert record_name(Path("coded/average.row-12.safetensors")) == "average"
