"""Mistakes on the command line and in its files: status 2, one line, nothing written. Defects keep their traceback."""

import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coin.callbacks import ExpertExport
from coin.cli import main, take_signals
from coin.errors import CoinWarning, ConfigurationError, DataError, FileError
from coin.modules import Expert
from coin.networks import NetworkConfig, build_network, head_name, save_network

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
output: o
"""
RUN = ["run", "-c", "small.yaml"]
TRAIN = [*RUN, "--only=digits"]
MISTAKES = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def experiment(own_folder: None) -> None:
    """Write the experiment's file."""
    Path("small.yaml").write_text(EXPERIMENT)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that returns the line that a command ends with; it has written nothing, unless `writes`."""

    def refuse(arguments: list[str], writes: bool = False) -> str:
        capsys.readouterr()
        before = set(Path().rglob("*"))
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert writes or set(Path().rglob("*")) == before
        line = error.strip().splitlines()[-1]
        assert line.startswith("coin: error: ")
        assert len(line) < 540
        return line

    return refuse


@pytest.fixture
def wrong_files() -> None:
    """Write the files that the commands name: no weights of a network, or those of another one."""
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), "other.pt")
    torch.save(torch.nn.Conv2d(3, 4, 3), "whole.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "a.pth")
    Path("page.pt").write_text("<!DOCTYPE html>")
    Path("text.pt").write_text("no checkpoint")
    Path("hf_folder").mkdir()
    Path("hf_folder/config.json").write_text("{}")


@pytest.mark.usefixtures("wrong_files")
@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_trained(
    name: str, refused: Callable[..., str]
) -> None:
    case = MISTAKES[name]
    if "replaces" in case:
        old, new = case["replaces"]
        assert old in EXPERIMENT
        Path("small.yaml").write_text(EXPERIMENT.replace(old, new, 1))
    command = case.get("command", [*RUN, *case.get("options", [])])
    assert case["line"] in refused(command, case.get("writes", False))
    assert not list(Path().rglob("*.ckpt"))


def test_a_package_that_is_missing_is_one_line(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    line = refused([*RUN, "--network={name: timm/resnet18, options: {}}"])
    assert "timm" in line
    assert "pip install" in line


def test_a_full_disk_is_one_line(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device; free the space" in refused(RUN, writes=True)
    assert not list(Path().rglob(".*.tmp"))


def test_imported_experts_are_different_ones(
    refused: Callable[..., str], write_experts: Any
) -> None:
    (expert,) = write_experts([10]).values()
    twice = json.dumps({"digits": expert, "letters": expert})
    line = refused([*RUN, f"--expert.checkpoints={twice}"])
    assert "found one expert for the tasks 'digits' and 'letters'" in line


def test_an_imported_expert_is_compared_with_the_initialisation(
    small_config: NetworkConfig,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    base = build_network(small_config, 10, seed=5)
    save_network(Path("base.safetensors"), base, small_config, 10, {})
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if not name.startswith(head_name(base)):
                parameter.mul_(1.01)
    save_network(Path("expert.safetensors"), base, small_config, 10, {})
    command = [*TRAIN, "--expert.checkpoints={digits: expert.safetensors}"]
    for base_option, is_told in (
        ([], True),
        (["--base.checkpoint=base.safetensors", "--name=based"], False),
    ):
        recwarn.clear()
        assert main([*command, *base_option]) == 0  # without a base it would be random weights
        told = [
            str(each.message)
            for each in recwarn
            if "of its weights from the initialisation" in str(each.message)
        ]
        assert len(told) == is_told
    assert "expert digits: its weights are" in capsys.readouterr().err


def with_context() -> KeyError:
    """Return a defect's error that came up while a mistake of the user's was handled."""
    error = KeyError("y")
    error.__context__ = FileError("found no file 'x', expected it")
    return error


DEFECTS: dict[str, BaseException] = {
    "an error": ValueError("x"),
    "an error within": with_context(),
    "out of memory": RuntimeError("not enough memory"),
    "of the system": OSError("x"),
    "of a worker": DataError(
        "Caught DataError in DataLoader worker 0.\nOriginal Traceback (most recent call last):\n x"
    ),
    "an exit": SystemExit(3),
}


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a function that has ``coin run`` call another one."""

    def patch(function: Callable[[], Any]) -> None:
        monkeypatch.setattr("coin.commands.run.main", lambda _: function())

    return patch


def throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("name", DEFECTS)
def test_what_is_no_mistake_keeps_its_traceback(name: str, ends_with: Any, capsys: Any) -> None:
    ends_with(lambda: throw(DEFECTS[name]))
    with pytest.raises(type(DEFECTS[name])):
        main(RUN)
    assert capsys.readouterr().err == ""


def test_a_defect_in_a_constructor_of_the_users_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("owntasks.py").write_text(
        "from coin.data import Digits\n\nclass Broken(Digits):\n    def __init__(self) -> None:\n        {}['x']\n"
    )
    monkeypatch.syspath_prepend(Path().absolute())
    with pytest.raises(KeyError, match="x"):
        main([*RUN, "--tasks.digits={class_path: owntasks.Broken}"])


