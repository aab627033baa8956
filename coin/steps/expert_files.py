"""The experts of one seed or one merge, loaded lazily from their files."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coin.data import Calibration
from coin.errors import ConfigurationError
from coin.files.safetensors import StateFile
from coin.files.tensors import State, fingerprint
from coin.merging.calibrated import Calibrated
from coin.merging.experts import Experts
from coin.networks import (
    NetworkConfig,
    NetworkFile,
    Unpacked,
    build_network,
    check_layout,
    has_batchnorm,
    head_name,
    load_network,
    open_network,
    pad_head,
    padded_state,
)
from coin.statistics.files import open_statistic
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind


class ExpertFiles:
    """The experts' files and their contents, by task; `networks` keeps all of them in memory until `release`."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)

    @cached_property
    def opened(self) -> dict[str, NetworkFile]:
        """The opened files, tensors not yet read; raises CoinError if they do not belong together."""
        opened = {task: open_network(path) for task, path in self.paths.items()}
        first = next(iter(opened.values())).config.name
        for task, file in opened.items():
            if file.config.name != first:
                raise ConfigurationError(
                    f"found expert '{task}' of architecture {file.config.name}, expected {first} as of the first"
                )
        return opened

    @property
    def config(self) -> NetworkConfig:
        """The architecture that all experts share."""
        return next(iter(self.opened.values())).config

    @property
    def width(self) -> int:
        """The largest class count."""
        return max(file.num_classes for file in self.opened.values())

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of the networks; see `coin.files.tensors.fingerprint`."""
        return {task: fingerprint(file.state) for task, file in self.opened.items()}

    @cached_property
    def skeleton(self) -> nn.Module:
        """A network of the experts' architecture with `width` logits, for its names and shapes, without weights.

        Raises a StateError where the tensors of an expert do not fit it.
        """
        config, width = self.config, self.width  # from files, whose tensors must not become meta ones
        try:
            with torch.device("meta"):
                network = build_network(config, width)
        except NotImplementedError:  # RegNets look at their tensors while they are built
            network = build_network(config, width).to("meta")
        for file in self.opened.values():
            _check(file, network, width)
        return network

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks with their heads padded by zeros to `width` logits; raises as `opened` and `skeleton` do."""
        self.skeleton  # noqa: B018 (checks that they belong together)
        return list(self.each_network())

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the entries of `networks`, loaded one at a time unless they are in memory already."""
        if "networks" in self.__dict__:
            yield from self.networks
        else:
            for path in self.paths.values():
                yield pad_head(load_network(path).network, self.width)

    def release(self) -> None:
        """Free the networks' memory; the next access reads the files again."""
        self.__dict__.pop("networks", None)


def _check(file: NetworkFile, skeleton: nn.Module, width: int) -> None:
    """Check that a file has the tensors of a network; only its head may have fewer outputs."""
    own = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    for name in (f"{head_name(skeleton)}.weight", f"{head_name(skeleton)}.bias"):
        if name in own:
            own[name] = torch.Size([min(file.num_classes, width), *own[name][1:]])
    check_layout(own, file.state.shapes(), str(file.state.path))


StatisticPaths = Mapping[Statistic, Mapping[str, Path]]
"""The files of every expert's statistics, by task."""


class StoredExperts(Experts):
    """The experts of one merge, loaded lazily from their files.

    `parameters` and `buffers` read one tensor at a time and keep none, so that merging many experts takes little
    memory.

    Args:
        files: The experts.
        statistics: The files of the experts' statistics.
        calibrations: Each task's calibration samples, for methods and BatchNorm policies that run networks.
        initial: The shared initialisation's file.
        train: The trainer of methods that train (`coin.steps.distill.Training`).
    """

    def __init__(
        self,
        files: ExpertFiles,
        statistics: StatisticPaths | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        initial: Path | None = None,
        train: Any = None,
    ) -> None:
        Calibrated.__init__(self, len(files.paths), list(calibrations.values()) if calibrations else None, train)
        self.files, self._statistics = files, {}
        self.statistic_paths = dict(statistics or {})
        self.initial_path = initial

    @property
    def parameters(self) -> Sequence[State]:
        """Every expert's parameters, heads padded with zeros; read on access."""
        return [self._parts(file.state)[0] for file in self.files.opened.values()]

    @property
    def buffers(self) -> Sequence[State]:
        """Every expert's buffers, read on access."""
        return [self._parts(file.state)[1] for file in self.files.opened.values()]

    def _parts(self, state: StateFile | Unpacked) -> tuple[State, State]:
        """Return a network's parameters, tied ones once, and its buffers; only a padded head is read here."""
        skeleton = self.files.skeleton
        every = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
        parameters: State = state.select([name for name, _ in skeleton.named_parameters()])
        parameters = padded_state(parameters, *self._padding())
        return parameters, state.select([name for name in skeleton.state_dict() if name not in every])

    @cached_property
    def networks(self) -> Sequence[nn.Module]:  # type: ignore[override]
        """All experts at once."""
        return self.files.networks

    @property
    def has_batchnorm(self) -> bool:
        """Whether the networks have BatchNorm layers with running statistics."""
        return has_batchnorm(self.files.skeleton)

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, one at a time unless they are in memory already."""
        return self.files.each_network()

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, whose contents do not matter."""
        return build_network(self.files.config, self.files.width)

    def initial(self) -> tuple[State, State]:
        """Return the shared initialisation's parameters and buffers, its head padded like the experts'."""
        if self.initial_path is None:
            raise ConfigurationError("found no shared initialisation, which the method or 'keep' needs; name its file")
        file = open_network(self.initial_path)
        _check(file, self.files.skeleton, self.files.width)
        return self._parts(file.state)

    def _padding(self) -> tuple[str, int]:
        """Return the head's name and its number of outputs."""
        return head_name(self.files.skeleton), self.files.width

    def _data_of(self, name: StatisticKind, data: DataChoice) -> list[DataChoice]:
        """Return for which data (own, pooled) there are files of a statistic."""
        there = list(dict.fromkeys(which.data for which in self.statistic_paths if which.name is name))
        if not there:
            raise ConfigurationError(
                f"found no {name} of the experts, which the method needs; run coin fisher on each and name the files"
            )
        return there

    def _states(self, which: Statistic) -> Sequence[State]:
        """Open one statistic of every expert, and check that it belongs to that expert's weights."""
        paths = self.statistic_paths.get(which, {})
        if missing := [task for task in self.files.paths if task not in paths]:
            raise ConfigurationError(
                f"found no {which} of expert '{missing[0]}', which the method needs; run coin fisher on it and "
                "name the file"
            )
        fingerprints = self.files.fingerprints
        found = [open_statistic(paths[task], statistic=which.name, weights=mark) for task, mark in fingerprints.items()]
        self.seconds += sum(file.seconds for file in found)
        self.passes += sum(file.passes for file in found)
        return [file.values for file in found]
