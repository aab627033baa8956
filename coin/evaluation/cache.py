"""The networks that an evaluation runs, loaded when they are needed and held while they fit."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from coin.core.choices import check_integer
from coin.merging.body import default_memory_mib
from coin.networks.adapted import resident_nbytes


def _unchanged(network: nn.Module) -> nn.Module:
    return network


class NetworkCache:
    """Networks by their places, each loaded when it is needed; where not all fit, only those that are needed are held.

    Args:
        loads: For each place what loads its network, as often as it is called.
        memory_mib: Up to so many MiB networks stay held that are not needed; those that are needed together may take
            more. By default 8192, on a GPU half of what is free.
    """

    def __init__(
        self, loads: Sequence[Callable[[], nn.Module]], memory_mib: int | None = None
    ) -> None:
        if memory_mib is not None:
            check_integer("memory_mib", memory_mib, 0)
        self._loads = loads
        self._memory_mib = memory_mib
        self._held: dict[int, nn.Module] = {}
        self.move(torch.device("cpu"))

    def move(
        self, device: torch.device, convert: Callable[[nn.Module], nn.Module] = _unchanged
    ) -> None:
        """Move what is held to a device, and what is loaded from now on, each network converted."""
        self._device = device
        self._convert = convert
        memory_mib = default_memory_mib(device) if self._memory_mib is None else self._memory_mib
        self._bound = memory_mib * 2**20
        self._held = {place: self._moved(network) for place, network in self._held.items()}

    def _moved(self, network: nn.Module) -> nn.Module:
        return self._convert(network).to(self._device)

    def networks(self, places: Collection[int]) -> dict[int, nn.Module]:
        """Return the networks at these places, in eval mode and frozen."""
        with torch.inference_mode(False):  # which a Trainer's test runs in
            for place in places:
                if place not in self._held:
                    self._make_room(places)
                    self.hold(place, self._loads[place]())
        return {place: self._held[place] for place in places}

    def hold(self, place: int, network: nn.Module) -> None:
        """Hold a network that has been loaded."""
        self._held[place] = self._moved(network.eval().requires_grad_(False))

    def _make_room(self, needed: Collection[int]) -> None:
        """Drop the networks that are not needed, if one more would not fit beside all that are held."""
        sizes = [resident_nbytes(network) for network in self._held.values()]
        if sum(sizes) + max(sizes, default=0) > self._bound:
            self._held = {place: each for place, each in self._held.items() if place in needed}
