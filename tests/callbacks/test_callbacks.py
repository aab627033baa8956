"""Callbacks that write the trained expert and its Fisher, and what they refuse before training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from coin.callbacks import ExpertExport, FisherEstimator
from coin.errors import ConfigurationError, DataError, FileError, NumericalError
from coin.files.tensors import fingerprint
from coin.modules import Expert
from coin.networks import load_network, read_weights
from coin.statistics import fisher_diagonal
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}}


@pytest.fixture
def task(synthetic):
    return synthetic(key=5, seed=2)


@pytest.fixture
def fit(tmp_path, task, make_trainer):
    """Return a function that trains with callbacks, and returns the expert and its best checkpoint."""

    def run(*callbacks, epochs=2, monitor="train/loss", lr=0.05):
        # The highest training loss is the first epoch's, so that the best weights are not the last ones.
        saver = ModelCheckpoint(tmp_path / "checkpoints", monitor=monitor, mode="max")
        trainer = make_trainer(
            max_epochs=epochs, enable_checkpointing=True, callbacks=[saver, *callbacks]
        )
        expert = Expert(**SMALL, lr=lr)
        trainer.fit(expert, datamodule=task)
        return expert, saver.best_model_path

    return run


def mark_of(network):
    return fingerprint(network.state_dict())


def test_the_export_holds_the_trained_network_and_says_what_it_is(tmp_path, fit):
    expert, _ = fit(ExpertExport())
    file = load_network(tmp_path / "run" / "expert.safetensors")
    assert mark_of(file.network) == mark_of(expert.network)
    assert file.config.described() == expert.config.described()
    made = file.provenance
    expected = {"made_by": "coin fit", "task": "Synthetic", "epochs": 2, "num_classes": 3}
    assert {name: made[name] for name in expected} == expected
    assert made["classes"] == ["class 0", "class 1", "class 2"]
    assert made["options"]["lr"] == 0.05
    assert {"train/loss", "val/accuracy"} <= made["metrics"].keys()


def test_the_fisher_at_the_end_of_training_is_that_of_the_exported_expert(tmp_path, fit, task):
    """Of random cotangents: all kinds are computed by one function, which tests/trainer compares with the plain one."""
    path = tmp_path / "fisher.safetensors"
    kind = {"kind": "monte_carlo", "mc_samples": 2}
    fit(ExpertExport(task="mine"), FisherEstimator(20, path=str(path), **kind), epochs=1)
    file = load_network(tmp_path / "run" / "expert.safetensors")
    assert file.provenance["task"] == "mine"
    # In the memory format that it trained in, so that the same kernels give the same bits.
    exported = file.network.to(memory_format=torch.channels_last)
    statistic = open_statistic(path, statistic="fisher", weights=mark_of(exported))
    generator = torch.Generator().manual_seed(2 * 100_003)  # of the task's seed
    expected = fisher_diagonal(exported, task.calibration(20), generator=generator, **kind)
    torch.testing.assert_close(dict(statistic), expected, rtol=0, atol=0)
    made = statistic.provenance
    assert (made["samples"], made["passes"]) == (20, 20 * (1 + 2 * 2))
    assert (made["kind"], made["data"]) == ("monte_carlo", "own")
    with pytest.raises(FileError, match="expected gram"):
        open_statistic(path, statistic="gram")
    with pytest.raises(FileError, match="the expert has changed since"):
        open_statistic(path, statistic="fisher", weights="0" * 64)


def test_best_takes_the_best_checkpoint_for_both_files_and_leaves_the_module_as_it_is(
    tmp_path, fit
):
    plain, _ = fit()
    expert, best = fit(ExpertExport(weights="best"), FisherEstimator(8, weights="best"))
    assert mark_of(expert.network) == mark_of(plain.network)
    assert all(parameter.requires_grad for parameter in expert.network.parameters())
    mark = fingerprint(read_weights(tmp_path / best, expert.network.state_dict().keys()))
    assert mark != mark_of(expert.network)
    assert mark_of(load_network(tmp_path / "run" / "expert.safetensors").network) == mark
    open_statistic(tmp_path / "run" / "expert.fisher.safetensors", statistic="fisher", weights=mark)


class Started(Callback):
    training = False

    def on_train_start(self, *_):
        self.training = True


NO_BEST = "found no best checkpoint; add a ModelCh"
UNWRITABLE = {
    "no best weights": (ConfigurationError, NO_BEST, ExpertExport(weights="best")),
    "no best to estimate": (ConfigurationError, NO_BEST, FisherEstimator(8, weights="best")),
    "too many samples": (
        DataError,
        "1000 calibration samples of Synthetic, expected at most 32",
        FisherEstimator(1000),
    ),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_could_not_be_written_is_refused_before_the_training(name, fit):
    error, message, callback = UNWRITABLE[name]
    started = Started()
    with pytest.raises(error, match=message):
        fit(callback, started, monitor=None)
    assert not started.training


def test_training_that_diverged_leaves_no_file(tmp_path, fit):
    message = r"training diverged: the weights for .* give a smaller rate"
    with pytest.raises(NumericalError, match=message):
        fit(ExpertExport(), lr=1e30)
    assert not (tmp_path / "run" / "expert.safetensors").exists()


class Foreign(LightningModule):
    pass


OF_FOREIGN = "found a Foreign, expected an Expert"
WRONG_PARTS = {  # the number of processes
    "another module": (ExpertExport(), 1, OF_FOREIGN),
    "another module to estimate": (FisherEstimator(4), 1, OF_FOREIGN),
    "too many processes": (FisherEstimator(8), 9, "found 8 calibration samples for 9 processes"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_other_modules_and_too_many_processes_are_refused(name, task):
    callback, processes, message = WRONG_PARTS[name]
    trainer = SimpleNamespace(datamodule=task, world_size=processes)
    with pytest.raises(ConfigurationError, match=message):
        callback.on_fit_start(trainer, Foreign())


def test_data_without_calibration_samples_is_refused(task, make_trainer):
    trainer = make_trainer(max_epochs=1, callbacks=[FisherEstimator(8)])
    message = r"found data of NoneType .*, expected a task of coin.data"
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(Expert(**SMALL, num_classes=3), task.train_dataloader())


REFUSED = {
    "found samples_per_task=0, expected a whole number of at least 1": {"samples_per_task": 0},
    "found mc_samples=2 for the exact Fisher; only monte_carlo takes one": {"mc_samples": 2},
    "found mc_samples=0, expected a whole number": {"kind": "monte_carlo", "mc_samples": 0},
    "found memory_mib=0, expected a whole number of at least 1": {"memory_mib": 0},
    r"found kind='exactly' \(did you mean exact\?\), expected one of exact": {"kind": "exactly"},
    "found weights='first', expected one of last, best": {"weights": "first"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_options_are_refused_at_construction(message):
    with pytest.raises(ConfigurationError, match=message):
        FisherEstimator(**REFUSED[message])
