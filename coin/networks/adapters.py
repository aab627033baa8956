"""Adapters: what every expert keeps beside one body, so that the body answers in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coin.core.batches import clone, plain
from coin.core.choices import check_integer, check_number
from coin.errors import ConfigurationError
from coin.files.tensors import State
from coin.networks.delta import Rounded, quantise
from coin.networks.heads import head_name

Change = Mapping[str, Tensor]
"""What becomes of a parameter θ, by part: (θ + ``left`` ``right``) ⊙ ``scale`` + ``shift``, each if it is there."""
BITS = 4  # of the factors of a correction, a value
_FACTORS = {"left": 1, "right": 0}  # and the dimension that is r


@dataclass(frozen=True)
class AdapterOptions:
    """What every expert keeps beside the body; raises ConfigurationError for an option out of its range.

    Args:
        rank: r of the correction of every matrix; 0 for scales and biases alone.
        memory_mib: In place of a rank, the MiB of all adapters together; the largest rank is taken that fits.
        ridge: μ, relative to the mean diagonal entry of the inputs' covariance, above 0.
    """

    rank: int | None = None
    memory_mib: float | None = None
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.memory_mib is None):
            found = f"found rank={self.rank} and memory_mib={self.memory_mib} of adapters"
            raise ConfigurationError(f"{found}, expected one of them")
        if self.rank is not None:
            check_integer("rank", self.rank, 0)
        if self.memory_mib is not None:
            check_number("memory_mib", self.memory_mib, low=0, strict=True)
        check_number("ridge", self.ridge, low=0, strict=True)

    @classmethod
    def of(cls, options: "AdapterOptions | Mapping[str, Any] | None") -> Self | None:
        """Return a section of options as an object."""
        try:
            return options if options is None or isinstance(options, cls) else cls(**cast(Any, options))
        except TypeError as error:
            raise ConfigurationError(f"found {options!r:.100} for adapters, expected {{rank: 16}} or so") from error

    @property
    def name(self) -> str:
        """Their name in results and files: ``rank4``, ``1.5mib``."""
        return f"rank{self.rank}" if self.memory_mib is None else f"{self.memory_mib:g}mib"


class Adapter(nn.Module):
    """What one expert keeps beside a body: changes of the body's parameters, as buffers.

    A map's weight [O, …] has a scale for each output, and a correction of rank r: left [O, r] and right [r, K]; its
    bias, or that of the BatchNorm behind it, a shift. Scales and shifts are in float16, the factors of corrections in 4
    bits a value (`quantise`), with a scale for each of the r, and two of the r in a byte.

    >>> layer = torch.nn.Linear(4, 3)
    >>> adapter = coin.Adapter({"weight": {"scale": torch.full((3, 1), 2.0)}})
    >>> torch.equal(adapter.applied_to(layer).weight, 2 * layer.weight), adapter.nbytes
    (True, 6)
    """

    def __init__(self, changes: Mapping[str, Mapping[str, Tensor | Rounded]] | None = None) -> None:
        super().__init__()
        for name, parts in (changes or {}).items():
            self.add(name, parts)

    def add(self, name: str, parts: Mapping[str, Tensor | Rounded]) -> None:
        """Add the change of a parameter, by its dotted name; factors may be rounded already, by r rows."""
        for part, value in parts.items():
            key = f"{name.replace('.', '/')}/{part}"
            if part in _FACTORS and isinstance(value, Tensor):
                value = quantise(value.detach().cpu().movedim(_FACTORS[part], 0).contiguous(), BITS)
            if isinstance(value, Rounded):
                codes = F.pad(value.codes, (0, 0, 0, len(value.codes) % 2))
                self.register_buffer(f"{key}_scale", value.scale)
                self.register_buffer(key, (codes[::2] << BITS) + codes[1::2])
            else:
                self.register_buffer(key, value.half())

    @property
    def changes(self) -> dict[str, dict[str, Tensor]]:
        """The changes by parameter, in float32."""
        found: dict[str, dict[str, Tensor]] = {}
        kept = dict(self.named_buffers())
        for key, tensor in kept.items():
            name, _, part = key.rpartition("/")
            if part in _FACTORS:
                scale = kept[f"{key}_scale"].cpu()
                codes = torch.stack([tensor >> BITS, tensor & 2**BITS - 1], 1).flatten(0, 1)[: len(scale)].cpu()
                tensor = Rounded(codes, scale, BITS).dense().movedim(0, _FACTORS[part]).to(tensor.device)
            if not part.endswith("_scale"):
                found.setdefault(name.replace("/", "."), {})[part] = tensor.float()
        return found

    @property
    def nbytes(self) -> int:
        """Its bytes in memory and in a file."""
        return sum(tensor.nbytes for tensor in self.buffers())

    @torch.no_grad()
    def applied_to(self, body: nn.Module, head: nn.Module | None = None) -> nn.Module:
        """Return the body as the expert's: a plain network, in eval mode, with that head's weights if one is given."""
        network = plain(clone(body)).eval()
        for name, parts in self.changes.items():
            parameter = network.get_parameter(name)
            value = parameter.float()
            if "left" in parts:
                value = value + (parts["left"] @ parts["right"]).reshape(value.shape)
            if "scale" in parts:
                value = value * parts["scale"]
            parameter.copy_(value + parts["shift"].reshape(value.shape) if "shift" in parts else value)
        if head is not None:
            own = network.get_submodule(head_name(network))
            for place, parameter in head.named_parameters():
                setattr(own, place, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
            setattr(
                own, "out_features" if isinstance(own, nn.Linear) else "out_channels", len(own.get_parameter("weight"))
            )
        return network


_ADAPTERS = "adapters."


def adapters_state(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the tensors of adapters by name, as a file beside a body has them."""
    every = enumerate(adapters)
    return {f"{_ADAPTERS}{i}.{name}": tensor for i, each in every for name, tensor in each.named_buffers()}


def split_adapters(state: State, count: int) -> tuple[list[str], list[Adapter]]:
    """Return the names of the other tensors in a state, and the adapters of so many experts."""
    adapters = [Adapter() for _ in range(count)]
    others = []
    for name in state:
        if count and name.startswith(_ADAPTERS):
            place, _, key = name.removeprefix(_ADAPTERS).partition(".")
            adapters[int(place)].register_buffer(key, state[name].clone())
        else:
            others.append(name)
    return others, adapters