def test_messages_and_warnings_are_one_line_whatever_they_quote(ends_with: Any) -> None:
    assert (
        str(ConfigurationError("found key 'a\n\nb', expected c")) == "found key 'a b', expected c"
    )
    assert str(FileError(2, "No such\nfile", "x")) == "[Errno 2] No such file: 'x'"
    shown = []

    def warn() -> None:
        shown.append(warnings.formatwarning("one\nline", CoinWarning, "file.py", 1))
        shown.append(warnings.formatwarning("one\nline", UserWarning, "file.py", 1))

    ends_with(warn)
    assert main(RUN) == 0
    assert shown[0] == "coin: warning: one line\n"
    assert shown[1].startswith("file.py:1: UserWarning")


@pytest.fixture
def killed_after_training(monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expert's last checkpoint, whose training was killed before the expert was written."""
    with monkeypatch.context() as patch:
        patch.setattr(ExpertExport, "on_train_end", lambda *_: throw(KeyError("killed")))
        with pytest.raises(KeyError, match="killed"):
            main(TRAIN)
    (last,) = Path("o/.steps").glob("expert-digits-*/checkpoints/last.ckpt")
    return last


def test_a_truncated_checkpoint_is_moved_away_and_the_training_begins_anew(
    killed_after_training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = killed_after_training.read_bytes()
    killed_after_training.unlink()  # it may be mapped
    killed_after_training.write_bytes(content[: len(content) // 2])
    assert main(TRAIN) == 0
    assert Path("o/small/seed-0/experts/digits/expert.safetensors").is_file()
    assert killed_after_training.with_name("last.ckpt.torn").is_file()
    assert "moved it to" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_now_is_kept(
    killed_after_training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = killed_after_training.read_bytes()
    message = "unable to mmap 13 bytes: Cannot allocate memory"
    monkeypatch.setattr(torch, "load", lambda *_, **__: throw(RuntimeError(message)))
    with pytest.raises(RuntimeError, match="unable to mmap"):
        main(TRAIN)
    assert killed_after_training.read_bytes() == before


UNDER = """
name: x
tasks: {a: {class_path: Digits, init_args: {max_train: 7}}}
methods: [{class_path: Coin, init_args: {damping: 5}}]
"""
OVER = """
tasks: {a: {class_path: MNIST5k}}
methods: [{class_path: RegMean}]
"""


@pytest.mark.parametrize(
    ("options", "most", "damping"),
    [
        (["-c", "over.yaml"], None, None),
        (
            ["--methods", "[{class_path: RegMean}]", "--tasks={a: {class_path: MNIST5k}}"],
            None,
            None,
        ),
        (["--tasks.a.init_args.max_train=9"], 9, 5),
    ],
    ids=["a file", "options", "one option"],
)
def test_what_is_laid_over_leaves_nothing_behind_of_another_class(
    options: list[str], most: int | None, damping: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("under.yaml").write_text(UNDER)
    Path("over.yaml").write_text(OVER)
    with pytest.raises(SystemExit):
        main(["run", "-c", "under.yaml", *options, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["tasks"]["a"]["init_args"]["max_train"] == most
    assert (found["methods"][0]["init_args"]["damping"] == 5) is (damping == 5)


@pytest.fixture
def signals() -> Iterator[None]:
    """Take the signals as the command does, and put the handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    take_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def kill_in_c_code() -> None:
    """Torch, copying a tensor of a file, may raise an error of its own in place of what a handler raises."""
    try:
        kill(signal.SIGTERM)
    except BaseException:
        raise ValueError(
            "could not determine the shape of object type 'torch.storage.UntypedStorage'"
        ) from None


INTERRUPTIONS: dict[str, tuple[Callable[[], Any], int]] = {
    "a key": (lambda: throw(KeyboardInterrupt()), 130),
    "SIGINT": (lambda: kill(signal.SIGINT), 130),
    "SIGTERM": (lambda: kill(signal.SIGTERM), 143),
    "SIGTERM in C code": (kill_in_c_code, 143),
    "SIGTERM while Ray starts": (lambda: sys.exit(15), 143),
}


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interruption_is_one_line_and_a_status(name: str, ends_with: Any, capsys: Any) -> None:
    does, status = INTERRUPTIONS[name]
    ends_with(does)
    assert main(RUN) == status
    by = " by SIGTERM" if status == 143 else ""
    assert (
        capsys.readouterr().err == f"coin: interrupted{by}; the same command goes on where it was\n"
    )


@pytest.mark.usefixtures("signals")
def test_sigterm_during_a_training_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expert, "training_step", lambda *_: kill(signal.SIGTERM))
    assert main(TRAIN) == 143


def test_a_command_that_ends_itself_is_not_interrupted(ends_with: Any) -> None:
    ends_with(sys.exit)
    with pytest.raises(SystemExit):
        main(RUN)
