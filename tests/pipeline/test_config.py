"""What the parts of an experiment file take, whether a parser has seen it or an override brings it."""

from dataclasses import replace
from pathlib import Path

import pytest

from coin.callbacks import Weights
from coin.commands.run import read_experiment
from coin.data import Augmentation
from coin.errors import ConfigurationError
from coin.pipeline.config import CalibrationConfig, ExpertConfig
from coin.pipeline.options import result_options
from coin.statistics import FisherKind


def test_strings_of_an_override_become_members():
    override = {"optimizer": "AdamW", "lr_scheduler": None, "augmentation": "crop_flip", "weights": "best", "lr": 1}
    config = replace(ExpertConfig(), **override)
    assert config.optimizer == "AdamW"
    assert config.lr_scheduler is None
    assert config.augmentation is Augmentation.crop_flip
    assert config.weights is Weights.best
    assert replace(config) == config


@pytest.mark.parametrize(
    ("option", "choices"), [("augmentation", "none, crop, crop_flip, shift"), ("weights", "last, best")]
)
@pytest.mark.parametrize("value", ["crop-flip", None, 3, ["sgd"]])
def test_a_value_that_is_no_choice_is_refused_with_the_choices(option, choices, value):
    with pytest.raises(ConfigurationError, match=rf"^found {option}=[^\n]*, expected one of {choices}$"):
        replace(ExpertConfig(), **{option: value})


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("epochs", [0, 2.0, "3", True]),
        ("batch_size", [1, 64.0, "64"]),
        ("lr", [0, -0.1, "0.1", True, float("nan"), float("inf")]),
        ("optimizer", [3, [], {"lr": 0.1}, {"class_path": 3}]),
        ("lr_scheduler", [3, {"class_path": None}]),
        ("freeze_batchnorm", [1, None]),
    ],
)
def test_values_of_an_override_are_checked(option, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=f"^found {option}="):
            replace(ExpertConfig(), **{option: value})


def test_a_number_of_cotangents_belongs_to_monte_carlo():
    # Another kind here may stand beside a method with one of its own: the experiment checks them together.
    assert CalibrationConfig(fisher_kind=FisherKind.exact, fisher_mc_samples=4).fisher_mc_samples == 4
    for number in (0, 1.5):
        with pytest.raises(ConfigurationError, match="expected a whole number of at least 1"):
            CalibrationConfig(fisher_kind=FisherKind.monte_carlo, fisher_mc_samples=number)


def test_a_run_leaves_the_options_that_repeat_it(config: Path) -> None:
    options = ["--expert.lr=0.5", "--methods=[{class_path: Coin, init_args: {damping: 0.1}}]", "--code=[[0.25,0.75]]"]
    experiment = read_experiment(["-c", str(config), *options])[0]
    said = experiment.of_seeds([7])
    assert said["seeds"] == [7]
    assert said["tasks"]["digits"]["init_args"]["image_size"] == 16  # what the network takes
    assert said["tasks"]["digits"]["class_path"] == "coin.data.Digits"
    assert (said["methods"][0]["class_path"], said["methods"][0]["init_args"]["damping"]) == ("coin.Coin", 0.1)
    assert (said["code"], said["expert"]["lr"]) == ([[0.25, 0.75]], 0.5)
    assert {"launch", "only", "json", "dry_run"}.isdisjoint(said)


@pytest.mark.parametrize("wrong", [{"promise_samples": -1}, {"promise_alpha": 0.0}, {"promise_confidence": 1}])
def test_a_promise_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        CalibrationConfig(**wrong)


def test_only_what_changes_a_result_is_in_a_key():
    trainer = {
        **{"precision": "bf16-mixed", "devices": 2, "num_nodes": 1, "strategy": "ddp", "limit_test_batches": 3},
        **{"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1, "profiler": "simple"},
    }
    same = {"precision": "bf16-mixed", "limit_test_batches": 3}
    assert result_options(trainer, training=False) == same
    assert result_options(trainer, training=True) == same | {"devices": 2, "strategy": "ddp"}
