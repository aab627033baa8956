"""What of a network is fine-tuned, how fast, and how far from where it started."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.errors import ConfigurationError
from coin.networks import full_precision, head_name

HEAD = "head"
"""The pattern that stands for a network's head, whatever it is called."""


def trainable_names(network: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Return the names of the parameters that are trained, in the network's order.

    Args:
        network: The network.
        patterns: Glob patterns over the parameters' names, or `HEAD`; none takes all.

    Raises:
        ConfigurationError: A pattern matches nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    if patterns is None:
        return names
    found: set[str] = set()
    for pattern in patterns:
        glob = f"{head_name(network)}.*" if pattern == HEAD else pattern
        matching = {name for name in names if fnmatchcase(name, glob)}
        if not matching:
            raise ConfigurationError(
                f"found trainable pattern '{pattern}', which matches no parameter of {type(network).__name__}; the "
                f"nearest names are {', '.join(_nearest(pattern, names))} (or '{HEAD}'; 'layer.*' takes all of a layer)"
            )
        found |= matching
    return [name for name in names if name in found]


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Return three names like a pattern: of the same beginning if there are any, or of few other letters."""
    stem = pattern.split("*")[0].rstrip(".")
    beginning = [name for name in names if stem and name.startswith(stem)]
    return beginning[:3] or difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)


def hold_batchnorm(network: nn.Module) -> None:
    """Put all BatchNorm layers into eval mode: they use their running statistics, which do not move."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def parameter_groups(network: nn.Module, lr: float, head_lr: float | None) -> list[dict[str, Any]]:
    """Return an optimiser's groups of the parameters that require gradients: one, or the head apart with its own rate.

    Raises:
        ConfigurationError: The head has a rate of its own and is not trained.
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
    """Return the names that are not of the head's parameters."""
    head = f"{head_name(network)}."
    return [name for name in names if not name.startswith(head)]


def squared_distance(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Return ‖θ − θ₀‖², a scalar, over the tensors that `start` names; in float32 at least."""
    if not start:
        return torch.zeros(())
    moved = (full_precision(parameters[name]) - full_precision(tensor) for name, tensor in start.items())
    return torch.stack([difference.square().sum() for difference in moved]).sum()
