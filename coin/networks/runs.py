"""One network run once: logits, and the features that decoders read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coin.errors import ConfigurationError
from coin.networks.heads import features_and_logits
from coin.networks.stages import stages_and_logits


class Run(NamedTuple):
    """What one network answers: features ``[B, F]``, logits ``[B, C]``, and the widths of its stages if asked for."""

    features: Tensor
    logits: Tensor
    widths: tuple[int, ...] | None = None


def run_network(network: nn.Module, inputs: Tensor, features: bool, stages: bool = False) -> Run:
    """Run a network once; F is 0 unless its features are wanted, the penultimate ones or those of all stages."""
    if features and stages:
        found = Run(*stages_and_logits(network, inputs))
    elif features:
        found = Run(*features_and_logits(network, inputs))
    else:
        logits = network(inputs)
        found = Run(logits[:, :0], logits)
    return found._replace(features=full_precision(found.features), logits=full_precision(found.logits))


def full_precision(values: Tensor) -> Tensor:
    """Return values that autocast left in 16 bits as float32, in which answers are compared, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def common_widths(runs: Sequence[Run]) -> tuple[int, ...] | None:
    """Return the widths of all networks' stages, None where only the penultimate features are wanted.

    Raises:
        ConfigurationError: They differ between the networks.
    """
    found = list(dict.fromkeys(run.widths for run in runs))
    if len(found) != 1:
        raise ConfigurationError(
            f"found networks with stages of widths {found[0]} and {found[1]}, expected one architecture; use the last "
            "features"
        )
    return found[0]
