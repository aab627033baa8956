"""How a network is trained: the options that ``coin fit`` and ``coin run`` share."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from coin.choices import chosen
from coin.errors import ConfigurationError, first_line
from coin.networks import Lora, check_peft


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
    """How a network is trained: options of ``coin fit``'s `Expert` and of an experiment's ``expert`` and ``base``.

    Args:
        optimizer: ``sgd`` or ``adamw``.
        lr: The (peak) learning rate.
        head_lr: The head's own; none takes `lr`. The schedule scales both.
        momentum: Of ``sgd``.
        weight_decay: The L2 penalty's (``sgd``) or the decay's (``adamw``) factor.
        schedule: The learning rate's course, over all optimiser steps of the run.
        label_smoothing: The share of the target spread over all classes, in [0, 1).
        l2_sp: The factor α of the penalty ½α‖θ − θ₀‖² towards the shared initialisation θ₀, over all parameters that
            are trained but the head's. Source: Li et al., *Explicit inductive bias for transfer learning with
            convolutional networks* (ICML 2018), L²-SP.
        freeze_batchnorm: Whether BatchNorm layers stay in eval mode: their running statistics are used and never move,
            their weights and biases train.
        trainable: Which parameters train, by glob patterns over their names, such as ``layer4.*``; the word ``head``
            stands for the head, whatever it is called. None trains all, or with `lora` the head. BatchNorm's running
            statistics are no parameters: see `freeze_batchnorm`.
        lora: Low-rank adapters that are trained in the place of the layers that they are in; see `coin.networks.Lora`.
            They are merged into the weights before the expert is written or its Fisher estimated.
        compile_network: Whether to run the network through `torch.compile`.

    Raises:
        ConfigurationError: An option is not of its type or out of its range. Overrides bring plain values, which no
            parser has seen.
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
    lora: Lora | None = None
    compile_network: bool = False

    def __post_init__(self) -> None:
        for name, kind in self._ENUMS.items():
            object.__setattr__(self, name, chosen(kind, name, getattr(self, name)))
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
        check_patterns("trainable", self.trainable)
        if self.lora is not None:
            object.__setattr__(self, "lora", _lora(self.lora))
            check_peft()
            if self.l2_sp:
                raise ConfigurationError(
                    f"found l2_sp={self.l2_sp} with lora, whose adapters start at zero and are drawn there by "
                    "weight_decay; leave one of them out"
                )


def _lora(value: Any) -> Lora:
    """Return adapters' options, which an override brings as plain values."""
    if isinstance(value, Lora):
        return value
    try:
        return Lora(**value)
    except TypeError as error:
        raise ConfigurationError(
            f"found lora={value!r}, expected null or some of rank, alpha, targets and dropout: {first_line(error)}"
        ) from error


def check_number(name: str, value: Any, *, low: float, high: float | None = None, strict: bool = False) -> None:
    """Refuse, with a ConfigurationError, what is no finite number from `low` (above it, if strict) to below `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and (value > low if strict else value >= low) and (high is None or value < high)):
        bound = f"{'above' if strict else 'at least'} {low:g}" + ("" if high is None else f" and below {high:g}")
        raise ConfigurationError(f"found {name}={value!r}, expected a number {bound}")


def check_patterns(name: str, value: Any) -> None:
    """Refuse, with a ConfigurationError, what is neither null nor a list of patterns."""
    if value is not None and not (
        isinstance(value, list) and value and all(isinstance(pattern, str) for pattern in value)
    ):
        raise ConfigurationError(
            f"found {name}={value!r}, expected a list of names or glob patterns, such as [head], or null"
        )
