"""Adapters: what every expert keeps beside one body, so that the body answers in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from coin.core.choices import check_integer, check_number
from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.networks.calling import clone
from coin.networks.heads import with_head
from coin.networks.kept import Change


@dataclass(frozen=True)
class AdapterOptions:
    """What every expert keeps beside the body; raises ConfigurationError for an option out of its range.

    Args:
        rank: r of the correction of every matrix; 0 for scales and biases alone.
        ridge: μ, relative to the mean diagonal entry of the inputs' covariance, above 0.
        scales: Whether there are scales and biases beside the corrections. Without them adapters are plain LoRA: only
            ungrouped maps have them.
    """

    rank: int
    ridge: float = 0.1
    scales: bool = True

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 0 if self.scales else 1)
        check_number("ridge", self.ridge, low=0, strict=True)

    @classmethod
    def of(cls, options: "AdapterOptions | Mapping[str, Any] | None") -> Self | None:
        """Return a section of options as an object."""
        if options is None or isinstance(options, cls):
            return options
        try:
            return cls(**cast(Any, options))
        except TypeError as error:
            raise ConfigurationError(
                f"found {options!r:.100} for adapters, expected {{rank: 16}} or so"
            ) from error

    @property
    def name(self) -> str:
        """Their name in results and files: ``rank4``; without scales ``lora4``."""
        return f"rank{self.rank}" if self.scales else f"lora{self.rank}"


class Adapter:
    """What one expert keeps beside a body: changes of the body's parameters, by their dotted names.

    A map's weight [O, …] has a scale for each output, and a correction of rank r; its bias, or that of the BatchNorm
    behind it, a shift.

    Args:
        changes: For each parameter its `Change`, or that one's parts as float tensors.

    >>> layer = torch.nn.Linear(4, 3)
    >>> adapter = coin.Adapter({"weight": {"scale": torch.full((3, 1), 2.0)}})
    >>> torch.equal(adapter.applied_to(layer).weight, 2 * layer.weight), adapter.nbytes
    (True, 11)
    """

    def __init__(self, changes: Mapping[str, Change | Mapping[str, Tensor]] | None = None) -> None:
        self.changes: dict[str, Change] = {}
        for name, change in (changes or {}).items():
            self.changes[name] = change if isinstance(change, Change) else Change.of(**change)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors as they are stored, by the parameter's name and the part's."""
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in change.tensors.items()}
        return tensors

    @property
    def nbytes(self) -> int:
        """Its bytes in memory and in a file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @torch.no_grad()
    def applied_to(self, body: nn.Module, head: nn.Module | None = None) -> nn.Module:
        """Return the body as the expert's: a plain network, in eval mode, with that head's weights if one is given."""
        network = clone(body).eval()
        for name, change in self.changes.items():
            parameter = network.get_parameter(name)
            parameter.copy_(change(parameter))
        return network if head is None else with_head(network, head)


_ADAPTERS = ".adapters."  # before an expert's index and the tensor's name, in files; no module's name is empty


def adapters_state(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the tensors of adapters by name, as a file beside a body has them."""
    state: dict[str, Tensor] = {}
    for expert, adapter in enumerate(adapters):
        state |= {f"{_ADAPTERS}{expert}.{name}": tensor for name, tensor in adapter.tensors.items()}
    return state


def split_adapters(state: State, count: int) -> tuple[list[str], list[Adapter]]:
    """Return the names of the other tensors in a state, and the adapters of so many experts."""
    # By expert, parameter and part.
    parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(count)]
    others = []
    for key in state:
        if count == 0 or not key.startswith(_ADAPTERS):
            others.append(key)
            continue
        expert, place = key.removeprefix(_ADAPTERS).split(".", maxsplit=1)
        name, _, part = place.rpartition(".")
        parts[int(expert)].setdefault(name, {})[part] = state[key].clone()
    adapters = []
    for own in parts:
        changes = {name: Change(**each) for name, each in own.items()}
        adapters.append(Adapter(changes))
    return others, adapters
