"""N experts of one architecture, in memory or in files; heads are padded with zeros to the largest class count."""

import statistics
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from coin.core.devices import device_of
from coin.errors import ConfigurationError
from coin.files.tensors import State, check_layout, fingerprint, on_device, weighted_mean
from coin.networks.calling import clone
from coin.networks.files import NetworkFile, load_network, open_network
from coin.networks.heads import head_name, linear_head, of_one_width, pad_head, padded_state
from coin.networks.registry import build_network, empty_network
from coin.networks.weights import parameters_of, tensors_of

# The spread above which experts are far apart: 0.005 to 0.008 near ImageNet weights, 0.016 to 0.25 tuned freely.
FAR = 0.0125


@dataclass(frozen=True)
class Record:
    """An expert, or the shared initialisation, with a padded head.

    Args:
        parameters: By name, tied ones once. Those of a file are read on access.
        buffers: Likewise.
        load: Returns the network.
    """

    parameters: State
    buffers: State
    load: Callable[[], nn.Module]

    @classmethod
    def of_network(cls, network: nn.Module, like: nn.Module, source: str) -> Self:
        """Return a record of a network in memory, on the device of one that it must be like, else a StateError."""
        parameters, buffers = tensors_of(network)
        check_layout(parameters_of(like), parameters, source)
        device = device_of(like)
        return cls(on_device(parameters, device), on_device(buffers, device), lambda: network)

    @property
    def state(self) -> State:
        """Both as one state."""
        # Never written to, so that any mapping will do.
        return ChainMap(*cast(Any, (self.parameters, self.buffers)))


@dataclass(eq=False)
class ExpertSource:
    """N experts of one architecture, whose heads are padded with zeros to the largest class count.

    Args:
        records: The experts.
        initial: The shared initialisation, if there is one.
        skeleton: A network like the experts; of those in files one without values.
        padding: The head's name and its number of outputs, where heads are padded.
        unpadded: The experts in memory as they are.
        device: The device of all tensors.
    """

    records: Sequence[Record]
    initial: Record | None
    skeleton: nn.Module
    padding: tuple[str, int] | None
    unpadded: Sequence[nn.Module]
    device: torch.device

    @classmethod
    def of_networks(
        cls, networks: Sequence[nn.Module], initial: nn.Module | None = None
    ) -> "ExpertSource":
        """Return experts in memory; padded ones are copies that share all other tensors.

        Raises ConfigurationError for no experts, unlike ones or an initialisation of more classes, HeadError if heads
        cannot be padded, StateError where experts or the shared initialisation have other names or shapes.
        """
        if not networks:
            raise ConfigurationError("found no experts, expected at least one")
        for network in networks:
            if not isinstance(network, nn.Module) or hasattr(network, "_orig_mod"):
                raise ConfigurationError(
                    f"found an expert of type {type(network).__name__}, expected a torch.nn.Module; load a state dict "
                    "into one, or compile it afterwards"
                )
        _check_alike(networks)
        padded = of_one_width(networks)
        skeleton = padded[0]
        padding = None
        if any(own is not given for own, given in zip(padded, networks, strict=True)):
            width = linear_head(skeleton).out_features
            padding = (head_name(skeleton), width)
            if initial is not None:
                _check_width(linear_head(initial).out_features, width)
                initial = pad_head(initial, width)
        start = None
        if initial is not None:
            start = Record.of_network(initial, skeleton, "the shared initialisation")
        records = [
            Record.of_network(network, skeleton, f"expert {place}")
            for place, network in enumerate(padded)
        ]
        return ExpertSource(records, start, skeleton, padding, networks, device_of(networks[0]))

    def network(self, place: int) -> nn.Module:
        """Return an expert; one in a file is loaded anew."""
        return self.records[place].load()

    def each_network(self) -> Iterator[nn.Module]:
        """Yield the experts, those in files one at a time."""
        for record in self.records:
            yield record.load()

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return clone(self.skeleton)


def _check_width(found: int, width: int) -> None:
    """Raise ConfigurationError where the shared initialisation has more classes than the experts."""
    if found > width:
        raise ConfigurationError(
            f"found a shared initialisation of {found} classes for experts of up to {width}, expected no more; "
            "give one with the experts' head"
        )


