"""What the parts of an experiment file take, whether a parser has seen it or an override brings it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from coin.callbacks import Weights
from coin.data import Augmentation, Digits
from coin.errors import ConfigurationError
from coin.merging import Coin
from coin.networks import NetworkConfig
from coin.pipeline.config import CalibrationConfig, ExpertConfig, WandbConfig
from coin.pipeline.experiment import Experiment
from coin.pipeline.options import result_options, to_config
from coin.statistics import FisherKind, Precision
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}}


def test_strings_of_an_override_become_members():
    override = {"optimizer": "AdamW", "lr_scheduler": None, "augmentation": "crop_flip", "weights": "best", "lr": 1}
    config = replace(ExpertConfig(), **override)
    assert ExpertConfig().optimizer == SGD
    assert config.optimizer == {"class_path": "torch.optim.AdamW", "init_args": {}}
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
        ("label_smoothing", [-0.1, 1.0, None]),
    ],
)
def test_values_of_an_override_are_checked(option, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=f"^found {option}="):
            replace(ExpertConfig(), **{option: value})


def test_a_number_of_cotangents_belongs_to_monte_carlo():
    assert CalibrationConfig(fisher_kind="monte_carlo", fisher_mc_samples=4).fisher_kind is FisherKind.monte_carlo
    # Another kind here may stand beside a method with one of its own: the experiment checks them together.
    assert CalibrationConfig(fisher_kind=FisherKind.exact, fisher_mc_samples=4).fisher_mc_samples == 4
    for number in (0, 1.5):
        with pytest.raises(ConfigurationError, match="expected a whole number of at least 1"):
            CalibrationConfig(fisher_kind=FisherKind.monte_carlo, fisher_mc_samples=number)
    with pytest.raises(ConfigurationError, match="found fisher_kind='full', expected one of exact, monte_carlo"):
        CalibrationConfig(fisher_kind="full")


def test_a_precision_is_that_of_fishers_and_of_no_gram_matrices():
    calibration = CalibrationConfig(fisher_precision="bfloat16")
    fisher = Statistic(StatisticKind.fisher, DataChoice.own, FisherKind.categorical)
    assert calibration.options_of(fisher).precision is Precision.bfloat16
    assert calibration.options_of(Statistic(StatisticKind.gram, DataChoice.own)) is None
    with pytest.raises(ConfigurationError, match="found fisher_precision='half', expected one of full, bfloat16"):
        CalibrationConfig(fisher_precision="half")


@pytest.mark.parametrize("tag", ["", "x" * 65])
def test_a_tag_that_w_and_b_refuses_is_refused_before_anything_runs(tag):
    with pytest.raises(ConfigurationError, match="expected one of 1 to 64 characters"):
        WandbConfig(tags=["fine", tag])


class OwnTask(Digits):
    """A user's task that keeps its option its own way."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self._folder = Path(folder)


class Forgetful(OwnTask):
    """One that keeps it nowhere."""

    def __init__(self, shade: int, **options: Any) -> None:
        super().__init__("x", **options)


def test_an_experiment_of_objects_says_the_configuration_that_repeats_it() -> None:
    own: Any = {"a": OwnTask("images", max_train=40), "b": Digits(augmentation="shift")}
    code: Any = [[np.float64(0.25), 0.75]]
    network = NetworkConfig("small_resnet", 16)
    expert = ExpertConfig(lr=np.float64(0.5))
    experiment = Experiment("x", own, [Coin(damping=0.1)], network=network, expert=expert, code=code)
    said = yaml.safe_load(experiment.as_yaml([7]))
    assert said["seeds"] == [7]
    assert said["tasks"]["a"]["init_args"]["folder"] == "images"
    assert said["tasks"]["a"]["init_args"]["max_train"] == 40
    assert said["tasks"]["a"]["init_args"]["image_size"] == 16  # what the network takes
    assert said["tasks"]["a"]["class_path"].endswith("test_config.OwnTask")
    assert said["tasks"]["b"]["class_path"] == "coin.data.Digits"
    assert said["tasks"]["b"]["init_args"]["augmentation"] == "shift"
    assert said["methods"] == [to_config(Coin(damping=0.1))]
    assert said["code"] == [[0.25, 0.75]]
    assert said["expert"]["lr"] == 0.5
    forgetful: Any = {**own, "a": Forgetful(3)}
    with pytest.raises(ConfigurationError, match="found a Forgetful that does not store its option shade"):
        Experiment("x", forgetful, [Coin()]).as_yaml()


def test_what_is_promised_has_no_say_in_the_coded_models():
    own = CalibrationConfig(promise_samples=400, promise_alpha=0.01, promise_confidence=0.9)
    assert own.merging == CalibrationConfig().merging
    assert own.merging != CalibrationConfig(samples_per_task=100).merging
    for wrong in ({"promise_samples": -1}, {"promise_alpha": 0.0}, {"promise_confidence": 1}):
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
