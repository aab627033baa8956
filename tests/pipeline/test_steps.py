"""The records that make an experiment resumable."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coin.data import Digits, ImageFolder, TextFile
from coin.distillation import Distillation
from coin.errors import ConfigurationError, FileError
from coin.merging import Average, Coin
from coin.pipeline import Experiment
from coin.pipeline.config import CalibrationConfig, ExpertConfig
from coin.pipeline.locks import shared_step_lock
from coin.pipeline.options import config_dict
from coin.pipeline.records import Status, inputs_of, record_step, reused_status, status_of
from coin.pipeline.runner import Runner
from coin.pipeline.step import Step, needed_for, waves
from coin.pipeline.steps.merge import coded_name, coded_paths


def step_key(options: Any, inputs: Sequence[Path] = ()) -> str:
    return inputs_of(Step("a", Path("x/y"), "", "", print, options, inputs)).key


def step(folder: Path, name: str = "a", options: str = "k", outputs: Sequence[str] = ("out",), **more: Any) -> Step:
    return Step(name, folder, name, "", print, {"o": options}, outputs=[folder / output for output in outputs], **more)


def test_a_step_is_finished_only_with_its_key_and_its_outputs(tmp_path: Path) -> None:
    output, source = tmp_path / "out", tmp_path / "in"
    source.write_text("one")
    made = step(tmp_path, inputs=[source])
    assert status_of(made).why == "never done"
    output.write_text("one")
    assert not status_of(made).is_current
    record_step(made, inputs_of(made), 3.0)
    assert status_of(made) == Status("", 3.0)
    assert status_of(step(tmp_path, options="other", inputs=[source])).why == "changed: o"
    assert status_of(step(tmp_path, "b", inputs=[source])).why == "never done"
    source.write_text("two")
    assert status_of(made) == Status("changed: in", 3.0)
    source.write_text("one")
    output.write_text("two")
    assert status_of(made).why == "'out' is not what was written"
    output.unlink()
    assert status_of(made).why == "'out' is missing"
    with pytest.raises(FileError, match="out"):
        record_step(made, inputs_of(made))
    source.unlink()
    assert status_of(made).why == "'in' is not there yet"


def test_what_changes_while_a_step_runs_is_no_input_of_its_outputs(tmp_path: Path) -> None:
    output, source = tmp_path / "out", tmp_path / "in"
    source.write_text("old")
    made = step(tmp_path, inputs=[source])

    def work(_: object) -> None:
        source.write_text("new")
        output.write_text("made of old")

    tasks = {"a": Digits(), "b": Digits()}
    Runner(Experiment("x", tasks, [Average()], output=str(tmp_path))).run([replace(made, run=work)])
    assert status_of(made).why == "changed: in"


def test_a_difference_names_what_was_left_out_and_the_order(tmp_path: Path) -> None:
    first, second, output = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for path in (first, second, output):
        path.write_text(path.name)
    made = step(tmp_path, inputs=[first, second])
    record_step(made, inputs_of(made))
    assert status_of(step(tmp_path, inputs=[first])).why == "changed: without second"
    assert status_of(step(tmp_path, inputs=[second, first])).why == "another order of its inputs"


@pytest.mark.parametrize("text", ["{", "[1]", '{"key": 1}', '{"key": "k", "outputs": []}'])
def test_a_damaged_record_counts_as_none(text: str, tmp_path: Path) -> None:
    made, output = step(tmp_path), tmp_path / "out"
    output.write_text("one")
    record_step(made, inputs_of(made))
    (tmp_path / ".steps/a.json").write_text(text)
    assert status_of(made).why == "never done"


def test_a_record_of_before_without_inputs_says_that_they_have_changed(tmp_path: Path) -> None:
    made, output = step(tmp_path), tmp_path / "out"
    output.write_text("one")
    record_step(made, inputs_of(made))
    record = tmp_path / ".steps/a.json"
    kept = {key: json.loads(record.read_text())[key] for key in ("key", "outputs")}
    record.write_text(json.dumps(kept | {"seconds": "long"}))
    assert status_of(made) == Status("")
    assert status_of(step(tmp_path, options="other")).why == "its options or inputs have changed"


def test_steps_wait_for_what_they_read(tmp_path: Path) -> None:
    base, expert, coded = step(tmp_path, "base"), step(tmp_path, "expert"), step(tmp_path, "coded")
    base = replace(base, outputs=[tmp_path / "base"])
    expert = replace(expert, inputs=base.outputs, outputs=[tmp_path / "expert"])
    other = replace(expert, name="other", outputs=[tmp_path / "other"])
    coded = replace(coded, inputs=[*expert.outputs, *other.outputs])
    steps = [base, expert, other, coded]
    assert waves(steps) == [[base], [expert, other], [coded]]
    assert needed_for("other", steps) == [base, other]
    assert needed_for("coded", steps) == steps
    assert needed_for("nothing", steps) == []


OUTPUTS = ("experts/a.bin", "b.bin")


@pytest.fixture
def points(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of one seed in two points of a sweep; the first has finished a step with two outputs."""
    (tmp_path / "sweep.yaml").touch()
    first, second = (tmp_path / name / "seed-0" for name in ("first", "second"))
    (first / "experts").mkdir(parents=True)
    for name in OUTPUTS:
        (first / name).write_text(f"weights of {name}")
    made = step(first, "expert-a[1]", outputs=OUTPUTS)
    record_step(made, inputs_of(made))
    return first, second


