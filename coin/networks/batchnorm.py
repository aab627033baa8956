"""BatchNorm merge policies: the running statistics of a merged network, always by an explicit policy."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coin.core.batches import Batch, joined, map_tensors, size_of
from coin.core.devices import disable_tf32
from coin.errors import StateError
from coin.files.tensors import State
from coin.networks.calling import (
    as_input,
    clear_caches,
    logits_of,
    same_modes,
)


class BatchNormPolicy(StrEnum):
    """The policy for a merged network's BatchNorm buffers.

    * ``auto``: the experts' buffers if all are equal; otherwise ``average`` or ``recalibrate``, whichever has the
      smaller residual ‖f_c − Σ_i β_i f_i‖ on held-out calibration samples.
    * ``average``: the experts' running means and variances, averaged with the code's weights β.
    * ``recalibrate``: running statistics reset and re-estimated in the merged network, by a cumulative average over the
      pooled calibration samples.
    * ``keep``: the statistics of the start of the merge or of the shared initialisation; with training, frozen ones.

    >>> coin.Average(batchnorm="recalibrate").batchnorm is coin.BatchNormPolicy.recalibrate
    True
    """

    auto = "auto"
    average = "average"
    recalibrate = "recalibrate"
    keep = "keep"


def batchnorms(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that track running statistics."""
    return [
        each
        for each in network.modules()
        if isinstance(each, _BatchNorm) and each.track_running_stats
    ]


_FOLDED = "folded_norms"  # an attribute of networks
# Of a folded BatchNorm: float16 holds it and its root, beside which eps is nothing.
_VARIANCE = 128.0**2


def mark_folded(network: nn.Module, norms: Mapping[str, str]) -> None:
    """Note at a network into which weights BatchNorms of it are `folded`, all by name."""
    vars(network)[_FOLDED] = {**folded_norms(network), **norms}


def folded_norms(network: nn.Module) -> dict[str, str]:
    """Return the BatchNorms that `mark_folded` has noted, and the weights that they are folded into."""
    return dict(vars(network).get(_FOLDED, {}))


def folded(
    state: State,
    weight: str,
    bias: str | None,
    norm: str,
    eps: float,
) -> dict[str, Tensor]:
    """Return the tensors of a linear map and the BatchNorm `norm` after it, folded into the map, in float64.

    With the map's weight W and bias b, and the BatchNorm's γ, β, μ and σ² = variance + eps, the weight becomes γ/σ·W,
    the map's bias 0, and the BatchNorm an identity, in float16 too, whose bias is β + γ/σ·(b − μ).
    """
    gain = state[f"{norm}.weight"].double()
    shift = state[f"{norm}.bias"].double()
    mean = state[f"{norm}.running_mean"].double()
    variance = state[f"{norm}.running_var"].double()
    kernel = state[weight].double()
    scale = gain / (variance + eps).sqrt()
    scale_of_row = scale.view(-1, *[1] * (kernel.ndim - 1))
    before = torch.zeros_like(mean) if bias is None else state[bias].double()
    made = {
        weight: scale_of_row * kernel,
        f"{norm}.weight": torch.full_like(gain, (_VARIANCE + eps) ** 0.5),
        f"{norm}.bias": shift + scale * (before - mean),
        f"{norm}.running_mean": torch.zeros_like(mean),
        f"{norm}.running_var": torch.full_like(variance, _VARIANCE),
    }
    if bias is not None:
        made[bias] = torch.zeros_like(before)
    return made


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimate all BatchNorm layers' statistics in place, and return the number of samples.

    They become the mean of a layer's batch statistics, weighted by batch size, all layers running as in training. A
    layer that runs several times per pass counts each time; layers whose `train` keeps them in eval mode are included;
    one that never runs keeps its statistics. A batch of one sample has no variance and is joined to a neighbour. Raises
    StateError, with the network unchanged, for fewer than two samples.

    Args:
        network: The network.
        batches: Input batches ``[B, ...]``, of any device and floating-point type, or pairs of inputs and labels.

    >>> layer = torch.nn.BatchNorm1d(2)
    >>> coin.recalibrate(layer, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])]), layer.running_mean.tolist()
    (2, [2.0, 3.0])
    """
    layers = batchnorms(network)
    momenta = {layer: layer.momentum for layer in layers}
    rows_seen: Counter[nn.Module] = Counter()

    def weigh(layer: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Give a layer the momentum of a cumulative average over rows; one that never runs keeps its statistics."""
        assert isinstance(layer, _BatchNorm)
        if layer not in rows_seen:
            layer.reset_running_stats()
        inputs = [*arguments, *named.values()]
        rows = len(inputs[0])
        rows_seen[layer] += rows
        layer.momentum = rows / rows_seen[layer]

    samples = 0
    clear_caches(network)
    try:
        with (
            ExitStack() as hooks,
            same_modes(network),
            disable_tf32(),
        ):
            network.eval()
            for layer in layers:
                layer.training = True
                hooks.enter_context(layer.register_forward_pre_hook(weigh, with_kwargs=True))
            for batch in _without_singles(as_input(batch, network) for batch in batches):
                samples += size_of(batch)
                logits_of(network, map_tensors(torch.clone, batch))  # which it may change in place
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        clear_caches(network)
    if samples == 0:
        raise StateError(
            "found fewer than two calibration samples to recalibrate BatchNorm on, expected at least two"
        )
    return samples


def _without_singles(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches, one of a single sample joined to the one before it, the first to the next."""
    waiting: Batch | None = None
    for batch in batches:
        if waiting is None:
            waiting = batch
        elif 1 in (size_of(waiting), size_of(batch)):
            waiting = joined([waiting, batch])
        else:
            yield waiting
            waiting = batch
    if waiting is not None and size_of(waiting) > 1:
        yield waiting
