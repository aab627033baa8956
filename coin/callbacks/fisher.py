"""The Fisher of a trained network, written when training ends."""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from coin.callbacks.export import FileOfTrained, Weights
from coin.core.devices import device_of
from coin.core.progress import progress_bar
from coin.data import Calibration, TaskData
from coin.errors import ConfigurationError
from coin.statistics import DEFAULT_MEMORY_MIB, FisherKind, FisherOptions, reduce_sums, shard
from coin.statistics.files import save_statistic
from coin.statistics.statistic import StatisticKind, statistic_sums


class FisherEstimator(FileOfTrained):
    """Writes the Fisher diagonal of the trained network on calibration samples of its own task.

    ``coin fisher --ckpt_path`` computes the same for any checkpoint.

    Args:
        samples_per_task: P, the number of unlabelled training samples.
        kind: Which Fisher diagonal; see `coin.statistics.FisherKind`.
        mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind.
        memory_mib: The pass's working memory in MiB, to which samples and cotangents are cut.
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
        shard(self.options.samples_per_task, 0, trainer.world_size)  # raises
        super().on_fit_start(trainer, pl_module)
        self._calibration(trainer)  # raises

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the Fisher of the trained network, and write it."""
        estimate_statistic(
            trainer,
            self.trained_network(trainer, pl_module),
            self._calibration(trainer),
            self.options,
            self.file(trainer),
            samples_per_task=self.options.samples_per_task,
            seed=trainer.datamodule.seed,  # type: ignore[attr-defined]
            data="own",
        )

    def _calibration(self, trainer: Trainer) -> Calibration:
        """Return the samples, drawn from the trainer's data."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, TaskData):
            raise ConfigurationError(
                f"found data of {type(data).__name__} to draw samples from, expected a task of coin.data; give fit one"
            )
        return data.calibration(self.options.samples_per_task)


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

    Every process takes its share of the samples, and the shares' sums are added. `provenance` goes into the file; the
    seed too, which is of random cotangents. Returns the cost in ``seconds`` and ``passes``.
    """
    started = time.perf_counter()
    rank = trainer.global_rank
    share = shard(calibration.num_samples, rank, trainer.world_size)
    samples = calibration.subset(share).on(device_of(network))
    statistic = StatisticKind.gram
    if options is not None:
        statistic = StatisticKind.fisher
        provenance |= {"kind": options.kind, "cotangents": options.mc_samples}
    batches = math.ceil(samples.num_samples / samples.batch_size)
    watched = progress_bar(str(statistic), batches, samples)
    sums = reduce_sums(statistic_sums(network, watched, options, seed=seed, rank=rank))
    seconds = time.perf_counter() - started
    if trainer.is_global_zero:
        save_statistic(
            path, sums, network, statistic=statistic, seconds=seconds, seed=seed, **provenance
        )
    return {"seconds": seconds, "passes": sums.passes}
