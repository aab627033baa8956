"""The training options shared by ``coin fit`` and ``coin run``, and their effect on a network."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from coin.core.choices import check_number, is_list_of_names
from coin.errors import ConfigurationError
from coin.files.packaged import imported
from coin.networks.heads import head_name

HEAD = "head"  # the pattern that means a network's head, whatever its name

# The name of a class, or {class_path: …, init_args: {…}}. Of plain values, which a step's key holds; jsonargparse would
# make objects of `dict[str, Any]`.
ClassSpec: TypeAlias = str | dict | None  # type: ignore[type-arg]

SGD: dict[str, Any] = {
    "class_path": "torch.optim.SGD",
    "init_args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
}
"""The optimiser if none is given."""


class OneCycle(OneCycleLR):
    """Torch's one cycle with the optimiser's momentum.

    Source: Smith and Topin, *Super-convergence* (2018).
    """

    def __init__(
        self, optimizer: Optimizer, max_lr: float | list[float], total_steps: int, **options: Any
    ) -> None:
        super().__init__(optimizer, max_lr, total_steps, cycle_momentum=False, **options)


@dataclass(frozen=True)
class Recipe:
    """The training options of ``coin fit``'s `Expert` and of an experiment's ``expert`` and ``base``.

    Args:
        optimizer: A class of `torch.optim`, such as ``AdamW``, or any other's ``class_path`` and ``init_args``; by
            default SGD with momentum 0.9.
        lr: The optimiser's learning rate; it overrides that in ``init_args``.
        weight_decay: The optimiser's weight decay; it overrides that in ``init_args``.
        lr_scheduler: A class of `torch.optim.lr_scheduler`, given like the optimiser, that steps with it. Its
            ``total_steps``, ``T_max`` and ``max_lr`` are by default the run's length and the optimiser's rate. None is
            a constant rate.
        freeze_batchnorm: Whether BatchNorm layers stay in eval mode: their running statistics are fixed, their weights
            and biases train.
        trainable: Which parameters train, by glob patterns over their names, such as ``layer4.*``, or ``head``,
            whatever the head is called. None trains all. See `freeze_batchnorm` for BatchNorm.
    """

    optimizer: ClassSpec = None
    lr: float | None = None
    weight_decay: float | None = None
    lr_scheduler: ClassSpec = "coin.modules.recipe.OneCycle"
    freeze_batchnorm: bool = False
    trainable: list[str] | None = None

    def __post_init__(self) -> None:  # overrides bring plain values, which no parser has seen
        if self.lr is not None:
            check_number("lr", self.lr, low=0.0, strict=True)
        if not isinstance(self.freeze_batchnorm, bool):
            raise ConfigurationError(
                f"found freeze_batchnorm={self.freeze_batchnorm!r}, expected true or false"
            )
        if self.trainable is not None and not is_list_of_names(self.trainable):
            raise ConfigurationError(
                f"found trainable={self.trainable!r}, expected a list of glob patterns or null"
            )
        # Made of a parameter of its own, so that wrong classes and options are refused before anything is trained.
        optimizer = self.make_optimizer([nn.Parameter(torch.zeros(1, 1))])
        self.make_scheduler(optimizer, 100)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimiser of parameters."""
        given = SGD if self.optimizer is None else self.optimizer
        path, options = _class_and_options("optimizer", given, "torch.optim")
        if self.lr is not None:
            options["lr"] = self.lr
        if self.weight_decay is not None:
            options["weight_decay"] = self.weight_decay
        return _made("optimizer", path, parameters, options)  # type: ignore[no-any-return]

    def make_scheduler(self, optimizer: Optimizer, steps: float) -> LRScheduler | None:
        """Return the schedule of a run of this many steps; ConfigurationError where a schedule's length is infinite."""
        if self.lr_scheduler is None:
            return None
        path, given = _class_and_options(
            "lr_scheduler", self.lr_scheduler, "torch.optim.lr_scheduler"
        )
        known = {
            "max_lr": [group["lr"] for group in optimizer.param_groups],
            "total_steps": steps,
            "T_max": steps,
        }
        kind = imported("lr_scheduler", path, "a class")
        taken = inspect.signature(kind).parameters
        options = {name: value for name, value in known.items() if name in taken} | given
        if float("inf") in options.values():
            raise ConfigurationError(
                f"found lr_scheduler={path} for a run of no known length, expected its number of steps; "
                "set trainer.max_epochs or trainer.max_steps, or lr_scheduler=null"
            )
        return _made("lr_scheduler", path, optimizer, options)  # type: ignore[no-any-return]


def _made(
    name: str,
    path: str,
    argument: Any,
    options: Mapping[str, Any],
) -> Any:
    """Return an object of the class at an import path; a ConfigurationError where the options do not fit."""
    kind = imported(name, path, "a class")
    try:
        return kind(argument, **options)
    except (TypeError, ValueError) as error:
        told = f"found {name} {path} with options {dict(options)}"
        raise ConfigurationError(f"{told}: {error}; change these") from error


def _class_and_options(name: str, given: Any, home: str) -> tuple[str, dict[str, Any]]:
    """Return a class's import path, by default in `home`, and its options."""
    spec: Any = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ConfigurationError(
            f"found {name}={given!r}, expected the name of a class of {home}, or its class_path"
        )
    path = spec["class_path"]
    if "." not in path:
        path = f"{home}.{path}"
    return path, dict(spec.get("init_args", {}))


def trainable_names(network: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Return names that match globs or `HEAD`, all by default; ConfigurationError for no match."""
    names = [name for name, _ in network.named_parameters()]
    kind = type(network).__name__
    if patterns is None:
        return names
    found: set[str] = set()
    for pattern in patterns:
        glob = f"{head_name(network)}.*" if pattern == HEAD else pattern
        matching = [name for name in names if fnmatchcase(name, glob)]
        if not matching:
            near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ConfigurationError(
                f"found trainable pattern '{pattern}', which matches no parameter of {kind}; the nearest names are "
                f"{near} (or '{HEAD}'; 'layer.*' is a whole layer)"
            )
        found.update(matching)
    return [name for name in names if name in found]
