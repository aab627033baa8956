"""The networks that an evaluation runs, read from their files when they are needed."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from coin.core.choices import check_integer
from coin.merging.body import default_memory_mib
from coin.networks import load_network, pad_head
from coin.networks.adapted import resident_nbytes


class HeldNetworks:
    """Networks by file, each read when it is needed; where not all fit, those alone are held that are needed now.

    Files must stay as they are meanwhile.

    Args:
        width: The number of logits to which heads are padded.
        memory_mib: Bound on all networks that are held, in MiB; where it is passed, what is not needed is dropped. By
            default 8192, on a GPU half of what is free.
    """

    def __init__(self, width: int, memory_mib: int | None = None) -> None:
        if memory_mib is not None:
            check_integer("memory_mib", memory_mib, 0)
        self.width = width
        self.memory_mib = memory_mib
        self._held: dict[Path, nn.Module] = {}
        self.place(torch.device("cpu"))

    def place(
        self,
        device: torch.device,
        convert: Callable[[nn.Module], nn.Module] = lambda network: network,
    ) -> None:
        """Move what is held to a device, and what is read from now on, each network converted."""
        self._device = device
        self._convert = convert
        bound = default_memory_mib(device) if self.memory_mib is None else self.memory_mib
        self._bound = bound * 2**20
        self._held = {path: self._ready(network) for path, network in self._held.items()}

    def _ready(self, network: nn.Module) -> nn.Module:
        """Return a network converted and on the device, frozen and in eval mode."""
        return self._convert(network).to(self._device).eval().requires_grad_(False)

    def add(self, path: Path, network: nn.Module) -> nn.Module:
        """Hold a network that was read from a file, its head padded, and return it so."""
        self._held[path] = self._ready(pad_head(network, self.width))
        return self._held[path]

    def need(self, paths: Collection[Path]) -> None:
        """Read the networks of these files, which run next, where they are not held; drop others where not all fit."""
        for path in paths:
            if path not in self._held:
                self.make_room(paths)
                self.add(path, load_network(path).network)

    def make_room(self, needed: Collection[Path] = ()) -> None:
        """Drop the networks that are not needed, if one more would not fit beside all that are held."""
        sizes = [resident_nbytes(network) for network in self._held.values()]
        if sum(sizes) + max(sizes, default=0) > self._bound:
            self._held = {path: each for path, each in self._held.items() if path in needed}

    def __getitem__(self, path: Path) -> nn.Module:
        """Return the network of a file that was needed last."""
        return self._held[path]
