"""The Trainer of all steps: Lightning's, with the commands ``fisher`` and ``evaluate``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from coin.callbacks import StepProgress, estimate_statistic
from coin.core.choices import parse_enum
from coin.core.lightning import silence_lightning
from coin.core.processes import leave_processes_at_exit
from coin.core.progress import progress_bar
from coin.data import TaskData
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, first_line
from coin.evaluation.scores import Measurement
from coin.modules import DecodingEvaluator, Expert
from coin.networks import NetworkConfig, fill_network, load_network, read_weights, without_frozen
from coin.statistics import DEFAULT_MEMORY_MIB, FisherKind, FisherOptions
from coin.statistics.statistic import StatisticKind
from coin.tracking.settings import check_connection
from coin.trainer.record import record_evaluation


class Trainer(pl.Trainer):
    """Lightning's Trainer with ``fisher`` and ``evaluate``, and without its distributed sampler.

    ``coin`` shards samples by index and never pads, so that one process and many give the same numbers; Lightning's
    `DistributedSampler` would repeat samples. In a SLURM job Lightning's automatic requeue is off: a checkpoint in the
    middle of an epoch cannot be resumed exactly. ``configs/cluster/run.sbatch`` requeues the job itself.

    Args:
        use_distributed_sampler: Must stay off for ``coin``'s own data.
        callbacks: Lightning's or your own; without a progress bar among them `coin.callbacks.StepProgress` is added.
        enable_progress_bar: Whether to show progress.
        matmul_precision: The precision of float32 matrix products in the whole process: ``high`` allows TF32 on GPUs,
            ``medium`` bfloat16; ``highest`` is torch's default. None does not change it.
        **kwargs: Lightning's own arguments. ``precision: bf16-mixed`` is of networks in training and evaluation;
            statistics, merges and decoding always use full precision, without TF32. Where networks are trained,
            distilled or evaluated it is as torch has it, by default with TF32 in a GPU's convolutions, as in use.
    """

    callbacks: list[Callback]

    def __init__(
        self,
        *,
        use_distributed_sampler: bool = False,
        callbacks: list[Callback] | Callback | None = None,
        enable_progress_bar: bool = True,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        **kwargs: Any,
    ) -> None:
        if (precision := str(kwargs.get("precision"))).endswith("16-true"):
            told = f"found precision '{precision}', in which no weights are trained or written"
            raise ConfigurationError(f"{told}; use {precision.replace('true', 'mixed')}")
        given = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks] if callbacks is not None else []
        has_bar = any(isinstance(callback, ProgressBar) for callback in given)
        given += [StepProgress()] if enable_progress_bar and not has_bar else []
        leave_processes_at_exit()
        super().__init__(
            callbacks=given, enable_progress_bar=has_bar, use_distributed_sampler=use_distributed_sampler, **kwargs
        )
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
        if any(isinstance(logger, WandbLogger) for logger in self.loggers):
            check_connection()
        environment = self._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and not kwargs.get("plugins"):
            environment.auto_requeue = False

    def fisher(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        samples_per_task: int = 200,
        kind: FisherKind | None = None,
        mc_samples: int | None = None,
        statistic: StatisticKind = StatisticKind.fisher,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        """Compute a statistic of a checkpoint, and write ``expert.STATISTIC.safetensors`` to ``default_root_dir``.

        Args:
            model: The expert.
            datamodule: Its task, or several as `coin.data.Tasks` for a pooled Fisher.
            ckpt_path: A Lightning checkpoint or an ``expert.safetensors``; none takes the model as configured.
            samples_per_task: P, the number of unlabelled training samples of each task.
            kind: Which Fisher diagonal, by default ``exact``. Gram matrices have no kinds.
            mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind.
            statistic: ``fisher`` or ``gram``.
            memory_mib: Bound on the pass's working memory in MiB, beside the network and the accumulators.

        Raises:
            CoinError: Options do not fit together, the checkpoint does not fit the model, or samples are too few.
        """
        statistic, options = parse_enum(StatisticKind, "statistic", statistic), None
        if statistic is StatisticKind.fisher:
            options = FisherOptions(kind or FisherKind.exact, mc_samples, memory_mib, samples_per_task)
        elif (kind, mc_samples) != (None, None):
            told = f"found kind={kind} and mc_samples={mc_samples} for Gram matrices"
            raise ConfigurationError(f"{told}, expected neither; leave them out or set statistic=fisher")
        network, config = _network(model, ckpt_path)
        if not isinstance(datamodule, TaskData | Tasks):
            raise ConfigurationError(f"found data of {type(datamodule).__name__}, expected a task or Tasks")
        own = isinstance(datamodule, TaskData)
        tasks = Tasks({"task": datamodule} if isinstance(datamodule, TaskData) else datamodule.tasks, samples_per_task)
        for task in tasks.tasks.values():
            config.check_content(task.content)
        tasks.resize(config.image_size)
        path = Path(self.default_root_dir) / f"expert.{statistic}.safetensors"
        estimate_over_tasks(self, network, tasks, options, path, data="own" if own else "pooled")

    def evaluate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        name: str = "evaluate",
        configuration: dict[str, Any] | None = None,
    ) -> list[Measurement]:
        """Measure how well lost experts are decoded, and write it to ``default_root_dir`` and the loggers.

        Args:
            model: A `coin.modules.DecodingEvaluator`.
            datamodule: The tasks, as `coin.data.Tasks`.
            name: The experiment's name in the results.
            configuration: The configuration that ``results.json`` holds beside the code.
        """
        if not isinstance(model, DecodingEvaluator) or not isinstance(datamodule, Tasks):
            found = f"found a {type(model).__name__} with data of {type(datamodule).__name__}"
            raise ConfigurationError(f"{found}, expected a DecodingEvaluator with Tasks; see configs/evaluate/")
        datamodule.resize(model.config.image_size)
        with progress_bar("evaluation") as model.progress:
            self.test(model, datamodule=datamodule, verbose=False)
        if self.is_global_zero:
            record_evaluation(model, datamodule, Path(self.default_root_dir), name, configuration, self.loggers)
        return model.measurements


def _network(model: LightningModule, ckpt_path: str | None) -> tuple[nn.Module, NetworkConfig]:
    """Return an expert's network with the weights of a checkpoint, and its configuration."""
    if ckpt_path is not None and ckpt_path.endswith(".safetensors"):
        file = load_network(Path(ckpt_path))
        return file.network, file.config
    if not isinstance(model, Expert) or model.network is None:
        expected = "expected an Expert with num_classes, or ckpt_path=expert.safetensors"
        raise ConfigurationError(f"found a model without a network, {expected}")
    if ckpt_path is not None:
        fill_network(model.network, read_weights(Path(ckpt_path), model.network.state_dict().keys()), ckpt_path)
    return without_frozen(model.network), model.config


