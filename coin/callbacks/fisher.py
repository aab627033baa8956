"""Estimates the expert's Fisher when training ends: when to estimate, and where to save."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from coin.callbacks.weights import Weights, check_weights, trained_network
from coin.choices import chosen
from coin.errors import ConfigurationError
from coin.files.tensors import fingerprint
from coin.statistics import (
    DEFAULT_MEMORY_MIB,
    FisherKind,
    check_shares,
    fisher_sums,
    process_generator,
    reduce_sums,
    shard,
)
from coin.statistics.cotangents import check_cotangents
from coin.statistics.files import write_statistic
from coin.statistics.memory import check_memory


class FisherEstimator(Callback):
    """Writes the Fisher diagonal of the trained network on calibration samples of its own task.

    It runs on `on_train_end`, while the network is still on its device, in eval mode, and leaves the module as found.
    ``last.ckpt`` is written before that, so the statistic has a file of its own. ``coin fisher --ckpt_path`` computes
    the same of any checkpoint, by the same functions.

    Args:
        samples: P, the number of unlabelled training samples.
        kind: Which Fisher diagonal; see `coin.statistics.FisherKind`.
        cotangents: k, for the Monte Carlo kind.
        memory_mib: Bound on the pass's working memory in MiB.
        path: The file; none writes ``expert.fisher.safetensors`` into the trainer's ``default_root_dir``.
        weights: ``last`` or ``best``.

    Raises:
        ConfigurationError: An option is out of its range, or `cotangents` is given without Monte Carlo.
    """

    def __init__(
        self,
        samples: int = 200,
        kind: FisherKind = FisherKind.exact,
        cotangents: int | None = None,
        memory_mib: int = DEFAULT_MEMORY_MIB,
        path: str | None = None,
        weights: Weights = Weights.last,
    ) -> None:
        if samples < 1:
            raise ConfigurationError(f"found samples={samples}, expected at least 1 calibration sample")
        self.samples = samples
        self.kind = chosen(FisherKind, "kind", kind)
        check_cotangents(self.kind, cotangents)
        self.cotangents = cotangents
        self.memory_mib = check_memory(memory_mib)
        self.path = None if path is None else Path(path)
        self.weights = chosen(Weights, "weights", weights)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the training, what could not be estimated after it.

        Raises:
            ConfigurationError: There is no datamodule, no best checkpoint to expect, or not one sample a process.
            DataError: The task has fewer training samples than `samples`.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise ConfigurationError(
                "found no datamodule to draw calibration samples from, expected a task; give fit a datamodule"
            )
        check_shares(self.samples, trainer.world_size)
        check_weights(trainer, pl_module, self.weights)
        data.calibration(self.samples)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate on every process's share of the samples, add up, and write on the first process."""
        data: Any = getattr(trainer, "datamodule", None)
        network = trained_network(trainer, pl_module, self.weights)
        started = time.perf_counter()
        calibration = data.calibration(self.samples)
        places = shard(calibration.num_samples, trainer.global_rank, trainer.world_size)
        mine = calibration.subset(places)
        sums = fisher_sums(
            network,
            (batch.to(pl_module.device) for batch in mine),
            kind=self.kind,
            cotangents=self.cotangents,
            memory_mib=self.memory_mib,
            generator=process_generator(self.kind, data.seed, trainer.global_rank, pl_module.device),
            labels=mine.labels.to(pl_module.device) if self.kind is FisherKind.empirical else None,
        )
        sums = reduce_sums(sums)
        if trainer.is_global_zero:
            write_statistic(
                self.path or Path(trainer.default_root_dir) / "expert.fisher.safetensors",
                sums,
                statistic="fisher",
                weights=fingerprint(network.state_dict()),
                seconds=time.perf_counter() - started,
                kind=str(self.kind),
                cotangents=self.cotangents,
                data="own",
                samples_per_task=self.samples,
                seed=data.seed,
            )
