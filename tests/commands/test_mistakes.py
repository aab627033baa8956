"""Mistakes on the command line and in its files: status 2, one line, nothing written. Defects keep their traceback."""

import errno
import json
import os
import shutil
import signal
import subprocess
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
from coin.files.atomic import write_text
from coin.files.safetensors import save_state
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


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    return tmp_path / "small.yaml"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], written: bool = False) -> str:
    """Return the line that a command ends with; it has written nothing, unless `written`."""
    capsys.readouterr()
    before = set(Path().rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert written or set(Path().rglob("*")) == before
    return line.removeprefix("coin: error: ")


TYPOS = {
    "an option": (
        "samples_per",
        "sample_per",
        "'calibration' does not accept option 'sample_per_task'; see",
    ),
    "a task's option": ("max_train", "max_trian", "class_path 'coin.data.Digits': Option 'max_trian' is not accepted"),
    "a task's class": ("class_path: Digits", "class_path: Digist", "string: Digist; see coin run --help"),
    "a task of torchvision's": ("class_path: Digits", "class_path: torchvision.datasets.MNIST", "subclass of TaskData"),
    "a null section": ("calibration: {samples_per_task: 4}", "calibration:", "found no options in calibration"),
    "no YAML": ("name: small\n", "name: [small\n", "as YAML: while parsing a flow sequence in line 2"),
    "a method's class": ("Average}", "Refitt}", '"methods": Expected a dot import path string: Refitt; see'),
    "a method's option": ("Average}", "Average, init_args: {batchnrom: keep}}", "Option 'batchnrom' is not accepted"),
    "an option beside": ("Average}", "Refit, ridge: 1}", '"methods": Expected an instantiatable class, but'),
    "no list of methods": ("[{class_path: Average}]", "Average", "\"methods\": Expected a <class 'list'>. Got val"),
    "a choice": ("samples_per_task: 4", "fisher_kind: exat", "'FisherKind'>: {exact,"),
    "a method's number": ("Average}", "Refit, init_args: {ridge: -1}}", "found ridge=-1.0, expected a number above 0"),
    "a method's module": ("Average", "nowhere.Method", "'nowhere.Method': No module named 'nowhere'"),
    "a task that leads out": ("  digits:", "  '..':", "found task name '..'"),
    "an experiment that leads out": ("name: small\n", "name: ../small\n", "found name '../small'"),
    "a name too long": ("name: small\n", f"name: {'x' * 300}\n", "expected a plain folder name"),
}


@pytest.mark.parametrize("case", TYPOS)
def test_a_mistake_in_a_file_is_one_line(case: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, message = TYPOS[case]
    assert old in EXPERIMENT
    config.write_text(EXPERIMENT.replace(old, new, 1))
    assert message in refused(["run", "-c", "small.yaml"], capsys)


FOLDER = "{class_path: ImageFolder, init_args: {root: nowhere}}"
POLICIES = (
    "[{class_path: Coin, init_args: {label: mine}}, {class_path: Coin, init_args: {label: mine, batchnorm: keep}}]"
)


def method_with(option: str) -> str:
    """Return the value of ``--methods`` with one method that has an option."""
    return f"[{{class_path: Average, init_args: {{{option}}}}}]"


LARGER = "[{class_path: Distillation, init_args: {samples_per_task: 4000}}]"
RUN = {
    "half an option": (["--expert.epoch=7"], "unrecognized arguments: --expert.epoch=7; see coin run --help"),
    "a task's class": (
        ["--tasks={a: {class_path: Nothing}}"],
        "path string: Nothing; see coin run --help",
    ),
    "one task": (["--tasks={a: {class_path: Digits}}"], "two"),
    "a base's option": (["--base={task: {class_path: ImageFolder, init_args: {rot: x}}}"], "'rot' is not accepted"),
    "no sum of one": (["--code=[[0.5, 0.6]]"], "row 0 of the code is [0.5, 0.6], which sums to 1.1, expected"),
    "negative weight": (["--code=[[1.5, -0.5]]"], "-0.5"),
    "a seed twice": (["--seeds=[1, 1]"], "seeds"),
    "a seed that is no number": (["--seeds=[a]"], "Expected a <class 'int'>. Got value: a"),
    "a method twice": (["--methods=[{class_path: Coin}, {class_path: Coin}]"], "label"),
    "unknown network": (["--network.name=resnet51"], "Unknown model resnet51; change network.name"),
    "unknown weights": (
        ["--network={name: resnet18, weights: V9, options: {}}"],
        "weights V9 and options",
    ),
    "missing weights": (["--network.weights=nowhere.pt"], "found network.weights 'nowhere.pt', expected null"),
    "unknown decoder": (["--decoders=[linear, lineer]"], "found decoder='lineer' (did you mean linear?), expected one"),
    "a decoder twice": (["--decoders=[ridge, ridge]"], "expected at least one and each once"),
    "an expert of no task": (["--expert.overrides={diggits: {epochs: 1}}"], "'diggits' (did you mean digits?)"),
    "override of a wrong kind": (["--expert.overrides={digits: {schedule: up}}"], "schedule"),
    "unknown trainer option": (["--trainer={speed: 9}"], "speed"),
    "a trainer option of a step's": (["--trainer={max_epochs: 3}"], "found trainer.max_epochs, which each step sets"),
    "a draw of no method": (["--calibration.fisher_mc_samples=3"], "monte_carlo"),
    "name with a slash": (["--name=a/b"], "a/b"),
    "a folder of images": ([f"--tasks.digits={FOLDER}"], "nowhere/train'; expected images as"),
    "a base's images": (
        [f"--tasks.digits={FOLDER}", "--base={task: {class_path: Digits}}"],
        "nowhere/train'; expected",
    ),
    "two replicas of a name": (["--replicas=[{bits: 3}, {bits: 3}]"], "found method replica-3bit-delta twice"),
    "an option of no replica": (["--replicas=[{bit: 3}]"], "bits and base_"),
    "too few for a promise": (
        ["--calibration.promise_samples=4000"],
        "found 4000 promise samples of",
    ),
    "too few samples": (["--calibration.samples_per_task=4000"], "found 4000 calibration samples of digits, expected"),
    "a method's own": ([f"--methods={LARGER}"], "found 4000 calibration samples of digits, expected"),
    "one label for two policies": ([f"--methods={POLICIES}"], "found method mine twice; leave one out, or give one"),
    "an option of another network": (["--network={name: timm/resnet18}"], "and options {'width': 4}: ResNet.__init__"),
    "an option of no network": (["--network.options={wide: 1}"], "and options {'wide': 1}: SmallResNet.__init__"),
    "missing base": (["--base={checkpoint: nowhere.pt, task: null}"], "nowhere.pt"),
    "missing checkpoint": (["--expert.checkpoints={digits: nowhere.ckpt}"], "nowhere.ckpt"),
    "a rate's other name": (["--expert.learning_rate=1"], "unrecognized arguments: --expert.learning_rate=1; se"),
    "a rank alone": (
        [f"--methods={method_with('adapters: 4')}"],
        'Parser key "adapters": Does not validate against any of',
    ),
    "bits alone": ([f"--methods={method_with('compress: 4')}"], "Given value: 4; see coin run --help"),
    "bits in a list": ([f"--methods={method_with('compress: [4]')}"], "Expected a <class 'dict'>. Got value: 4"),
    "one replica": (
        ["--replicas={bits: 3}"],
        '"replicas": Does not validate against any of the Union subtypes Subtypes: [list[d',
    ),
    "a flat code": (
        ["--code=[0.5, 0.5]"],
        '"code": Does not validate against any of the Union subtypes Subtypes: [list[list[flo',
    ),
    "half an epoch": (["--expert.epochs=1.5"], "\"expert.epochs\": Expected a <class 'int'>. Got value: 1.5; see coin"),
    "a network's name alone": (["--network=resnet18"], "\"network\": Unable to load config 'resnet18'"),
    "such a folder's weights": (
        ["--expert.checkpoints={digits: hf_folder}"],
        "'hf_folder' (Is a directory), expected a f",
    ),
    "folder that cannot be made": (["--output=/proc/nope"], "/proc/nope"),
}
"""Options of ``coin run -c small.yaml``."""

IMPORTED = {
    "another architecture": ("other.pt", "it is of another architecture: give one of"),
    "a pickled network": ("whole.pt", "cannot read 'whole.pt' as a network's weights"),
    "a web page": ("page.pt", "cannot read 'page.pt' as a network's weights"),
    "no checkpoint": ("text.pt", "cannot read 'text.pt' as a network's weights"),
}
"""Files of an expert."""


@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")
@pytest.mark.parametrize("case", RUN)
def test_a_mistake_of_an_experiment_is_one_line(case: str, config: Path, capsys: Any) -> None:
    Path("hf_folder").mkdir()
    Path("hf_folder/config.json").write_text("{}")
    options, message = RUN[case]
    assert message in refused(["run", "-c", "small.yaml", *options], capsys)
    assert not list(Path().rglob("*.ckpt")), "trained"


@pytest.mark.parametrize("case", IMPORTED)
def test_a_mistake_in_an_imported_expert_is_one_line_before_others_are_trained(
    case: str, config: Path, capsys: Any
) -> None:
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), "other.pt")
    torch.save(torch.nn.Conv2d(3, 4, 3), "whole.pt")
    Path("page.pt").write_text("<!DOCTYPE html>")
    Path("text.pt").write_text("no checkpoint")
    file, message = IMPORTED[case]
    command = ["run", "-c", "small.yaml", f"--expert.checkpoints={{letters: {file}}}"]
    assert message in refused(command, capsys, written=True)
    assert not list(Path("o/.steps").glob("expert-digits-*")), "trained"


