"""Mistakes on the command line and in its files: status 2, one line, nothing written. Defects keep their traceback."""

import errno
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from coin.callbacks import ExpertExport
from coin.cli import main, take_signals
from coin.errors import CoinWarning, ConfigurationError, DataError, FileError
from coin.modules import Expert
from coin.networks import build_network, head_name, save_network

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
def experiment(own_folder):
    """Write the experiment's file."""
    Path("small.yaml").write_text(EXPERIMENT)


@pytest.fixture
def refused(capsys):
    """Return a function that returns the line that a command ends with; it has written nothing, unless `writes`."""

    def refuse(arguments, writes=False):
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
def wrong_files():
    """Write the files that the commands name: no weights of a network, or those of another one."""
    convolution = torch.nn.Conv2d(3, 4, 3)
    torch.save(convolution.state_dict(), "other.pt")
    torch.save(convolution.state_dict(), "a.pth")
    torch.save(convolution, "whole.pt")
    Path("page.pt").write_text("<!DOCTYPE html>")
    Path("text.pt").write_text("no checkpoint")
    Path("hf_folder").mkdir()
    Path("hf_folder/config.json").write_text("{}")


@pytest.mark.usefixtures("wrong_files")
@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_trained(name, refused):
    case = MISTAKES[name]
    if "replaces" in case:
        old, new = case["replaces"]
        assert old in EXPERIMENT
        Path("small.yaml").write_text(EXPERIMENT.replace(old, new, 1))
    command = case.get("command", [*RUN, *case.get("options", [])])
    assert case["line"] in refused(command, case.get("writes", False))
    assert not list(Path().rglob("*.ckpt"))


def test_a_package_that_is_missing_is_one_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    line = refused([*RUN, "--network={name: timm/resnet18, options: {}}"])
    assert "timm" in line
    assert "pip install" in line


def throw(error):
    raise error


def test_a_full_disk_is_one_line(refused, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: throw(full))
    assert "No space left on device; free the space" in refused(RUN, writes=True)
    assert not list(Path().rglob(".*.tmp"))


def test_imported_experts_are_different_ones(refused, write_experts):
    (expert,) = write_experts([10]).values()
    twice = json.dumps({"digits": expert, "letters": expert})
    line = refused([*RUN, f"--expert.checkpoints={twice}"])
    assert "found one expert for the tasks 'digits' and 'letters'" in line


def test_an_imported_expert_is_compared_with_the_initialisation(small_config, recwarn, capsys):
    network = build_network(small_config, 10, seed=5)
    save_network(Path("base.safetensors"), network, small_config, 10, {})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith(head_name(network)):
                parameter.mul_(1.01)
    save_network(Path("expert.safetensors"), network, small_config, 10, {})
    command = [*TRAIN, "--expert.checkpoints={digits: expert.safetensors}"]
    told = "of its weights from the initialisation"
    assert main(command) == 0  # without a base it is random weights
    assert [told in str(each.message) for each in recwarn].count(True) == 1
    recwarn.clear()
    assert main([*command, "--base.checkpoint=base.safetensors", "--name=based"]) == 0
    assert [told in str(each.message) for each in recwarn].count(True) == 0
    assert "expert digits: its weights are" in capsys.readouterr().err


def with_context():
    """Return a defect's error that came up while a mistake of the user's was handled."""
    error = KeyError("y")
    error.__context__ = FileError("found no file 'x', expected it")
    return error


