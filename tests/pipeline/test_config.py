"""What the parts of an experiment file take, whether a parser has seen it or an override brings it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coin.commands.run import read_experiment
from coin.errors import CoinError, ConfigurationError
from coin.pipeline.config import BaseConfig, CalibrationConfig, ExpertConfig
from coin.pipeline.options import result_options

CHOICES = {"augmentation": "none, crop, crop_flip, shift", "weights": "last, best"}
WRONG = {
    "augmentation": ["crop-flip", None, 3, ["sgd"]],
    "weights": ["bst", None],
    "epochs": [0, 2.0, "3", True],
    "batch_size": [1, 64.0],
    "lr": [0, "0.1", True, float("nan"), float("inf")],
    "optimizer": [3, [], {"lr": 0.1}, {"class_path": 3}],
    "lr_scheduler": [3, {"class_path": None}],
    "freeze_batchnorm": [1, None],
}


@pytest.mark.parametrize("option", WRONG)
def test_values_of_an_override_are_checked(option: str) -> None:
    for value in WRONG[option]:
        with pytest.raises(ConfigurationError, match=f"^found {option}=") as raised:
            replace(ExpertConfig(), **{option: value})
        assert CHOICES.get(option, "") in str(raised.value)


def test_strings_of_an_override_become_members() -> None:
    config = replace(ExpertConfig(), augmentation="crop_flip", weights="best")
    assert isinstance(config.weights, type(ExpertConfig().weights))
    assert isinstance(config.augmentation, type(ExpertConfig().augmentation))


SECTIONS = {
    "promise_samples=-1": lambda: CalibrationConfig(promise_samples=-1),
    "promise_alpha=0.0": lambda: CalibrationConfig(promise_alpha=0.0),
    "promise_confidence=1": lambda: CalibrationConfig(promise_confidence=1),
    "fisher_mc_samples=1.5": lambda: CalibrationConfig(fisher_mc_samples=1.5),  # type: ignore[arg-type]
    "samples_per_task=0": lambda: CalibrationConfig(samples_per_task=0),
    "a base with both or neither": BaseConfig,
}


@pytest.mark.parametrize("message", SECTIONS)
def test_values_of_sections_are_checked(message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^found {message}"):
        SECTIONS[message]()


EXPERIMENTS = {
    "--name=a/b": "found name 'a/b', expected a plain folder name",
    "--tasks.mean={class_path: Digits}": "found task name 'mean'",
    "--expert.overrides={digit: {lr: 1}}": r"an expert 'digit' \(did you mean digits\?\)",
    "--expert.checkpoints={ltters: x}": r"an expert 'ltters' \(did you mean letters\?\)",
    "--expert.overrides={digits: {speed: 1}}": "expert.overrides.digits has an unknown option",
    "--expert.overrides.letters={trainable: [layer4.*]}": "trainable pattern 'layer4.*', which matches no",
    "--base.trainable=[fc.wieght]": "the nearest names are fc.weight",
    "--seeds=[0,0]": r"found seeds \[0, 0\], expected distinct",
    "--seeds=[4294967296]": "expected distinct numbers from 0 to 4294967295",
    "--trainer.max_epochs=3": "found trainer.max_epochs, which each step sets itself",
    "--methods=[{class_path: Average}, {class_path: Average}]": "found method average twice",
    "--code=[[0.2,0.3,0.5]]": "found a code for 3 experts, expected 2",
    "--code=3": "found 3 coded models for 2 experts, expected at least one, and at most one an expert",
    "--code=[[1.0,0.0]]": "the code cannot decode the loss of experts 1",
}


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_options_that_do_not_fit_together_are_refused_before_anything_runs(
    option: str, config: Path
) -> None:
    with pytest.raises(CoinError, match=EXPERIMENTS[option]):
        read_experiment(["-c", str(config), option])[0].check()


@pytest.mark.parametrize(
    "value", ["lr=0.5", "freeze_batchnorm=true", "weight_decay=null", "optimizer=AdamW"]
)
def test_overrides_of_the_command_line_are_plain_values(value: str, config: Path) -> None:
    expected = {"lr=0.5": 0.5, "freeze_batchnorm=true": True, "weight_decay=null": None}
    option = f"--expert.overrides.letters.{value}"
    found = read_experiment(["-c", str(config), option])[0].config["expert"]["overrides"]
    assert [*found["letters"].values()] == [expected.get(value, "AdamW")]


def test_a_run_leaves_the_options_that_repeat_it(config: Path) -> None:
    method = "--methods=[{class_path: Coin, init_args: {damping: 0.1}}]"
    arguments = ["-c", str(config), "--expert.lr=0.5", method, "--code=[[0.25,0.75]]"]
    left: dict[str, Any] = read_experiment(arguments)[0].of_seeds([7])
    assert left["seeds"] == [7]
    assert left["tasks"]["digits"]["init_args"]["image_size"] == 16  # what the network takes
    assert left["tasks"]["digits"]["class_path"] == "coin.data.Digits"
    (coin,) = left["methods"]
    assert (coin["class_path"], coin["init_args"]["damping"]) == ("coin.Coin", 0.1)
    assert (left["code"], left["expert"]["lr"]) == ([[0.25, 0.75]], 0.5)
    assert {"launch", "only", "dry_run"}.isdisjoint(left)


def test_only_what_changes_a_result_is_in_a_key() -> None:
    same = {"precision": "bf16-mixed", "limit_test_batches": 3}
    processes = {"devices": 2, "strategy": "ddp"}
    without_effect = {
        "num_nodes": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "profiler": "simple",
    }
    trainer = {**same, **processes, **without_effect}
    assert result_options(trainer, training=False) == same
    assert result_options(trainer, training=True) == same | processes