def _check_alike(networks: Sequence[nn.Module]) -> None:
    """Raise ConfigurationError where modules of a name are of different classes, or parameters of different types."""
    kinds: dict[str, str] = {}
    for network in networks:
        for name, kind in _kinds(network).items():
            known = kinds.setdefault(name, kind)
            if kind != known:
                raise ConfigurationError(
                    f"found experts with '{name or 'network'}' of {known} and {kind}, "
                    "expected one class and type; convert them"
                )


def _kinds(network: nn.Module) -> dict[str, str]:
    """Return the classes of a network's modules, and its parameters' types, by name; dropout is an identity."""
    kinds = {}
    for name, module in network.named_modules():
        kind = type(module).__qualname__
        kinds[name] = "Identity" if "Drop" in kind else kind
    for name, parameter in network.named_parameters():
        kinds[name] = str(parameter.dtype)
    return kinds


class ExpertFiles(ExpertSource):
    """Experts in files: tensors are read on access, networks when they are asked for.

    Args:
        paths: The experts' files by task.
        initial: The shared initialisation's.
        device: The device of tensors and networks.

    Attributes:
        config: The architecture that all experts share.
        class_counts: Their numbers of classes; `width` is the largest.
        fingerprints: Those of the networks by task; see `coin.files.tensors.fingerprint`.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        initial: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.paths = dict(paths)
        self.initial_path = initial
        files = [open_network(path) for path in self.paths.values()]
        self.config = files[0].config
        self.class_counts = [file.num_classes for file in files]
        self.width = max(self.class_counts)
        skeleton = empty_network(self.config, self.width)
        padding = (head_name(skeleton), self.width)
        home = torch.device(device)
        records = [_record_of(file, skeleton, padding, home) for file in files]
        start = None
        if initial is not None:
            file = open_network(initial)
            _check_width(file.num_classes, self.width)
            start = _record_of(file, skeleton, padding, home)
        super().__init__(records, start, skeleton, padding, (), home)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of the networks by task."""
        # Of files opened anew: what has been read of the tensors that are kept would stay in memory.
        return {task: fingerprint(open_network(path).state) for task, path in self.paths.items()}

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return build_network(self.config, self.width).to(self.device)


def _record_of(
    file: NetworkFile, skeleton: nn.Module, padding: tuple[str, int], device: torch.device
) -> Record:
    """Return a record of a file; a StateError where it is not like the skeleton, but for the head's outputs."""
    head, width = padding
    own = skeleton.state_dict()
    expected = padded_state(own, head, file.num_classes)
    check_layout(expected, file.state, str(file.path))
    every_name = dict(skeleton.named_parameters(remove_duplicate=False))
    parameters = file.select([name for name, _ in skeleton.named_parameters()])
    buffers = file.select([name for name in own if name not in every_name])
    load = partial(_load_padded, file.path, width, device)
    padded = padded_state(parameters, head, width)
    return Record(on_device(padded, device), on_device(buffers, device), load)


def _load_padded(path: Path, width: int, device: torch.device) -> nn.Module:
    """Return the network of a file with a padded head on a device."""
    return pad_head(load_network(path).network.to(device), width)


def spread(experts: Sequence[State], row: Sequence[float], without: tuple[str, ...] = ()) -> float:
    """Return how far experts are apart: the median over their matrices of √(Σ_i β_i ‖W_i − W̄‖²) / ‖W̄‖, W̄ = Σ_i β_i W_i.

    0 for networks without a matrix. Names that begin with one of those in `without` are left out.
    """
    found = []
    for name, first in experts[0].items():
        if first.ndim < 2 or not first.is_floating_point() or name.startswith(without):
            continue
        mean = weighted_mean(experts, row, name, torch.float64).detach()
        square = 0.0
        for expert, beta in zip(experts, row, strict=True):
            off = expert[name].detach().double() - mean
            square += beta * float(off.square().sum())
        size = max(float(mean.square().sum()), torch.finfo(torch.float64).tiny)
        found.append((square / size) ** 0.5)
    return statistics.median(found) if found else 0.0
