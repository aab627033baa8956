"""The parts of an experiment file."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum, StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from lightning.pytorch import LightningModule

from coin.callbacks import Weights
from coin.choices import chosen
from coin.data import Augmentation, TaskData
from coin.data.torchvision_transforms import TransformSpec, build_transforms
from coin.errors import ConfigurationError
from coin.merging import Method
from coin.modules import Recipe
from coin.reporting.wandb_logging import TAG_LENGTH
from coin.statistics import DEFAULT_MEMORY_MIB, FisherKind
from coin.statistics.statistic import DataChoice

# What an override may be; of Any, jsonargparse would make objects where there is a class_path.
_Plain: TypeAlias = bool | int | float | list | dict | str | None  # type: ignore[type-arg]


@dataclass(frozen=True)
class TrainingConfig(Recipe):
    """How a network is trained, and on what; the tuned values live in YAML.

    The options of `coin.modules.Recipe` are those of ``coin fit`` as well.

    Args:
        epochs: Passes over the training split.
        batch_size: Samples a step and process.
        augmentation: What happens to training images: ``none``, ``crop``, ``crop_flip`` or ``shift``.
        transform: What happens to them after that, transforms of ``torchvision.transforms.v2`` by class path; none
            leaves it to the task's own option, an empty list leaves it out. See `coin.data.TaskData`.

    Raises:
        ConfigurationError: An option is not of its type or out of its range.
    """

    _ENUMS: ClassVar[dict[str, type[StrEnum]]] = {**Recipe._ENUMS, "augmentation": Augmentation}

    epochs: int = 3
    batch_size: int = 64
    augmentation: Augmentation = Augmentation.none
    transform: TransformSpec = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("epochs", self.epochs, 1)
        _check_integer("batch_size", self.batch_size, 2)
        build_transforms(self.transform)

    @property
    def recipe(self) -> dict[str, Any]:
        """The options of the `Recipe` alone."""
        return {option.name: getattr(self, option.name) for option in fields(Recipe)}


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
    overrides: dict[str, dict[str, _Plain]] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)

    def of(self, task: str) -> "ExpertConfig":
        """Return the training options with a task's own in place.

        Raises:
            ConfigurationError: An override is no option of an expert, or out of its range.
        """
        options: dict[str, Any] = dict(self.overrides.get(task, {}))
        try:
            own = replace(self, **options)
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


def as_options(value: Any) -> Any:
    """Return what a configuration file says of a value: the constructor's options of tasks and methods by class path.

    Raises:
        ConfigurationError: An object does not keep one of its options under the option's name.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): as_options(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_options(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {option.name: as_options(getattr(value, option.name)) for option in fields(value)}
    if isinstance(value, TaskData | Method):
        hparams = value.hparams if isinstance(value, LightningModule) else {}
        options = {}
        for name in _constructor_options(type(value)):
            if name not in hparams and not hasattr(value, name):
                raise ConfigurationError(
                    f"found a {type(value).__name__} that does not keep its option {name}, expected an attribute of "
                    "that name; set it in the constructor"
                )
            options[name] = as_options(hparams[name] if name in hparams else getattr(value, name))
        return {"class_path": _import_path(type(value)), "init_args": options}
    return value


def _constructor_options(kind: type) -> list[str]:
    """Return the names of a constructor's arguments, those that it hands on to its base class among them."""
    names: dict[str, None] = {}
    for each in kind.__mro__:
        if "__init__" in vars(each):
            arguments = list(inspect.signature(each.__init__).parameters.values())[1:]  # type: ignore[misc]
            names |= dict.fromkeys(a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD))
            if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
                break
    return list(names)


def _import_path(kind: type) -> str:
    """Return the shortest path that a class is imported by."""
    parts = kind.__module__.split(".")
    packages = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    home = next(each for each in packages if getattr(import_module(each), kind.__name__, None) is kind)
    return f"{home}.{kind.__name__}"


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"found {name}={value!r}, expected a whole number of at least {least}")