COMMANDS = {
    "no command": ([], "found no command, expected one of run"),
    "a command": (["rnu"], "found command 'rnu' (did you mean run?), expected one of run, fit,"),
    "a configuration": (
        ["run", "-c", "quikstart"],
        "'quikstart' (did you mean quickstart?), expected a file, or the name of",
    ),
    "a file": (["run", "-c", "a.yaml"], "found no configuration 'a.yaml', expected a file"),
    "a file without -c": (["run", "a.yaml"], "unrecognized arguments: a.yaml; see coin run --help"),
    "nothing": (["run"], "required: name, tasks, methods"),
    "an option of a function": (["compress", "a", "--bts=3"], "unrecognized arguments: --bts=3; see coin compress --"),
    "a network's file": (["compress", "no.safetensors", "--bits=4"], "found no file 'no.safetensors', expected"),
    "report of nothing": (["report", "nowhere"], "nowhere"),
    "serving nothing": (["serve", "nowhere"], "in 'nowhere', expected the folder of an experiment or of one seed"),
    "choosing of nothing": (["choose", "nowhere"], "nowhere"),
    "a folder's root": (["fit", "--data=ImageFolder"], "'coin.data.ImageFolder': the following arguments are required"),
    "an option": (["fit", "--dat=Digits"], "unrecognized arguments: --dat=Digits; see coin fit --help"),
    "a Trainer's option": (["fit", "--data=Digits", "--trainer.max_epoch=1"], "unrecognized arguments: --trainer.max"),
    "an expert's option": (["fit", "--data=Digits", "--model.lrr=1"], "'coin.modules.Expert': Option 'lrr' is not acc"),
    "an expert's network": (
        ["fit", "--data=Digits", "--model.network=resnet5"],
        "Unknown model resnet5; change netw",
    ),
    "image sizes": (["fit", "--data=Digits", "--data.image_size=8", "--model.network=small_resnet"], "image_size"),
    "a checkpoint": (["fisher", "--data=Digits", "--ckpt_path=no.safetensors"], "no.safetensors"),
    "no checkpoint of Lightning's": (
        ["validate", "--data=Digits", "--ckpt_path=expert.safetensors"],
        "give one that coin fit",
    ),
    "missing checkpoint": (["test", "--ckpt_path=nowhere.ckpt", "--data=Digits"], "nowhere.ckpt"),
    "no experts": (["evaluate", "--model=DecodingEvaluator"], "the following arguments are required: experts"),
    "a checkpoint to merge": (
        ["merge", "--experts={a: a.pth}", "--method=Average", "--output=x"],
        "found 'a.pth', a check",
    ),
    "a checkpoint to compress": (
        ["compress", "a.pth", "--bits=4"],
        "import it by coin run with expert: {checkpoints: {TASK",
    ),
    "no file": (["merge", "--experts={a: no.safetensors}", "--method=Average", "--output=x"], "no.safetensors"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_mistake_of_any_command_is_one_line(case: str, config: Path, capsys: Any) -> None:
    arguments, message = COMMANDS[case]
    torch.save(torch.nn.Linear(2, 2).state_dict(), "a.pth")
    line = refused(arguments, capsys, written=case == "image sizes")
    assert message in line
    assert len(line) < 540


def test_a_package_that_is_missing_is_one_line(config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    line = refused(["run", "-c", "small.yaml", "--network={name: timm/resnet18, options: {}}"], capsys)
    assert "timm" in line
    assert "pip install" in line


def worker_error() -> DataError:
    """An error as a DataLoader hands it on from a worker."""
    return DataError("Caught DataError in DataLoader worker 0.\nOriginal Traceback (most recent call last):\n x")


def within() -> None:
    try:
        raise FileError("found no file 'x', expected it")
    except FileError:
        {}["y"]


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (within, KeyError),
        (lambda: len(3), TypeError),
        (lambda: torch.empty(2**60), RuntimeError),
        (lambda: open("/proc/nope", "w"), OSError),  # noqa: PTH123, SIM115
        (lambda: (_ for _ in ()).throw(worker_error()), DataError),
        (lambda: sys.exit(3), SystemExit),
    ],
)
def test_what_is_no_mistake_of_the_commands_keeps_its_traceback(
    does: Callable[[], Any], kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("coin.commands.choose.main", lambda _: does())
    with pytest.raises(kind):
        main(["choose", "x"])
    assert capsys.readouterr().err == ""


def test_a_defect_in_a_constructor_of_the_users_keeps_its_traceback(config: Path, monkeypatch: Any) -> None:
    (config.parent / "owntasks.py").write_text(
        "from coin.data import Digits\n\nclass Broken(Digits):\n    def __init__(self) -> None:\n        {}['x']\n"
    )
    monkeypatch.syspath_prepend(config.parent)
    with pytest.raises(KeyError, match="x"):
        main(["run", "-c", "small.yaml", "--tasks.digits={class_path: owntasks.Broken}"])


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(ConfigurationError("found key 'a\n\nb', expected c")) == "found key 'a b', expected c"
    assert str(FileError(2, "No such\nfile", "x")) == "[Errno 2] No such file: 'x'"


WRITERS: dict[str, Callable[[Path], None]] = {
    "kept.safetensors": lambda path: save_state(path, {"a": torch.zeros(3)}, {}),
    "kept.json": lambda path: write_text(path, "[]"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_loses_nothing_that_was_written(
    name: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = config.parent / name
    save_state(path, {"a": torch.ones(3)}, {}) if path.suffix == ".safetensors" else write_text(path, "{}")
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr("coin.files.safetensors.save_file", refuse)
    with pytest.raises(FileError, match=r"No space left on device; free the space"):
        WRITERS[name](path)
    assert path.read_bytes() == before
    assert not list(config.parent.glob(".*.tmp"))
    assert "No space left on device" in refused(["run", "-c", "small.yaml"], capsys, written=True)


def cut_off(path: Path) -> None:
    """Leave the first half of a file, as another file: this one may be mapped."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def test_a_truncated_checkpoint_of_a_training_is_no_end(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyError("killed")

    command = ["run", "-c", str(config), "--only=digits"]
    assert main(command) == 0
    folder = (tmp_path / "o/small/seed-0/experts/digits").resolve()
    wanted = (folder / "expert.safetensors").read_bytes()
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(ExpertExport, "on_train_end", killed)
        with pytest.raises(KeyError, match="killed"):
            main(command)
    last, whole = folder / "checkpoints/last.ckpt", tmp_path / "whole.ckpt"
    shutil.copyfile(last, whole)
    cut_off(last)
    assert main(command) == 0
    assert (folder / "expert.safetensors").read_bytes() == wanted
    assert (folder / "checkpoints/last.ckpt.torn").is_file()
    assert "moved it to" in capsys.readouterr().err
    # Another network's, given by hand, is refused by Lightning.
    fit = ["fit", "--data=Digits", "--data.image_size=16", "--model.network=small_resnet", "--model.image_size=16"]
    with pytest.raises(RuntimeError, match="loading state_dict"):
        main([*fit, f"--ckpt_path={whole}", "--trainer.logger=false"])


def test_a_checkpoint_that_cannot_be_read_now_is_kept(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", "-c", str(config), "--only=digits", "--expert.epochs=2"]
    plain = Expert.on_train_epoch_start

    def killed(self: Expert) -> None:
        plain(self)
        if self.current_epoch == 1:
            raise KeyError("killed")

    monkeypatch.setattr(Expert, "on_train_epoch_start", killed)
    with pytest.raises(KeyError, match="killed"):
        main(command)
    (last,) = tmp_path.glob("o/.steps/expert-digits-*/checkpoints/last.ckpt")
    before = last.read_bytes()

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 13 bytes: Cannot allocate memory")

    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(RuntimeError, match="unable to mmap"):
        main(command)
    assert last.read_bytes() == before


def test_imported_experts_are_compared_with_one_another_and_with_the_initialisation(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_config: NetworkConfig
) -> None:
    """Before anything is trained, merged or measured."""
    base = build_network(small_config, 10, seed=5)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "digits", "letters")}
    for place, (name, path) in enumerate(files.items()):
        network = build_network(small_config, 3 if name == "letters" else 10, seed=6)
        with torch.no_grad():
            for own, parameter in network.named_parameters():
                if own in dict(base.named_parameters()) and not own.startswith(head_name(network)):
                    moved = 0.01 * place * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
                    parameter.copy_(base.get_parameter(own) + moved)
        save_network(path, network, small_config, 3 if name == "letters" else 10, {})
    twice = {"digits": str(files["digits"]), "letters": str(files["digits"])}
    line = refused(["run", "-c", str(config), f"--expert.checkpoints={json.dumps(twice)}"], capsys)
    assert line.startswith("found one expert for the tasks 'digits' and 'letters'")
    own = f"--expert.checkpoints={json.dumps({name: str(files[name]) for name in ('digits', 'letters')})}"
    command = ["run", "-c", str(config), own, "--only=digits"]
    with pytest.warns(
        CoinWarning, match=r"the expert 'digits' \d+% of its weights from the initialisation, as unrelated"
    ):
        assert main(command) == 0  # without a base it would be random weights
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "found the expert .* from the initialisation", CoinWarning)
        assert main([*command, "--output=other", f"--base.checkpoint={files['base']}"]) == 0
    said = capsys.readouterr().err
    assert "expert digits: its weights are" in said


def test_what_is_laid_over_leaves_nothing_behind_of_another_class(tmp_path: Path, capsys: Any) -> None:
    under, over = tmp_path / "under.yaml", tmp_path / "over.yaml"
    tasks, first = "{a: {class_path: Digits, init_args: {max_train: 7}}}", "{class_path: Coin, init_args: {damping: 5}}"
    under.write_text(f"name: x\ntasks: {tasks}\nmethods: [{first}]\n")
    over.write_text("tasks: {a: {class_path: MNIST5k}}\nmethods: [{class_path: RegMean}]\n")
    given = ["--methods", "[{class_path: RegMean}]", "--tasks={a: {class_path: MNIST5k}}"]
    for more in (["-c", str(over)], given):
        with pytest.raises(SystemExit):
            main(["run", "-c", str(under), *more, "--print_config"])
        found = yaml.safe_load(capsys.readouterr().out)
        assert found["methods"][0]["init_args"]["damping"] != 5
        assert found["tasks"]["a"]["init_args"]["max_train"] is None
    with pytest.raises(SystemExit):
        main(["run", "-c", str(under), "--tasks.a.init_args.max_train=9", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["tasks"]["a"]["init_args"]["max_train"] == 9


def test_an_interruption_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coin.commands.run.main", interrupted)
    assert main(["run", "-c", "quickstart"]) == 130
    assert capsys.readouterr().err == "coin: interrupted; the same command goes on where it was\n"


@pytest.fixture
def signals() -> Iterator[None]:
    """Take the signals as the command does, and put the handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    take_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


TERMINATED = "coin: interrupted by SIGTERM; the same command goes on where it was\n"


@pytest.mark.usefixtures("signals")
def test_sigterm_during_a_training_is_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Expert.training_step

    def terminated(self: Expert, batch: Any, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Expert, "training_step", terminated)
    Path("small.yaml").write_text(EXPERIMENT)
    assert main(["run", "-c", "small.yaml"]) == 143
    assert capsys.readouterr().err.endswith(TERMINATED)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("comes", ["between trainings", "in C code"])
def test_a_signal_is_one_line_whatever_becomes_of_the_exception(
    number: signal.Signals, comes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch, copying a tensor of a file, may raise "could not determine the shape" in place of what is raised."""

    def merge(*_: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            if comes == "between trainings":
                raise
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    monkeypatch.setattr("coin.commands.run.main", merge)
    assert main(["run", "-c", "quickstart"]) == 128 + number
    assert capsys.readouterr().err == TERMINATED.replace(
        " by SIGTERM", "" if number == signal.SIGINT else " by SIGTERM"
    )


def test_sigterm_while_ray_starts_is_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coin.commands.run.main", lambda *_: sys.exit(15))
    assert main(["run", "-c", "quickstart"]) == 143
    assert capsys.readouterr().err == TERMINATED


def test_a_command_that_ends_itself_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coin.commands.run.main", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        main(["run", "-c", "quickstart"])


WARN = """
import warnings
from functools import partial
from coin.cli import _format_warning
from coin.errors import CoinWarning
warnings.formatwarning = partial(_format_warning, warnings.formatwarning)
import lightning.fabric.utilities.warnings  # which formats warnings in its own way
warnings.warn("one\\nline", CoinWarning)
"""


def test_our_warnings_are_one_line() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", WARN], capture_output=True, text=True, check=True
    )
    assert found.stderr == "coin: warning: one line\n"
