"""N experts of one architecture, in memory or in files; heads are padded with zeros to the largest class count."""

import statistics
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from coin.core.devices import device_of
from coin.errors import ConfigurationError
from coin.files.tensors import State, check_layout, fingerprint, on_device
from coin.networks.calling import clone
from coin.networks.files import NetworkFile, load_network, open_network
from coin.networks.heads import head_name, of_one_width, pad_head, padded_state, with_rows
from coin.networks.registry import NetworkConfig, build_network, empty_network
from coin.networks.weights import parameters_of, tensors_of

# The spread above which experts are far apart: 0.005 to 0.008 near ImageNet weights, 0.016 to 0.25 tuned freely.
FAR = 0.0125


class ExpertNetworks:
    """Experts in memory.

    Raises ConfigurationError for no experts, HeadError if heads cannot be padded, StateError where
    experts or the shared initialisation have parameters of other names or shapes.

    Attributes:
        count: N.
        unpadded: The experts as they are.
        networks: The experts with padded heads, in copies that share all other tensors.
        padding: The head's name and its number of outputs, where heads are padded.
        device: The device of all tensors.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        initial: nn.Module | None = None,
    ) -> None:
        if not networks:
            raise ConfigurationError("found no experts, expected at least one")
        for network in networks:
            if not isinstance(network, nn.Module) or hasattr(network, "_orig_mod"):
                raise ConfigurationError(
                    f"found an expert of type {type(network).__name__}, expected a torch.nn.Module; load a state dict "
                    "into one, or compile it afterwards"
                )
        self.count = len(networks)
        self.device = device_of(networks[0])
        self.unpadded = list(networks)
        self.networks = of_one_width(self.unpadded)
        self.skeleton = self.networks[0]
        self.initial = initial
        self.padding: tuple[str, int] | None = None
        if self.networks != self.unpadded:
            head = head_name(self.skeleton)
            outputs = len(self.skeleton.get_submodule(head).get_parameter("weight"))
            self.padding = (head, outputs)
        for index, (parameters, _) in enumerate(self.tensors):
            self._check_layout(parameters, f"expert {index}")

    def _check_layout(self, parameters: State, source: str) -> None:
        check_layout(parameters_of(self.skeleton), parameters, source)

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, their heads padded."""
        yield from self.networks

    @cached_property
    def tensors(self) -> list[tuple[State, State]]:
        """Every expert's parameters and buffers."""
        return [tensors_of(network) for network in self.networks]

    @cached_property
    def initial_tensors(self) -> tuple[State, State] | None:
        """The shared initialisation's parameters and buffers, none without one."""
        if self.initial is None:
            return None
        network = self.initial
        if self.padding is not None:
            _, outputs = self.padding
            network = pad_head(network, outputs)
        parameters, buffers = tensors_of(network)
        self._check_layout(parameters, "the shared initialisation")
        return on_device(parameters, self.device), on_device(buffers, self.device)

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return clone(self.skeleton)


def whole_state(tensors: tuple[State, State]) -> State:
    """Return a network's parameters and buffers as one state, still read on access."""
    return ChainMap(*cast(Any, tensors))  # never written to, so that any mapping will do


class ExpertFiles:
    """Experts in files, by task, read on demand, one tensor at a time; `networks` keeps all of them in memory.

    Networks and tensors are on `device`, to which a tensor goes when it is first read.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        initial: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.paths = dict(paths)
        self.count = len(paths)
        self.initial = initial
        self.device = torch.device(device)

    @cached_property
    def opened(self) -> dict[str, NetworkFile]:
        """The opened files, tensors not yet read."""
        return {task: open_network(path) for task, path in self.paths.items()}

    @property
    def config(self) -> NetworkConfig:
        """The architecture that all experts share."""
        first, *_ = self.opened.values()
        return first.config

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
        """A network of the experts' architecture and `width`, without weights; a StateError where one does not fit."""
        network = empty_network(self.config, self.width)
        for file in self.opened.values():
            _check(file, network)
        return network

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks of `each_network`."""
        return list(self.each_network())

    def each_network(self) -> Iterator[nn.Module]:
        """Load the experts one at a time, their heads padded by zeros to `width` logits."""
        for path in self.paths.values():
            network = load_network(path).network
            yield pad_head(network.to(self.device), self.width)

    @property
    def padding(self) -> tuple[str, int]:
        """The head's name and its number of outputs."""
        return head_name(self.skeleton), self.width

    @cached_property
    def tensors(self) -> list[tuple[State, State]]:
        """Every expert's parameters and buffers, read on access."""
        return [self._tensors_of(file) for file in self.opened.values()]

    @cached_property
    def initial_tensors(self) -> tuple[State, State] | None:
        """The shared initialisation's parameters and buffers, none without one."""
        if self.initial is None:
            return None
        file = open_network(self.initial)
        _check(file, self.skeleton)
        return self._tensors_of(file)

    def _tensors_of(self, file: NetworkFile) -> tuple[State, State]:
        """Return a network's parameters, tied ones once, and its buffers; only a padded head is read here."""
        skeleton = self.skeleton
        parameter_names = [name for name, _ in skeleton.named_parameters()]
        tied = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
        buffer_names = [name for name in skeleton.state_dict() if name not in tied]
        parameters = padded_state(file.select(parameter_names), *self.padding)
        buffers = file.select(buffer_names)
        return on_device(parameters, self.device), on_device(buffers, self.device)

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return build_network(self.config, self.width).to(self.device)


def _check(file: NetworkFile, skeleton: nn.Module) -> None:
    """Check that a file has the tensors of a network; only its head may have fewer outputs."""
    own = skeleton.state_dict()
    head = head_name(skeleton)
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in own:
            own[name] = with_rows(own[name], file.num_classes)
    check_layout(own, file.state, str(file.path))


def spread(experts: Sequence[State], row: Sequence[float], without: tuple[str, ...] = ()) -> float:
    """Return how far experts are apart: the median over their matrices of √(Σ_i β_i ‖W_i − W̄‖²) / ‖W̄‖, W̄ = Σ_i β_i W_i.

    0 for networks without a matrix. Names that begin with one of those in `without` are left out.
    """
    found = []
    for name, first in experts[0].items():
        if first.ndim < 2 or not first.is_floating_point() or name.startswith(without):
            continue
        # Which may be read from files.
        matrices = [expert[name].detach().double() for expert in experts]
        mean = torch.zeros_like(matrices[0])
        for beta, matrix in zip(row, matrices, strict=True):
            mean = mean + beta * matrix
        square = 0.0
        for beta, matrix in zip(row, matrices, strict=True):
            square += beta * float((matrix - mean).square().sum())
        size = max(float(mean.square().sum()), torch.finfo(torch.float64).tiny)
        found.append((square / size) ** 0.5)
    return statistics.median(found) if found else 0.0
