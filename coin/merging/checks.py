"""What merge methods check: code rows, experts and the coded models they make."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from coin.errors import CoinWarning, ConfigurationError
from coin.files.tensors import State, check_finite, check_same_layout
from coin.merging.experts import Experts
from coin.networks.experts import parameters_of

MOST_AVERAGED = 0.1  # with a larger share of parameters that cannot be refitted a warning is given


def check_row(weights: Sequence[float], count: int) -> None:
    """Raise ConfigurationError unless the weights are a code row: one per expert, non-negative, summing to 1."""
    if len(weights) != count or not all(weight >= 0 for weight in weights) or not abs(sum(weights) - 1) <= 1e-6:
        raise ConfigurationError(
            f"found {len(weights)} weights for {count} experts, {list(weights)}, expected one each, non-negative "
            "numbers that sum to 1; give a row of the code"
        )


def check_each(states: Sequence[State], what: str) -> None:
    """Raise StateError, which names the expert and the tensor, where states differ in layout or are not finite."""
    names = [f"{what} {index}" for index in range(len(states))]
    check_same_layout(states, names)
    for state, name in zip(states, names, strict=True):
        check_finite(state, name)


def check_experts(experts: Experts, row: Sequence[float]) -> None:
    """Raise as `check_row` and `check_each`, of the experts' parameters."""
    check_row(row, experts.count)
    check_each(experts.parameters, "expert")


def check_coded(network: nn.Module, experts: Experts, label: str) -> None:
    """Raise StateError where a tensor is not finite, but for infinities of buffers that the experts have, as masks."""
    infinite = [name for name, buffer in experts.buffers[0].items() if bool(torch.isinf(buffer).any())]
    tensors = {**parameters_of(network), **dict(network.named_buffers())}
    check_finite(tensors, f"the coded model of method '{label}'", infinite)


def warn_of_averaged(averaged: Sequence[str], network: nn.Module, label: str) -> None:
    """Warn where the parameters that a `Refit` could not refit are more than `MOST_AVERAGED` of the network's."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    share = sum(sizes[name] for name in averaged) / sum(sizes.values())
    if share > MOST_AVERAGED:
        warnings.warn(
            f"method '{label}' kept the average of {share:.0%} of the parameters of {type(network).__name__} "
            f"({len(averaged)} tensors, such as '{averaged[0]}'), which are no affine map's that runs once, or "
            "whose outputs do not have one row per sample; compare it with other methods on this network",
            CoinWarning,
            stacklevel=3,
        )
