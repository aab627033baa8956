"""The parts of an experiment file."""

from dataclasses import dataclass, field
from typing import Any

from coin.callbacks import Weights
from coin.data import Augmentation, TaskData
from coin.errors import ConfigurationError
from coin.modules import OptimizerKind, Schedule
from coin.statistics import FisherKind


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
        augmentation: What happens to training images: ``none``, ``crop`` or ``crop-flip``.
        compile_network: Whether to run the network through `torch.compile`.
    """

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
        if self.epochs < 1:
            raise ConfigurationError(f"found epochs={self.epochs}, expected at least 1")
        if self.batch_size < 2:
            raise ConfigurationError(f"found batch_size={self.batch_size}, expected at least 2")


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

    weights: Weights = Weights.last
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationConfig:
    """The unlabelled samples that merging and decoding may use, and the Fisher computed on them.

    Args:
        samples_per_task: P.
        fisher_data: ``own``: each expert's Fisher on its own task's samples; ``pooled``: on all tasks'.
        fisher_kind: Which Fisher diagonal.
        fisher_cotangents: k, for the Monte Carlo kind.
        batch_size: Samples a batch.
    """

    samples_per_task: int = 200
    fisher_data: str = "own"
    fisher_kind: FisherKind = FisherKind.exact
    fisher_cotangents: int | None = None
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.samples_per_task < 1 or self.batch_size < 1:
            raise ConfigurationError(
                f"found samples_per_task={self.samples_per_task}, batch_size={self.batch_size}, expected at least 1"
            )
        if self.fisher_data not in ("own", "pooled"):
            raise ConfigurationError(f"found fisher_data '{self.fisher_data}', expected own or pooled")