def estimate_over_tasks(
    trainer: pl.Trainer, network: nn.Module, tasks: Tasks, options: FisherOptions | None, path: Path, **provenance: Any
) -> dict[str, float]:
    """Start the Trainer's processes, and on them `estimate_statistic` over the tasks' calibration samples."""
    launcher, start = trainer.strategy.launcher, trainer.strategy.setup_environment
    start() if launcher is None else launcher.launch(start)
    if trainer.local_rank == 0:
        tasks.prepare_data()
    trainer.strategy.barrier()
    network.to(trainer.strategy.root_device)
    provenance |= {"samples_per_task": tasks.samples_per_task, "seed": tasks.seed}
    costs = estimate_statistic(trainer, network, tasks.calibration(), options, path, **provenance)
    network.cpu()
    return costs


def make_trainer(folder: Path, options: Mapping[str, Any], **fixed: Any) -> Trainer:
    """Return a Trainer for one step, from the experiment's ``trainer`` section and the options fixed by the step."""
    silence_lightning()
    settings = {"devices": 1, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    try:
        return Trainer(default_root_dir=str(folder), **{**settings, **options, **fixed})
    except (TypeError, ValueError, MisconfigurationException) as error:
        told = f"the trainer section {dict(options)} does not fit: {first_line(error)}"
        raise ConfigurationError(f"{told}; see Lightning's Trainer") from error
