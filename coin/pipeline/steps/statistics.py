"""The statistics step: a network and its tasks' calibration samples in, the file of a statistic out."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from coin.data.tasks import Tasks
from coin.files.tensors import fingerprint
from coin.modules import StatisticPass
from coin.statistics import Sums, check_shares
from coin.statistics.files import write_statistic
from coin.statistics.statistic import StatisticOptions


def statistic_sums(trainer: Trainer, network: nn.Module, tasks: Tasks, options: StatisticOptions) -> tuple[Sums, float]:
    """Return the sums of a network's statistic over the tasks' calibration samples, and the seconds it took.

    The samples are divided among the Trainer's processes; every process gets the sums over all samples.

    Raises:
        ConfigurationError: There are fewer samples than processes.
    """
    check_shares(tasks.samples_per_task * len(tasks.tasks), trainer.world_size)
    labels = None
    if options.needs_labels:
        tasks.prepare_data()
        tasks.setup("predict")
        labels = tasks.calibration().labels
    module = StatisticPass(network, options, tasks.seed, labels)
    trainer.predict(module, datamodule=tasks, return_predictions=False)
    assert module.sums is not None
    return module.sums, module.seconds


def estimate_statistic(
    trainer: Trainer,
    network: nn.Module,
    tasks: Tasks,
    options: StatisticOptions,
    path: Path,
    *,
    weights: str | None = None,
    **provenance: Any,
) -> dict[str, float]:
    """Compute a network's statistic, write it on the first process, and return its cost in ``seconds`` and ``passes``.

    Args:
        trainer: The Trainer whose processes and devices run the pass.
        network: The network.
        tasks: The tasks of the calibration samples: the expert's own task, or all tasks.
        options: Which statistic.
        path: The file.
        weights: The network's fingerprint, if it is known.
        **provenance: Further metadata of the file: the data (``own`` or ``pooled``), the task.
    """
    sums, seconds = statistic_sums(trainer, network, tasks, options)
    if trainer.is_global_zero:
        write_statistic(
            path,
            sums,
            weights=weights or fingerprint(network.state_dict()),
            seconds=seconds,
            samples_per_task=tasks.samples_per_task,
            seed=tasks.seed,
            **options.provenance,
            **provenance,
        )
    return {"seconds": seconds, "passes": sums.passes}
