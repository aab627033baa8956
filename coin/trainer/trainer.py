"""The Trainer of all steps: Lightning's, with the commands ``fisher`` and ``evaluate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from coin.callbacks import estimate_statistic
from coin.core.choices import parse_enum
from coin.core.lightning import leave_out_anonymous, silence_lightning
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
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        **kwargs: Any,
    ) -> None:
        precision = str(kwargs.get("precision"))
        if precision.endswith("16-true"):
            found = f"found precision '{precision}', in which no weights are trained or written"
            raise ConfigurationError(f"{found}; use {precision.replace('true', 'mixed')}")
        leave_processes_at_exit()
        try:
            super().__init__(use_distributed_sampler=use_distributed_sampler, **kwargs)
        except MisconfigurationException as error:
            told = f"the Trainer cannot start: {first_line(error)}"
            raise ConfigurationError(
                f"{told}; without a GPU give --trainer.accelerator=cpu"
            ) from error
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
        of_wandb = [logger for logger in self.loggers if isinstance(logger, WandbLogger)]
        if of_wandb:
            check_connection()
        for logger in of_wandb:
            leave_out_anonymous(logger)
        environment = self._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and not kwargs.get("plugins"):
            environment.auto_requeue = False

    def fisher(
        self,
        model: LightningModule,
        datamodule: TaskData | Tasks,
        ckpt_path: str | None = None,
        samples_per_task: int = 200,
        kind: FisherKind = FisherKind.exact,
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
            kind: Which Fisher diagonal; Gram matrices have no kinds.
            mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind.
            statistic: ``fisher`` or ``gram``.
            memory_mib: The pass's working memory in MiB, to which samples and cotangents are cut.

        Raises:
            CoinError: Options do not fit together, the checkpoint does not fit the model, or samples are too few.
        """
        statistic = parse_enum(StatisticKind, "statistic", statistic)
        options = None
        if statistic is StatisticKind.fisher:
            options = FisherOptions(kind, mc_samples, memory_mib, samples_per_task)
        network, config = _network(model, ckpt_path)
        is_pooled = isinstance(datamodule, Tasks)
        members = datamodule.tasks if isinstance(datamodule, Tasks) else {"task": datamodule}
        tasks = Tasks(members, samples_per_task)
        for task in members.values():
            config.check_content(task.content, task.vocabulary)
        tasks.resize(config.image_size)
        path = Path(self.default_root_dir) / f"expert.{statistic}.safetensors"
        estimate_over_tasks(
            self, network, tasks, options, path, data="pooled" if is_pooled else "own"
        )

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
            raise ConfigurationError(
                f"{found}, expected a DecodingEvaluator with Tasks; see configs/evaluate/"
            )
        datamodule.resize(model.experts.config.image_size)
        with progress_bar("evaluation") as model.progress:
            self.test(model, datamodule=datamodule, verbose=False)
        if self.is_global_zero:
            record_evaluation(self, model, datamodule, name, configuration or {})
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
        fill_network(
            model.network,
            read_weights(Path(ckpt_path), model.network.state_dict().keys()),
            ckpt_path,
        )
    return without_frozen(model.network), model.config


def estimate_over_tasks(
    trainer: pl.Trainer,
    network: nn.Module,
    tasks: Tasks,
    options: FisherOptions | None,
    path: Path,
    **provenance: Any,
) -> dict[str, float]:
    """Start the Trainer's processes, and on them `estimate_statistic` over the tasks' calibration samples."""
    launcher = trainer.strategy.launcher
    if launcher is None:
        trainer.strategy.setup_environment()
    else:
        launcher.launch(trainer.strategy.setup_environment)
    if trainer.local_rank == 0:
        tasks.prepare_data()
    trainer.strategy.barrier()
    network.to(trainer.strategy.root_device)
    made = {**provenance, "samples_per_task": tasks.samples_per_task, "seed": tasks.seed}
    costs = estimate_statistic(trainer, network, tasks.calibration(), options, path, **made)
    network.cpu()
    return costs


def make_trainer(folder: Path, options: Mapping[str, Any], **fixed: Any) -> Trainer:
    """Return a Trainer for one step, from the experiment's ``trainer`` section and the options fixed by the step."""
    silence_lightning()
    quiet = ("enable_model_summary", "enable_progress_bar", "enable_checkpointing", "logger")
    settings = {"devices": 1, **dict.fromkeys(quiet, False)}
    try:
        return Trainer(default_root_dir=str(folder), **{**settings, **options, **fixed})
    except (TypeError, ValueError, MisconfigurationException) as error:
        problem = f"the trainer section {dict(options)} does not fit: {first_line(error)}"
        raise ConfigurationError(f"{problem}; see Lightning's Trainer") from error
