"""N experts of one architecture, in memory or in files; heads are padded with zeros to the largest class count."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from coin.errors import ConfigurationError
from coin.files.tensors import State, check_layout, fingerprint, on_device
from coin.networks.calling import Forward, called_by, clone
from coin.networks.files import NetworkFile, load_network, open_network
from coin.networks.heads import head_name, of_one_width, pad_head, padded_state
from coin.networks.registry import NetworkConfig, build_network, empty_network
from coin.networks.weights import check_plain, tensors_of

# The spread above which experts are far apart: 0.005 to 0.008 near ImageNet weights, 0.016 to 0.25 tuned freely.
FAR = 0.0125


class ExpertNetworks:
    """Experts in memory: `networks` have padded heads, in copies that share all other tensors with those `unpadded`.

    `padding` is the head's name and its number of outputs where it is padded. Raises ConfigurationError for
    fewer than two experts or unlike ones, HeadError if heads cannot be padded, StateError as `check_plain`.
    """

    def __init__(
        self, networks: Sequence[nn.Module], initial: nn.Module | None = None, forward: Forward | None = None
    ) -> None:
        if len(networks) < 2:
            raise ConfigurationError(f"found {len(networks)} experts, expected at least two; give those of two tasks")
        for network in networks:
            check_plain(network)
        if initial is not None:
            check_plain(initial)
        _check_alike(networks)
        self.device = one_device(networks)
        self.unpadded = [called_by(network, forward) for network in networks]
        self.networks = of_one_width(self.unpadded)
        self.skeleton, self.initial = self.networks[0], initial
        self.padding: tuple[str, int] | None = None
        if self.networks != self.unpadded:
            head = head_name(self.skeleton)
            self.padding = head, len(self.skeleton.get_submodule(head).get_parameter("weight"))

    def __len__(self) -> int:
        return len(self.networks)

    def each_network(self, *, padded: bool = True) -> Iterator[nn.Module]:
        """Yield the experts, their heads padded or as they are."""
        yield from self.networks if padded else self.unpadded

    @property
    def tensors(self) -> list[tuple[State, State]]:
        """Every expert's parameters and buffers."""
        return [tensors_of(network) for network in self.networks]

    def initial_tensors(self) -> tuple[State, State] | None:
        """Return the shared initialisation's parameters and buffers, none without one."""
        if self.initial is None:
            return None
        parameters, buffers = tensors_of(pad_head(self.initial, self.padding[1]) if self.padding else self.initial)
        return on_device(parameters, self.device), on_device(buffers, self.device)

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return clone(self.skeleton)


def one_device(networks: Sequence[nn.Module]) -> torch.device:
    """Return the device of networks, the CPU for none; a ConfigurationError where they are on several."""
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    found = list(dict.fromkeys(tensor.device for tensor in tensors))
    if len(found) > 1:
        told = f"found experts on {' and '.join(map(str, found))}"
        raise ConfigurationError(f"{told}, expected one device; move them with network.to('{found[0]}')")
    return found[0] if found else torch.device("cpu")


def _check_alike(networks: Sequence[nn.Module]) -> None:
    """Raise ConfigurationError where networks have modules of different classes, or parameters of different types."""
    kinds = [_kinds(network) for network in networks]
    for name, kind in kinds[0].items():
        found = sorted({each.get(name, kind) for each in kinds})
        if len(found) > 1:
            told = f"found experts with '{name or 'network'}' of {' and '.join(found)}"
            raise ConfigurationError(f"{told}, expected one class and type; convert them")


def _kinds(network: nn.Module) -> dict[str, str]:
    """Return by name the classes of a network's modules, what drops out as an identity, and its parameters' types."""
    classes = {name: type(module).__qualname__ for name, module in network.named_modules()}
    kinds = {name: "Identity" if "Drop" in kind else kind for name, kind in classes.items()}
    return kinds | {name: str(parameter.dtype) for name, parameter in network.named_parameters()}