DEFECTS = {
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
def ends_with(monkeypatch):
    """Return a function that has ``coin run`` call another one."""

    def patch(function):
        monkeypatch.setattr("coin.commands.run.main", lambda _: function())

    return patch


@pytest.mark.parametrize("name", DEFECTS)
def test_what_is_no_mistake_keeps_its_traceback(name, ends_with, capsys):
    ends_with(lambda: throw(DEFECTS[name]))
    with pytest.raises(type(DEFECTS[name])):
        main(RUN)
    assert capsys.readouterr().err == ""


BROKEN = """
from coin.data import Digits

class Broken(Digits):
    def __init__(self) -> None:
        {}["x"]
"""


def test_a_defect_in_a_constructor_of_the_users_keeps_its_traceback(monkeypatch):
    Path("owntasks.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(Path().absolute())
    with pytest.raises(KeyError, match="x"):
        main([*RUN, "--tasks.digits={class_path: owntasks.Broken}"])


def test_messages_and_warnings_are_one_line_whatever_they_quote(ends_with):
    error = ConfigurationError("found key 'a\n\nb', expected c")
    assert str(error) == "found key 'a b', expected c"
    assert str(FileError(2, "No such\nfile", "x")) == "[Errno 2] No such file: 'x'"

    def warn():
        own = warnings.formatwarning("one\nline", CoinWarning, "file.py", 1)
        assert own == "coin: warning: one line\n"
        other = warnings.formatwarning("one\nline", UserWarning, "file.py", 1)
        assert other.startswith("file.py:1: UserWarning")

    ends_with(warn)
    assert main(RUN) == 0


@pytest.fixture
def killed_after_training(monkeypatch):
    """An expert's last checkpoint, whose training was killed before the expert was written."""
    with monkeypatch.context() as patch:
        patch.setattr(ExpertExport, "on_train_end", lambda *_: throw(KeyError("killed")))
        with pytest.raises(KeyError, match="killed"):
            main(TRAIN)
    (last,) = Path("o/.steps").glob("expert-digits-*/checkpoints/last.ckpt")
    return last


def test_a_truncated_checkpoint_is_moved_away_and_the_training_begins_anew(
    killed_after_training, capsys
):
    content = killed_after_training.read_bytes()
    killed_after_training.unlink()  # it may be mapped
    killed_after_training.write_bytes(content[: len(content) // 2])
    assert main(TRAIN) == 0
    assert Path("o/small/seed-0/experts/digits/expert.safetensors").is_file()
    assert killed_after_training.with_name("last.ckpt.torn").is_file()
    assert "moved it to" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_now_is_kept(killed_after_training, monkeypatch):
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
REPLACED = ["--methods=[{class_path: RegMean}]", "--tasks={a: {class_path: MNIST5k}}"]


@pytest.mark.parametrize(
    ("options", "most", "is_damped"),
    [
        (["-c", "over.yaml"], None, False),
        (REPLACED, None, False),
        (["--tasks.a.init_args.max_train=9"], 9, True),
    ],
    ids=["a file", "options", "one option"],
)
def test_what_is_laid_over_leaves_nothing_behind_of_another_class(options, most, is_damped, capsys):
    Path("under.yaml").write_text(UNDER)
    Path("over.yaml").write_text(OVER)
    with pytest.raises(SystemExit):
        main(["run", "-c", "under.yaml", *options, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    (method,) = found["methods"]
    assert found["tasks"]["a"]["init_args"]["max_train"] == most
    assert (method["init_args"]["damping"] == 5) is is_damped


@pytest.fixture
def signals():
    """Take the signals as the command does, and put the handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    take_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_in_c_code():
    """Torch, copying a tensor of a file, may raise an error of its own in place of what a handler raises."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        raise ValueError("could not determine the shape of object type 'torch.storage'") from None


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("does", "status", "by"),
    [
        (lambda: throw(KeyboardInterrupt()), 130, ""),
        (lambda: signal.raise_signal(signal.SIGINT), 130, ""),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, " by SIGTERM"),
        (kill_in_c_code, 143, " by SIGTERM"),
        (lambda: sys.exit(15), 143, " by SIGTERM"),
    ],
    ids=["a key", "SIGINT", "SIGTERM", "SIGTERM in C code", "SIGTERM while Ray starts"],
)
def test_an_interruption_is_one_line_and_a_status(does, status, by, ends_with, capsys):
    ends_with(does)
    assert main(RUN) == status
    line = f"coin: interrupted{by}; the same command goes on where it was\n"
    assert capsys.readouterr().err == line


@pytest.mark.usefixtures("signals")
def test_sigterm_during_a_training_is_no_success(monkeypatch):
    monkeypatch.setattr(Expert, "training_step", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(TRAIN) == 143


def test_a_command_that_ends_itself_is_not_interrupted(ends_with):
    ends_with(sys.exit)
    with pytest.raises(SystemExit):
        main(RUN)
