"""The experts of one seed, or of one merge: files that are hashed once, and read as far as they are needed."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.files.atomic import sha256_of
from coin.files.tensors import State, fingerprint
from coin.networks import (
    NetworkConfig,
    NetworkFile,
    build_network,
    check_layout,
    has_batchnorm,
    head_name,
    load_network,
    open_network,
    padded_rows,
    widen_network,
)


@dataclass(frozen=True)
class Layout:
    """What an architecture's tensors are called.

    Attributes:
        parameters: The names of the parameters, in the network's order; tied ones have one.
        buffers: The names of the buffers that files hold.
        head: The dotted name of the head.
        batchnorm: Whether BatchNorm layers track running statistics.
        shapes: The shapes of all tensors in a file, with the head of `ExpertFiles.width` outputs.
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    head: str
    batchnorm: bool
    shapes: dict[str, torch.Size]


class ExpertFiles:
    """The experts' files and what is in them.

    `parameters` and `buffers` read a tensor at a time and keep none, so that many experts merge in little memory;
    `networks` and `files` keep all of them until `release`.

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
    def opened(self) -> dict[str, NetworkFile]:
        """The networks' files by task, checked, their tensors yet to be read.

        Raises:
            FileError: A file is missing or damaged, or holds no network.
            StateError: A tensor is not finite.
            ConfigurationError: The experts are of different architectures.
        """
        opened = {task: open_network(path) for task, path in self.paths.items()}
        first = next(iter(opened.values())).config.name
        for task, file in opened.items():
            if file.config.name != first:
                raise ConfigurationError(
                    f"found expert '{task}' of architecture {file.config.name}, expected {first} as of the first"
                )
        return opened

    @cached_property
    def layout(self) -> Layout:
        """The names and shapes that all experts share.

        Raises:
            StateError: The tensors of an expert do not fit its architecture.
        """
        _ = self.config, self.width  # from files, whose tensors must not become meta ones
        try:
            with torch.device("meta"):  # names and shapes alone, without the memory
                network = self.blank()
        except NotImplementedError:  # RegNets look at their tensors while they are built
            network = self.blank()
        every = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        layout = Layout(
            parameters=tuple(name for name, _ in network.named_parameters()),
            buffers=tuple(name for name in shapes if name not in every),
            head=head_name(network),
            batchnorm=has_batchnorm(network),
            shapes=shapes,
        )
        for file in self.opened.values():
            own = dict(shapes)
            for name in (f"{layout.head}.weight", f"{layout.head}.bias"):
                if name in own:
                    own[name] = torch.Size([file.num_classes, *own[name][1:]])
            check_layout(own, file.state.shapes(), str(file.state.path))
        return layout

    @property
    def parameters(self) -> list[State]:
        """The experts' parameters with their heads padded by zeros to `width` logits, read when they are asked for."""
        return [self.padded(file.state.select(self.layout.parameters)) for file in self.opened.values()]

    @property
    def buffers(self) -> list[State]:
        """The experts' buffers, read when they are asked for."""
        return [file.state.select(self.layout.buffers) for file in self.opened.values()]

    def padded(self, state: State) -> State:
        """Return a network's tensors with its head padded to `width` logits, all its other tensors yet to be read."""
        rows = padded_rows(state, self.layout.head, self.width)
        # A ChainMap that is never written to takes any mapping.
        return ChainMap(rows, cast(Any, state)) if rows else state

    def blank(self) -> nn.Module:
        """Return a network of the experts' architecture with `width` logits and random weights."""
        return build_network(self.config, self.width)

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the networks as `networks` has them, but one at a time unless they are there already."""
        if "networks" in self.__dict__:
            yield from self.networks
        else:
            for path in self.paths.values():
                yield widen_network(load_network(path), self.width)

    @cached_property
    def files(self) -> dict[str, NetworkFile]:
        """The networks by task, each with its own head; raises as `opened` and `layout` do."""
        self.layout  # noqa: B018 (checks that they belong together)
        return {task: load_network(path) for task, path in self.paths.items()}

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks with their heads padded by zeros to `width` logits."""
        return [widen_network(file, self.width) for file in self.files.values()]

    @cached_property
    def marks(self) -> dict[str, str]:
        """The fingerprints of the networks by task; see `coin.files.tensors.fingerprint`."""
        return {task: fingerprint(file.state) for task, file in self.opened.items()}

    @property
    def class_counts(self) -> dict[str, int]:
        """The class counts by task."""
        return {task: file.num_classes for task, file in self.opened.items()}

    @property
    def width(self) -> int:
        """The largest class count."""
        return max(self.class_counts.values())

    @property
    def config(self) -> NetworkConfig:
        """The architecture that all experts share."""
        return next(iter(self.opened.values())).config

    @property
    def head(self) -> str:
        """The dotted name of the head."""
        return self.layout.head

    def release(self) -> None:
        """Let go of the networks' memory; whoever needs them next has the files read again."""
        for name in ("files", "networks"):
            self.__dict__.pop(name, None)