def finished(folder: Path, name: str = "expert-a[1]", options: str = "k", shared: bool = True) -> bool:
    return reused_status(step(folder, name, options, OUTPUTS, shared=shared)).is_current


def test_a_shared_step_is_taken_over_from_a_point_with_the_same_key(points: tuple[Path, Path]) -> None:
    first, second = points
    assert not finished(second, shared=False)
    assert not finished(second, options="other")
    assert not finished(second, name="expert-a1")
    assert not finished(second.with_name("seed-1"))
    waiting = step(second, "expert-a[1]", outputs=OUTPUTS, inputs=[second / "not there yet"], shared=True)
    assert not reused_status(waiting).is_current
    assert not second.exists()
    (second / "experts").mkdir(parents=True)
    (second / "experts/a.bin").write_text("half a training")
    assert finished(second)
    assert all((first / name).samefile(second / name) for name in OUTPUTS)
    assert finished(second, shared=False)
    (second / "b.bin").unlink()
    assert finished(second)
    assert not list(second.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["no sweep", "changed", "gone", "record"])
def test_nothing_is_taken_over_from_a_damaged_point_or_outside_a_sweep(
    damage: str, points: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = points
    match damage:
        case "no sweep":
            (tmp_path / "sweep.yaml").unlink()
        case "changed":
            (first / "b.bin").write_text("other weights")
        case "gone":
            (first / "b.bin").unlink()
        case "record":
            (first / ".steps/expert-a[1].json").write_text("[1]")
    assert not finished(second)
    assert not second.exists()


def test_outputs_are_copied_where_there_are_no_links(
    points: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    assert finished(points[1])
    assert (points[1] / "b.bin").read_text() == "weights of b.bin"


def test_a_point_waits_for_another_that_does_the_same_step(points: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (step(folder, "expert-b", shared=True) for folder in points)
    done: list[str] = []

    def wait() -> None:
        with shared_step_lock(second, "k"):
            done.append("second")

    waiting = threading.Thread(target=wait)
    with shared_step_lock(first, "k"):
        waiting.start()
        with shared_step_lock(second, "other key"), shared_step_lock(replace(second, name="expert-a"), "k"):
            done.append("other steps")
        waiting.join(1)
        done.append("first")
    waiting.join(60)
    assert done == ["other steps", "first", "second"]
    (tmp_path / "sweep.yaml").unlink()
    with shared_step_lock(first, "k"), shared_step_lock(second, "k"):  # outside a sweep nobody waits
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
    assert coded_paths(Fixed(0.5), 1, Path("coded"))[0].parent == Path("coded")
    assert {coded_name(Average(label=label)) for label in ("a-0.2", "a-0.5")} == {"a-0.2", "a-0.5"}
    assert coded_name(Average(batchnorm="keep")) == "average-keep"
