"""The statistics step: a network and its tasks' calibration samples in, the file of a statistic out."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from coin.callbacks.fisher import estimate_statistic
from coin.data.tasks import Tasks
from coin.statistics.statistic import StatisticOptions


def estimate_over_tasks(
    trainer: Trainer, network: nn.Module, tasks: Tasks, options: StatisticOptions, path: Path, **provenance: Any
) -> dict[str, float]:
    """Start the Trainer's processes, and on them `estimate_statistic` over the tasks' calibration samples."""
    launcher, start = trainer.strategy.launcher, trainer.strategy.setup_environment
    start() if launcher is None else launcher.launch(start)
    if trainer.local_rank == 0:
        tasks.prepare_data()
    trainer.strategy.barrier()
    network.to(trainer.strategy.root_device)
    samples, seed = tasks.samples_per_task, tasks.seed
    costs = estimate_statistic(
        trainer, network, tasks.calibration(), options, path, samples_per_task=samples, seed=seed, **provenance
    )
    network.cpu()
    return costs
