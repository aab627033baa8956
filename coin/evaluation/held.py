"""The networks that an evaluation runs, read from their files when they are needed."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from coin.merging.passes import default_memory_mib
from coin.networks import load_network, pad_head
from coin.networks.adapted import tensor_nbytes


class HeldNetworks:
    """Networks by file, each read when it is needed; where not all fit, those alone are held that are needed now.

    Args:
        width: The number of logits to which heads are padded.
        memory_mib: Bound on all networks that are held, in MiB; where it is passed, what is not needed is dropped. By
            default 8192, on a GPU half of what is free.
    """

    def __init__(self, width: int, memory_mib: int | None = None) -> None:
        self.width = width
        self.memory_mib = memory_mib
        self._held: dict[Path, nn.Module] = {}

    def keep(self, path: Path, network: nn.Module) -> nn.Module:
        """Hold a network that was read from a file, its head padded, frozen and in eval mode; return it so."""
        padded = pad_head(network, self.width)
        self._held[path] = padded.eval().requires_grad_(False)
        return self._held[path]

    def need(self, paths: Iterable[Path], device: torch.device) -> None:
        """Read the networks of these files, which run next on a device; drop others where not all fit."""
        needed = set(paths)
        for path in needed - self._held.keys():
            self.make_room(device, needed)
            self.keep(path, load_network(path).network)

    def make_room(self, device: torch.device, needed: Collection[Path] = ()) -> None:
        """Drop the networks that are not needed, if one more would not fit beside all that are held."""
        sizes = [tensor_nbytes(network) for network in self._held.values()]
        bound = default_memory_mib(device) if self.memory_mib is None else self.memory_mib
        if sum(sizes) + max(sizes, default=0) > bound * 2**20:
            self._held = {path: each for path, each in self._held.items() if path in needed}

    def network(self, path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return the network of a file, on a device and of a type."""
        self.need([path], device)
        return self._held[path].to(device, dtype)
