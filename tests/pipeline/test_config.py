"""What the parts of an experiment file take, whether a parser has seen it or an override brings it."""

from dataclasses import replace

import pytest

from coin.commands.run import read_experiment
from coin.errors import CoinError, ConfigurationError
from coin.pipeline.config import BaseConfig, CalibrationConfig, ExpertConfig
from coin.pipeline.options import result_options

WRONG = [
    ({"augmentation": "crop-flip"}, "augmentation='crop-flip'.* none, crop, crop_flip, shift"),
    ({"weights": "bst"}, "weights='bst'.* last, best"),
    ({"weights": None}, "weights="),
    ({"epochs": 0}, "epochs=0"),
    ({"epochs": "3"}, "epochs="),
    ({"batch_size": 1}, "batch_size=1"),
    ({"lr": True}, "lr=True"),
    ({"lr": float("inf")}, "lr=inf"),
    ({"optimizer": {"lr": 0.1}}, "optimizer="),
    ({"lr_scheduler": {"class_path": None}}, "lr_scheduler="),
    ({"freeze_batchnorm": 1}, "freeze_batchnorm=1"),
]


@pytest.mark.parametrize(("options", "found"), WRONG)
def test_values_of_an_override_are_checked(options, found):
    with pytest.raises(ConfigurationError, match=f"^found {found}"):
        replace(ExpertConfig(), **options)


SECTIONS = {
    "promise_samples=-1": {"promise_samples": -1},
    "promise_alpha=0.0": {"promise_alpha": 0.0},
    "promise_confidence=1": {"promise_confidence": 1},
    "fisher_mc_samples=1.5": {"fisher_mc_samples": 1.5},
    "samples_per_task=0": {"samples_per_task": 0},
}


@pytest.mark.parametrize("found", SECTIONS)
def test_values_of_the_calibration_are_checked(found):
    with pytest.raises(ConfigurationError, match=f"^found {found}"):
        CalibrationConfig(**SECTIONS[found])


def test_a_base_is_trained_or_read():
    with pytest.raises(ConfigurationError, match="found a base with both or neither"):
        BaseConfig()


EXPERIMENTS = {
    "--tasks.mean={class_path: Digits}": "found task name 'mean'",
    "--expert.checkpoints={ltters: x}": r"an expert 'ltters' \(did you mean letters\?\)",
    "--expert.overrides={digits: {speed: 1}}": "expert.overrides.digits has an unknown option",
    "--expert.overrides.letters={trainable: [layer4.*]}": "'layer4.*', which matches no",
    "--base.trainable=[fc.wieght]": "the nearest names are fc.weight",
    "--seeds=[4294967296]": "expected distinct numbers from 0 to 4294967295",
    "--trainer.max_epochs=3": "found trainer.max_epochs, which each step sets itself",
    "--methods=[{class_path: Average}, {class_path: Average}]": "found method average twice",
    "--code=[[0.2,0.3,0.5]]": "found a code for 3 experts, expected 2",
    "--code=3": "found 3 coded models for 2 experts, expected at least one, and at most one an expert",
    "--code=[[1.0,0.0]]": "the code cannot decode the loss of experts 1",
}


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_options_that_do_not_fit_together_are_refused_before_anything_runs(option, config):
    with pytest.raises(CoinError, match=EXPERIMENTS[option]):
        read_experiment(["-c", str(config), option])[0].check()


@pytest.mark.parametrize(
    ("option", "expected"),
    [("lr=0.5", 0.5), ("freeze_batchnorm=true", True), ("weight_decay=null", None)],
)
def test_overrides_of_the_command_line_are_plain_values(option, expected, config):
    override = f"--expert.overrides.letters.{option}"
    experiment, _ = read_experiment(["-c", str(config), override])
    found = experiment.config["expert"]["overrides"]["letters"]
    assert [*found.values()] == [expected]


def test_a_run_leaves_the_options_that_repeat_it(config):
    method = "--methods=[{class_path: Coin, init_args: {damping: 0.1}}]"
    arguments = ["-c", str(config), "--expert.lr=0.5", method, "--code=[[0.25,0.75]]"]
    left = read_experiment(arguments)[0].of_seeds([7])
    assert left["seeds"] == [7]
    assert left["tasks"]["digits"]["init_args"]["image_size"] == 16  # what the network takes
    assert left["tasks"]["digits"]["class_path"] == "coin.data.Digits"
    (coin,) = left["methods"]
    assert (coin["class_path"], coin["init_args"]["damping"]) == ("coin.Coin", 0.1)
    assert (left["code"], left["expert"]["lr"]) == ([[0.25, 0.75]], 0.5)
    assert {"launch", "only", "dry_run"}.isdisjoint(left)


def test_only_what_changes_a_result_is_in_a_key():
    same = {"precision": "bf16-mixed", "limit_test_batches": 3}
    processes = {"devices": 2, "strategy": "ddp"}
    without_effect = {"num_nodes": 1, "accelerator": "cpu", "profiler": "simple"}
    trainer = {**same, **processes, **without_effect}
    assert result_options(trainer, training=False) == same
    assert result_options(trainer, training=True) == same | processes
