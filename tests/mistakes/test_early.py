"""What a command line and its files show by themselves is told before anything heavy is imported."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from torchvision import models

import coin.data
import coin.distillation
import coin.merging
import coin.modules
from coin.cli import _options_of
from coin.commands import ON_TRAINER, sweep
from coin.commands.coded_system import Choice
from coin.commands.early import check_early
from coin.commands.signatures import annotated_options, known_classes, known_networks, known_options
from coin.commands.simulate import simulate
from coin.errors import ConfigurationError, FileError
from coin.networks.sources import Own
from coin.pipeline import Experiment
from coin.pipeline.config import ExpertConfig
from coin.pipeline.launch import Launch
from coin.pipeline.steps.merge import merge
from coin.pipeline.steps.trainer import Trainer
from coin.serving.sim.conditions import Conditions

RUN = """
import sys
from coin.cli import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "lightning", "torchvision", "wandb", "pandas"} & set(sys.modules))
print("heavy:", heavy)
sys.exit(status)
"""

WRONG = {
    "no file": (None, "cannot read '{path}' (No such file or directory)"),
    "a tab": ("name: x\n\tmethods: []\n", "cannot use '{path}' as YAML"),
    "a key": ("name: x\nmetods: []\n", "found option 'metods' (did you mean methods?), expected one of base,"),
    "a method": (
        "methods: [{class_path: Refti}]\n",
        "found class 'Refti' (did you mean Refit?), expected one of coin's",
    ),
    "options beside a class": (
        "tasks: {a: {class_path: ImageFolder, root: data}}\n",
        "found 'root' beside class_path: ImageFolder, expected options under init_args",
    ),
    "options beside the tasks": (
        "tasks:\n  a: {class_path: ImageFolder}\n  init_args: {root: data}\n",
        "found 'init_args' as the name of a task; indent it under its task",
    ),
    "tasks that are not indented": (
        "name: x\ntasks:\nlow: {class_path: MNIST5k}\n",
        "found option 'low', expected one of base, ",
    ),
    "methods that are no list": ("methods: Refit\n", "found methods: Refit, expected a list; write methods: [Refit]"),
    "a task of torchvision's": (
        "tasks: {a: {class_path: torchvision.datasets.ImageFolder}}\n",
        "found class 'torchvision.datasets.ImageFolder', expected one of coin's; write class_path: ImageFolder",
    ),
    "a folder of images one too deep": (
        "tasks: {a: {class_path: ImageFolder, init_args: {root: /nowhere/train}}}\n",
        "/nowhere/train/train does not exist; expected images as /nowhere/train/train/CLASS/image.png; set root to the "
        "folder above, /nowhere",
    ),
    "a task": ("tasks: {a: {class_path: mnist5}}\n", "found class 'mnist5' (did you mean MNIST5k?)"),
    "a section's option": (
        "expert: {epoch: 3}\n",
        "found expert option 'epoch' (did you mean epochs?), expected one of optimizer, lr, ",
    ),
    "a method's option": (
        "methods: [{class_path: Coin, init_args: {dampign: 1}}]\n",
        "found Coin option 'dampign' (did you mean damping?), expected one of damping, fisher_kind, ",
    ),
    "a number of a section": ("expert: {lr: 1e-3, epochs: many}\n", "found expert.epochs='many', expected int"),
    "a number of a method": (
        "methods: [{class_path: Refit, init_args: {ridge: none at all}}]\n",
        "found Refit.ridge='none at all', expected float or nothing",
    ),
    "a folder of images": (
        "tasks: {a: {class_path: ImageFolder, init_args: {root: /nowhere}}}\n",
        "/nowhere/train does not exist; expected images as /nowhere/train/CLASS/image.png",
    ),
    "a network": (
        "network: {name: resnet51}\n",
        "found network.name 'resnet51' (did you mean resnet50?), expected small_resnet, ",
    ),
    "a choice of a section": (
        "calibration: {fisher_kind: exat}\n",
        "found calibration.fisher_kind 'exat' (did you mean exact?), expected one of exact, monte_carlo, ",
    ),
    "a choice of a method": (
        "methods: [{class_path: Refit, init_args: {target: oun}}]\n",
        "found Refit.target 'oun' (did you mean own?), expected one of own, both, auto",
    ),
    "an expert's file": (
        "expert: {checkpoints: {a: nowhere.ckpt, b: hf/someone/model}}\n",
        "found no file 'nowhere.ckpt', expected expert.checkpoints.a",
    ),
    "a base's file": ("base: {checkpoint: nowhere.pt}\n", "found no file 'nowhere.pt', expected base.checkpoint"),
    "a network's file": ("network: {weights: nowhere.pt}\n", "found no file 'nowhere.pt', expected network.weights"),
    "an expert of no task": (
        "tasks: {a: {class_path: Digits}}\nexpert: {overrides: {aa: {epochs: 1}}}\n",
        "found an expert of task 'aa' (did you mean a?), expected one of a; check it",
    ),
    "a row of the code": (
        "code: [[0.5, 0.6]]\n",
        "found code row [0.5, 0.6], whose sum is 1.1, expected non-negative weights that sum to 1",
    ),
    "a decoder": (
        "decoders: [linear, lineer]\n",
        "found decoder='lineer' (did you mean linear?), expected one of linear, ridge, ",
    ),
    "a decoder's option": (
        "decoders: [{kind: ridge, feat: last}]\n",
        "found option 'feat' of a decoder, expected kind, ",
    ),
    "an option of the base's task": (
        "base: {task: {class_path: ImageFolder, init_args: {rot: data}}}\n",
        "found ImageFolder option 'rot' (did you mean root?), expected one of root, in_memory, ",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_in_a_file_is_told_without_torch(what, tmp_path):
    content, message = WRONG[what]
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    ended = subprocess.run([sys.executable, "-c", RUN, "run", "-c", str(path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (2, "heavy: []")
    assert ended.stderr.startswith("coin: error: " + message.format(path=path))
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "fit", "simulate", "serve"])
def test_files_of_other_commands_are_read_early_too(command, tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        check_early(command, ["-c", str(tmp_path / "x.yaml")])
    (tmp_path / "x.yaml").write_text("whatever: 1\n")
    with pytest.raises(ConfigurationError, match="found option 'whatever'"):
        check_early(command, [f"--config={tmp_path / 'x.yaml'}"])


def test_an_option_of_the_command_line_that_does_not_exist():
    with pytest.raises(ConfigurationError, match=r"found option 'seds' \(did you mean seeds\?\)"):
        check_early("run", ["--seds=[1]"])
    with pytest.raises(ConfigurationError, match=r"found option '--expert.epoch' \(did you mean --expert.epochs\?\)"):
        check_early("run", ["--expert.epoch", "3"])
    for sound in (
        "--seeds=[1]",
        "--expert.epochs=3",
        "--base.task.init_args.root=x",
        "--launch.workers=2",
        "--calibration.samples_per_task=5",
        "--methods+=Average",
        "--print_config",
        "--only",
        "--json",
        "--network.name=hf/openai/clip-vit-base-patch32",
        "--network.name=mine.Net",
    ):
        check_early("run", [sound])
    check_early("run", ["-c", "{name: x}"])


GIVEN = {
    "--tasks.mnist.class_path=MNIST5kk": "found class 'MNIST5kk' (did you mean MNIST5k?)",
    "--tasks.mnist.init_args.max_tran=9": "found MNIST5k option 'max_tran' (did you mean max_train?)",
    "--tasks.letters.init_args.max_train=many": "found Glyphs.max_train='many', expected int or nothing",
    "--methods+={class_path: Foo}": "found class 'Foo'",
    "--methods+=Foo": "found class 'Foo'",
    "--base.task.class_path=Foo": "found class 'Foo'",
    "--expert.lr=abc": "found expert.lr='abc', expected float",
    "--decoders=[linr]": "found decoder='linr'",
    "--expert.checkpoints.mnist=nowhere.pt": "found no file 'nowhere.pt', expected expert.checkpoints.mnist",
    "--calibration.fisher_data=mine": "found calibration.fisher_data 'mine', expected one of own, pooled, auto",
}


@pytest.mark.parametrize("option", GIVEN)
def test_options_of_the_command_line_are_looked_at_like_a_files(option, tmp_path):
    (tmp_path / "x.yaml").write_text(
        "tasks: {mnist: {class_path: MNIST5k}, letters: {class_path: Glyphs, init_args: {classes: A-J}}}\n"
    )
    name, _, value = option.partition("=")
    for given in ([option], [name, value]):
        with pytest.raises((ConfigurationError, FileError), match=re.escape(GIVEN[option])):
            check_early("run", ["-c", str(tmp_path / "x.yaml"), *given])


REPLACED = {
    "checkpoints": ("expert: {checkpoints: {a: nowhere.pt}}", ["--expert.checkpoints={b: pyproject.toml}"]),
    "overrides": ("expert: {overrides: {z: {epochs: 1}}}", ["--expert.overrides={}"]),
    "a base": ("base: {checkpoint: nowhere.pt}", ["--base=null"]),
    "a code": ("code: [[0.5, 0.6]]", ["--code=auto"]),
    "the last method's option": ("methods: [{class_path: Refit}]", ["--methods.target=own"]),
    "a method's help": ("methods: []", ["--methods.help=Refit"]),
    "nearly a date": ("name: x", ["--name=2024-02-30"]),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_a_later_option_replaces_is_not_looked_at(what, tmp_path):
    content, options = REPLACED[what]
    (tmp_path / "x.yaml").write_text(f"tasks: {{a: {{class_path: Digits}}, b: {{class_path: Digits}}}}\n{content}\n")
    (tmp_path / "pyproject.toml").touch()
    options = [option.replace("pyproject.toml", str(tmp_path / "pyproject.toml")) for option in options]
    check_early("run", ["-c", str(tmp_path / "x.yaml"), *options])


def test_a_label_of_results_is_no_class_and_a_file_that_is_given_anew_is_left_to_the_parser(tmp_path):
    (tmp_path / "x.yaml").write_text("network: {weights: nowhere.pt}\n")
    check_early("run", ["-c", str(tmp_path / "x.yaml"), "--network.weights=null", "--tasks.a.max_train=9"])
    check_early("simulate", [str(tmp_path), "--method=refit-4bit"])
    (tmp_path / "y.yaml").write_text("method: refit-4bit\n")
    check_early("simulate", [str(tmp_path), "-c", str(tmp_path / "y.yaml")])


def test_a_file_without_an_option_is_told_which():
    with pytest.raises(ConfigurationError, match=r"found 'mine.yaml' without an option, expected -c mine.yaml"):
        check_early("run", ["mine.yaml"])


def test_classes_of_ones_own_and_files_of_other_shapes_are_left_to_the_parser(tmp_path):
    for content in ("- 1\n", "tasks: 3\nmethods: {}\n", "methods: [3, {class_path: 5}, {class_path: my.Own}]\n", ""):
        (tmp_path / "x.yaml").write_text(content)
        check_early("run", ["-c", str(tmp_path / "x.yaml")])


ELSEWHERE = {
    "no data": (
        ["evaluate", "--model=DecodingEvaluator"],
        "found no data for coin evaluate, expected tasks; give --data",
    ),
    "a file": (["compress", "nothing.safetensors", "out"], "found no file 'nothing.safetensors', expected a network"),
    "a folder": (["report", "nowhere"], "found no folder 'nowhere'"),
    "an option of a function": (["compress", "a", "--bts=3"], r"found option 'bts' \(did you mean bits\?\)"),
    "an option of a section": (
        ["simulate", ".", "--conditions=3"],
        "found option 'conditions', expected",
    ),
    "an option of Lightning's": (["fit", "--dat=Digits"], r"found option 'dat' \(did you mean data\?\)"),
    "an option of a Trainer of ours": (["fisher", "--sampels=3"], r"'sampels' \(did you mean samples\?\)"),
    "a class": (["fit", "--data", "Mnist5k"], r"found class 'Mnist5k' \(did you mean MNIST5k\?\)"),
    "a class in a file": (["merge", "-c", "{path}"], "found class 'Coim'"),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_mistakes_in_other_commands(what, tmp_path):
    (tmp_path / "x.yaml").write_text("method: {class_path: Coim}\n")
    (command, *arguments), message = ELSEWHERE[what]
    with pytest.raises((ConfigurationError, FileError), match=message):
        check_early(command, [each.format(path=tmp_path / "x.yaml") for each in arguments])


def test_what_is_known_is_what_there_is():
    assert known_options("run") == {*inspect.signature(Experiment).parameters, "launch", "only", "dry-run", "dry_run"}
    assert known_options("merge") == set(inspect.signature(merge).parameters)
    given = {*inspect.signature(simulate).parameters, *inspect.signature(Conditions).parameters}
    assert known_options("simulate") == {*given, *inspect.signature(Choice).parameters} - {"conditions", "choice"}
    for command in ON_TRAINER:
        added = {name for name, _ in getattr(Trainer, command).__annotations__.items()} - {"return"}
        supplied = {"datamodule", "configuration", "dataloaders", "train_dataloaders", "val_dataloaders"}
        assert known_options(command) == {"trainer", "model", "data", "seed_everything", *added} - supplied
    rooms = (coin.merging, coin.data, coin.modules, coin.distillation)
    assert all(any(hasattr(room, name) for room in rooms) for name in known_classes())
    assert {"Coin", "Digits", "Coded", "Distillation"} <= {*known_classes()}
    assert {*known_networks()} == {*Own.kinds, *models.list_models(module=models)}


def test_the_options_of_classes_are_those_that_the_parser_takes():
    rooms = (coin.merging, coin.data, coin.distillation)
    found = {
        name: ([*annotated_options(name)], _options_of(f"{room.__name__}.{name}"))
        for name in known_classes()
        for room in rooms
        if hasattr(room, name)
    }
    assert all(early == parser for early, parser in found.values() if early and parser)
    assert {"Refit", "Distillation", "MNIST5k", "Tweets"} <= {n for n, each in found.items() if each[0]}
    assert [*annotated_options("ExpertConfig")] == [each.name for each in fields(ExpertConfig)]
    assert [*annotated_options("Launch")] == [each.name for each in fields(Launch)]
    assert annotated_options("Nothing") == annotated_options("Target") == {}


def test_the_methods_of_a_sweep_are_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("name: x\n")
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: s\nexperiment: [x.yaml]\nset: {methods: [{class_path: Coin, damping: 1}]}\ngrid: {seeds: [1]}\n"
    )
    with pytest.raises(ConfigurationError, match="found 'damping' beside class_path: Coin"):
        sweep.main([str(path), "--dry-run"])


def test_only_what_follows_an_empty_section_may_belong_under_it(tmp_path):
    path = tmp_path / "x.yaml"
    for text, meant in (("base:\nlow: 1\n", True), ("low: 1\nbase:\n", False), ("base:\nname: x\nlow: 1\n", False)):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="found option 'low'") as caught:
            check_early("run", ["-c", str(path)])
        assert ("indented under 'base'" in str(caught.value)) == meant
