"""Mistakes that only a whole command shows: each ends with status 2 and one line, and loses nothing."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coin.cli import main
from coin.errors import CoinWarning, ConfigurationError, FileError, shortage_behind
from coin.files.atomic import write_text
from coin.files.safetensors import save_state

EXPERIMENT = """
name: small
network: {name: small_resnet, image_size: 16, options: {width: 4}}
tasks:
  digits: {class_path: Digits, init_args: {max_train: 40, max_test: 20}}
  letters: {class_path: Glyphs, init_args: {classes: A-C, train_per_class: 10, test_per_class: 4}}
expert: {epochs: 1, lr: 0.02, batch_size: 8}
calibration: {samples_per_task: 4}
methods: [{class_path: Average}]
decoders: [linear]
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT)
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that a command ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    return line.removeprefix("coin: error: ")


TYPOS = {
    "a section": ("calibration:", "calibratoin:", "calibratoin"),
    "an option": ("samples_per_task", "sample_per_task", "(did you mean samples_per_task?)"),
    "a task's option": ("max_train", "max_trian", "found Digits option 'max_trian' (did you mean max_train?)"),
    "a task's class": ("class_path: Digits", "class_path: Digist", "Digist"),
    "a section that is null": (
        "calibration: {samples_per_task: 4}",
        "calibration: null",
        "a section of options that is null",
    ),
    "a key twice": ("name: small\n", "name: small\nname: other\n", "found key 'name' twice"),
    "a method's option": (
        "Average}",
        "Average, init_args: {batchnrom: keep}}",
        "found Average option 'batchnrom' (did you mean batchnorm?)",
    ),
    "a task that leads out": ("  digits:", "  '..':", "found task name '..'"),
    "an experiment that leads out": ("name: small\n", "name: ../small\n", "found name '../small'"),
    "a name with a line in it": ("name: small\n", 'name: "a\\nb"\n', "found name 'a\\nb'"),
    "a name too long": ("name: small\n", f"name: {'x' * 300}\n", "expected a plain folder name"),
}


