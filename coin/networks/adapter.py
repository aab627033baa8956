"""Adapters: what every expert keeps beside one body, so that the body answers in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from coin.core.choices import check_integer, check_number
from coin.errors import ConfigurationError
from coin.files.tensors import State, nbytes
from coin.networks.calling import clone
from coin.networks.delta import balanced, byte_row, read_factor, read_rows, round_factor
from coin.networks.heads import with_head


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


class Change(NamedTuple):
    """What one expert changes of a parameter θ: (θ + left right) ⊙ scale + shift, each part if it is there.

    θ is a matrix [O, K], a kernel that is flattened to one, or a vector. The parts are bytes, the same in memory and in
    files (`coin.networks.delta`).

    Args:
        scale: The scale ``[1, n + 8]`` in 8 bits a value, for n = O, or as many as θ has values.
        shift: The shift, likewise.
        left: leftᵀ ``[r, ⌈O/2⌉ + 4]`` in 4 bits a value.
        right: right ``[r, ⌈K/2⌉ + 4]``.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def of(
        cls,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> "Change":
        """Return a change in bytes, given float tensors: both factors, as [O, r] and [r, K], or neither."""
        change = cls(
            scale=None if scale is None else byte_row(scale),
            shift=None if shift is None else byte_row(shift),
        )
        if left is None or right is None:
            return change
        balance = balanced(left.T, right)
        return change._replace(
            left=round_factor(left.T * balance),
            right=round_factor(right / balance),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its parts that are there, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    @property
    def form(self) -> tuple[tuple[str, torch.Size], ...]:
        """Its parts and their shapes."""
        return tuple((name, tensor.shape) for name, tensor in self.tensors.items())

    def scales(self) -> Tensor:
        """Return the scale ``[n]`` in float32; 1 without one."""
        return torch.ones(()) if self.scale is None else read_rows(self.scale)[0]

    def factors(
        self, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return leftᵀ [r, O] and right [r, K], for θ [O, K]; r is 0 without a correction."""
        if self.left is None or self.right is None:
            return torch.zeros(0, rows), torch.zeros(0, columns)
        return read_factor(self.left, rows, dtype), read_factor(self.right, columns, dtype)

    def __call__(self, value: Tensor) -> Tensor:
        """Return the parameter θ as the expert has it, a new tensor."""
        if self.left is None and self.scale is None and self.shift is not None:
            return value + _along(self.shift, value)
        return self.change_(value.clone(memory_format=torch.contiguous_format))

    def change_(self, value: Tensor) -> Tensor:
        """Change a contiguous parameter θ in place, and return it."""
        if self.left is not None:
            matrix = value.flatten(1)
            rows, columns = matrix.shape
            left, right = self.factors(rows, columns, value.dtype)
            matrix.addmm_(left.T, right)
        if self.scale is not None:
            value.mul_(_along(self.scale, value))
        if self.shift is not None:
            value.add_(_along(self.shift, value))
        return value


def _along(row: Tensor, value: Tensor) -> Tensor:
    """Return the numbers in a row of bytes, in a shape that broadcasts over a parameter."""
    numbers = read_rows(row, value.dtype)
    if numbers.numel() == value.numel():
        return numbers.view_as(value)
    ones = [1] * (value.ndim - 1)
    return numbers.view(-1, *ones)


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
        return nbytes(self.tensors.values())

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
    adapters = [Adapter() for _ in range(count)]
    others = []
    for key in state:
        if not key.startswith(_ADAPTERS):
            others.append(key)
            continue
        place = key.removeprefix(_ADAPTERS)
        expert, _, tensor = place.partition(".")
        name, _, part = tensor.rpartition(".")
        changes = adapters[int(expert)].changes
        change = changes.get(name, Change())
        changes[name] = change._replace(**{part: state[key].clone()})
    return others, adapters
