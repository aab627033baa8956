"""``coin --safe``: a stranger's configuration imports nothing but what the allow-list names."""

import sys
from collections.abc import Iterator
from pathlib import Path

import jsonargparse._common
import pytest

from coin.cli import main
from coin.commands import safe
from coin.errors import ConfigurationError

TASKS = "--tasks={digits: {class_path: Digits}, letters: {class_path: THEIRS, init_args: {classes: A-C}}}"
RUN = ["run", "--name=x", "--methods=[{class_path: Average}]", "--seeds=[-1]"]
"""Ends before anything is trained: with a line about seeds where all of it was parsed."""


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `enforce` does for the rest of the process."""
    settings = jsonargparse._common.parsing_settings
    before = dict(settings)
    monkeypatch.setenv(safe.VARIABLE, "0")
    monkeypatch.chdir(tmp_path)
    yield
    settings.clear()
    settings.update(before)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file where it is imported; its class is a task."""
    mark = tmp_path / "imported"
    (tmp_path / "evil_module.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom coin.data import Glyphs\nclass Theirs(Glyphs):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("evil_module", None)
    return mark


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def run(task: str, *options: str) -> list[str]:
    return [*RUN, TASKS.replace("THEIRS", task), *options]


def test_without_it_a_configuration_imports_what_it_names(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run("evil_module.Theirs")) == 2
    assert "found seeds [-1]" in last_line(capsys)
    assert evil.exists()


@pytest.mark.parametrize("place", [0, 1, -1])
def test_with_it_nothing_is_imported(place: int, evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = run("evil_module.Theirs")
    arguments.insert(place if place >= 0 else len(arguments), safe.SAFE)
    assert main(arguments) == 2
    line = last_line(capsys)
    assert line.startswith("coin: error: ")
    assert "evil_module.Theirs" in line
    assert not evil.exists()


def test_a_child_of_a_safe_command_is_safe(
    evil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(safe.VARIABLE, "1")
    assert main(run("evil_module.Theirs")) == 2
    assert "evil_module.Theirs" in last_line(capsys)
    assert not evil.exists()


def test_coins_own_classes_are_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("Glyphs", "coin.data.Glyphs", "coin.data.embedded.Glyphs"):
        assert main([safe.SAFE, *run(task)]) == 2
        assert "found seeds [-1]" in last_line(capsys)


NAMES = [
    "os.system",
    "subprocess.Popen",
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load",
    "torch.serialization.load",
    "torchvision.datasets.ImageFolder",
    "lightning.pytorch.cli.LightningCLI",
    "coin.cli.main",
    "coin.pipeline.executors.train_side_by_side",
    "coin.data.image_folder.Path",  # what a module imports is not its own
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.loggers.csv_logs.os.system",
]


def test_nothing_else_may_be_named_not_even_below_an_allowed_package() -> None:
    from jsonargparse._util import import_object

    safe.enforce()
    for name in NAMES:
        with pytest.raises(ImportError, match="is not allowed"):
            import_object(name)
    for name in (
        "coin.data.Glyphs",
        "coin.merging.Coin",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "torch.optim.SGD",
    ):
        assert isinstance(import_object(name), type)


def test_a_callback_cannot_be_handed_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--data=Digits", "--trainer.callbacks+=LambdaCallback", "--trainer.callbacks.setup=os.system"]
    assert main([safe.SAFE, *fit]) == 2
    assert last_line(capsys).startswith("coin: error: ")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"launch": {"slurm": {"slurm_setup": ["rm -rf ~"]}}}, "launch.slurm"),
        ({"launch": {"ray": {"runtime_env": {"pip": ["x"]}}}}, "launch.ray"),
        ({"weights_only": False}, "weights_only"),
    ],
)
def test_options_that_run_or_unpickle_are_refused(
    options: dict[str, object], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe.check_options(options)  # without --safe they are the user's to give
    monkeypatch.setenv(safe.VARIABLE, "1")
    with pytest.raises(ConfigurationError, match=f"found {found}"):
        safe.check_options(options)


def test_commands_for_a_cluster_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--launch.executor=slurm", "--launch.slurm={slurm_setup: [touch /tmp/x]}"]
    assert main([safe.SAFE, *run("Glyphs", *options)]) == 2
    assert "found launch.slurm with --safe" in last_line(capsys)


def test_a_variable_that_is_neither_on_nor_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(safe.VARIABLE, "true")
    assert main(["report", "x"]) == 2
    assert "COIN_SAFE=true, expected 0 or 1" in last_line(capsys)


def test_a_method_of_the_users_own_is_refused(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = "--methods=[{class_path: UserMethod, init_args: {function: evil_module.merge}}]"
    assert main([safe.SAFE, *run("Glyphs", methods)]) == 2
    line = last_line(capsys)
    assert line.startswith("coin: error: found function 'evil_module.merge' with --safe, expected nothing of your own;")
    assert not evil.exists()


def test_transforms_are_not_on_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    spec = "{class_path: torchvision.transforms.v2.RandomVerticalFlip}"
    task = f"Glyphs, init_args: {{classes: A-C, transform: {spec}}}}}, more: {{class_path: Glyphs"
    for options in (run("Glyphs", f"--expert.transform={spec}"), run(task)):
        assert main([safe.SAFE, *options]) == 2
        line = last_line(capsys)
        assert "found transform {'class_path': 'torchvision.transforms.v2.RandomVerticalFlip'}, which cannot be" in line
        assert "not allowed" in line
