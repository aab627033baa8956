"""The records that make an experiment resumable."""

from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from coin.data import Digits, ImageFolder
from coin.experiment.config import CalibrationConfig, ExpertConfig
from coin.experiment.records import Steps, described, step_key
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