@pytest.mark.parametrize("case", TYPOS)
def test_a_typo_is_named(case: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, message = TYPOS[case]
    assert old in EXPERIMENT
    config.write_text(EXPERIMENT.replace(old, new, 1))
    assert message in refused(["run", "-c", str(config)], capsys)


MISTAKES = {
    "a command": (["rnu"], "found command 'rnu' (did you mean run?), expected one of run, fit,"),
    "a method for a model": (["fit", "--model=Distillation", "--data=Digits"], "(did you mean DistillationModule?)"),
    "a task's class": (
        ["fit", "--data.class_path=Mnist5k"],
        "found class 'Mnist5k' (did you mean MNIST5k?)",
    ),
    "a folder's root": (
        ["fit", "--data=ImageFolder"],
        "arguments are required: root",
    ),
    "an optimiser of torch's": (
        ["fit", "--data=Digits", "--optimizer=Adam"],
        "found option 'optimizer', expected one of ckpt_path,",
    ),
    "a file": (["run", "-c", "a.yaml"], "cannot read 'a.yaml' (No such file or directory), expected"),
    "a number": (["run", "--expert.epochs=many"], "expert.epochs"),
    "nothing": (["run"], "required: name, tasks, methods"),
    "a list that is none": (["run", "--seeds=[a]"], "Expected a <class 'int'>. Got value: a"),
    "a checkpoint": (["fisher", "--data=Digits", "--ckpt_path=no.safetensors"], "no.safetensors"),
    "half an option": (["run", "--expert.epoch=7"], "found option '--expert.epoch' (did you mean --expert.epochs?)"),
    "a method's option, written out": (
        ["run", "--methods=[{class_path: Coin, damping: 1}]"],
        "found 'damping' beside class_path: Coin",
    ),
    "an option of an expert": (
        ["fit", "--data=Digits", "--model.lrr=1"],
        "found Expert option 'lrr' (did you mean lr?)",
    ),
    "half an option of the Trainer": (["fit", "--data=Digits", "--trainer.max_epoch=1"], "unrecognized arguments"),
    "a seed": (["fit", "--data=Digits", "--seed_everything=-1"], "seed"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_command_line_that_does_not_fit_is_one_line(case: str, config: Path, capsys: Any) -> None:
    arguments, message = MISTAKES[case]
    line = refused(arguments, capsys)
    assert message in line
    assert len(line) < 500
    assert "Namespace" not in line


def test_a_folder_that_is_missing_is_told_of_before_the_base_is_trained(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coin.pipeline.plan_experts.train_network", lambda *_, **__: pytest.fail("trained"))
    config.write_text(
        EXPERIMENT.replace(
            "class_path: Digits, init_args: {max_train: 40, max_test: 20}",
            "class_path: ImageFolder, init_args: {root: nowhere}",
        )
    )
    base = "--base={task: {class_path: Digits}}"
    assert "nowhere/train does not exist" in refused(["run", "-c", str(config), "--output=o", base], capsys)


@pytest.mark.parametrize("section", ["[]", "[1]"])
def test_a_section_that_is_a_list_is_one_line(section: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["run", "-c", str(config), "--output=o", f"--network={section}"], capsys)
    assert "network" in line


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(ConfigurationError("found key 'a\n\nb', expected c")) == "found key 'a b', expected c"
    assert str(FileError(2, "No such\nfile", "x")) == "[Errno 2] No such file: 'x'"


def test_too_few_samples_are_told_of_before_the_training(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coin.pipeline.plan_experts.train_network", lambda *_, **__: pytest.fail("trained"))
    line = refused(["run", "-c", str(config), "--output=o", "--calibration.samples_per_task=4000"], capsys)
    assert line.startswith("4000 calibration samples asked of the task 'digits' (Digits)")


@pytest.fixture
def finished(config: Path, tmp_path: Path) -> Path:
    """A run folder with a file, as good as one."""
    save_state(tmp_path / "kept.safetensors", {"a": torch.ones(3)}, {})
    write_text(tmp_path / "kept.json", "{}")
    return tmp_path


@pytest.fixture
def full_disk(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every file grow to a few bytes and no further, as on a full disk."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        patch.setattr("coin.files.safetensors.save_file", refuse)
        yield


WRITERS: dict[str, Callable[[Path], None]] = {
    "kept.safetensors": lambda path: save_state(path, {"a": torch.zeros(3)}, {}),
    "kept.json": lambda path: write_text(path, "[]"),
}


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_loses_nothing_that_was_written(name: str, finished: Path) -> None:
    before = (finished / name).read_bytes()
    with pytest.raises(OSError, match=r"No space left on device; free the space"):
        WRITERS[name](finished / name)
    assert (finished / name).read_bytes() == before
    assert not list(finished.glob(".*.tmp"))


@pytest.mark.usefixtures("full_disk")
def test_a_run_on_a_full_disk_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No space left on device" in refused(["run", "-c", str(config), "--output=o"], capsys)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning writes its checkpoints itself."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")

    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", refuse)
    line = refused(["run", "-c", str(config), "--output=o"], capsys)
    assert line == (
        "found 'No space left on device' at 'last.ckpt', expected to read or write; free some space, and run the same "
        "command again"
    )
    monkeypatch.undo()
    os.chdir(config.parent)
    assert main(["run", "-c", str(config), "--output=o", "--only=digits"]) == 0  # goes on where it was


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x"), "found 'Permission denied' at 'x'"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "choose a folder you can write to"),
        (MemoryError(), "found too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), "lower batch sizes"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"), "cannot be written"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error: Exception, line: str) -> None:
    outer = ValueError("later")
    outer.__context__ = error
    found = shortage_behind(outer)
    assert line in str(found)


def test_a_defect_stays_a_defect() -> None:
    assert shortage_behind(KeyError("x")) is None
    assert shortage_behind(RuntimeError("shapes do not fit")) is None


def test_a_truncated_checkpoint_of_a_training_is_no_end(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-c", str(config), "--output=o", "--only=digits"]
    assert main(command) == 0
    folder = tmp_path / "o/small/seed-0/experts/digits"
    wanted = (folder / "expert.safetensors").read_bytes()
    (folder / "expert.safetensors").unlink()
    last = folder / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    assert main(command) == 0
    assert (folder / "expert.safetensors").read_bytes() == wanted
    # Given by hand, it is a mistake, as is one of another network.
    fit = ["fit", "--data=Digits", "--data.image_size=16", "--model.network=small_resnet", "--model.image_size=16"]
    assert "ckpt_path is of another model" in refused([*fit, f"--ckpt_path={last}", "--trainer.logger=false"], capsys)
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    line = refused([*fit, f"--ckpt_path={last}", "--trainer.logger=false"], capsys)
    assert f"cannot read '{last}' as a checkpoint" in line
    shutil.rmtree(tmp_path / "o")


def test_too_few_samples_for_a_method_of_its_own_are_told_of_before_the_training(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coin.pipeline.plan_experts.train_network", lambda *_, **__: pytest.fail("trained"))
    methods = "--methods=[{class_path: Distillation, init_args: {samples_per_task: 4000}}]"
    line = refused(["run", "-c", str(config), "--output=o", methods], capsys)
    assert line.startswith("4000 calibration samples asked of the task 'digits' (Digits)")


@pytest.mark.parametrize("option", ["max_epochs: 3", "logger: false", "callbacks: []"])
def test_trainer_options_that_the_steps_decide_are_refused(
    option: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["run", "-c", str(config), "--output=o", f"--trainer={{{option}}}"], capsys)
    assert line.startswith(f"found trainer.{option.split(':')[0]}, which each step sets itself; ")


def test_what_is_laid_over_leaves_nothing_behind_of_another_class(tmp_path: Path, capsys: Any) -> None:
    under, over = tmp_path / "under.yaml", tmp_path / "over.yaml"
    first = "{class_path: Distillation, init_args: {steps: 5}}"
    under.write_text(
        f"name: x\ntasks: {{a: {{class_path: Digits, init_args: {{max_train: 7}}}}}}\nmethods: [{first}]\n"
    )
    over.write_text("tasks: {a: {class_path: MNIST5k}}\nmethods: [{class_path: ReadoutDistillation}]\n")
    given = ["--methods", "[{class_path: ReadoutDistillation}]", "--tasks={a: {class_path: MNIST5k}}"]
    for more in (["-c", str(over)], given):
        with pytest.raises(SystemExit):
            main(["run", "-c", str(under), *more, "--print_config"])
        found = yaml.safe_load(capsys.readouterr().out)
        assert found["methods"][0]["init_args"]["steps"] == 100
        assert found["tasks"]["a"]["init_args"]["max_train"] is None
    with pytest.raises(SystemExit):
        main(["run", "-c", str(under), "--tasks.a.init_args.max_train=9", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["tasks"]["a"]["init_args"]["max_train"] == 9


@pytest.mark.parametrize("by_lightning", [False, True])
def test_an_interruption_is_one_line(by_lightning: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not by_lightning:
                raise
            sys.exit(1)  # as Lightning does

    monkeypatch.setattr("coin.cli.check_early", interrupted)
    assert main(["run", "-c", "quickstart"]) == 130
    assert capsys.readouterr().err == "coin: interrupted; the same command goes on where it was\n"
    monkeypatch.setattr("coin.cli.check_early", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        main(["run", "-c", "quickstart"])


def test_experts_of_another_start_than_the_imported_ones_are_warned_of(config: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("coin.pipeline.run.on_rank_zero", lambda *_: sys.exit(3))  # before anything is done
    options = f"{{digits: {config}}}"
    told = "found checkpoints beside experts that are fine-tuned without network.weights"
    with pytest.warns(CoinWarning, match=told), pytest.raises(SystemExit):
        main(["run", "-c", str(config), f"--expert.checkpoints={options}"])