class ExpertFiles:
    """Experts in files, by task, read on demand, one tensor at a time; `networks` keeps all of them in memory.

    Networks and tensors are on `device`, to which a tensor goes when it is first read.
    """

    def __init__(
        self, paths: Mapping[str, Path], initial: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.paths, self.initial = dict(paths), initial
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def opened(self) -> dict[str, NetworkFile]:
        """The opened files, tensors not yet read."""
        return {task: open_network(path) for task, path in self.paths.items()}

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
        """A network of the experts' architecture and `width`, without weights; a StateError where one does not fit."""
        network = empty_network(self.config, self.width)
        for file in self.opened.values():
            _check(file, network, self.width)
        return network

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks with their heads padded by zeros to `width` logits; raises as `opened` and `skeleton` do."""
        self.skeleton  # noqa: B018 (checks that they belong together)
        return list(self.each_network())

    def each_network(self, *, padded: bool = True) -> Iterator[nn.Module]:
        """Yield the experts, their heads padded or as they are; loaded one at a time unless `networks` are there."""
        if padded and "networks" in self.__dict__:
            yield from self.networks
        else:
            for path in self.paths.values():
                network = load_network(path).network.to(self.device)
                yield pad_head(network, self.width) if padded else network

    @property
    def padding(self) -> tuple[str, int]:
        """The head's name and its number of outputs."""
        return head_name(self.skeleton), self.width

    @cached_property
    def tensors(self) -> list[tuple[State, State]]:
        """Every expert's parameters and buffers, read on access."""
        return [self._parts(file) for file in self.opened.values()]

    def _parts(self, file: NetworkFile) -> tuple[State, State]:
        """Return a network's parameters, tied ones once, and its buffers; only a padded head is read here."""
        skeleton = self.skeleton
        every = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
        parameters = file.select([name for name, _ in skeleton.named_parameters()])
        buffers = file.select([name for name in skeleton.state_dict() if name not in every])
        padded = padded_state(parameters, *self.padding)
        return on_device(padded, self.device), on_device(buffers, self.device)

    @cached_property
    def _initial_tensors(self) -> tuple[State, State] | None:
        if self.initial is None:
            return None
        file = open_network(self.initial)
        _check(file, self.skeleton, self.width)
        return self._parts(file)

    def initial_tensors(self) -> tuple[State, State] | None:
        """Return the shared initialisation's parameters and buffers, none without one."""
        return self._initial_tensors

    def empty_model(self) -> nn.Module:
        """Return a new network of the experts' architecture, with arbitrary weights."""
        return build_network(self.config, self.width).to(self.device)


def _check(file: NetworkFile, skeleton: nn.Module, width: int) -> None:
    """Check that a file has the tensors of a network; only its head may have fewer outputs."""
    own = skeleton.state_dict()
    for name in own.keys() & {f"{head_name(skeleton)}.weight", f"{head_name(skeleton)}.bias"}:
        own[name] = own[name][: min(file.num_classes, width)]
    check_layout(own, file.state, str(file.path))


def spread(experts: Sequence[State], row: Sequence[float], without: tuple[str, ...] = ()) -> float:
    """Return how far experts are apart: the median over their matrices of √(Σ_i β_i ‖W_i − W̄‖²) / ‖W̄‖, W̄ = Σ_i β_i W_i.

    0 for networks without a matrix. Names that begin with one of those in `without` are left out.
    """
    found = []
    for name, first in experts[0].items():
        if first.ndim < 2 or not first.is_floating_point() or name.startswith(without):
            continue
        every = [expert[name].detach().double() for expert in experts]  # which may be read from files
        mean = sum((beta * each for beta, each in zip(row, every, strict=True)), torch.zeros_like(every[0]))
        squares = sum(beta * float((each - mean).square().sum()) for beta, each in zip(row, every, strict=True))
        size = max(float(mean.square().sum()), torch.finfo(torch.float64).tiny)
        found.append((squares / size) ** 0.5)
    return statistics.median(found) if found else 0.0
