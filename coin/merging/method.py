"""The base of all merge methods: what is checked before and after the arithmetic."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from coin.errors import ConfigurationError, NumericalError
from coin.merging.inputs import MergeInputs, Requirement, check_requirements
from coin.networks.batchnorm import BatchNormPolicy
from coin.state import State, check_finite, check_same_layout
from coin.statistics import FisherKind

DATA = ("own", "pooled")
"""On which data a statistic may be wanted: the expert's own task's samples, or all tasks'."""

_RESERVED = ("none", "oracle")
_LABEL = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


class MergeMethod(ABC):
    """Experts + statistics + one code row → the parameters of a coded model.

    Args:
        batchnorm: What becomes of the BatchNorm statistics of the coded model. The method does not touch them; whoever
            builds the network applies the policy.
        label: What results and files call this variant; the method's name by default.

    Raises:
        ConfigurationError: The policy is unknown, or the label cannot be used (`check_label`).
    """

    name: ClassVar[str]
    """The name in result tables."""
    requires: ClassVar[frozenset[Requirement]] = frozenset()
    """What `merge` needs besides the experts."""

    def __init__(self, *, batchnorm: BatchNormPolicy = BatchNormPolicy.average, label: str | None = None) -> None:
        try:
            self.batchnorm = BatchNormPolicy(batchnorm)
        except ValueError as error:
            raise ConfigurationError(
                f"found batchnorm '{batchnorm}', expected one of {', '.join(BatchNormPolicy)}"
            ) from error
        self.label = check_label(self.name if label is None else label)

    def merge(self, inputs: MergeInputs, weights: Sequence[float]) -> dict[str, Tensor]:
        """Return the parameters of the coded model for one code row, in the experts' types and devices.

        Args:
            inputs: Experts and the statistics in `requires`.
            weights: The code row β ``[N]``, non-negative with sum 1.

        Raises:
            ConfigurationError: A weight is negative or they do not sum to 1, or a requirement is not met.
            StateError: Experts or statistics differ in names or shapes, hold a NaN or an infinity, or a Fisher entry
                is negative; the message names the expert and the tensor.
            NumericalError: The method broke down on sound inputs.
        """
        count = len(inputs.experts)
        check_row(weights, count)
        experts = [f"expert {index}" for index in range(count)]
        check_same_layout(inputs.experts, experts)
        for expert, called in zip(inputs.experts, experts, strict=True):
            check_finite(expert, called)
        check_requirements(self.label, self.requires, inputs)
        merged = self._merge(inputs, tuple(weights))
        check_finite(merged, f"the coded model of method '{self.label}'")
        return merged

    @abstractmethod
    def _merge(self, inputs: MergeInputs, weights: tuple[float, ...]) -> dict[str, Tensor]:
        """Do the arithmetic on checked inputs."""


def check_row(weights: Sequence[float], count: int) -> None:
    """Check that weights are a code row for so many experts.

    Raises:
        ConfigurationError: There are more or fewer, one is negative, or they do not sum to 1.
    """
    if len(weights) != count:
        raise ConfigurationError(
            f"found {len(weights)} weights for {count} experts, expected one each; give a row of the code"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigurationError(
            f"found weights {list(weights)}, expected non-negative numbers that sum to 1; give a row of the code"
        )


def check_label(label: str) -> str:
    """Return `label` after checking that it can name a method's variant in results, and its files.

    Raises:
        ConfigurationError: It is not a plain file name, or results use it for something else.
    """
    if label in _RESERVED:
        raise ConfigurationError(f"found label '{label}', which results use for something else; choose another")
    if not _LABEL.fullmatch(label):
        raise ConfigurationError(
            f"found label {label!r}, expected a plain file name: letters, digits, '_', '-', '+', and '.' not first"
        )
    return label


def check_choice(option: str, value: str | None, choices: Iterable[str]) -> str | None:
    """Return the value of an option that is one of `choices`, or None for the experiment's.

    Raises:
        ConfigurationError: It is neither.
    """
    allowed = tuple(choices)
    if value is not None and value not in allowed:
        raise ConfigurationError(f"found {option} '{value}', expected one of {', '.join(allowed)}, or null")
    return value


def check_fisher_options(kind: str | None, data: str | None) -> tuple[str | None, str | None]:
    """Return ``fisher_kind`` and ``fisher_data`` of a method that wants Fishers, after checking both.

    Raises:
        ConfigurationError: One is neither None nor one of its choices.
    """
    return check_choice("fisher_kind", kind, FisherKind), check_choice("fisher_data", data, DATA)


def weighted_mean(states: Sequence[State], weights: Sequence[float], key: str) -> Tensor:
    """Return Σ_i w_i · state_i[key] in float64."""
    total = states[0][key].double() * weights[0]
    for state, weight in zip(states[1:], weights[1:], strict=True):
        total.add_(state[key].double(), alpha=weight)
    return total


def floored_diagonal(fishers: Sequence[State], weights: Sequence[float], ridge: float) -> dict[str, Tensor]:
    """Return Σ_i β_i F_i + ridge × its mean over all entries, in float64; ones where every entry is zero.

    Raises:
        NumericalError: The mean is so small that dividing by its share overflows the type of the Fishers.
    """
    totals = {key: weighted_mean(fishers, weights, key) for key in fishers[0]}
    mean = sum(float(total.sum()) for total in totals.values()) / max(sum(t.numel() for t in totals.values()), 1)
    floor = ridge * mean if mean > 0 else 1.0
    largest = torch.finfo(next(iter(fishers[0].values())).dtype).max
    if floor * largest < 1:
        raise NumericalError(
            f"the mean entry of the Fishers is {mean:.3g}, too small to divide by; check the experts' outputs on the "
            "calibration data"
        )
    return {key: total + floor for key, total in totals.items()}
