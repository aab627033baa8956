"""What every method checks: its options, the code row, the experts, and what it has made."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from coin.errors import ConfigurationError, NumericalError, StateError
from coin.files.tensors import State, check_finite, check_same_layout

Number = TypeVar("Number", bound=float)

_RESERVED = ("none", "oracle")
_LABEL = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


def checked(name: str, value: Number, is_sound: bool, expected: str) -> Number:
    """Return an option's value if it is sound, and raise ConfigurationError with what is expected otherwise."""
    if not is_sound:
        raise ConfigurationError(f"found {name} {value}, expected {expected}")
    return value


def check_label(label: str) -> str:
    """Return `label`; raise ConfigurationError where it is no plain file name, or results use it otherwise."""
    if label in _RESERVED:
        raise ConfigurationError(f"found label '{label}', which results use for something else; choose another")
    if not _LABEL.fullmatch(label):
        raise ConfigurationError(
            f"found label {label!r}, expected a plain file name: letters, digits, '_', '-', '+', and '.' not first"
        )
    return label


def check_row(weights: Sequence[float], count: int) -> None:
    """Raise ConfigurationError where weights are no code row: one an expert, non-negative, with the sum 1."""
    if len(weights) != count:
        raise ConfigurationError(
            f"found {len(weights)} weights for {count} experts, expected one each; give a row of the code"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigurationError(
            f"found weights {list(weights)}, expected non-negative numbers that sum to 1; give a row of the code"
        )


def check_each(states: Sequence[State], what: str) -> None:
    """Raise StateError, which names the expert and the tensor, where states differ in layout or are not finite."""
    names = [f"{what} {index}" for index in range(len(states))]
    check_same_layout(states, names)
    for state, name in zip(states, names, strict=True):
        check_finite(state, name)


def check_buffers(network: nn.Module, buffers: Sequence[State], label: str) -> None:
    """Raise StateError where a coded model's buffer is not finite, unless every expert's is the same infinity."""
    for name, buffer in network.named_buffers():
        if not (buffer.is_floating_point() or buffer.is_complex()) or bool(torch.isfinite(buffer).all()):
            continue
        wrong = ~torch.isfinite(buffer)
        theirs = [state[name].to(buffer)[wrong] for state in buffers if name in state]
        if not all(torch.equal(buffer[wrong], other) for other in theirs):  # as no NaN is
            raise StateError(
                f"the coded model of method '{label}' is not finite: buffer '{name}' holds a NaN, or an infinity that "
                "the experts do not share; check the experts' buffers"
            )


def check_errors(errors: Iterable[float], label: str) -> None:
    """Raise NumericalError where no candidate of a method has a finite held-out error."""
    if not any(map(math.isfinite, errors)):
        raise NumericalError(
            f"the outputs of method '{label}' on held-out calibration samples are not finite; check the experts' "
            "outputs"
        )
