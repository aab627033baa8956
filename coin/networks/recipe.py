"""The training options shared by ``coin fit`` and ``coin run``, and their effect on a network."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coin.core.choices import check_number, is_list_of_names, parse_enum
from coin.errors import ConfigurationError
from coin.networks.heads import head_name, is_frozen
from coin.networks.stages import full_precision

HEAD = "head"  # the pattern that stands for a network's head, whatever it is called


class OptimizerKind(StrEnum):
    """The optimiser: ``sgd`` (with momentum) or ``adamw``."""

    sgd = "sgd"
    adamw = "adamw"


class Schedule(StrEnum):
    """The learning rate over the run: ``constant``, ``cosine`` to zero, or ``one_cycle`` (up, then to zero)."""

    constant = "constant"
    cosine = "cosine"
    one_cycle = "one_cycle"


@dataclass(frozen=True)
class Recipe:
    """The training options of ``coin fit``'s `Expert` and of an experiment's ``expert`` and ``base``.

    Args:
        optimizer: ``sgd`` or ``adamw``.
        lr: The (peak) learning rate.
        head_lr: The head's learning rate, by default `lr`. The schedule scales both.
        momentum: The momentum of ``sgd``.
        weight_decay: The factor of the L2 penalty (``sgd``) or of the decay (``adamw``).
        schedule: The learning-rate schedule, over all optimiser steps of the run.
        label_smoothing: The share of the target spread over all classes, in [0, 1).
        l2_sp: The factor α of the penalty ½α‖θ − θ₀‖² towards the shared initialisation θ₀, over all trained parameters
            but the head's. Source: Li et al., *Explicit inductive bias for transfer learning* (ICML 2018), L²-SP.
        freeze_batchnorm: Whether BatchNorm layers stay in eval mode: their running statistics are fixed, their weights
            and biases train.
        trainable: Which parameters train, by glob patterns over their names, such as ``layer4.*``, or ``head``,
            whatever the head is called. None trains all. See `freeze_batchnorm` for BatchNorm.
        compile_network: Whether to run the network through `torch.compile`.
    """

    _ENUMS: ClassVar[dict[str, type[StrEnum]]] = {"optimizer": OptimizerKind, "schedule": Schedule}

    optimizer: OptimizerKind = OptimizerKind.sgd
    lr: float = 0.01
    head_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = Schedule.one_cycle
    label_smoothing: float = 0.0
    l2_sp: float = 0.0
    freeze_batchnorm: bool = False
    trainable: list[str] | None = None
    compile_network: bool = False

    def __post_init__(self) -> None:  # overrides bring plain values, which no parser has seen
        for name, kind in self._ENUMS.items():
            object.__setattr__(self, name, parse_enum(kind, name, getattr(self, name)))
        check_number("lr", self.lr, low=0.0, strict=True)
        if self.head_lr is not None:
            check_number("head_lr", self.head_lr, low=0.0, strict=True)
        for name in ("weight_decay", "l2_sp"):
            check_number(name, getattr(self, name), low=0.0)
        for name in ("momentum", "label_smoothing"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        for name in ("freeze_batchnorm", "compile_network"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"found {name}={getattr(self, name)!r}, expected true or false")
        if self.trainable is not None and not is_list_of_names(self.trainable):
            expected = "expected a list of names or glob patterns, such as [head], or null"
            raise ConfigurationError(f"found trainable={self.trainable!r}, {expected}")


def trainable_names(network: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Return names that match globs or `HEAD`, all by default, no frozen head's; ConfigurationError for no match."""
    names = [name for name, _ in network.named_parameters()]
    if is_frozen(network):
        names = without_head(network, names)
        if patterns is not None and HEAD in patterns:
            told = f"found trainable pattern '{HEAD}' for a {type(network).__name__}"
            raise ConfigurationError(f"{told}, whose head is computed from class names and not trained; leave it out")
    if patterns is None:
        return names
    found: set[str] = set()
    for pattern in patterns:
        glob = f"{head_name(network)}.*" if pattern == HEAD else pattern
        matching = {name for name in names if fnmatchcase(name, glob)}
        if not matching:
            stem = pattern.split("*")[0].rstrip(".")
            near = [name for name in names if stem and name.startswith(stem)]
            near = near[:3] or difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ConfigurationError(
                f"found trainable pattern '{pattern}', which matches no parameter of {type(network).__name__}; the "
                f"nearest names are {', '.join(near)} (or '{HEAD}'; 'layer.*' takes all of a layer)"
            )
        found |= matching
    return [name for name in names if name in found]


def parameter_groups(network: nn.Module, lr: float, head_lr: float | None) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups: one, or two if the head has its own learning rate.

    Raises ConfigurationError if the head has its own learning rate but is not trained.
    """
    trained = {name: each for name, each in network.named_parameters() if each.requires_grad}
    if head_lr is None:
        return [{"params": list(trained.values()), "lr": lr}]
    body = without_head(network, list(trained))
    own = [each for name, each in trained.items() if name not in body]
    if not own:
        raise ConfigurationError(
            f"found head_lr={head_lr} and a head that is not trained; add '{HEAD}' to trainable, or leave head_lr out"
        )
    groups = [{"params": [trained[name] for name in body], "lr": lr}] if body else []
    return [*groups, {"params": own, "lr": head_lr}]


def without_head(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names without those of the head's parameters."""
    head = f"{head_name(network)}."
    return [name for name in names if not name.startswith(head)]


def squared_distance(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Return ‖θ − θ₀‖², a scalar, over the tensors in `start`; in float32 at least."""
    moved = (full_precision(parameters[name]) - full_precision(tensor) for name, tensor in start.items())
    return torch.stack([difference.square().sum() for difference in moved]).sum()
