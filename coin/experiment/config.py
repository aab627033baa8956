"""The parts of an experiment file."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from coin.callbacks import Weights
from coin.choices import chosen
from coin.data import Augmentation, TaskData
from coin.errors import ConfigurationError
from coin.modules import OptimizerKind, Schedule
from coin.reporting.wandb_logging import TAG_LENGTH
from coin.statistics import DEFAULT_MEMORY_MIB, FisherKind
from coin.statistics.statistic import DataChoice


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained; the tuned values live in YAML.

    Args:
        epochs: Passes over the training split.
        lr: The (peak) learning rate.
        batch_size: Samples a step and process.
        optimizer: ``sgd`` or ``adamw``.
        momentum: Of ``sgd``.
        weight_decay: The factor of the L2 penalty or of the decay.
        schedule: ``one_cycle``, ``cosine`` or ``constant``.
        label_smoothing: The share of the target spread over all classes.
        augmentation: What happens to training images: ``none``, ``crop``, ``crop_flip`` or ``shift``.
        compile_network: Whether to run the network through `torch.compile`.

    Raises:
        ConfigurationError: An option is not of its type or out of its range. Overrides bring plain values, which no
            parser has seen.
    """

    _ENUMS: ClassVar[dict[str, type[StrEnum]]] = {
        "optimizer": OptimizerKind,
        "schedule": Schedule,
        "augmentation": Augmentation,
    }

    epochs: int = 3
    lr: float = 0.01
    batch_size: int = 64
    optimizer: OptimizerKind = OptimizerKind.sgd
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = Schedule.one_cycle
    label_smoothing: float = 0.0
    augmentation: Augmentation = Augmentation.none
    compile_network: bool = False

    def __post_init__(self) -> None:
        for name, kind in self._ENUMS.items():
            object.__setattr__(self, name, chosen(kind, name, getattr(self, name)))
        _check_integer("epochs", self.epochs, 1)
        _check_integer("batch_size", self.batch_size, 2)
        if not (_is_number(self.lr) and self.lr > 0):
            raise ConfigurationError(f"found lr={self.lr!r}, expected a positive number")
        if not (_is_number(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigurationError(f"found weight_decay={self.weight_decay!r}, expected a number of at least 0")
        for name in ("momentum", "label_smoothing"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise ConfigurationError(f"found {name}={value!r}, expected a number from 0 to below 1")
        if not isinstance(self.compile_network, bool):
            raise ConfigurationError(f"found compile_network={self.compile_network!r}, expected true or false")


@dataclass(frozen=True)
class BaseConfig(TrainingConfig):
    """The shared initialisation that all experts start from, where it is not the network's `weights`.

    Args:
        task: What to pretrain on.
        checkpoint: Trained weights instead: a safetensors state dict or a Lightning checkpoint.
    """

    task: TaskData | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.task is None) == (self.checkpoint is None):
            raise ConfigurationError("found a base with both or neither of task and checkpoint, expected one of them")


@dataclass(frozen=True)
class ExpertConfig(TrainingConfig):
    """How every task's expert is made.

    Args:
        weights: Which weights become the expert: ``last``, or ``best`` on the validation split.
        overrides: By task, options of this section that differ for it.
        checkpoints: By task, trained weights to take instead of training: a safetensors state dict or a Lightning
            checkpoint.
    """

    _ENUMS: ClassVar[dict[str, type[StrEnum]]] = {**TrainingConfig._ENUMS, "weights": Weights}

    weights: Weights = Weights.last
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)

    def of(self, task: str) -> "ExpertConfig":
        """Return the training options with a task's own in place.

        Raises:
            ConfigurationError: An override is no option of an expert, or out of its range.
        """
        try:
            own = replace(self, **self.overrides.get(task, {}))
        except TypeError as error:
            raise ConfigurationError(
                f"expert.overrides.{task} has an option that an expert has not: {error}"
            ) from error
        return replace(own, overrides={}, checkpoints={})


@dataclass(frozen=True)
class CalibrationConfig:
    """The unlabelled samples that merging and decoding may use, and the Fisher computed on them.

    Args:
        samples_per_task: P.
        fisher_data: The data of the experts' statistics for methods that leave it open: ``own``: each expert's on its
            own task's samples; ``pooled``: on all tasks'; ``auto``: both, the better one for every method.
        fisher_kind: Which Fisher diagonal.
        fisher_cotangents: k, for the Monte Carlo kind and only for it.
        memory_mib: Bound on the Fisher pass's working memory in MiB, beside the network and the accumulators.
        batch_size: Samples a batch.

    Raises:
        ConfigurationError: An option is out of its range, or k is given for another kind.
    """

    samples_per_task: int = 200
    fisher_data: DataChoice = DataChoice.auto
    fisher_kind: FisherKind = FisherKind.exact
    fisher_cotangents: int | None = None
    memory_mib: int = DEFAULT_MEMORY_MIB
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.samples_per_task < 1 or self.batch_size < 1:
            raise ConfigurationError(
                f"found samples_per_task={self.samples_per_task}, batch_size={self.batch_size}, expected at least 1"
            )
        if self.memory_mib < 1:
            raise ConfigurationError(f"found memory_mib={self.memory_mib}, expected at least 1")
        object.__setattr__(self, "fisher_data", chosen(DataChoice, "fisher_data", self.fisher_data))
        kind = chosen(FisherKind, "fisher_kind", self.fisher_kind)
        object.__setattr__(self, "fisher_kind", kind)
        if self.fisher_cotangents is not None:
            _check_integer("fisher_cotangents", self.fisher_cotangents, 1)


@dataclass(frozen=True)
class WandbConfig:
    """What of an experiment goes to W&B; ``WANDB_MODE``, ``WANDB_PROJECT`` and ``WANDB_ENTITY`` say where to.

    Args:
        method_runs: Whether every method has a run of its own, beside the jobs', so that a dashboard can group by it.
        tags: Short words to filter by, on all runs.

    Raises:
        ConfigurationError: A tag is empty or longer than W&B allows.
    """

    method_runs: bool = True
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if wrong := [tag for tag in self.tags if not 1 <= len(tag) <= TAG_LENGTH]:
            raise ConfigurationError(f"found W&B tag '{wrong[0]}', expected one of 1 to {TAG_LENGTH} characters")


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"found {name}={value!r}, expected a whole number of at least {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
