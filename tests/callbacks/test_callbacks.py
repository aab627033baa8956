from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from coin.callbacks import ExpertExport, FisherEstimator, Weights
from coin.errors import ConfigurationError, DataError, FileError
from coin.files.tensors import fingerprint
from coin.modules import Expert
from coin.networks import load_network, read_weights
from coin.statistics import fisher_diagonal
from coin.statistics.files import open_statistic

SMALL = {"network": "small_resnet", "image_size": 16, "options": {"width": 4}, "lr": 0.05}


@pytest.fixture
def fit(tmp_path, synthetic, make_trainer):
    def run(*callbacks, epochs=2, monitored=True):
        # The highest training loss is the first epoch's, so that the best weights are not the last ones.
        saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="train/loss" if monitored else None, mode="max")
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[saver, *callbacks])
        expert = Expert(**SMALL)
        trainer.fit(expert, datamodule=synthetic(key=5, seed=2))
        return expert, saver.best_model_path

    return run


def test_the_export_holds_the_trained_network_and_says_what_it_is(tmp_path, fit):
    expert, _ = fit(ExpertExport())
    file = load_network(tmp_path / "run" / "expert.safetensors")
    assert fingerprint(file.network.state_dict()) == fingerprint(expert.network.state_dict())
    assert file.config.described() == expert.config.described()
    made, classes = file.provenance, ["class 0", "class 1", "class 2"]
    assert (made["made_by"], made["task"], made["classes"]) == ("coin fit", "Synthetic", classes)
    assert (made["epochs"], made["num_classes"], made["options"]["lr"]) == (2, 3, 0.05)
    assert {"train/loss", "val/accuracy"} <= made["metrics"].keys()


def test_the_fisher_at_the_end_of_training_is_that_of_the_exported_expert(tmp_path, fit, synthetic):
    """Of random cotangents: all kinds are computed by one function, which tests/trainer compares with the plain one."""
    path = tmp_path / "fisher.safetensors"
    options = {"kind": "monte_carlo", "mc_samples": 2}
    fit(ExpertExport(), FisherEstimator(samples_per_task=20, path=str(path), **options), epochs=1)
    exported = load_network(tmp_path / "run" / "expert.safetensors").network
    statistic = open_statistic(path, statistic="fisher", weights=fingerprint(exported.state_dict()))
    # In the memory format that it trained in, so that the same kernels give the same bits.
    exported.to(memory_format=torch.channels_last)
    calibration, generator = synthetic(key=5, seed=2).calibration(20), torch.Generator().manual_seed(2 * 100_003)
    wanted = fisher_diagonal(exported, calibration, generator=generator, **options)
    assert statistic.keys() == wanted.keys()
    assert all(torch.equal(statistic[name], value) for name, value in wanted.items())
    made = statistic.provenance
    assert (made["samples"], made["passes"]) == (20, 20 * (1 + 2 * 2))
    assert (made["kind"], made["data"]) == ("monte_carlo", "own")
    with pytest.raises(FileError, match="expected gram"):
        open_statistic(path, statistic="gram")
    with pytest.raises(FileError, match="the expert has changed since"):
        open_statistic(path, statistic="fisher", weights="0" * 64)


def test_best_takes_the_best_checkpoint_for_both_files_and_leaves_the_module_as_it_is(tmp_path, fit):
    plain, _ = fit()
    expert, best = fit(ExpertExport(weights=Weights.best), FisherEstimator(samples_per_task=8, weights="best"))
    modes = [module.training for module in plain.network.modules()]
    assert fingerprint(expert.network.state_dict()) == fingerprint(plain.network.state_dict())
    assert [module.training for module in expert.network.modules()] == modes
    assert all(parameter.requires_grad for parameter in expert.network.parameters())
    mark = fingerprint(read_weights(tmp_path / best, expert.network.state_dict().keys()))
    assert mark != fingerprint(expert.network.state_dict())
    exported = load_network(tmp_path / "run" / "expert.safetensors")
    assert fingerprint(exported.network.state_dict()) == mark
    statistic = open_statistic(tmp_path / "run" / "expert.fisher.safetensors", statistic="fisher", weights=mark)
    assert statistic.provenance["samples"] == 8


class Started(Callback):
    training = False

    def on_train_start(self, *_):
        self.training = True


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (
            ExpertExport(weights="best"),
            ConfigurationError,
            "found no best checkpoint; add a ModelCheckpoint with a mon",
        ),
        (FisherEstimator(8, weights="best"), ConfigurationError, "found no best checkpoint"),
        (FisherEstimator(1000), DataError, "1000 calibration samples of Synthetic, expected at most 32"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_training(fit, callback, error, message):
    started = Started()
    with pytest.raises(error, match=message):
        fit(callback, started, epochs=1, monitored=False)
    assert not started.training


def test_other_modules_data_and_too_many_processes_are_refused(synthetic, make_trainer):
    class Foreign(LightningModule):
        def configure_optimizers(self):
            return None

    for callback in (ExpertExport(), FisherEstimator(samples_per_task=4)):
        trainer = SimpleNamespace(datamodule=synthetic(), world_size=1)
        with pytest.raises(ConfigurationError, match="found a Foreign, expected an Expert"):
            callback.on_fit_start(trainer, Foreign())
    started = Started()
    trainer = make_trainer(max_epochs=1, callbacks=[FisherEstimator(samples_per_task=8), started])
    with pytest.raises(ConfigurationError, match=r"found data of NoneType.*expected a task of coin.data"):
        trainer.fit(Expert(**SMALL, num_classes=3), synthetic().train_dataloader())
    assert not started.training
    trainer = SimpleNamespace(datamodule=object(), world_size=9)
    with pytest.raises(ConfigurationError, match=r"found 8 calibration samples for 9 processes.*take fewer devices"):
        FisherEstimator(samples_per_task=8).on_fit_start(trainer, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_task": 0}, "found samples_per_task=0, expected a whole number of at least 1"),
        ({"mc_samples": 2}, "found mc_samples=2 for the exact Fisher; only monte_carlo takes one"),
        ({"kind": "monte_carlo", "mc_samples": 0}, "found mc_samples=0, expected a whole number of at least 1"),
        ({"memory_mib": 0}, "found memory_mib=0, expected a whole number of at least 1"),
        ({"kind": "exactly"}, r"found kind='exactly' \(did you mean exact\?\), expected one of exact, monte_carlo"),
        ({"weights": "first"}, "found weights='first', expected one of last, best"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ConfigurationError, match=message):
        FisherEstimator(**options)
