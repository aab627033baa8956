"""The parts of an experiment file."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from coin.callbacks import Weights
from coin.coding.promise import samples_needed
from coin.core.choices import check_integer, check_number, parse_enum
from coin.data import TaskData
from coin.errors import CoinWarning, ConfigurationError
from coin.pipeline.steps.train import TrainingConfig
from coin.statistics import DEFAULT_MEMORY_MIB, FisherKind, FisherOptions
from coin.statistics.statistic import DataChoice, Statistic

# Of Any, jsonargparse would make objects where there is a class_path.
_Plain: TypeAlias = bool | int | float | list | dict | str | None  # type: ignore[type-arg]


@dataclass(frozen=True)
class BaseConfig(TrainingConfig):
    """The shared initialisation of all experts, if it is not the network's `weights`.

    Args:
        task: The task to pretrain on.
        checkpoint: Trained weights to use instead of pretraining: a safetensors state dict or a Lightning checkpoint.
        seed: Of the pretraining: initial weights, order of samples. All seeds of an experiment share one base.
    """

    task: TaskData | None = None
    checkpoint: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.task is None) == (self.checkpoint is None):
            raise ConfigurationError(
                "found a base with both or neither of task and checkpoint; give exactly one"
            )
        check_integer("seed", self.seed, 0)


@dataclass(frozen=True)
class ExpertConfig(TrainingConfig):
    """How every task's expert is made.

    Args:
        weights: Which weights become the expert: ``last``, or ``best`` on the validation split.
        overrides: Options of this section that differ for a task, by task name.
        checkpoints: Trained weights to use instead of training, by task name: a safetensors state dict, a Lightning
            checkpoint, or ``hf/FOLDER_OR_ID`` for a network of Hugging Face's.
    """

    weights: Weights = Weights.last
    overrides: dict[str, dict[str, _Plain]] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", parse_enum(Weights, "weights", self.weights))

    def of(self, task: str) -> "ExpertConfig":
        """Return the training options for a task, its overrides applied."""
        options: dict[str, Any] = {
            **self.overrides.get(task, {}),
            "overrides": {},
            "checkpoints": {},
        }
        try:
            return replace(self, **options)
        except TypeError as error:
            problem = f"expert.overrides.{task} has an unknown option ({error})"
            raise ConfigurationError(f"{problem}; use options of the expert section") from error


@dataclass(frozen=True)
class CalibrationConfig:
    """The unlabelled samples that merging and decoding may use, and the Fisher computed on them.

    Args:
        samples_per_task: P, the number of calibration samples of each task.
        fisher_data: The samples of the experts' statistics, for methods that do not set it: each expert's ``own`` task,
            or all tasks (``pooled``).
        fisher_kind: Which Fisher diagonal.
        fisher_mc_samples: k, the number of random cotangents a sample, for the Monte Carlo kind only.
        memory_mib: Bound on the Fisher pass's working memory in MiB, beside the network and the accumulators.
        batch_size: Samples per batch.
        promise_samples: How many validation samples of each task set the score up to which decoded answers are
            accepted; nothing else learns from them. 0 makes no promise; at 95 % confidence α = 5 % takes 59, 2 % 149.
        promise_alpha: α, the largest probability that an accepted answer differs from the expert's.
        promise_confidence: The probability that the promise holds.
    """

    samples_per_task: int = 200
    fisher_data: DataChoice = DataChoice.own
    fisher_kind: FisherKind = FisherKind.exact
    fisher_mc_samples: int | None = None
    memory_mib: int = DEFAULT_MEMORY_MIB
    batch_size: int = 50
    promise_samples: int = 0
    promise_alpha: float = 0.02
    promise_confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("samples_per_task", "batch_size", "memory_mib"):
            check_integer(name, getattr(self, name), 1)
        check_integer("promise_samples", self.promise_samples, 0)
        if self.fisher_mc_samples is not None:
            check_integer("fisher_mc_samples", self.fisher_mc_samples, 1)
        check_number("promise_alpha", self.promise_alpha, low=0, high=1, strict=True)
        check_number("promise_confidence", self.promise_confidence, low=0, high=1, strict=True)

    def warn_of_too_few(self) -> None:
        """Warn if there are too few samples for any promise."""
        needed = samples_needed(self.promise_alpha, self.promise_confidence)
        if 0 < self.promise_samples < needed:
            warnings.warn(
                f"nothing will be promised: found promise_samples={self.promise_samples}, expected at least {needed} "
                f"for promise_alpha={self.promise_alpha:g} at {self.promise_confidence:g} confidence; raise either",
                CoinWarning,
                stacklevel=2,
            )

    def options_of(self, which: Statistic) -> FisherOptions | None:
        """Return the options with which a Fisher is computed; Gram matrices have none."""
        if which.kind is None:
            return None
        mc_samples = self.fisher_mc_samples if which.kind is FisherKind.monte_carlo else None
        return FisherOptions(which.kind, mc_samples, self.memory_mib, self.samples_per_task)


@dataclass(frozen=True)
class WandbConfig:
    """What is logged to W&B; ``WANDB_MODE``, ``WANDB_PROJECT`` and ``WANDB_ENTITY`` set where.

    Args:
        tags: Tags of all runs.
    """

    tags: list[str] = field(default_factory=list)
