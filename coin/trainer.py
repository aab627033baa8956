"""The Trainer: Lightning's, with the commands that need a model, data and devices."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from coin.data import TaskData
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError
from coin.modules import DecodingEvaluator, FisherPass, Outcome
from coin.networks import fill_network, load_network, read_weights
from coin.reporting.results import Row, confusion_key, write_results
from coin.reporting.wandb_evaluation import log_evaluation
from coin.state import fingerprint
from coin.statistics import FisherKind, Sums
from coin.statistics.files import save_statistic

_EXPECTED = (
    r".*does not have many workers.*",  # data live in memory: workers would only copy them
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*module\(s\) in eval mode at the start of training.*",  # distillation freezes BatchNorm on purpose
    r".*is smaller than the logging interval.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*treespec.*is deprecated.*",  # Lightning's own
    r"predict returned None.*",  # a pass that sums needs no predictions
    r".*`tensorboardX` has been removed.*",
)
"""What Lightning warns of and an experiment means."""


def quieten() -> None:
    """Silence Lightning's notices on standard error, and the warnings of what ``coin`` does on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)


class Trainer(pl.Trainer):
    """Lightning's Trainer with ``fisher`` and ``evaluate``, and without its distributed sampler.

    ``coin`` shards samples by index and never pads, so that one process and many give the same numbers; Lightning's
    `DistributedSampler` would repeat samples.

    Args:
        use_distributed_sampler: Must stay off for ``coin``'s own data.
        **kwargs: Lightning's own arguments.
    """

    def __init__(self, *, use_distributed_sampler: bool = False, **kwargs: Any) -> None:
        super().__init__(use_distributed_sampler=use_distributed_sampler, **kwargs)

    def fisher(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        samples: int = 200,
        kind: FisherKind = FisherKind.exact,
        cotangents: int | None = None,
        output: str | None = None,
    ) -> None:
        """Compute the Fisher diagonal of an existing checkpoint.

        Args:
            model: The expert.
            datamodule: Its task, or several as `coin.data.Tasks` for a pooled Fisher.
            ckpt_path: A Lightning checkpoint or an ``expert.safetensors``; none takes the model as configured.
            samples: P, the number of unlabelled training samples of each task.
            kind: Which Fisher diagonal.
            cotangents: k, for the Monte Carlo kind.
            output: The file to write; none writes ``expert.fisher.safetensors`` beside the checkpoint.

        Raises:
            FileError: The checkpoint is missing or damaged.
            StateError: It does not fit the model.
            DataError: A task has fewer than `samples` training samples.
        """
        network = _network(model, ckpt_path)
        single = isinstance(datamodule, TaskData)
        if isinstance(datamodule, TaskData):
            tasks = Tasks({"task": datamodule}, samples_per_task=samples)
        elif isinstance(datamodule, Tasks):
            tasks = Tasks(datamodule.tasks, samples, datamodule.batch_size)
        else:
            raise ConfigurationError(f"found data of {type(datamodule).__name__}, expected a task or Tasks")
        sums, seconds = self.fisher_sums(network, tasks, kind=kind, cotangents=cotangents)
        if self.is_global_zero:
            folder = Path(self.default_root_dir) if ckpt_path is None else Path(ckpt_path).parent
            save_statistic(
                Path(output) if output is not None else folder / "expert.fisher.safetensors",
                sums,
                statistic="fisher",
                weights=fingerprint(network.state_dict()),
                seconds=seconds,
                kind=str(kind),
                cotangents=cotangents,
                data="own" if single else "pooled",
                seed=tasks.seed,
            )

    def fisher_sums(
        self, network: nn.Module, tasks: Tasks, *, kind: FisherKind = FisherKind.exact, cotangents: int | None = None
    ) -> tuple[Sums, float]:
        """Return the sums of a network's Fisher diagonal over the tasks' calibration samples, and the seconds it took.

        The samples are shared out over this Trainer's processes; every process gets the sums over all of them.
        """
        labels = None
        if kind == FisherKind.empirical:
            tasks.prepare_data()
            tasks.setup("predict")
            labels = tasks.calibration().labels
        module = FisherPass(network, FisherKind(kind), cotangents, seed=tasks.seed, labels=labels)
        self.predict(module, datamodule=tasks, return_predictions=False)
        assert module.sums is not None
        return module.sums, module.seconds

    def evaluate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: str | None = None,
        name: str = "evaluate",
        configuration: dict[str, Any] | None = None,
    ) -> list[Outcome]:
        """Measure how well lost experts are decoded, and record it: files, table, loggers.

        Args:
            model: A `coin.modules.DecodingEvaluator`.
            datamodule: The tasks, as `coin.data.Tasks`.
            output: The folder for ``results.csv``, ``results.json`` and the rest; none takes the Trainer's
                ``default_root_dir``.
            name: The experiment's name in the results.
            configuration: What ``results.json`` says of how the results came about, beside the code.
        """
        if not isinstance(model, DecodingEvaluator) or not isinstance(datamodule, Tasks):
            raise ConfigurationError(
                f"found a {type(model).__name__} with data of {type(datamodule).__name__}, expected a "
                "DecodingEvaluator with Tasks; see configs/evaluate/"
            )
        self.test(model, datamodule=datamodule, verbose=False)
        if self.is_global_zero:
            rows = result_rows(model.outcomes, name, datamodule.seed, datamodule.samples_per_task)
            confusions = {confusion_key(row): o.confusion for row, o in zip(rows, model.outcomes, strict=True)}
            code = model.code.matrix.tolist()
            described = {"tasks": list(model.tasks), "code": code, **(configuration or {})}
            write_results(Path(output or self.default_root_dir), rows, described, confusions)
            for logger in self.loggers:
                if isinstance(logger, WandbLogger):
                    log_evaluation(logger.experiment, rows, confusions)
        return model.outcomes


def result_rows(outcomes: Sequence[Outcome], experiment: str, seed: int, samples_per_task: int) -> list[Row]:
    """Return the rows of the results for what an evaluation measured.

    Args:
        outcomes: What was measured.
        experiment: The experiment's name.
        seed: The seed of the run.
        samples_per_task: P of the decoders, and of a coded model whose file does not say.
    """
    return [
        Row(
            experiment=experiment,
            seed=seed,
            method=outcome.variant.method,
            batchnorm=outcome.variant.batchnorm,
            decoder=outcome.decoder,
            code_row="+".join(str(row) for row in range(len(outcome.variant.networks))),
            erased="+".join(outcome.erased),
            task=outcome.task,
            samples_per_task=outcome.variant.samples_per_task or samples_per_task,
            expert_accuracy=outcome.expert_accuracy,
            decoded_accuracy=outcome.decoded_accuracy,
            nda=outcome.nda,
            agreement=outcome.agreement,
            residual=outcome.residual,
            calibration_seconds=outcome.calibration_seconds,
            sample_passes=outcome.sample_passes,
        )
        for outcome in outcomes
    ]


def _network(model: LightningModule, ckpt_path: str | None) -> nn.Module:
    """Return an expert's network with the weights of a checkpoint."""
    if ckpt_path is not None and ckpt_path.endswith(".safetensors"):
        return load_network(Path(ckpt_path)).network
    network = getattr(model, "network", None)
    if not isinstance(network, nn.Module):
        raise ConfigurationError(
            "found a model without a network, expected an Expert with num_classes, or ckpt_path=expert.safetensors"
        )
    if ckpt_path is not None:
        fill_network(network, read_weights(Path(ckpt_path)), ckpt_path)
    return network
