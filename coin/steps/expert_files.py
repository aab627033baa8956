"""The experts of one seed, or of one merge: files that are hashed once, and read as far as they are needed."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from coin.data import Calibration
from coin.errors import ConfigurationError
from coin.files.atomic import sha256_of
from coin.files.tensors import State, fingerprint
from coin.merging.experts import Experts, padded_statistic
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
    widened,
)
from coin.statistics import FisherKind
from coin.statistics.files import StatisticFile, open_statistic
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


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
                yield widened(load_network(path).network, self.width)

    @cached_property
    def files(self) -> dict[str, NetworkFile]:
        """The networks by task, each with its own head; raises as `opened` and `layout` do."""
        self.layout  # noqa: B018 (checks that they belong together)
        return {task: load_network(path) for task, path in self.paths.items()}

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks with their heads padded by zeros to `width` logits."""
        return [widened(file.network, self.width) for file in self.files.values()]

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


StatisticPaths = Mapping[Statistic, Mapping[str, Path]]
"""The files of every expert's statistics, by task."""


class StoredExperts(Experts):
    """The experts of one merge in files, read as far as they are needed.

    Args:
        files: The experts.
        statistics: The files of their statistics.
        calibrations: Each task's calibration samples; for methods and policies that run networks.
        initial: The shared initialisation's file.
        train: What methods that are trained are trained by (`coin.modules.training.Training`).
    """

    def __init__(
        self,
        files: ExpertFiles,
        statistics: StatisticPaths | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        initial: Path | None = None,
        train: Any = None,
    ) -> None:
        self.passes = self.seconds = 0.0
        self.train = train
        self.files = files
        self._paths = dict(statistics or {})
        self._calibration = None if not calibrations else list(calibrations.values())
        self._initial_path = initial
        self._computed, self._outputs = {}, {}

    @property
    def count(self) -> int:
        """N."""
        return len(self.files.paths)

    @property
    def parameters(self) -> Sequence[State]:
        """Every expert's parameters, its head padded with zeros; read when they are asked for."""
        return self.files.parameters

    @property
    def buffers(self) -> Sequence[State]:
        """Every expert's buffers, read when they are asked for."""
        return self.files.buffers

    @cached_property
    def networks(self) -> Sequence[nn.Module]:  # type: ignore[override]
        """All experts at once."""
        return self.files.networks

    @property
    def has_batchnorm(self) -> bool:
        """Whether the networks have BatchNorm layers with running statistics."""
        return self.files.layout.batchnorm

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, one at a time unless they are in memory already."""
        return self.files.each_network()

    def blank(self) -> nn.Module:
        """Return a new network of the experts' architecture, whose contents do not matter."""
        return self.files.blank()

    def initial(self) -> tuple[State, State]:
        """Return the shared initialisation's parameters and buffers, its head padded like the experts'.

        Raises:
            ConfigurationError: There is none.
            FileError: The file is missing or damaged.
            StateError: It is of another architecture, or not finite.
        """
        if self._initial_path is None:
            raise ConfigurationError("found no shared initialisation, which the method or 'keep' needs; name its file")
        file, layout = open_network(self._initial_path).state, self.files.layout
        shapes = {name: each.shape for name, each in self.files.padded(file).items()}
        check_layout(layout.shapes, shapes, str(self._initial_path))
        return self.files.padded(file.select(layout.parameters)), file.select(layout.buffers)

    def available(self, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
        """Return on which data a statistic can be had, of what a method's option allows."""
        there = list(dict.fromkeys(which.data for which in self._paths if which.name is name))
        allowed = [each for each in there if data in (DataChoice.auto, each)]
        if not there:
            raise ConfigurationError(
                f"found no {name} of the experts, which the method needs; run coin fisher on each and name the files"
            )
        if not allowed:
            raise ConfigurationError(
                f"found {name} files of {', '.join(there)} data, the method is to take {data}; name such files, or "
                f"set {name}_data"
            )
        return allowed

    def statistic(self, which: Statistic) -> Sequence[State]:
        """Open one statistic of every expert, after checking that it is of that expert's weights.

        Raises:
            ConfigurationError: There is none for some expert.
            FileError: A file is damaged or of other weights.
        """
        if which not in self._computed:
            paths = self._paths.get(which, {})
            if missing := [task for task in self.files.paths if task not in paths]:
                raise ConfigurationError(
                    f"found no {which} of expert '{missing[0]}', which the method needs; run coin fisher on it and "
                    "name the file"
                )
            marks = self.files.marks
            found = [open_statistic(paths[task], statistic=which.name, weights=mark) for task, mark in marks.items()]
            self.seconds += sum(file.seconds for file in found)
            self.passes += sum(file.passes for file in found)
            head, width = self.files.head, self.files.width
            self._computed[which] = [padded_statistic(file.values, head, width, _kind_of(file)) for file in found]
        return self._computed[which]


def _kind_of(file: StatisticFile) -> FisherKind | None:
    return FisherKind(file.provenance["kind"]) if file.provenance["statistic"] == StatisticKind.fisher else None
