"""What becomes of BatchNorm's running statistics when networks are merged: an explicit policy, never a silence."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.errors import StateError
from coin.state import State, weighted_sum


class BatchNormPolicy(StrEnum):
    """The buffers that a merged network gets.

    * ``average``: the experts' running means and variances, averaged with the code's weights β.
    * ``recalibrate``: running statistics reset and estimated anew, by a cumulative average over the pooled
      calibration data, in the merged network itself.
    * ``keep``: the buffers that the merge started from. A closed-form merge keeps those of the shared
      initialisation; a method that trains with frozen statistics keeps those that it trained with.
    """

    average = "average"
    recalibrate = "recalibrate"
    keep = "keep"


def has_batchnorm(network: nn.Module) -> bool:
    """Return whether any BatchNorm layer of `network` tracks running statistics."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in network.modules())


def freeze_statistics(network: nn.Module) -> None:
    """Put every BatchNorm layer into eval mode, so that training uses and leaves its running statistics."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def average_buffers(buffers: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the β-average of the experts' buffers (`BatchNormPolicy.average`).

    Args:
        buffers: One mapping a network, ``dict(network.named_buffers())``.
        weights: β, one a network.

    Raises:
        StateError: The networks' buffers differ in name or shape.
    """
    return weighted_sum(buffers, weights)


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate the running statistics of all BatchNorm layers anew, in place (`BatchNormPolicy.recalibrate`).

    The statistics are reset and become the cumulative average over the batches, each layer seeing what the layers
    before it produce from batch statistics, as in training. Everything else of the network is left as found.

    Args:
        network: The network; its mode and its layers' momenta are restored.
        batches: Input batches ``[B, ...]``. Their sizes should be equal, since each batch counts once.

    Returns:
        The number of samples seen.

    Raises:
        StateError: There is no batch.
    """
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in network.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    samples = 0
    try:
        for batch in batches:
            network(batch)
            samples += len(batch)
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
    if samples == 0:
        raise StateError("found no calibration batch to recalibrate BatchNorm on, expected at least one")
    return samples
