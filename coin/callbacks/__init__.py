"""Callbacks that write a trained network and its Fisher when training ends, and a progress bar."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from coin.core.batches import clone
from coin.core.choices import parse_enum
from coin.core.devices import device_of
from coin.core.progress import progress_bar
from coin.data import Calibration
from coin.errors import ConfigurationError, NumericalError
from coin.files.atomic import hashes
from coin.files.tensors import not_finite
from coin.networks import NetworkConfig, fill_network, save_network, without_frozen
from coin.statistics import DEFAULT_MEMORY_MIB, FisherKind, FisherOptions, reduce_sums, shard
from coin.statistics.files import save_statistic
from coin.statistics.statistic import StatisticKind, statistic_sums

_DESCRIBED = {"network", "image_size", "weights", "options", "num_classes"}  # from which a module builds its network


class Weights(StrEnum):
    """``last``: the weights at the end of training; ``best``: those of ModelCheckpoint's best checkpoint."""

    last = "last"
    best = "best"


class FileOfTrained(Callback):
    """Writes a file of the trained network when training ends, by default to the trainer's ``default_root_dir``."""

    name: ClassVar[str]

    def __init__(self, path: str | None, weights: Weights) -> None:
        self.path, self.weights = path, parse_enum(Weights, "weights", weights)

    def file(self, trainer: Trainer) -> Path:
        """Return the file that it writes."""
        return Path(self.path or Path(trainer.default_root_dir, self.name))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before training, that the file can be written after it."""
        if not isinstance(getattr(pl_module, "network", None), nn.Module) or not pl_module.hparams.keys() >= _DESCRIBED:
            found, own = type(pl_module).__name__, type(self).__name__
            raise ConfigurationError(f"found a {found}, expected an Expert; leave out {own}, or set model to Expert")
        if self.weights == Weights.best and self._monitored(trainer) is None:
            raise ConfigurationError("found no best checkpoint; add a ModelCheckpoint with a monitor, or take the last")

    def trained_network(self, trainer: Trainer, module: Any) -> nn.Module:
        """Return the network with the chosen weights, none frozen: what one expert did not train another may have."""
        monitored = self._monitored(trainer)
        if self.weights == Weights.last or monitored is None:
            return without_frozen(module.network)
        state = torch.load(monitored.best_model_path, map_location=module.device, weights_only=True)["state_dict"]
        best, own = clone(module.network), "network."
        saved = {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}
        fill_network(best, saved, monitored.best_model_path)
        return without_frozen(best)

    @staticmethod
    def _monitored(trainer: Trainer) -> ModelCheckpoint | None:
        found = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None)
        return next(found, None)


class ExpertExport(FileOfTrained):
    """Writes ``expert.safetensors``: the network with its architecture, classes, options and metrics.

    Args:
        path: The file; by default ``expert.safetensors`` in the trainer's ``default_root_dir``.
        weights: ``last`` or ``best``.
        task: The task's name, for the file; by default the class of the data.
    """

    name = "expert.safetensors"

    def __init__(self, path: str | None = None, weights: Weights = Weights.last, task: str | None = None) -> None:
        super().__init__(path, weights)
        self.task = task

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file on rank zero; raises NumericalError, without a file, if training diverged."""
        network = self.trained_network(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        path = self.file(trainer)
        if not_finite(network.state_dict()) is not None:
            raise NumericalError(f"training diverged: the weights for '{path}' are not finite; give a smaller rate")
        options = dict(pl_module.hparams)
        data = getattr(trainer, "datamodule", None)
        config = NetworkConfig(options["network"], options["image_size"], options["weights"], options["options"] or {})
        provenance = {
            "made_by": "coin fit",
            "task": self.task or (None if data is None else type(data).__name__),
            "sha256": hashes(Path(each) for each in (options.get("initial"), config.weights_file) if each),
            "classes": None if data is None else list(data.classes),
            "options": {name: value for name, value in options.items() if not name.startswith("_")},
            "epochs": trainer.current_epoch,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        save_network(path, network, config, int(options["num_classes"]), provenance)


def estimate_statistic(
    trainer: Trainer,
    network: nn.Module,
    calibration: Calibration,
    options: FisherOptions | None,
    path: Path,
    *,
    seed: int,
    **provenance: Any,
) -> dict[str, float]:
    """Compute a network's Fisher, or without options its Gram matrices, and write it on the first process.

    Returns its cost in ``seconds`` and ``passes``. The seed is of random cotangents; `provenance` goes into the file.
    """
    rank, world = trainer.global_rank, trainer.world_size
    started = time.perf_counter()
    share = calibration.subset(shard(calibration.num_samples, rank, world)).on(device_of(network))
    labels = share.labels if options is not None and options.kind is FisherKind.empirical else None
    name = StatisticKind.gram if options is None else StatisticKind.fisher
    with progress_bar(str(name), share.num_samples) as bar:
        own = statistic_sums(network, share, options, labels=labels, seed=seed, rank=rank, progress=bar.update)
    sums = reduce_sums(own)
    seconds = time.perf_counter() - started
    if trainer.is_global_zero:
        kind: dict[str, Any] = {} if options is None else {"kind": options.kind, "cotangents": options.mc_samples}
        save_statistic(path, sums, network, **kind, seconds=seconds, seed=seed, **provenance)
    return {"seconds": seconds, "passes": sums.passes}


class FisherEstimator(FileOfTrained):
    """Writes the Fisher diagonal of the trained network on calibration samples of its own task.

    ``coin fisher --ckpt_path`` computes the same for any checkpoint.

    Args:
        samples_per_task: P, the number of unlabelled training samples.
        kind: Which Fisher diagonal; see `coin.statistics.FisherKind`.
        mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind.
        memory_mib: Bound on the pass's working memory in MiB.
        path: The file; by default ``expert.fisher.safetensors`` in the trainer's ``default_root_dir``.
        weights: ``last`` or ``best``.
    """

    name = "expert.fisher.safetensors"

    def __init__(
        self,
        samples_per_task: int = 200,
        kind: FisherKind = FisherKind.exact,
        mc_samples: int | None = None,
        memory_mib: int = DEFAULT_MEMORY_MIB,
        path: str | None = None,
        weights: Weights = Weights.last,
    ) -> None:
        super().__init__(path, weights)
        self.options = FisherOptions(kind, mc_samples, memory_mib, samples_per_task)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before training, that the Fisher can be estimated after it."""
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise ConfigurationError("found no datamodule to draw samples from, expected a task; give fit a datamodule")
        shard(self.options.samples_per_task, 0, trainer.world_size)
        super().on_fit_start(trainer, pl_module)
        data.calibration(self.options.samples_per_task)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate on every process's share of the samples, add up, and write on rank zero."""
        data: Any = getattr(trainer, "datamodule", None)
        network, samples = self.trained_network(trainer, pl_module), self.options.samples_per_task
        about = {"samples_per_task": samples, "seed": data.seed, "data": "own"}
        estimate_statistic(trainer, network, data.calibration(samples), self.options, self.file(trainer), **about)


class StepProgress(Callback):
    """A training's steps as a bar on standard error; without a terminal a line now and then."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the steps that are left."""
        self._step = trainer.global_step
        self._bar = progress_bar("training", trainer.estimated_stepping_batches - self._step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Count a step of the optimizer, if this was one."""
        if steps := trainer.global_step - self._step:
            self._step += steps
            self._bar.update(steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean for what is printed next."""
        if hasattr(self, "_bar"):
            self._bar.close()
