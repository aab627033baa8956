"""The experts of one seed, or of one merge: each file is read and hashed once, for whatever needs it."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from torch import nn

from coin.errors import ConfigurationError
from coin.networks import NetworkConfig, NetworkFile, head_name, load_network, widen_network
from coin.state import fingerprint, sha256_of


class Experts:
    """The experts' files and what is in them, read when it is first needed and then kept.

    Args:
        paths: The files by task.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)

    @cached_property
    def sha256(self) -> dict[Path, str]:
        """The hashes of the files."""
        return {path: sha256_of(path) for path in self.paths.values()}

    @cached_property
    def files(self) -> dict[str, NetworkFile]:
        """The networks by task, each with its own head.

        Raises:
            FileError: A file is missing or damaged, or holds no network.
            ConfigurationError: The experts are of different architectures.
        """
        files = {task: load_network(path) for task, path in self.paths.items()}
        first = next(iter(files.values())).config.name
        for task, file in files.items():
            if file.config.name != first:
                raise ConfigurationError(
                    f"found expert '{task}' of architecture {file.config.name}, expected {first} as of the first"
                )
        return files

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks with their heads padded by zeros to `width` logits."""
        return [widen_network(file, self.width) for file in self.files.values()]

    @cached_property
    def marks(self) -> dict[str, str]:
        """The fingerprints of the networks by task; see `coin.state.fingerprint`."""
        return {task: fingerprint(file.network.state_dict()) for task, file in self.files.items()}

    @property
    def width(self) -> int:
        """The largest class count."""
        return max(file.num_classes for file in self.files.values())

    @property
    def config(self) -> NetworkConfig:
        """The architecture that all experts share."""
        return next(iter(self.files.values())).config

    @property
    def head(self) -> str:
        """The dotted name of the head."""
        return head_name(self.networks[0])

    def release(self) -> None:
        """Let go of the networks' memory; whoever needs them next has the files read again."""
        for name in ("files", "networks"):
            self.__dict__.pop(name, None)
