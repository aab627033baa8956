"""The coded network's penultimate features as a function of its parameters."""

from collections.abc import Iterable

from torch import Tensor, nn

from coin.networks.heads import features_and_logits, head_name
from coin.state import State
from coin.statistics.products import OutputMap


class FeatureMap:
    """The map from a network's parameters to the inputs of its head, on fixed inputs.

    Args:
        network: Maps ``[B, …]`` to logits ``[B, C]``; its buffers are the ones the coded network will keep. It runs in
            eval mode and is left as found.
        inputs: Batches ``[B, …]`` of the pooled calibration samples, iterated anew by every call.
    """

    def __init__(self, network: nn.Module, inputs: Iterable[Tensor]) -> None:
        self._map = OutputMap(_FeatureReader(network), inputs)
        self.head = head_name(network)
        """The dotted name of the head."""

    @property
    def passes(self) -> float:
        """Forward-equivalents spent so far, 1 a sample and call."""
        return self._map.passes

    def features(self, parameters: State) -> Tensor:
        """Return the inputs of the head ``[P, F]`` with these parameters in the network."""
        return self._map.outputs({f"network.{key}": tensor for key, tensor in parameters.items()})


class _FeatureReader(nn.Module):
    """A network's features as a module's output, so that its parameters can be replaced for a call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return features_and_logits(self.network, inputs)[0]
